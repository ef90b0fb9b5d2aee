"""Record workloads on vLLM with this project's recorder, and read their routes as arrays."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from expert_profiler.errors import UserError
from expert_profiler.log import open_log
from expert_profiler.log.schema import PHASES
from expert_profiler.run import engine


@dataclass(frozen=True)
class Recording:
    """A workload's routes, in the order of (request, position).

    Attributes:
        request: [tokens], its number, in the order of the prompts.
        prefill: [tokens] bool.
        tokens: [tokens], token ids.
        topk_ids: by layer, [tokens, top_k].
        texts: what was generated, a request.
        path: the log.
    """

    request: npt.NDArray[np.int64]
    prefill: npt.NDArray[np.bool_]
    tokens: npt.NDArray[np.int64]
    topk_ids: dict[int, npt.NDArray[np.int64]]
    texts: list[str]
    path: Path

    def first(self) -> npt.NDArray[np.bool_]:
        """[tokens], whether it begins its request."""
        return np.asarray(np.diff(self.request, prepend=-1) != 0, np.bool_)

    def where(self, keep: npt.NDArray[np.bool_]) -> Recording:
        """Only the tokens in ``keep``, [tokens] bool."""
        return replace(
            self,
            request=self.request[keep],
            prefill=self.prefill[keep],
            tokens=self.tokens[keep],
            topk_ids={layer: ids[keep] for layer, ids in self.topk_ids.items()},
        )

    def counts(self, num_experts: int) -> npt.NDArray[np.int64]:
        """[requests, layers, experts], choices."""
        requests = len(self.texts)
        of_layer = [
            np.bincount(
                (self.request[:, None] * num_experts + ids).ravel(),
                minlength=requests * num_experts,
            ).reshape(requests, num_experts)
            for _, ids in sorted(self.topk_ids.items())
        ]
        return np.stack(of_layer, axis=1)


def record(
    model: Path, workloads: Mapping[str, Sequence[str]], folder: Path, max_tokens: int
) -> dict[str, Recording]:
    """One engine, one recording a workload: ``folder/<name>.jsonl``.

    Raises:
        UserError: the engine did not start, or a recording can't be trusted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = list(workloads)
    os.environ["VLLM_LOG_MOE"] = str(folder / f"{names[0]}.jsonl")
    os.environ["VLLM_LOG_MOE_AUTOSTART"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    log = folder / "engine.log"
    with engine.quiet(log, verbose=False):
        llm = engine.start(
            {
                "model": str(model),
                "dtype": "float32",  # so that equal inputs give equal routes in any batch
                "max_model_len": 1024,
                "enforce_eager": True,
                "enable_prefix_caching": False,
                "seed": 1,
            },
            log,
        )
        from vllm.sampling_params import SamplingParams

        sampling = SamplingParams(max_tokens=max_tokens, temperature=0)
        results = {}
        for name, prompts in workloads.items():
            path = folder / f"{name}.jsonl"
            _, outputs, ends = engine.timed_pass(llm, prompts, sampling, path)
            if ends[0]["self_check"]["verdict"] != "pass" or any(ends[0]["drops"].values()):
                raise UserError(f"the recording {path} can't be trusted; see its last line")
            results[name] = (path, outputs)
        engine.stop(llm)
    return {name: read(path, outputs) for name, (path, outputs) in results.items()}


def read(path: Path, outputs: Sequence[Any]) -> Recording:
    """The routes of a log, joined with what vLLM gave back."""
    number = {output.request_id: i for i, output in enumerate(outputs)}
    ids_of = [[*output.prompt_token_ids, *output.outputs[0].token_ids] for output in outputs]
    with open_log(path) as log:
        rows = log.query(
            "SELECT layer, req_id, token_idx, phase, topk_ids FROM routes WHERE NOT flagged"
        )
    by_layer: dict[int, list[tuple[int, int, int, Any]]] = {}
    for layer, req_id, position, phase, ids in rows:
        by_layer.setdefault(layer, []).append((number[req_id], position, phase, ids))
    for of_layer in by_layer.values():
        of_layer.sort(key=lambda row: row[:2])
    some = next(iter(by_layer.values()))
    return Recording(
        request=np.array([row[0] for row in some], np.int64),
        prefill=np.array([PHASES[row[2]] == "prefill" for row in some], np.bool_),
        tokens=np.array([ids_of[row[0]][row[1]] for row in some], np.int64),
        topk_ids={
            layer: np.array([row[3] for row in by_layer[layer]], np.int64)
            for layer in sorted(by_layer)
        },
        texts=[output.outputs[0].text for output in outputs],
        path=path,
    )
