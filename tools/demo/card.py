"""The demo model's card: figures as tables, the loss curve as a picture."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.demo.specialists import CLASSES

CURVE = "loss_curve.png"
BASELINES = ("model", "trigram", "unigram")
KINDS = {"library": "Python's standard library", "problems": "generated word problems"}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that reads well as plain text too."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )


def held_out_table(facts: Mapping[str, Any]) -> str:
    head = ["held-out text", "tokens", *(f"{name}, bits a token (a byte)" for name in BASELINES)]
    rows = [
        [
            KINDS[kind],
            f"{found['tokens']:,}",
            *(
                f"{found[name]['bits_per_token']:.2f} ({found[name]['bits_per_byte']:.2f})"
                for name in BASELINES
            ),
        ]
        for kind, found in facts["held_out"].items()
    ]
    return table(head, rows)


def information_table(evidence: Mapping[str, Any]) -> str:
    head = ["layer", "trained, bits", "before training", "by chance", "p"]
    untrained = evidence["information"]["untrained"]
    rows = [
        [
            str(row["layer"]),
            f"{row['observed']:.3f}",
            f"{before['observed']:.3f}",
            f"{row['null_mean']:.3f}",
            f"{row['p_value']:.3f}",
        ]
        for row, before in zip(evidence["information"]["trained"], untrained, strict=True)
    ]
    return table(head, rows)


def specialists_table(evidence: Mapping[str, Any]) -> str:
    head = ["layer", "expert", "takes", "of its choices", "of all", "its load", "top tokens"]
    rows = [
        [
            str(found["layer"]),
            str(found["expert"]),
            found["class_name"],
            f"{found['share']:.0%}",
            f"{found['expected']:.0%}",
            f"{found['load']:.1%}",
            " ".join(shown(text) for text, _ in found["top"][:6]),
        ]
        for found in evidence["specialists"]
    ]
    return table(head, rows)


def shown(text: str) -> str:
    """A token as code; what is not to be seen is spelled out, and pipes would end the cell."""
    if text and not text.strip(" "):
        return f"`{len(text)} spaces`" if len(text) > 1 else "`space`"
    plain = text.replace("\n", "\\n").replace("|", "\u2758").replace("`", "'")
    return f"`{plain}`"


def differences_table(evidence: Mapping[str, Any]) -> str:
    head = ["compared", "requests", "divergence, bits", "by chance", "p"]
    rows = [
        [
            row["name"],
            " + ".join(map(str, row["requests"])),
            f"{row['bits']:.4f}",
            f"{row['by_chance']:.4f}",
            f"{row['p_value']:.4f}",
        ]
        for row in evidence["differences"]
    ]
    found = evidence["phases"]
    rows.append(
        [
            "prefill against decode of problems",
            f"{evidence['requests']['problems-a']}",
            f"{found['bits']:.4f}",
            f"{found['by_chance']:.4f}",
            f"{found['p_value']:.4f}",
        ]
    )
    return table(head, rows)


def figures(facts: Mapping[str, Any], evidence: Mapping[str, Any]) -> str:
    """All tables, as the evidence command prints them."""
    other = "" if evidence["same_text_as_in_training"] else (
        "note: this Python's library is not the one of the training, so some of the text that is "
        "held out here may have been trained on\n\n"
    )  # fmt: skip
    return other + "\n\n".join(
        [
            held_out_table(facts),
            information_table(evidence),
            specialists_table(evidence),
            differences_table(evidence),
        ]
    )


def write(folder: Path, facts: Mapping[str, Any], evidence: Mapping[str, Any]) -> None:
    """README.md and the loss curve into a checkpoint's folder."""
    draw_curve(folder / CURVE, facts)
    (folder / "README.md").write_text(text(facts, evidence), encoding="utf-8")


def end_of(prompt: str, characters: int = 300) -> str:
    """The prompt's last lines, as many as fit, and always the last one."""
    kept = prompt[-characters:]
    return kept if kept == prompt else "\u2026\n" + (kept.partition("\n")[2] or kept)


