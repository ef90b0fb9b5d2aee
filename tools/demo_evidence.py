#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Show that the demo model's routing is worth looking at, and write its model card.

Records held-out code and word problems on vLLM, on the trained model and on the same model before
its training, and prints: what a token's class tells of its expert, which experts have specialised
in what, and whether two workloads route differently while two halves of one do not.

    .venv/bin/python tools/demo_evidence.py
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from expert_profiler.errors import UserError, run
from expert_profiler.metrics import resampling, token_types
from expert_profiler.patch import patch_state
from expert_profiler.resources import DEMO_MODEL
from tools import train_demo_moe
from tools.demo import card, specialists, tokens
from tools.demo.corpus import Corpus, corpus
from tools.demo.recording import Recording, record

HALF = 12  # requests of half a workload: what is compared has equal sizes
PROMPT_CHARACTERS = 900  # of a piece of code, at most
MAX_TOKENS = 64
SPECIALISTS = 10
EVIDENCE = "evidence.json"
SIGNIFICANT = 0.01


def workloads(text: Corpus) -> dict[str, list[str]]:
    """Prompts nobody trained on: pieces of held-out programs, and questions of word problems.

    Each workload in two halves, that is every other prompt of it.
    """
    code = [piece for file in text.held_out["library"] if (piece := piece_of(file))]
    questions = [problem.partition("\n\n")[0] for problem in text.held_out["problems"]]
    return {
        f"{name}-{half}": prompts[start : 2 * HALF : 2]
        for name, prompts in (("code", code), ("problems", questions))
        for start, half in enumerate("ab")
    }


def piece_of(file: str) -> str | None:
    """Whole lines from the second definition on; None where there is none (prose, tables)."""
    starts = [match.start() for match in re.finditer(r"^(?:class|def|    def) ", file, re.M)]
    if len(starts) < 2:
        return None
    return file[starts[1] : starts[1] + PROMPT_CHARACTERS].rpartition("\n")[0] + "\n"


def class_of_tokens(recording: Recording, tokenizer: Any) -> tuple[Any, Any]:
    """Texts and class labels of all tokens."""
    texts = [tokenizer.decode([int(token)]) for token in recording.tokens]
    first = np.diff(recording.request, prepend=-1) != 0
    return np.array(texts, dtype=object), specialists.labels(texts, first)


def information(recording: Recording, label: Any, experts: int) -> list[dict[str, Any]]:
    """By layer: mutual information of token class and expert over the prompts' tokens."""
    prompts = recording.prefill
    found = []
    for layer, ids in enumerate(recording.topk_ids[prompts].swapaxes(0, 1)):
        request, classes = recording.request[prompts], len(specialists.CLASSES)
        test = token_types.permutation_test(label[prompts], ids, classes, experts, request=request)
        found.append({"layer": layer, **asdict(test)})
    return found


def divergence(a: Any, b: Any, paired: bool = False) -> tuple[dict[str, Any], list[float]]:
    """As ``expert-profiler compare`` has it: the mean over layers with its test, and each layer.

    a, b: [requests, layers, experts] counts. paired: each draw swaps them in some requests.
    """
    test = resampling.divergence_test(a, b, paired=paired)
    names = {"bits": "mean_observed", "by_chance": "mean_null", "p_value": "mean_p_value"}
    return {key: getattr(test, name) for key, name in names.items()}, test.observed.tolist()


