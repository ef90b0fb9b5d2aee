# SPDX-License-Identifier: Apache-2.0
"""Engines whose workers are real recorders on stand-in runners, behind a real application."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from vllm.entrypoints.serve.expert_distribution import metrics
from vllm.entrypoints.serve.expert_distribution.api_router import attach_router
from vllm.moe_routes import recorder
from vllm.moe_routes.config import RouteLogConfig
from vllm.moe_routes.layers import describe
from vllm.moe_routes.recording import provenance

from tests.support.fake_runner import INDICES, FakeRunner

Stages = Sequence[tuple[int, ...]]


class Worker:
    """One rank, with a recorder armed by the environment.

    Args:
        rank: its place, by parallel dimension.
        stages: the layers of every pipeline stage.
        sizes: ranks in every dimension.
    """

    def __init__(self, rank: dict[str, int], stages: Stages, sizes: dict[str, int]) -> None:
        self.rank, self.sizes = rank, sizes
        runner = FakeRunner(stages[rank["pp"]])
        parallel = runner.vllm_config.parallel_config
        parallel.tensor_parallel_size = sizes["tp"]
        parallel.pipeline_parallel_size = sizes["pp"]
        parallel.data_parallel_size = sizes["dp"]
        parallel.data_parallel_rank = rank["dp"]
        self.model_runner = runner
        #: Set to raise instead of answering.
        self.broken: Exception | None = None
        with self.current():
            config = RouteLogConfig.from_env()
            assert config is not None
            runner.moe_routes = recorder.Recorder(config, runner)  # type: ignore[arg-type]
        # One process plays all ranks: where a pass's rows lie is not what is tested here.
        own = runner.moe_routes
        own._taps = [(module, tap._replace(dp_rank=None)) for module, tap in own._taps]

    def current(self) -> pytest.MonkeyPatch:
        """Be the rank that vLLM's groups say it is, while the context lasts."""
        patch = pytest.MonkeyPatch.context()
        return _Ranked(patch, self)  # type: ignore[return-value]

    def control(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        with self.current():
            return recorder.control(self, *args, **kwargs)

    def execute(self, *rows: tuple[str, int, int]) -> None:
        with self.current():
            self.model_runner.execute(*rows)


class _Ranked:
    def __init__(self, patch: Any, worker: Worker) -> None:
        self._patch, self._worker = patch, worker

    def __enter__(self) -> None:
        patch = self._patch.__enter__()
        rank, sizes = self._worker.rank, self._worker.sizes
        for dim in ("pp", "tp"):
            group = SimpleNamespace(rank_in_group=rank[dim], world_size=sizes[dim], cpu_group=None)
            patch.setattr(recorder, f"get_{dim}_group", lambda group=group: group)
        patch.setattr(recorder, "_gather_over_stages", lambda own: STAGES)

    def __exit__(self, *error: object) -> None:
        self._patch.__exit__(*error)


STAGES: list[Any] = []


class Engines:
    """What the routes use of vLLM's engine client.

    Args:
        stages: the layers of every pipeline stage.
        tp: tensor-parallel ranks.
        dp: engines.
    """

    def __init__(self, stages: Stages = (INDICES,), tp: int = 1, dp: int = 1) -> None:
        sizes = {"tp": tp, "pp": len(stages), "dp": dp}
        STAGES[:] = [describe(FakeRunner(own).layers.items()) for own in stages]
        self.core_engines = [f"engine{i}" for i in range(dp)]
        self.workers = {
            name: [
                Worker({"dp": i, "pp": pp, "tp": rank}, stages, sizes)
                for pp in range(len(stages))
                for rank in range(tp)
            ]
            for i, name in enumerate(self.core_engines)
        }
        self.engine_core = self
        self.calls: list[str] = []
        #: Seconds before an engine answers.
        self.delay = 0.0
        self.error: Exception | None = None

    async def _call_utility_async(
        self, method: str, name: str, timeout: Any, args: Any, kwargs: Any, *, engine: str
    ) -> list[dict[str, Any]]:
        import asyncio

        assert (method, name, timeout) == ("collective_rpc", "moe_routes", None)
        self.calls.append(args[0])
        if self.error is not None:
            raise self.error
        await asyncio.sleep(self.delay)
        return [worker.control(*args, **kwargs) for worker in self.workers[engine]]

    def execute(self, *rows: tuple[str, int, int], engine: int = 0) -> None:
        """One forward pass of an engine, on all its ranks."""
        for worker in self.workers[self.core_engines[engine]]:
            worker.execute(*rows)

    def shutdown(self) -> None:
        for workers in self.workers.values():
            for worker in workers:
                with worker.current():
                    recorder.shutdown(worker)


def an_app(client: Any, keys: Sequence[str] = ()) -> FastAPI:
    """A server with the routes, as vLLM's ``build_app`` mounts them."""
    app = FastAPI()
    app.state.args = Namespace(api_key=list(keys))
    app.state.engine_client = client
    attach_router(app)
    return app


def isolate(monkeypatch: pytest.MonkeyPatch) -> list[CollectorRegistry]:
    """Keep apart what a process has once: the installed files, and the metrics.

    Returns:
        a registry for every application that gets made.
    """
    registries: list[CollectorRegistry] = []
    make = metrics.Series

    def series(per_layer: bool) -> metrics.Series:
        registries.append(CollectorRegistry())
        return make(per_layer, registries[-1])

    monkeypatch.setattr(provenance, "patch_id", lambda: "0123abcd")
    monkeypatch.setattr(metrics, "Series", series)
    return registries
