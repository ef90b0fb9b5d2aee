# SPDX-License-Identifier: Apache-2.0
"""A real ``vllm serve`` in a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from tests.support.cores import own_core

READY_SECONDS = 280.0


class VllmServer:
    """``vllm serve`` on a free port, started but not waited for.

    Args:
        model: folder of the checkpoint.
        folder: where its log and its recordings go.
        env: more environment variables.
        options: more options of ``vllm serve``.
    """

    def __init__(
        self,
        model: Path,
        folder: Path,
        env: Mapping[str, str],
        options: Sequence[str] = (),
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = folder / "server.log"
        self.recordings = folder / "recordings"
        clean = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_LOG_MOE")}
        command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model)]
        command += ["--port", str(self.port), "--host", "127.0.0.1", "--served-model-name", "tiny"]
        command += ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager"]
        command += ["--no-enable-prefix-caching", "--seed", "1", *options]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**clean, **own_core(), "VLLM_CPU_KVCACHE_SPACE": "1", **env},
            )
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if self.http.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        tail = self.log.read_text(errors="replace")[-4000:]
        raise AssertionError(f"vllm serve did not come up; the end of {self.log}:\n{tail}")

    def post(self, route: str, code: int = 200, **params: Any) -> dict[str, Any]:
        answer = self.http.post(f"/{route}_expert_distribution", params=params)
        assert answer.status_code == code, answer.text
        content: dict[str, Any] = answer.json()
        return content

    def status(self) -> dict[str, Any]:
        content: dict[str, Any] = self.http.get("/expert_distribution_status").json()
        return content

    @property
    def pid(self) -> int:
        """Of the server's own process, not of its engine's."""
        return self._process.pid

    def reap(self, seconds: float) -> int:
        """Wait until it is gone by itself; its exit code."""
        return self._process.wait(seconds)

    def stop(self) -> None:
        """SIGTERM, and its end."""
        self.http.close()
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
