# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the model runner that makes up requests and lets their passes through."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
from vllm.moe_routes.hooks import _log_moe_routes, _note_logical_ids
from vllm.moe_routes.recorder import Recorder
from vllm.sampling_params import SamplingParams

from tests.support.build import DEVICE, clean_routes
from tests.support.stand_ins import a_config, a_moe

INDICES = (1, 3, 4)
TOP_K = 2


class FakeRunner:
    """Passes over made-up requests, as ``GPUModelRunner.execute_model`` goes through them."""

    def __init__(self, indices: tuple[int, ...] = INDICES, runs_ahead: bool = False) -> None:
        self.layers = {f"model.layers.{i}.mlp.experts": a_moe() for i in indices}
        self.vllm_config = a_config(self.layers)
        self.device = DEVICE
        self.use_async_scheduling = runs_ahead
        self.input_ids = SimpleNamespace(gpu=torch.zeros(32, dtype=torch.int32, device=DEVICE))
        self.input_batch = SimpleNamespace(
            req_ids=[],
            num_computed_tokens_cpu=np.zeros(8, dtype=np.int32),
            num_prompt_tokens=np.zeros(8, dtype=np.int32),
        )
        self.moe_routes: Recorder | None = None
        self.passes = 0
        self.computed: dict[str, int] = {}
        self.requests: dict[str, SimpleNamespace] = {}

    def forward(self, n: int) -> list[list[int]]:
        """Run the layers over n rows; return layer 0's ids."""
        self.passes += 1
        items = [SimpleNamespace(top_k=TOP_K, num_experts=8) for _ in self.layers]
        routes = clean_routes(items, n, seed=self.passes)  # type: ignore[arg-type]
        for slot, layer in enumerate(self.layers.values()):
            ids = torch.from_numpy(routes.topk_ids[:, slot].astype(np.int32)).to(DEVICE)
            _note_logical_ids(layer.router, ids)
            if layer.router.enable_eplb:
                ids = ids + 8  # as physical ids are
            weights = torch.from_numpy(routes.topk_weights[:, slot].copy()).to(DEVICE)
            _log_moe_routes(layer, ids, weights)
        chosen: list[list[int]] = routes.topk_ids[:, 0].tolist()
        return chosen

    def execute(
        self,
        *rows: tuple[str, int, int],
        finished: tuple[str, ...] = (),
        tokens: tuple[int, ...] = (),
        params: SamplingParams | None = None,
    ) -> list[list[int]]:
        """One step over (raw id, rows, prompt length) of every request."""
        new = [raw_id for raw_id, _, _ in rows if raw_id not in self.computed]
        self.requests.update({raw_id: SimpleNamespace(sampling_params=params) for raw_id in new})
        batch = self.input_batch
        batch.req_ids = [raw_id for raw_id, _, _ in rows]
        for i, (raw_id, _, prompt) in enumerate(rows):
            batch.num_computed_tokens_cpu[i] = self.computed.get(raw_id, 0)
            batch.num_prompt_tokens[i] = prompt
        if self.moe_routes is not None:
            self.moe_routes.begin_step(
                SimpleNamespace(
                    total_num_scheduled_tokens=sum(n for _, n, _ in rows),
                    finished_req_ids=set(finished),
                    scheduled_new_reqs=[
                        SimpleNamespace(req_id=raw_id, sampling_params=params) for raw_id in new
                    ],
                )
            )
        counts = np.array([n for _, n, _ in rows], dtype=np.int32)
        if not counts.sum():
            return []
        if tokens:
            self.input_ids.gpu[: len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        chosen = self.forward(int(counts.sum()))
        if self.moe_routes is not None:
            self.moe_routes.end_step(counts)
        for raw_id, n, _ in rows:
            self.computed[raw_id] = self.computed.get(raw_id, 0) + n
        # The runner goes on with the same arrays.
        batch.req_ids.clear()
        batch.num_computed_tokens_cpu[:] = -1
        batch.num_prompt_tokens[:] = -1
        counts[:] = -1
        return chosen

    def dummy_run(self) -> None:
        """A profile, warm-up or capture pass."""
        self.forward(32)


def group(rank: int = 0, size: int = 1) -> Callable[[], SimpleNamespace]:
    return lambda: SimpleNamespace(rank_in_group=rank, world_size=size, cpu_group=None)
