"""Start engines for the tests, and the Hugging Face forward pass they are checked against."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import oracle
from tests.support.cores import own_core

#: What the tests found: (mode, rows expected, rows logged, agreement with the oracle).
TABLE: list[tuple[str, int, int, oracle.Agreement]] = []

DRIVER = Path(__file__).with_name("driver.py")
WEIGHT_TOLERANCE = oracle.WEIGHT_TOLERANCE


class Engines:
    """Starts engines in processes forked from one that has imported vLLM.

    Args:
        vllm_root: folder of another vLLM than the installed one, for ``PYTHONPATH``.
    """

    def __init__(self, vllm_root: Path | None = None) -> None:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_LOG_MOE")}
        paths = {"PYTHONPATH": str(vllm_root)} if vllm_root else {}
        self._process = subprocess.Popen(
            [sys.executable, str(DRIVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**clean, **paths, **own_core(), "VLLM_CPU_KVCACHE_SPACE": "1"},
            text=True,
        )

    def run(
        self,
        folder: Path,
        engine: Mapping[str, Any],
        steps: Sequence[Mapping[str, Any]],
        env: Mapping[str, str] | None = None,
        check: bool = True,
        async_scheduling: bool = False,
    ) -> list[Any]:
        """Run one engine, in one process unless ``env`` says otherwise; one result a step.

        With ``check`` off the engine may fail; then the list is empty and ``engine.log`` in
        ``folder`` says why.
        """
        folder.mkdir(parents=True, exist_ok=True)
        result, log = folder / "result.json", folder / "engine.log"
        spec = {
            "engine": dict(engine),
            "steps": list(steps),
            "async_scheduling": async_scheduling,
            "env": {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **(env or {})},
            "result": str(result),
            "log": str(log),
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(spec) + "\n")
        self._process.stdin.flush()
        code = -1
        for line in self._process.stdout:  # libraries may print while they are imported
            if line.strip().lstrip("-").isdigit():
                code = int(line)
                break
        if code != 0:
            tail = log.read_text()[-6000:] if log.exists() else "nothing printed"
            assert not check, f"the engine failed ({code}); the end of {log}:\n{tail}"
            return []
        return list(json.loads(result.read_text(encoding="utf-8"))["results"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


@dataclass
class Log:
    """A parsed log.

    Attributes:
        meta: the header.
        routes: by (req_id, token_idx, layer), unflagged rows only.
        flagged: the others, in order.
        requests: by req_id.
        end: the end record.
        rows: number of route lines.
    """

    meta: dict[str, Any]
    routes: dict[tuple[str, int, int], dict[str, Any]]
    flagged: list[dict[str, Any]]
    requests: dict[str, dict[str, Any]]
    end: dict[str, Any]
    rows: int


def read(path: Path) -> Log:
    """Parse a complete log with nothing but ``json``; asserts its outer shape."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines[0]["type"] == "meta", "the header comes first"
    assert lines[-1]["type"] == "end", "the end record comes last"
    rows = [line for line in lines[1:-1] if line["type"] == "route"]
    plain = [row for row in rows if "flag" not in row]
    routes = {(row["req_id"], row["token_idx"], row["layer"]): row for row in plain}
    assert len(routes) == len(plain), "no (request, position, layer) twice"
    return Log(
        meta=lines[0],
        routes=routes,
        flagged=[row for row in rows if "flag" in row],
        requests={line["req_id"]: line for line in lines[1:-1] if line["type"] == "request"},
        end=lines[-1],
        rows=len(rows),
    )


def compare_with_oracle(
    log: Log, outputs: Sequence[Mapping[str, Any]], model: str
) -> oracle.Agreement:
    """Compare every logged row with a float32 Hugging Face forward pass over prompt + output."""
    return oracle.compare(log, outputs, oracle.load(model))
