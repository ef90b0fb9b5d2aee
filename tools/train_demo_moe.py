#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Train the small Qwen2-MoE language model that ./test.sh shows where there is no GPU.

It reads Python's standard library and generated word problems, and writes a checkpoint that vLLM
and transformers load unchanged: demo_model/ is one. The same Python, torch and number of threads
give the same weights. A training that was cut short goes on from its last save. A step takes about
0.5 s on one quiet processor core, the whole some 15 minutes.

    python tools/train_demo_moe.py demo_model
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import numpy.typing as npt

from expert_profiler.errors import UserError, run
from expert_profiler.run.tiny_model import tokenizer_config
from tools.demo import ngrams, tokens
from tools.demo.corpus import Corpus, corpus

REPO = Path(__file__).resolve().parent.parent
WORK = REPO / ".cache" / "demo-training"
FACTS = "training.json"
#: Tokens of a training sequence, of which the first part of the training sees halves.
BLOCK = 512
CURVE_BLOCKS = 40
SAVE_EVERY, JUDGE_EVERY, REPORT_EVERY = 200, 200, 20

Tokens = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Settings:
    """What decides the weights, beside the text. Sizes are in elements.

    Attributes:
        blocks: sequences of :data:`BLOCK` tokens a step.
        halves: share of the steps that see their blocks cut in two, which is faster.
        horizon: steps after which the cosine of the learning rate would end.
        cooldown: last steps, over which the learning rate falls to 0 instead.
        balance: coefficient of the load-balancing loss.
    """

    layers: int = 6
    hidden: int = 128
    heads: int = 4
    experts: int = 16
    top_k: int = 2
    moe_intermediate: int = 64
    shared_intermediate: int = 128
    vocabulary: int = tokens.VOCABULARY
    max_positions: int = 1024
    steps: int = 1700
    blocks: int = 4
    halves: float = 0.85
    learning_rate: float = 3e-3
    warmup: int = 100
    horizon: int = 2500
    cooldown: int = 300
    weight_decay: float = 0.1
    balance: float = 0.01
    seed: int = 8

    def learning_rate_at(self, step: int) -> float:
        """A linear warm-up, half a cosine down towards a twentieth, and a linear end."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.horizon - self.warmup)
        cosine = 0.05 + 0.95 * (1 + math.cos(math.pi * min(1.0, done))) / 2
        return self.learning_rate * cosine * min(1.0, (self.steps - step) / self.cooldown)


# ---- the model ------------------------------------------------------------------------------


def new_model(settings: Settings) -> Any:
    """transformers' own Qwen2-MoE with the initial weights of the seed, in float32."""
    import torch
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(settings.seed)
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            vocab_size=settings.vocabulary,
            hidden_size=settings.hidden,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads,
            num_experts=settings.experts,
            num_experts_per_tok=settings.top_k,
            norm_topk_prob=False,
            moe_intermediate_size=settings.moe_intermediate,
            shared_expert_intermediate_size=settings.shared_intermediate,
            intermediate_size=settings.shared_intermediate,
            decoder_sparse_step=1,
            max_position_embeddings=settings.max_positions,
            initializer_range=0.04,
            router_aux_loss_coef=settings.balance,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def losses(model: Any, ids: Any) -> tuple[Any, Any]:
    """Cross-entropy of the next token [rows, length - 1] in nats, and the load-balancing loss.

    The latter is the architecture's own formula, taken layer by layer and averaged, so that every
    layer has to spread its tokens. ``ids`` is [rows, length].
    """
    import torch
    from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

    config = model.config
    out = model(input_ids=ids[:, :-1], output_router_logits=True, use_cache=False)
    nats = torch.nn.functional.cross_entropy(
        out.logits.float().transpose(1, 2), ids[:, 1:], reduction="none"
    )
    of_layer = [
        load_balancing_loss_func((logits,), config.num_experts, config.num_experts_per_tok)
        for logits in out.router_logits
    ]
    return nats, torch.stack(of_layer).mean()


