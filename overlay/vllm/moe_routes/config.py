# SPDX-License-Identifier: Apache-2.0
"""Every switch of the recorder, read and validated once. Standard library only."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm.moe_routes.errors import RouteLogError

#: Registered in ``vllm.envs``, so that workers (Ray's included) inherit them. None of them changes
#: a compiled graph's meaning on the platforms that key a cache on the environment, so ``vllm.envs``
#: also leaves them out of that key.
VARIABLES: dict[str, Callable[[], Any]] = {
    # Log to write: a .jsonl file or a .parquet directory; recording is armed by it. With this and
    # VLLM_LOG_MOE_API unset, the recorder does not exist.
    "VLLM_LOG_MOE": lambda: os.getenv("VLLM_LOG_MOE"),
    # What is recorded: "per_token", "per_pass" or "stat". Default: "per_token" into VLLM_LOG_MOE,
    # "stat" where that is unset.
    "VLLM_LOG_MOE_MODE": lambda: os.getenv(
        "VLLM_LOG_MOE_MODE", "per_token" if os.getenv("VLLM_LOG_MOE") else "stat"
    ),
    # "1": `vllm serve` has the expert-distribution routes; the recorder is armed for them.
    "VLLM_LOG_MOE_API": lambda: os.getenv("VLLM_LOG_MOE_API", "0"),
    # "1": the balance of every layer stands in `/metrics` too, one series a layer.
    "VLLM_LOG_MOE_LAYER_METRICS": lambda: os.getenv("VLLM_LOG_MOE_LAYER_METRICS", "0"),
    # Folder of the files that the routes write; clients name files in it, and none outside.
    "VLLM_LOG_MOE_DIR": lambda: os.getenv("VLLM_LOG_MOE_DIR", "moe_recordings"),
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
    # No file grows past this size: bytes, or with K, M or G (powers of 1024). Unset: no bound.
    "VLLM_LOG_MOE_MAX_BYTES": lambda: os.getenv("VLLM_LOG_MOE_MAX_BYTES", ""),
    # What happens there: "stop" ends the recording, "rotate" goes on in x.2.jsonl, x.3.jsonl, …
    "VLLM_LOG_MOE_ON_MAX": lambda: os.getenv("VLLM_LOG_MOE_ON_MAX", "stop"),
    # "1/n": record one request in n, the same ones on every rank. Mode per_token only.
    "VLLM_LOG_MOE_SAMPLE": lambda: os.getenv("VLLM_LOG_MOE_SAMPLE", "1/1"),
    # Precision of weights in Parquet: "float32" (exact) or "float16".
    "VLLM_LOG_MOE_WEIGHTS": lambda: os.getenv("VLLM_LOG_MOE_WEIGHTS", "float32"),
}

ON_FULL = ("block", "drop")
ON_MAX = ("stop", "rotate")
MODES = ("stat", "per_pass", "per_token")
SUFFIXES = (".jsonl", ".parquet")
#: Least size of a file's bound: room for its header and its end record, whatever the model.
LEAST_BYTES = 1 << 20
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
WEIGHTS = ("float32", "float16")


@dataclass(frozen=True)
class RouteLogConfig:
    """The validated switches; :data:`VARIABLES` says what each means.

    Attributes:
        path: absolute path of the log's main file; None where only the API arms the recorder.
        directory: absolute path of the folder that the routes write to.
        layers: the layer selection as given; resolved against the model by ``layers.select``.
        queue_bytes: in bytes of captured arrays.
        max_bytes: None: no bound.
        sample: one request in this many is recorded.
    """

    path: Path | None
    mode: str = "per_token"
    api: bool = False
    directory: Path = field(default_factory=lambda: Path("moe_recordings").absolute())
    layer_metrics: bool = False
    layers: str = "all"
    autostart: bool = True
    queue_bytes: int = 256 << 20
    on_full: str = "block"
    flush_seconds: float = 1.0
    weights: str = "float32"
    max_bytes: int | None = None
    on_max: str = "stop"
    sample: int = 1

    @property
    def private(self) -> bool:
        """Whether files are their owner's only: a server writes what strangers' requests caused."""
        return self.api

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
        api = _choice(env, "VLLM_LOG_MOE_API", "0", ("0", "1")) == "1"
        if not path and not api:
            return None
        mode = _choice(env, "VLLM_LOG_MOE_MODE", "per_token" if path else "stat", MODES)
        if path and mode == "stat":
            raise RouteLogError(
                "VLLM_LOG_MOE_MODE=stat keeps counts and writes no file; unset VLLM_LOG_MOE and "
                "set VLLM_LOG_MOE_API=1, or use per_pass or per_token"
            )
        sample = _sample(env)
        check_sample(sample, mode)
        max_bytes = _size(env, "VLLM_LOG_MOE_MAX_BYTES")
        on_max = _choice(env, "VLLM_LOG_MOE_ON_MAX", "stop", ON_MAX)
        if on_max == "rotate" and max_bytes is None:
            raise RouteLogError(
                "VLLM_LOG_MOE_ON_MAX=rotate needs a size; set VLLM_LOG_MOE_MAX_BYTES, such as 1G"
            )
        if on_max == "rotate" and path.endswith(".parquet"):
            raise RouteLogError(
                "VLLM_LOG_MOE_ON_MAX=rotate is for .jsonl files, and a .parquet directory is made "
                "of parts already; use stop or name a .jsonl file"
            )
        # A server must not wait for a slow disk unless it is told to; a job must not lose rows.
        on_full = "drop" if api else "block"
        return cls(
            path=log_path(path, "VLLM_LOG_MOE=", mode) if path else None,
            mode=mode,
            api=api,
            directory=Path(env.get("VLLM_LOG_MOE_DIR", "moe_recordings")).absolute(),
            layer_metrics=_choice(env, "VLLM_LOG_MOE_LAYER_METRICS", "0", ("0", "1")) == "1",
            layers=env.get("VLLM_LOG_MOE_LAYERS", "all"),
            autostart=_choice(env, "VLLM_LOG_MOE_AUTOSTART", "1", ("0", "1")) == "1",
            queue_bytes=int(_number(env, "VLLM_LOG_MOE_QUEUE_MB", "256", 1, 1 << 20) * (1 << 20)),
            on_full=_choice(env, "VLLM_LOG_MOE_ON_FULL", on_full, ON_FULL),
            flush_seconds=_number(env, "VLLM_LOG_MOE_FLUSH_SECONDS", "1.0", 0.01, 3600),
            weights=_choice(env, "VLLM_LOG_MOE_WEIGHTS", "float32", WEIGHTS),
            max_bytes=max_bytes,
            on_max=on_max,
            sample=sample,
        )


def check_mode(mode: str) -> str:
    """The mode itself.

    Raises:
        RouteLogError: there is none of that name.
    """
    if mode not in MODES:
        raise RouteLogError(f"unknown mode {mode!r}; use {', '.join(MODES)}")
    return mode


def check_sample(sample: int, mode: str) -> None:
    """Refuse to sample where nothing is kept apart by request.

    Raises:
        RouteLogError: the mode counts whole passes.
    """
    if sample > 1 and mode != "per_token":
        raise RouteLogError(
            f"VLLM_LOG_MOE_SAMPLE=1/{sample} chooses requests and mode {mode} counts whole passes; "
            "use mode per_token (VLLM_LOG_MOE_MODE=per_token) or unset VLLM_LOG_MOE_SAMPLE"
        )


def log_path(text: str, prefix: str = "route log ", mode: str | None = None) -> Path:
    """The absolute path of a log.

    Args:
        text: as given.
        prefix: what stands before it in messages.
        mode: what is to be recorded there; None takes any.

    Raises:
        RouteLogError: its name does not say what it holds.
    """
    shown = text if len(text) <= 400 else f"{text[:80]}…"
    if not text.isprintable():  # bytes that are no UTF-8 are not printable either
        raise RouteLogError(
            f"{prefix}{_short(text)} holds characters that no log's name may hold; name a file "
            "such as moe_routes.jsonl"
        )
    if mode == "per_pass" and not text.endswith(".jsonl"):
        raise RouteLogError(
            f"{prefix}{shown} does not end in .jsonl, which mode per_pass writes; name a file "
            "such as passes.jsonl"
        )
    if not text.rstrip("/").endswith(SUFFIXES):  # a directory may be written with a slash
        raise RouteLogError(
            f"{prefix}{shown} does not end in .jsonl or .parquet; name a file such as "
            "moe_routes.jsonl"
        )
    return Path(text).absolute()


def _choice(env: Mapping[str, str], name: str, default: str, known: Sequence[str]) -> str:
    value = env.get(name, default)
    if value not in known:
        choices = f"{', '.join(known[:-1])} or {known[-1]}"
        raise RouteLogError(f"{name}={_short(value)}; use {choices}")
    return value


def _number(env: Mapping[str, str], name: str, default: str, low: float, high: float) -> float:
    text = env.get(name, default)
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:  # also false for NaN
        raise RouteLogError(f"{name}={_short(text)}; use a number from {low:g} to {high:g}")
    return value


def _size(env: Mapping[str, str], name: str) -> int | None:
    """Bytes of a size such as ``512M``; None where it is unset."""
    text = env.get(name, "").strip()
    if not text:
        return None
    number, unit = (text[:-1], text[-1].upper()) if text[-1].upper() in _UNITS else (text, "")
    # isdecimal takes other scripts' digits too; their number of digits bounds what int() does.
    value = int(number) * _UNITS[unit] if number.isdecimal() and len(number) < 20 else 0
    if not LEAST_BYTES <= value <= 1 << 60:
        raise RouteLogError(f"{name}={_short(text)}; use a size of at least 1M, such as 512M or 4G")
    return value


def _sample(env: Mapping[str, str]) -> int:
    """n of ``1/n``."""
    text = env.get("VLLM_LOG_MOE_SAMPLE", "1/1").strip()
    one, _, n = text.partition("/")
    if one != "1" or not n.isdecimal() or not 1 <= len(n) <= 6 or int(n) < 1:
        raise RouteLogError(
            f"VLLM_LOG_MOE_SAMPLE={_short(text)}; use 1/n with n from 1 to 999999, such as 1/16"
        )
    return int(n)


def _short(text: str) -> str:
    """What was given, quoted, on one line of bounded length."""
    return repr(text) if len(text) <= 80 else f"{text[:80]!r}…"
