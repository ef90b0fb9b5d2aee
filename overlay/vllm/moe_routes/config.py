# SPDX-License-Identifier: Apache-2.0
"""Every switch of the recorder, read and validated once. Standard library only."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.moe_routes.errors import RouteLogError

#: Registered in ``vllm.envs``, so that workers (Ray's included) inherit them. None of them changes
#: a compiled graph's meaning on the platforms that key a cache on the environment, so ``vllm.envs``
#: also leaves them out of that key.
VARIABLES: dict[str, Callable[[], Any]] = {
    # Log to write: a .jsonl file or a .parquet directory. Unset: the recorder does not exist.
    "VLLM_LOG_MOE": lambda: os.getenv("VLLM_LOG_MOE"),
    # Layers to record: "all", or layer indices and ranges such as "0,3-5".
    "VLLM_LOG_MOE_LAYERS": lambda: os.getenv("VLLM_LOG_MOE_LAYERS", "all"),
    # "0": the engine comes up armed but stopped; `collective_rpc("moe_routes", ("start",))` starts.
    "VLLM_LOG_MOE_AUTOSTART": lambda: os.getenv("VLLM_LOG_MOE_AUTOSTART", "1"),
    # Bound of the rows that wait for the writer thread, in MiB of captured arrays.
    "VLLM_LOG_MOE_QUEUE_MB": lambda: os.getenv("VLLM_LOG_MOE_QUEUE_MB", "256"),
    # What a full queue does: "block" the engine (nothing is lost) or "drop" the pass (counted).
    "VLLM_LOG_MOE_ON_FULL": lambda: os.getenv("VLLM_LOG_MOE_ON_FULL", "block"),
    # Rows reach the file at most this many seconds after their pass (Parquet: at least 30).
    "VLLM_LOG_MOE_FLUSH_SECONDS": lambda: os.getenv("VLLM_LOG_MOE_FLUSH_SECONDS", "1.0"),
    # Precision of weights in Parquet: "float32" (exact) or "float16".
    "VLLM_LOG_MOE_WEIGHTS": lambda: os.getenv("VLLM_LOG_MOE_WEIGHTS", "float32"),
}

ON_FULL = ("block", "drop")
SUFFIXES = (".jsonl", ".parquet")
WEIGHTS = ("float32", "float16")


@dataclass(frozen=True)
class RouteLogConfig:
    """The validated switches.

    Attributes:
        path: absolute path of the log's main file.
        layers: the layer selection as given; resolved against the model by ``layers.select``.
        autostart: record from the first real forward pass on.
        queue_bytes: bound of the writer's queue, in bytes of captured arrays.
        on_full: "block" or "drop".
        flush_seconds: longest time between a row's pass and its place in the file.
        weights: precision of weights in Parquet, one of ``WEIGHTS``.
    """

    path: Path
    layers: str = "all"
    autostart: bool = True
    queue_bytes: int = 256 << 20
    on_full: str = "block"
    flush_seconds: float = 1.0
    weights: str = "float32"

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> "RouteLogConfig | None":
        """Read the switches from ``environ`` (the process's by default); None when unset.

        Raises:
            RouteLogError: a value is unusable, or a name looks like a switch and is none.
        """
        env = os.environ if environ is None else environ
        unknown = sorted(k for k in env if k.startswith("VLLM_LOG_MOE") and k not in VARIABLES)
        if unknown:
            raise RouteLogError(
                f"{unknown[0]} is no switch of the route recorder; known are {', '.join(VARIABLES)}"
            )
        path = env.get("VLLM_LOG_MOE", "").strip()
        if not path:
            return None
        on_full = env.get("VLLM_LOG_MOE_ON_FULL", "block")
        if on_full not in ON_FULL:
            raise RouteLogError(f"VLLM_LOG_MOE_ON_FULL={on_full!r}; use {' or '.join(ON_FULL)}")
        autostart = env.get("VLLM_LOG_MOE_AUTOSTART", "1")
        if autostart not in ("0", "1"):
            raise RouteLogError(f"VLLM_LOG_MOE_AUTOSTART={autostart!r}; use 0 or 1")
        weights = env.get("VLLM_LOG_MOE_WEIGHTS", "float32")
        if weights not in WEIGHTS:
            raise RouteLogError(f"VLLM_LOG_MOE_WEIGHTS={weights!r}; use {' or '.join(WEIGHTS)}")
        return cls(
            path=log_path(path, "VLLM_LOG_MOE="),
            layers=env.get("VLLM_LOG_MOE_LAYERS", "all"),
            autostart=autostart == "1",
            queue_bytes=int(_number(env, "VLLM_LOG_MOE_QUEUE_MB", "256", 1, 1 << 20) * (1 << 20)),
            on_full=on_full,
            flush_seconds=_number(env, "VLLM_LOG_MOE_FLUSH_SECONDS", "1.0", 0.01, 3600),
            weights=weights,
        )


def log_path(text: str, said_by: str = "route log ") -> Path:
    """The absolute path of a log.

    Raises:
        RouteLogError: its name does not say what it holds.
    """
    if not text.rstrip("/").endswith(SUFFIXES):  # a directory may be written with a slash
        raise RouteLogError(
            f"{said_by}{text} does not end in .jsonl or .parquet; name a file such as "
            "moe_routes.jsonl"
        )
    return Path(text).absolute()


def _number(env: Mapping[str, str], name: str, default: str, low: float, high: float) -> float:
    text = env.get(name, default)
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:  # also false for NaN
        raise RouteLogError(f"{name}={text!r}; use a number from {low:g} to {high:g}")
    return value