def write_model(model: Any, tokenizer: Any, out: Path) -> None:
    """A checkpoint in bfloat16, with its tokenizer. ``out`` exists."""
    import torch

    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    config = tokenizer_config(tokens.END, tokens.END, model.config.max_position_embeddings)
    write_json(out / "tokenizer_config.json", config)
    (out / "model.safetensors").chmod(0o644)  # it is written readable by its owner only


# ---- the text -------------------------------------------------------------------------------


def stream(tokenizer: Any, texts: Sequence[str]) -> Tokens:
    """All texts in order as one run of tokens, each ended by token 0."""
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return np.array([token for text in encoded for token in (*text.ids, 0)], np.int64)


def batch(data: Tokens, step: int, settings: Settings) -> Tokens:
    """The blocks of a step, [rows, length + 1]; a function of the step, so that training resumes.

    An epoch cuts the run of tokens into blocks, from another place every time, and takes each once.
    """
    per_epoch = (len(data) - BLOCK - 1) // BLOCK // settings.blocks
    epoch, at = divmod(step, per_epoch)
    rng = np.random.default_rng((settings.seed, epoch))
    start = int(rng.integers(BLOCK))
    order = rng.permutation(per_epoch * settings.blocks)
    chosen = order[at * settings.blocks : (at + 1) * settings.blocks]
    halved = step < settings.halves * settings.steps
    length = BLOCK // 2 if halved else BLOCK
    starts = start + chosen * BLOCK
    if halved:
        starts = np.concatenate([starts, starts + length])
    return data[starts[:, None] + np.arange(length + 1)]


# ---- judging --------------------------------------------------------------------------------


def nats_of(model: Any, data: Tokens) -> Floats:
    """Cross-entropy of every token but the first of each block, [n] in nats."""
    import torch

    n = (len(data) - 1) // BLOCK
    ids = torch.from_numpy(data[: n * BLOCK + 1])
    rows = torch.stack([ids[i * BLOCK : (i + 1) * BLOCK + 1] for i in range(n)])
    with torch.inference_mode():
        parts = [losses(model, part)[0].double().flatten() for part in rows.split(4)]
    return np.asarray(torch.cat(parts).numpy(), np.float64)


def baseline_bits(data: Tokens, judged: Tokens, vocabulary: int) -> dict[str, Floats]:
    """Bits of each of ``judged[2:]`` by the baselines, counted on ``data``."""
    return {
        "trigram": -np.log2(ngrams.trigram(data, judged, vocabulary)),
        "unigram": -np.log2(ngrams.unigram(data, vocabulary)[judged[2:]]),
    }