def differences(counts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Divergence of two workloads and of the halves of one, from the counts of each workload."""
    pairs = {
        "code against problems": ("code-a", "problems-a"),
        "the halves of code": ("code-a", "code-b"),
        "the halves of problems": ("problems-a", "problems-b"),
    }
    found = []
    for name, pair in pairs.items():
        a, b = (counts[workload] for workload in pair)
        mean, layers = divergence(a, b)
        found.append({"name": name, "requests": [len(a), len(b)], **mean, "layers": layers})
    return found


def evidence(model: Path, facts: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Record and judge.

    Args:
        model: the trained checkpoint.
        facts: of its training.
        folder: takes the logs and the untrained model.
    """
    settings = train_demo_moe.Settings(**facts["settings"])
    tokenizer = tokens.load(model)
    text = corpus()
    untrained = folder / "untrained"
    untrained.mkdir(parents=True)
    train_demo_moe.write_model(train_demo_moe.new_model(settings), tokenizer, untrained)

    prompts = workloads(text)
    recordings, classes = {}, {}
    for name, path in (("trained", model), ("untrained", untrained)):
        print(f"recording {name} …", file=sys.stderr)
        recordings[name] = record(path, prompts, folder / f"routes-{name}", MAX_TOKENS)
        classes[name] = class_of_tokens(recordings[name], tokenizer)
    trained, experts, (texts, label) = recordings["trained"], settings.experts, classes["trained"]
    ends = np.cumsum([0, *map(len, prompts.values())])
    of = {name: slice(*ends[i : i + 2]) for i, name in enumerate(prompts)}
    counts, lengths = trained.counts(experts), np.bincount(trained.request)
    prefill, decode = (
        trained.counts(experts, trained.prefill == phase)[of["problems-a"]]
        for phase in (True, False)
    )
    chosen = specialists.most_specialised(trained.topk_ids, label, texts, experts, SPECIALISTS)
    return {
        "text": text.sha256,
        "same_text_as_in_training": text.sha256 == facts["text"]["sha256"],
        "requests": {name: len(found) for name, found in prompts.items()},
        "tokens": {name: int(lengths[part].sum()) for name, part in of.items()},
        "most_bits": math.log2(experts),
        "information": {
            name: information(each, classes[name][1], experts) for name, each in recordings.items()
        },
        "specialists": [asdict(found) for found in chosen],
        "differences": differences({name: counts[part] for name, part in of.items()}),
        "phases": divergence(prefill, decode, paired=True)[0],
        "samples": {
            name: {"prompt": prompts[name][1], "text": trained.texts[of[name]][1]}
            for name in ("code-a", "problems-a")
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", nargs="?", type=Path, default=DEMO_MODEL, metavar="MODEL_DIR",
        help="a checkpoint of tools/train_demo_moe.py [demo_model]")  # fmt: skip
    add("--keep", type=Path, metavar="DIR", help="leave the recordings there")
    add("--write-card", action="store_true",
        help=f"write {EVIDENCE}, README.md and the loss curve into MODEL_DIR")  # fmt: skip
    args = parser.parse_args(argv)
    if not (args.model / train_demo_moe.FACTS).is_file():
        raise UserError(
            f"{args.model} has no {train_demo_moe.FACTS}, so it is no model of this script's; "
            f"run: python tools/train_demo_moe.py {args.model}"
        )
    facts = json.loads((args.model / train_demo_moe.FACTS).read_text(encoding="utf-8"))
    report = patch_state.inspect()
    if not report.ok:
        raise UserError(report.message)
    if args.keep is not None and args.keep.exists():
        raise UserError(f"{args.keep} exists; name another folder with --keep")

    scratch = Path(tempfile.mkdtemp(prefix="demo-evidence-"))
    try:
        found = evidence(args.model, facts, args.keep or scratch)
    finally:
        shutil.rmtree(scratch)
    if not found["same_text_as_in_training"]:
        print(
            "note: this Python's library is not the one of the training, so some of the text that "
            "is held out here may have been trained on\n"
        )
    print("\n\n".join(card.tables(facts, found).values()))
    if args.write_card:
        train_demo_moe.write_json(args.model / EVIDENCE, found)
        card.draw_curve(args.model / card.CURVE, facts)
        (args.model / "README.md").write_text(card.text(facts, found), encoding="utf-8")
        print(f"wrote {args.model / 'README.md'}")
    held, *halves = (row["p_value"] for row in found["differences"])
    shown = held < SIGNIFICANT and min(halves) > SIGNIFICANT
    shown &= all(row["p_value"] < SIGNIFICANT for row in found["information"]["trained"])
    print("next: ./test.sh run --model demo" if shown else "NOT SHOWN: see the p-values above")
    return 0 if shown else 1


if __name__ == "__main__":
    sys.exit(run(main))
