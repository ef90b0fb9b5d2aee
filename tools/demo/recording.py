# SPDX-License-Identifier: Apache-2.0
"""Record workloads on vLLM with this project's recorder, and read their routes as arrays."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from expert_profiler.errors import UserError
from expert_profiler.log import open_log
from expert_profiler.log import tokens as log_tokens
from expert_profiler.log.schema import PHASES
from expert_profiler.run import engine

Ints: TypeAlias = "npt.NDArray[np.int64]"


@dataclass(frozen=True)
class Recording:
    """The routes of all workloads, in the order of (request, position).

    Attributes:
        request: [tokens], its number, in the order of the workloads and of their prompts.
        prefill: [tokens] bool.
        tokens: [tokens], token ids.
        topk_ids: [tokens, layers, top_k].
        texts: what was generated, a request.
    """

    request: Ints
    prefill: npt.NDArray[np.bool_]
    tokens: Ints
    topk_ids: Ints
    texts: list[str]

    def counts(self, num_experts: int, of: Any = slice(None)) -> Ints:
        """[requests, layers, experts], choices of the tokens in ``of``."""
        layers = self.topk_ids.shape[1]
        found = np.zeros((len(self.texts), layers, num_experts), np.int64)
        request, layer = self.request[of][:, None, None], np.arange(layers)[:, None]
        np.add.at(found, (request, layer, self.topk_ids[of]), 1)
        return found


def record(
    model: Path, workloads: Mapping[str, Sequence[str]], folder: Path, max_tokens: int
) -> Recording:
    """One engine, one log a workload: ``folder/<name>.jsonl``.

    Raises:
        UserError: the engine did not start, or a recording can't be trusted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.jsonl" for name in workloads]
    os.environ["VLLM_LOG_MOE"] = str(paths[0])
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
        given = []
        for path, prompts in zip(paths, workloads.values(), strict=True):
            _, outputs, ends = engine.timed_pass(llm, prompts, sampling, path)
            if ends[0]["self_check"]["verdict"] != "pass" or any(ends[0]["drops"].values()):
                raise UserError(f"the recording {path} can't be trusted; see its last line")
            given += outputs
        engine.stop(llm)
    return read(paths, given)


def read(paths: Sequence[Path], outputs: Sequence[Any]) -> Recording:
    """The routes of the logs, joined with what vLLM gave back for all of them in order."""
    number = {output.request_id: i for i, output in enumerate(outputs)}
    parts = []
    for path in paths:
        with open_log(path) as log:
            numbers = np.array([number[name] for name in log_tokens.request_names(log)])
            parts += [(numbers[batch.request], batch) for batch in log_tokens.batches(log)]
    request = np.concatenate([part for part, _ in parts])
    order = np.argsort(request, kind="stable")
    position, phase, topk_ids = (
        np.concatenate([getattr(batch, name) for _, batch in parts])[order]
        for name in ("position", "phase", "ids")
    )
    if (topk_ids < 0).any():
        raise UserError(f"tokens without a row in some layer in {paths[0].parent}; record again")
    ids_of = [[*output.prompt_token_ids, *output.outputs[0].token_ids] for output in outputs]
    return Recording(
        request=request[order],
        prefill=phase == PHASES.index("prefill"),
        tokens=np.array([ids_of[r][p] for r, p in zip(request[order], position, strict=True)]),
        topk_ids=topk_ids.astype(np.int64),
        texts=[output.outputs[0].text for output in outputs],
    )