def judge(model: Any, tokenizer: Any, data: Tokens, text: Corpus) -> dict[str, Any]:
    """Held-out bits a token and a byte of the model and the baselines, by kind of text.

    Bits a byte: the bits of all judged tokens over the UTF-8 bytes that they stand for.
    """
    vocabulary = tokenizer.get_vocab_size()
    lengths = np.array([len(tokenizer.id_to_token(i)) for i in range(vocabulary)])
    lengths[0] = 0  # the end of a document stands for no text
    result = {}
    for kind, documents in text.held_out.items():
        held = stream(tokenizer, documents)
        judged = held[: (len(held) - 1) // BLOCK * BLOCK + 1]
        size = int(lengths[judged[2:]].sum())
        bits = {
            "model": nats_of(model, held)[1:] / math.log(2),
            **baseline_bits(data, judged, vocabulary),
        }
        result[kind] = {
            "documents": len(documents),
            "tokens": len(judged) - 2,
            "bytes": size,
            **{
                name: {"bits_per_token": float(b.mean()), "bits_per_byte": float(b.sum()) / size}
                for name, b in bits.items()
            },
        }
    return result


# ---- training -------------------------------------------------------------------------------


def train(settings: Settings, data: Tokens, held: Tokens, work: Path) -> tuple[Any, dict[str, Any]]:
    """Train, or go on from the last save in ``work``.

    Args:
        settings: all of them decide the weights.
        data: [n] training tokens.
        held: [m] held-out tokens for the curve.
        work: folder of the saves, made where missing.

    Returns:
        the model, and the curve: rows (step, training nats, held-out nats or None), and seconds.
    """
    import torch
    from tqdm import tqdm

    model = new_model(settings)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others}],
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=True,
    )
    work.mkdir(parents=True, exist_ok=True)
    save = work / "checkpoint.pt"
    identity = {**asdict(settings), "tokens": len(data)}
    curve: dict[str, Any] = {"rows": [], "seconds": 0.0}
    first = 0
    if save.is_file():
        state = torch.load(save, weights_only=True)
        if state["identity"] != identity:
            raise UserError(
                f"{save} is of a training with other settings or other text; "
                "name another folder with --work, or remove that file"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, curve = state["step"], state["curve"]

    recent: list[float] = []
    started = time.monotonic() - curve["seconds"]
    bar = tqdm(range(first, settings.steps), initial=first, total=settings.steps, unit="step")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(step)
        nats, balance = losses(model, torch.from_numpy(batch(data, step, settings)))
        loss = nats.mean()
        (loss + settings.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        done = step + 1
        if done % REPORT_EVERY == 0 or done == settings.steps:
            judged = done % JUDGE_EVERY == 0 or done == settings.steps
            held_nats = float(nats_of(model, held).mean()) if judged else None
            curve["rows"].append([done, sum(recent) / len(recent), held_nats])
            recent = []
            shown = f"{curve['rows'][-1][1]:.2f} nats, balance {balance.item():.2f}"
            bar.set_postfix_str(shown + (f", held out {held_nats:.2f}" if judged else ""))
        if done % SAVE_EVERY == 0 or done == settings.steps:
            curve["seconds"] = time.monotonic() - started
            part = save.with_suffix(".part")
            torch.save(
                {
                    "identity": identity,
                    "step": done,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "curve": curve,
                },
                part,
            )
            part.replace(save)
    return model, curve


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    default = Settings()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=default.steps, help=f"[{default.steps}]")
    parser.add_argument("--seed", type=int, default=default.seed, help=f"[{default.seed}]")
    parser.add_argument("--threads", type=int, default=1, help="of the processor [1]")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the saves to go on from")
    parser.add_argument("--force", action="store_true", help="write over a checkpoint in OUT_DIR")
    args = parser.parse_args(argv)
    settings = Settings(steps=args.steps, seed=args.seed)
    if (args.out / "config.json").exists() and not args.force:
        raise UserError(f"{args.out} holds a checkpoint; add --force to write over it")

    import torch

    torch.set_num_threads(args.threads)
    text = corpus()
    documents = text.training_documents()
    tokenizer = tokens.train_tokenizer(documents, settings.vocabulary)
    np.random.default_rng(settings.seed).shuffle(documents)
    data = stream(tokenizer, documents)
    # The curve is of the first blocks of the held-out library.
    held = stream(tokenizer, text.held_out["library"])[: CURVE_BLOCKS * BLOCK + 1]
    print(f"{len(documents)} documents, {len(data):,} tokens, text {text.sha256[:12]}")

    args.out.mkdir(parents=True, exist_ok=True)
    model, curve = train(settings, data, held, args.work)
    write_model(model, tokenizer, args.out)
    facts = {
        "settings": asdict(settings),
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": len(data),
        "tokens_seen": settings.steps * settings.blocks * BLOCK,
        "text": {
            "sha256": text.sha256,
            "python": platform.python_version(),
            "training": {k: len(v) for k, v in text.training.items()},
            "training_bytes": {
                k: sum(len(t.encode()) for t in v) for k, v in text.training.items()
            },
        },
        "torch": str(torch.__version__),
        "threads": args.threads,
        # Judged in float32 on the weights as they were written, in bfloat16.
        "held_out": judge(model.float(), tokenizer, data, text),
        "curve_baselines": {
            name: float(bits.mean())
            for name, bits in baseline_bits(data, held, settings.vocabulary).items()
        },
        **curve,
    }
    write_json(args.out / FACTS, facts)
    for kind, found in facts["held_out"].items():
        judges = ("model", "trigram", "unigram")
        shown = ", ".join(f"{name} {found[name]['bits_per_token']:.2f}" for name in judges)
        print(f"held-out {kind}: bits a token: {shown}")
    print(f"wrote {args.out}; next: python tools/demo_evidence.py")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
