# SPDX-License-Identifier: Apache-2.0
"""Switch an engine of this process from one mode to another. Runs in the engine's process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

from expert_profiler.bench.cases import YARDSTICK, Mode
from expert_profiler.bench.writer_alone import size_of
from expert_profiler.bench.yardstick import Yardstick
from expert_profiler.files import remove
from expert_profiler.run import engine

#: Where vLLM's patched modules hold the hook.
_HOOKED = (
    "vllm.model_executor.layers.fused_moe.layer",
    "vllm.model_executor.layers.fused_moe.cpu_fused_moe",
)
_HOOK = "_log_moe_routes"


class Outcome(NamedTuple):
    """What a recording left.

    Attributes:
        rows: rows it recorded, one a token and layer.
        verdict: its self-check's; "pass" where nothing was recorded.
        dropped: rows it lost.
    """

    rows: int = 0
    verdict: str = "pass"
    dropped: int = 0


class Switch:
    """Runs passes in the modes of ``cases``.

    Args:
        llm: a ``vllm.LLM`` in this process.
        folder: for the files of recordings; each is deleted once it is closed.
    """

    def __init__(self, llm: Any, folder: Path) -> None:
        self._llm = llm
        self._runner = llm.collective_rpc(_runner)[0]
        compilation = self._runner.vllm_config.compilation_config
        self._modules = {
            name: compilation.static_forward_context[name]
            for name in compilation.static_all_moe_layers
        }
        self._path = folder / "recording"
        #: Of an armed engine: the recorder and its taps as they are while it is stopped.
        self.recorder = getattr(self._runner, "moe_routes", None)
        self._taps = {
            name: getattr(module, "moe_route_tap", None) for name, module in self._modules.items()
        }
        self._yardstick: Yardstick | None = None
        self._hooks: dict[str, Any] = {}

    def begin(self, mode: Mode) -> None:
        """Go into ``mode``, as the engine's user would, right before its passes."""
        if self.recorder is None:
            return
        detached = mode.recorder is None and mode.name != "armed"
        self._attach(not detached)
        if mode.name == YARDSTICK:
            self._put_yardstick()
        elif mode.recorder is not None:
            options = {} if mode.suffix is None else {"path": str(self._file(mode))}
            self._command("start", **options)

    def prepare(self, mode: Mode) -> None:
        """What may happen long before: nothing of it is in a pass's time."""
        if self.recorder is not None and mode.recorder is not None:
            self._attach(True)
            self._command("configure", mode=mode.recorder, layers=mode.layers)

    def end(self, mode: Mode) -> Outcome:
        """Leave ``mode``: everything is written and closed when this returns."""
        if self._yardstick is not None:
            yardstick, self._yardstick = self._yardstick, None
            return Outcome(self._remove_yardstick(yardstick))
        if self.recorder is None or mode.recorder is None:
            return Outcome()
        status = self._command("stop")
        end = status["end"] or {**status["so_far"], "self_check": status["self_check"]}
        return Outcome(end["rows"], end["self_check"]["verdict"], sum(end["drops"].values()))

    def clean(self, mode: Mode) -> int:
        """Delete what the mode wrote; its size in bytes."""
        path = self._file(mode)
        size = size_of(path) if path.exists() else 0
        remove(path)
        return size

    def _file(self, mode: Mode) -> Path:
        return self._path.with_suffix(mode.suffix or ".jsonl")

    def _attach(self, on: bool) -> None:
        self._runner.moe_routes = self.recorder if on else None
        for name, module in self._modules.items():
            module.moe_route_tap = self._taps[name] if on else None

    def _put_yardstick(self) -> None:
        indices = {name: i for i, name in enumerate(self._modules)}
        self._yardstick = Yardstick(self._path.with_suffix(".jsonl"), indices)
        for name in _HOOKED:
            if name in sys.modules:
                self._hooks[name] = getattr(sys.modules[name], _HOOK)
                setattr(sys.modules[name], _HOOK, self._yardstick.write)

    def _remove_yardstick(self, yardstick: Yardstick) -> int:
        """Put the hooks back; the rows it wrote."""
        for name, hook in self._hooks.items():
            setattr(sys.modules[name], _HOOK, hook)
        yardstick.close()
        return yardstick.rows

    def _command(self, name: str, **options: Any) -> dict[str, Any]:
        return engine.command(self._llm, name, **options)[0]


def _runner(worker: Any) -> Any:
    return worker.model_runner