def flow(*paragraphs: str) -> str:
    """Paragraphs and list items, each wrapped at 100 characters."""
    wrapped = [
        textwrap.fill(
            " ".join(paragraph.split()),
            100,
            subsequent_indent="  " if paragraph.startswith("- ") else "",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for paragraph in paragraphs
    ]
    between = ["\n" if p.startswith("- ") else "\n\n" for p in paragraphs[1:]] + [""]
    return "".join(part + gap for part, gap in zip(wrapped, between, strict=True))


def text(facts: Mapping[str, Any], evidence: Mapping[str, Any]) -> str:
    """README.md."""
    parts = [
        "# Demo model: a small Mixture-of-Experts language model",
        *how_it_was_made(facts),
        *what_to_see(evidence),
        "## What it writes",
        "The text after \u25b6 is the model's, greedy:",
        *(
            f"```\n{end_of(sample['prompt'])}\u25b6{sample['text']}\n```"
            for sample in evidence["samples"].values()
        ),
        "## Limits",
        flow(
            "- Trained on sequences of up to 512 tokens; longer ones work, less well.",
            "- Answers to word problems have the right form and mostly wrong numbers.",
            "- Its experts specialise in what a small model can know: kinds of tokens and single "
            "words, not topics.",
            "- It knows Python and simple English word problems, nothing else.",
        ),
        "## Licence",
        flow(
            "The weights and the tokenizer are part of this repository and come under its licence, "
            "Apache-2.0. They were trained on CPython's standard library, which is under the PSF "
            "License Version 2 (some files carry notices of their own), and on text written for "
            "this project. Of the library's text this folder holds no more than the sample above "
            "quotes."
        ),
    ]
    return "\n\n".join(parts) + "\n"


def how_it_was_made(facts: Mapping[str, Any]) -> list[str]:
    """What it is, its text, its training and what came of it."""
    s, source = facts["settings"], facts["text"]
    size = {kind: count / 1e6 for kind, count in source["training_bytes"].items()}
    threads = f"{facts['threads']} thread{'s' if facts['threads'] > 1 else ''}"
    return [
        flow(
            "`./test.sh` runs on it where there is no GPU: a model whose experts have specialised, "
            "small enough to be part of the repository, so that the first run shows what routing "
            "looks like. It is good for nothing else: it continues programs and word problems in "
            "the right style, and its answers are guesses.",
            f"Qwen2-MoE: {s['layers']} layers, {s['experts']} experts, top-{s['top_k']}, a shared "
            f"expert, hidden size {s['hidden']}, {facts['parameters']:,} parameters in bfloat16, "
            f"and a byte-level BPE tokenizer of {s['vocabulary']:,} tokens. vLLM 0.15.1 and "
            "transformers load it unchanged.",
        ),
        "## Training",
        flow(
            f"- Text: the standard library of Python {source['python']} without tests and tables "
            f"({source['training']['library']} files and help topics, {size['library']:.1f} MB) "
            f"and {source['training']['problems']:,} word problems from the templates in "
            f"`tools/demo/problems.py` ({size['problems']:.1f} MB): "
            f"{facts['training_tokens']:,} tokens. Every 16th document of the library is held "
            f"out. sha256 of the text: `{source['sha256']}`.",
            f"- {s['steps']:,} steps of {s['blocks'] * 512:,} tokens, {facts['tokens_seen']:,} in "
            f"all; AdamW; learning rate {s['learning_rate']:g}, falling as half a cosine over "
            f"{s['horizon']:,} steps and linearly to 0 in the last {s['cooldown']}; seed "
            f"{s['seed']}; the "
            f"architecture's load-balancing loss with coefficient {s['balance']:g}; sequences of "
            f"256 tokens, after {s['halves']:.0%} of the steps of 512.",
            f"- {facts['seconds'] / 60:.0f} minutes on {threads} of a machine with two CPU cores "
            f"that did much other work; torch {facts['torch']}. A step took 0.5 s on one thread "
            "and 0.3 s on two while the machine was quiet, which would make 15 and 9 minutes.",
        ),
        flow(
            f"Train it again: `python tools/train_demo_moe.py OUT_DIR --steps {s['steps']} "
            f"--threads {facts['threads']}`. Another Python has another library, and another "
            "processor or number of threads rounds otherwise: then the model is a similar one."
        ),
        f"![loss curve]({CURVE})",
        flow(
            f"The curve is of the first {40 * 512:,} held-out tokens, which are easier than the "
            f"rest for all: {facts['rows'][-1][2] / math.log(2):.2f} bits a token for the model "
            f"there, {facts['curve_baselines']['trigram']:.2f} for the 3-gram model. All of the "
            "held-out text:"
        ),
        held_out_table(facts),
        flow(
            "The baselines are counted on the training tokens and judged on the same held-out "
            "tokens: the unigram model with one added to every count, the 3-gram model "
            "interpolated after Witten and Bell. Bits a byte: the bits of all judged tokens over "
            "the UTF-8 bytes that they stand for. The held-out word problems come from the "
            "templates of the training, with other numbers and names."
        ),
    ]


def what_to_see(evidence: Mapping[str, Any]) -> list[str]:
    """The evidence, with what each figure means."""
    requests, draws = evidence["requests"], evidence["information"]["trained"][0]["draws"]
    return [
        "## Something to see",
        flow(
            f"`python tools/demo_evidence.py` records {2 * requests['code-a']} pieces of held-out "
            f"programs and {2 * requests['problems-a']} held-out word problems "
            f"({sum(evidence['tokens'].values()):,} tokens) on vLLM and prints these tables.",
            "**Experts know what kind of token they get.** Mutual information of a token's class "
            f"({', '.join(CLASSES)}) and its experts, over the tokens of the prompts. Before "
            "training: the same model with its initial weights, on the same tokens. By chance: "
            f"the mean when the classes are rotated within each request ({draws} draws); p is the "
            "share of draws that reach the trained figure.",
        ),
        information_table(evidence),
        flow(
            "**Experts have trades.** The class that an expert takes most beyond that class's "
            "share of all choices, and the tokens that it takes most beyond an even spread:"
        ),
        specialists_table(evidence),
        flow(
            "**Workloads differ, the halves of one do not.** Jensen-Shannon divergence of the "
            "experts' shares, mean over layers, prompts and output together, as "
            "`expert-profiler compare` tests it: by chance is the mean when requests are dealt to "
            "the two sides at random, p the share of draws that reach what was found."
        ),
        differences_table(evidence),
    ]


def draw_curve(path: Path, facts: Mapping[str, Any]) -> None:
    """Training and held-out loss over the tokens seen, with the baselines as lines."""
    from matplotlib.figure import Figure

    a_step = facts["settings"]["blocks"] * 512 / 1e6
    rows = facts["rows"]
    figure = Figure(figsize=(6.4, 3.4), dpi=100, layout="constrained")
    axes = figure.subplots()
    bits = 1 / math.log(2)
    seen = [row[0] * a_step for row in rows]
    axes.plot(seen, [row[1] * bits for row in rows], color="0.65", lw=1, label="training, all text")
    judged = [row for row in rows if row[2] is not None]
    axes.plot(
        [row[0] * a_step for row in judged],
        [row[2] * bits for row in judged],
        color="C0",
        marker="o",
        ms=3,
        label="part of the held-out library",
    )
    for name, style in (("unigram", ":"), ("trigram", "--")):
        value = facts["curve_baselines"][name]
        axes.axhline(value, color="black", lw=0.9, ls=style, label=f"{name}, same held-out text")
    axes.set(xlabel="tokens seen, millions", ylabel="bits a token", xlim=(0, None))
    axes.set_title("The model learns more than runs of three tokens", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
