# SPDX-License-Identifier: Apache-2.0
"""Starts the processes that do the measuring, and reads their answers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from expert_profiler.bench.cases import Case
from expert_profiler.errors import UserError
from expert_profiler.patch import actions, patch_state, targets
from expert_profiler.run import engine as engines

#: Where the processes import this package from: they run in other folders.
IMPORTED_FROM = str(Path(__file__).resolve().parents[2])


def environment(*paths: str, **switches: str) -> dict[str, str]:
    """This process's environment with no other of the recorder's switches than ``switches``.

    Args:
        paths: folders to import from, before this package's.
        switches: variables to set.
    """
    clean = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_LOG_MOE")}
    clean.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; only the CPU backend reads it
    path = os.pathsep.join([*paths, IMPORTED_FROM])
    return {**clean, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": path, **switches}


class Engine:
    """An ``engine_worker``.

    Args:
        model: checkpoint.
        folder: for its log and its recordings; made here.
        armed: whether the recorder is armed; else its switch is unset.
        vllm_root: folder of another vLLM than the installed one.
    """

    def __init__(
        self, model: str, folder: Path, armed: bool = False, vllm_root: Path | None = None
    ) -> None:
        folder.mkdir(parents=True)
        self._log = folder / "engine.log"
        switches = {"VLLM_LOG_MOE_API": "1", "VLLM_LOG_MOE_ON_FULL": "block"} if armed else {}
        worker = "expert_profiler.bench.engine_worker"
        self._process = subprocess.Popen(
            # An absolute path: the worker runs elsewhere, so that no module here shadows another.
            [sys.executable, "-m", worker, str(Path(model).absolute()), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=folder,
            env=environment(*([str(vllm_root)] if vllm_root else []), **switches),
            text=True,
        )
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the process was started without pipes")
        self._commands, self._answers = self._process.stdin, self._process.stdout
        self._answer()

    def ask(self, do: str, **arguments: Any) -> Any:
        """Send a command and wait for its answer."""
        self._commands.write(json.dumps({"do": do, **arguments}) + "\n")
        self._commands.flush()
        return self._answer()

    def run(self, mode: str, case: Case, layers: str | None = None, do: str = "run") -> Any:
        """One pass; see ``engine_worker.Bench.run``."""
        return self.ask(do, mode=mode, case=vars(case), layers=layers)

    def close(self) -> None:
        """End the process: it has nothing left to say."""
        self._commands.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self) -> Any:
        line = self._answers.readline()
        if not line:
            self._process.wait()
            text = self._log.read_text(errors="replace") if self._log.is_file() else ""
            reason = engines.reason_in(self._log) or last_line(text)
            raise UserError(
                f"the bench's engine ended with code {self._process.returncode}: {reason}; "
                "run again with --keep and read engine.log in the folder that it names"
            )
        return json.loads(line)


def last_line(text: str) -> str:
    """What a process said last."""
    return (text.strip().splitlines()[-1:] or ["it printed nothing"])[0]


def pristine_vllm(folder: Path) -> Path:
    """A copy of the installed vLLM with the patch reverted, for ``PYTHONPATH``.

    Everything but the patched files is linked; ``revert`` replaces files and never writes through a
    link.
    """
    package = targets.find_target().root / "vllm"
    shutil.copytree(package, folder / "vllm", copy_function=os.symlink)
    for name in targets.DISTRIBUTIONS:
        try:
            info = Path(str(metadata.distribution(name)._path))  # type: ignore[attr-defined]
        except metadata.PackageNotFoundError:
            continue
        shutil.copytree(info, folder / info.name)
    report = actions.revert(root=folder)
    if report.state is not patch_state.State.PRISTINE:
        raise UserError(f"no unpatched copy to compare with: {report.message}")
    return folder
