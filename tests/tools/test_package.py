# SPDX-License-Identifier: Apache-2.0
"""The built wheel, in an environment without vLLM or torch and outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

import expert_profiler
from expert_profiler.patch import actions, targets
from expert_profiler.patch.patch_file import load_patch
from tests.support import logs
from tests.support.paths import REPO

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PATCH = "vllm-v0.15.1-moe-logger.patch"
BUNDLED = "expert_profiler/bundled"


class Installed(NamedTuple):
    """A clean environment with the wheel in it, and a folder elsewhere to work in."""

    wheel: Path
    sdist: Path
    bin: Path
    work: Path

    def run(self, *words: str | Path, code: int = 0) -> str:
        """Run ``expert-profiler``; its output, errors included."""
        clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        done = subprocess.run(
            [str(self.bin / "expert-profiler"), *map(str, words)],
            cwd=self.work,
            env=clean | {"PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("package")
    work = tmp_path_factory.mktemp("elsewhere")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(build, cwd=REPO, check=True, capture_output=True)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    uv = shutil.which("uv", path=tools)
    assert uv is not None, "tests/run.sh puts uv into .venv where it is not on PATH"
    venv = folder / "venv"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(venv)], check=True)
    # The versions that are tested otherwise, most of them in uv's cache.
    install = [uv, "pip", "install", "--quiet", "--python", str(venv), str(wheel)]
    install += ["--constraint", str(REPO / "requirements" / "cpu-0.15.1.txt")]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode and "error sending request" in done.stderr:
        pytest.skip("no network, and uv's cache lacks a package that the wheel needs")
    assert done.returncode == 0, done.stderr
    return Installed(wheel, sdist, venv / "bin", work)


@pytest.fixture(scope="module")
def log(installed: Installed) -> Path:
    return logs.write_run(installed.work / "run") / "moe_routes.jsonl"


def test_the_wheel_carries_what_the_commands_need(installed: Installed) -> None:
    overlay = REPO / "overlay"
    with zipfile.ZipFile(installed.wheel) as wheel:
        held = {name: wheel.read(name) for name in wheel.namelist() if name.startswith(BUNDLED)}
        names = wheel.namelist()
    sources = [p for p in overlay.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    expected = {f"{BUNDLED}/overlay/{p.relative_to(overlay).as_posix()}": p for p in sources}
    expected[f"{BUNDLED}/{PATCH}"] = REPO / PATCH
    assert held == {name: path.read_bytes() for name, path in expected.items()}
    assert {name.partition("/")[0] for name in names} == {
        "expert_profiler",
        f"vllm_expert_profiler-{expert_profiler.__version__}.dist-info",
    }
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_the_source_distribution_has_what_the_wheel_is_built_from(installed: Installed) -> None:
    with tarfile.open(installed.sdist) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", PATCH} <= names
    assert {"expert_profiler/__init__.py", "overlay/vllm/moe_routes/schema.py"} <= names
    assert not any(name.startswith(("demo_model", "tests")) for name in names)


def test_nothing_of_vllm_is_installed(installed: Installed) -> None:
    look = "import importlib.util as u; print([n for n in ('vllm', 'torch') if u.find_spec(n)])"
    python = str(installed.bin / "python")
    done = subprocess.run([python, "-I", "-c", look], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert "vllm is not installed" in installed.run("patch", "check", code=2)


def test_the_door_opens(installed: Installed) -> None:
    assert installed.run("--version") == f"expert-profiler {expert_profiler.__version__}\n"
    assert "commands:" in installed.run("--help")


def test_a_log_becomes_a_chart_and_a_report(installed: Installed, log: Path) -> None:
    installed.run("hist", log, "--out", "hist.png")
    assert (installed.work / "hist.png").read_bytes().startswith(b"\x89PNG")
    installed.run("report", log, "--out", "report")
    page = (installed.work / "report" / "report.html").read_text(encoding="utf-8")
    assert "tiny/moe" in page


def test_two_logs_are_compared(installed: Installed, log: Path) -> None:
    other = logs.write_log(installed.work / "other.jsonl", logs.run_rows(((5, 4), (3, 6))))
    installed.run("compare", log, other, "--out", "compared")
    assert list((installed.work / "compared").glob("*.html"))


def test_a_log_is_queried_converted_exported_and_validated(installed: Installed, log: Path) -> None:
    assert "24" in installed.run("sql", log, "select count(*) as rows from routes")
    installed.run("convert", log, "log.parquet")
    assert list((installed.work / "log.parquet").glob("*.parquet"))
    assert "24" in installed.run("sql", "log.parquet", "select count(*) as rows from routes")
    installed.run("export", log, "--format", "npz", "--out", "log.npz")
    assert (installed.work / "log.npz").is_file()
    installed.run("validate", log.parent)


def test_vllm_is_patched_without_a_checkout(installed: Installed, tmp_path: Path) -> None:
    """The bundled patch, on what it touches of the vLLM that is installed here."""
    source = targets.find_target()
    root = tmp_path / "unpacked"
    for path in [*(file.path for file in load_patch().files), "vllm/__init__.py"]:
        if (source.root / path).is_file():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source.root / path, root / path)
    actions.revert(root)
    told = installed.run("patch", "check", "--root", root, code=1)
    assert "state:    pristine" in told
    assert f"run: expert-profiler patch apply --root {root}" in told
    assert installed.run("patch", "apply", "--root", root).startswith("applied: ")
    assert "state:    applied" in installed.run("patch", "check", "--root", root)
    assert installed.run("patch", "revert", "--root", root).startswith("reverted: ")


def test_what_a_wheel_can_t_do_is_told_with_the_remedy(installed: Installed) -> None:
    assert "vllm is not installed" in installed.run("profile", "--out", "p", code=2)
    told = installed.run("bench", "--out", "b", code=2)
    assert "run: pip install vllm==0.15.1" in told
