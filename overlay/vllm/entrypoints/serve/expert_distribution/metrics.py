# SPDX-License-Identifier: Apache-2.0
"""A handful of series on vLLM's ``/metrics``, brought up to date when somebody looks."""

import asyncio
from typing import Any

import numpy as np
from prometheus_client import REGISTRY, CollectorRegistry, Gauge
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.entrypoints.serve.expert_distribution import answers
from vllm.entrypoints.serve.expert_distribution.engines import Reply, engines_of
from vllm.entrypoints.serve.expert_distribution.guard import ApiError
from vllm.logger import init_logger

logger = init_logger(__name__)

#: A scrape is not kept waiting longer; it then shows the values of the one before.
SCRAPE_SECONDS = 2.0


class Series:
    """The series.

    Args:
        per_layer: add one series a layer.
        registry: vLLM's, which ``/metrics`` shows.
    """

    def __init__(self, per_layer: bool, registry: CollectorRegistry = REGISTRY) -> None:
        def gauge(name: str, help_text: str, *labels: str) -> Gauge:
            name = f"vllm:moe_routes_{name}"
            # Several API servers of one engine all show the latest value that any of them got.
            return Gauge(name, help_text, labels, registry=registry, multiprocess_mode="mostrecent")

        self.recording = gauge("recording", "1 while a recording of MoE routes runs.")
        self.passes = gauge("passes", "Forward passes in the current or last recording.")
        self.rows = gauge("rows", "Rows recorded: tokens x layers.")
        self.dropped = gauge("dropped_rows", "Rows lost, for whatever cause.")
        self.balance = gauge("max_over_mean", "Mean over layers of max/mean expert load; 1: even.")
        help_text = "max/mean expert load of a layer; 1: even."
        self.layers = gauge("layer_max_over_mean", help_text, "layer") if per_layer else None

    def show(self, replies: list[Reply]) -> None:
        """Show the workers' answers.

        Args:
            replies: their answers to ``dump``.
        """
        self.recording.set(any(r["recording"] for r in replies))
        found = answers.recording_workers(replies)
        # Every stage of an engine sees the same passes.
        by_engine = {r["rank"]["dp"]: r["so_far"]["passes"] for r in found}
        self.passes.set(sum(by_engine.values()))
        self.rows.set(sum(r["so_far"]["rows"] for r in found))
        self.dropped.set(sum(sum(r["so_far"]["drops"].values()) for r in found))
        balance = [
            (layer, ratio)
            for r in found
            for layer, ratio in zip(r["layers"], r["layer_balance"], strict=False)
        ]
        self.balance.set(float(np.mean([ratio for _, ratio in balance])) if balance else np.nan)
        if self.layers is not None:
            for layer, ratio in balance:
                self.layers.labels(str(layer)).set(ratio)


class RefreshOnScrape:
    """Pure ASGI middleware: asks the workers when ``/metrics`` is asked for.

    Args:
        app: the next one.
        state: the application's state, which gets the engines at the first request.
        series: what to bring up to date.
    """

    def __init__(self, app: ASGIApp, state: Any, series: Series) -> None:
        self._app = app
        self._state = state
        self._series = series

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].rstrip("/").endswith("/metrics"):
            await self._refresh()
        await self._app(scope, receive, send)

    async def _refresh(self) -> None:
        try:
            self._series.show(await asyncio.wait_for(self._ask(), SCRAPE_SECONDS))
        except (ApiError, asyncio.TimeoutError) as error:
            reason = str(error) or f"no answer within {SCRAPE_SECONDS:g} s"
            logger.warning("/metrics shows older values of the route recorder: %s", reason)

    async def _ask(self) -> list[Reply]:
        async with engines_of(self._state) as engines:
            return await engines.agreed("dump")
