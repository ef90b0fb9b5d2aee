#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make a route log of any size without a model, to try readers and reports on.

    python tools/make_synthetic_log.py /tmp/synthetic.jsonl --rows 10000000
    python tools/make_synthetic_log.py /tmp/deepseek.parquet --layers 61 --experts 256 --top-k 8

Rows stand in the order in which the recorder writes them: a pass that prefills a batch of
requests, then a decode pass a token. Experts are drawn without replacement, from odds that differ
by layer and phase; weights are the softmax of the router. The same arguments give the same rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from expert_profiler.errors import UserError, run
from expert_profiler.resources import program

BATCH = 25  # requests that run together
_STEP_ROWS = 1 << 16


@dataclass(frozen=True)
class Spec:
    """What to make. ``skew``: standard deviation of the experts' mean router logits."""

    rows: int = 1_000_000
    layers: int = 24
    experts: int = 60
    top_k: int = 4
    skew: float = 0.4
    seed: int = 0

    @property
    def tokens(self) -> int:
        return self.rows // self.layers


class Tokens(NamedTuple):
    """[n] tokens in the order in which they are forwarded."""

    request: npt.NDArray[Any]
    position: npt.NDArray[Any]
    is_decode: npt.NDArray[Any]
    forward_pass: npt.NDArray[Any]


def schedule(spec: Spec) -> Iterator[Tokens]:
    """The tokens of one batch of requests after another, ``spec.tokens`` in all."""
    rng = np.random.default_rng(spec.seed)
    left, first_request, first_pass = spec.tokens, 0, 0
    while left > 0:
        prompts = rng.integers(60, 240, BATCH)
        # A request that generates n tokens forwards n - 1 of them.
        decoded = rng.integers(40, 240, BATCH)
        request = [np.repeat(np.arange(BATCH), prompts)]
        position = [np.concatenate([np.arange(n) for n in prompts])]
        forward_pass = [np.zeros(int(prompts.sum()), dtype=np.int64)]
        for step in range(int(decoded.max())):
            live = np.flatnonzero(decoded > step)
            request.append(live)
            position.append(prompts[live] + step)
            forward_pass.append(np.full(len(live), step + 1))
        requests, positions = np.concatenate(request), np.concatenate(position)
        tokens = Tokens(
            first_request + requests,
            positions,
            positions >= prompts[requests],
            first_pass + np.concatenate(forward_pass),
        )
        yield Tokens(*(column[:left] for column in tokens))
        left -= len(requests)
        first_request += BATCH
        first_pass += int(decoded.max()) + 1


def chunks(spec: Spec) -> Iterator[Any]:
    """The rows, as ``Chunk``s; requests are summed up as they end."""
    from expert_profiler.log.records import Chunk

    rng = np.random.default_rng((spec.seed, 1))
    shape = (2, spec.layers, spec.experts)
    base = rng.normal(0, spec.skew, shape).astype(np.float32)
    step = max(1, _STEP_ROWS // spec.layers)
    nothing = Tokens(*(np.zeros(0, dtype=np.int64),) * 4)
    for tokens in schedule(spec):
        for start in range(0, len(tokens.request), step):
            part = Tokens(*(column[start : start + step] for column in tokens))
            ids, weights = _route(spec, rng, base, part.is_decode)
            yield Chunk(_table(spec, part, ids, weights), [])
        yield Chunk(
            _table(spec, nothing, *_route(spec, rng, base, nothing.is_decode)), _requests(tokens)
        )


def _route(
    spec: Spec, rng: np.random.Generator, base: Any, is_decode: npt.NDArray[Any]
) -> tuple[Any, Any]:
    """[n * layers, top_k] ids and weights, the most probable expert first."""
    shape = (len(is_decode), spec.layers, spec.experts)
    logits = rng.standard_normal(shape, dtype=np.float32) + base[is_decode.astype(int)]
    logits = logits.reshape(-1, spec.experts)
    chosen = np.argpartition(logits, -spec.top_k, axis=1)[:, -spec.top_k :]
    picked = np.take_along_axis(logits, chosen, axis=1)
    order = np.argsort(-picked, axis=1)
    weights = np.exp(np.take_along_axis(picked, order, axis=1))
    weights /= np.exp(logits).sum(axis=1, keepdims=True)
    return np.take_along_axis(chosen, order, axis=1).astype(np.int16), weights


def _table(spec: Spec, tokens: Tokens, ids: Any, weights: Any) -> Any:
    import pyarrow as pa

    layers = spec.layers
    names = pa.array(tokens.request).cast(pa.string()).dictionary_encode()
    codes = np.repeat(names.indices.to_numpy(), layers)
    phases = np.repeat(tokens.is_decode.astype(np.int8), layers)
    n = len(codes)

    def lists(values: Any) -> Any:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), spec.top_k)

    return pa.table(
        {
            "req_id": pa.DictionaryArray.from_arrays(pa.array(codes), names.dictionary),
            "token_idx": pa.array(np.repeat(tokens.position, layers)),
            "layer": pa.array(np.tile(np.arange(layers), len(tokens.request))),
            "topk_ids": lists(ids),
            "topk_weights": lists(weights),
            "phase": pa.DictionaryArray.from_arrays(pa.array(phases), ["prefill", "decode"]),
            "forward_pass_id": pa.array(np.repeat(tokens.forward_pass, layers)),
            "flag": pa.nulls(n, pa.string()),
        }
    )


