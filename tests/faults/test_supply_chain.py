"""The patch touches the files of its own list and nothing else; the locks pin every byte."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from expert_profiler.bench.engine_process import pristine_vllm
from expert_profiler.errors import UserError
from expert_profiler.patch import actions, targets
from expert_profiler.patch.patch_file import load_patch
from tests.support.paths import REPO


def hashes(folder: Path) -> dict[str, str]:
    """Contents of every file below ``folder``, byte code aside."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_only_the_files_of_the_patch_change_in_the_real_package(tmp_path: Path) -> None:
    """The installed vLLM, unpatched in a copy made of links: what lies behind them stays."""
    try:
        installed = targets.find_target().root / "vllm"
    except UserError:
        pytest.skip("vllm is not installed here")
    live = hashes(installed)
    root = pristine_vllm(tmp_path)
    before = hashes(root)
    report = actions.apply(root=root)
    assert report.ok, report.message
    after = hashes(root)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed == {file.path for file in load_patch().files}
    actions.revert(root=root)
    assert hashes(root) == before
    assert hashes(installed) == live


@pytest.mark.parametrize(
    "lock",
    ["requirements-lock.txt", "requirements/cpu-0.15.1.txt", "requirements/dev.txt",
     "requirements/uv.txt"],
)  # fmt: skip
def test_every_package_of_a_lock_has_its_version_and_hashes(lock: str) -> None:
    text = re.sub(r"\\\n", " ", (REPO / lock).read_text())
    packages = [line for line in text.splitlines() if line and not line.startswith(("#", " ", "-"))]
    assert packages
    for line in packages:
        assert re.match(r"[A-Za-z0-9._\[\]-]+==[^\s;]+", line), line[:80]
        assert "--hash=sha256:" in line, line[:80]