def _requests(tokens: Tokens) -> list[tuple[int, dict[str, Any]]]:
    """The records of all requests of a batch."""
    first = int(tokens.request.min())
    positions = np.bincount(tokens.request - first)
    prompts = np.bincount(tokens.request[~tokens.is_decode] - first, minlength=len(positions))
    records = []
    for name, (prompt, count) in enumerate(zip(prompts, positions, strict=True), start=first):
        record = {
            "type": "request",
            "req_id": str(name),
            "raw_id": f"{name}-{name:08x}",
            "num_prompt_tokens": int(prompt),
            "cached_tokens": 0,
            "missed_tokens": 0,
            "positions": int(count),
            "rows_flagged": 0,
            "rows_dropped": 0,
            "finished": True,
        }
        records.append((0, record))
    return records


def header(spec: Spec, name: str) -> dict[str, Any]:
    return {
        "type": "meta",
        "model_id": f"synthetic-{spec.layers}x{spec.experts}-top{spec.top_k}",
        "vllm_version": "none: made by tools/make_synthetic_log.py",
        "torch_version": "none",
        "device": "none",
        "seed": spec.seed,
        "layers_logged": list(range(spec.layers)),
        "top_k": spec.top_k,
        "schema_version": 1,
        "num_experts": spec.experts,
        "num_moe_layers": spec.layers,
        "layers": [
            {
                "layer": layer,
                "name": f"model.layers.{layer}.mlp.experts",
                "top_k": spec.top_k,
                "num_experts": spec.experts,
                "source": "router",
            }
            for layer in range(spec.layers)
        ],
        "expert_ids": "logical",
        "weights_dtype": "float32",
        "files": [name],
    }


def make(path: Path, spec: Spec, on_rows: Any) -> None:
    """Write the log to ``path``."""
    from expert_profiler.log import log_file, records

    *_, last = schedule(spec)
    raw = {
        "type": "end",
        "reason": "stop",
        "rows": spec.tokens * spec.layers,
        "rows_flagged": 0,
        "passes": int(last.forward_pass[-1]) + 1,
        "passes_unfinished": 0,
        "requests": int(last.request.max()) + 1,
        "bytes": 0,
        "drops": {"queue_full": 0},
        "self_check": {"verdict": "pass", "checks": []},
    }
    end = log_file.parse_end(path, raw)

    def counted() -> Iterator[Any]:
        for chunk in chunks(spec):
            yield chunk
            on_rows(chunk.rows.num_rows)

    if path.suffix == ".parquet":
        plan = records.Plan(spec.experts, spec.top_k, "float32")
        records.write_parquet(path, header(spec, path.name), counted(), end, plan)
    else:
        records.write_jsonl(path, header(spec, path.name), counted(), end)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    spec = Spec(args.rows, args.layers, args.experts, args.top_k, args.skew, args.seed)
    if args.path.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"{args.path} ends in neither .jsonl nor .parquet; name one of them")
    if args.path.exists():
        raise UserError(f"{args.path} exists; remove it or name another")
    if not args.path.parent.is_dir():
        raise UserError(f"no directory {args.path.parent}; make it: mkdir -p {args.path.parent}")
    if not (spec.layers > 0 and 0 < spec.top_k < spec.experts <= 32_767 and spec.tokens > 0):
        raise UserError("need layers > 0, 0 < top-k < experts and at least one row a layer")
    from tqdm import tqdm

    rows = spec.tokens * spec.layers
    with tqdm(total=rows, desc=args.path.name, unit=" rows", unit_scale=True, delay=2) as bar:
        make(args.path, spec, bar.update)
    print(f"written  {args.path}, {rows:,} rows")
    print(f"next: {program()} hist {args.path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/make_synthetic_log.py", description="Make a route log without a model."
    )
    spec = Spec()
    add = parser.add_argument
    add("path", type=Path, help="a .jsonl file or a .parquet directory to make")
    add("--rows", type=int, default=spec.rows, help="rounded down to whole tokens [%(default)s]")
    add("--layers", type=int, default=spec.layers, help="[%(default)s]")
    add("--experts", type=int, default=spec.experts, help="[%(default)s]")
    add("--top-k", type=int, default=spec.top_k, help="[%(default)s]")
    add("--skew", type=float, default=spec.skew, help="0: even odds [%(default)s]")
    add("--seed", type=int, default=spec.seed, help="[%(default)s]")
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
