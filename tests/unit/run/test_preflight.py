"""The look before installing: one line a fact, FAIL only for what test.sh can't mend."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from expert_profiler.commands import preflight as command
from expert_profiler.errors import UserError
from expert_profiler.patch import patch_state, targets
from expert_profiler.patch.patch_state import State
from expert_profiler.run import machine, models, preflight
from expert_profiler.run.preflight import GB, Check
from tests.support.paths import REPO


@pytest.mark.parametrize(
    ("version", "status"),
    [((3, 9, 18), "FAIL"), ((3, 10, 0), "ok"), ((3, 13, 9), "ok"), ((3, 14, 0), "FAIL")],
)
def test_python_3_10_to_3_13(version: tuple[int, ...], status: str) -> None:
    assert preflight.python_check(version, "/usr/bin/python3").status == status


@pytest.mark.parametrize(
    ("check", "status"),
    [
        (preflight.platform_check("Linux", "x86_64"), "ok"),
        (preflight.platform_check("Darwin", "arm64"), "FAIL"),
        (preflight.installer_check("/usr/bin/uv", False), "ok"),
        (preflight.installer_check(None, True), "ok"),
        (preflight.installer_check(None, False), "FAIL"),
        (preflight.disk_check(12 * GB, 12 * GB, Path()), "ok"),
        (preflight.disk_check(11 * GB, 12 * GB, Path()), "FAIL"),
        (preflight.memory_check(None), "warn"),
        (preflight.memory_check(3 * GB), "FAIL"),
        (preflight.memory_check(5 * GB), "warn"),
        (preflight.memory_check(16 * GB), "ok"),
        (preflight.device_check([], False), "ok"),
        (preflight.device_check([], True), "warn"),
        (preflight.device_check([machine.GpuMemory("A10G", 24 * GB, 23 * GB)], True), "ok"),
        (preflight.device_check([machine.GpuMemory("T4", 16 * GB, 2 * GB)], True), "warn"),
        (preflight.libraries_check([]), "ok"),
        (preflight.libraries_check(["libnuma.so.1"]), "FAIL"),
        (preflight.compiler_check("/usr/bin/g++"), "ok"),
        (preflight.compiler_check(None), "warn"),
        (preflight.prompts_check(200), "ok"),
        (preflight.prompts_check(None), "ok"),
    ],
)
def test_what_is_not_ok_names_the_next_step(check: Check, status: str) -> None:
    assert check.status == status
    if status == "FAIL":
        assert check.next


@pytest.mark.parametrize(
    ("version", "installed", "status"),
    [
        ("0.15.1", True, "ok"),
        ("0.15.1+cpu", True, "ok"),
        ("0.16.0", True, "FAIL"),
        (None, False, "warn"),
    ],
)
def test_vllm_is_there_in_the_right_version(
    version: str | None, installed: bool, status: str
) -> None:
    target = targets.Target(Path("/x"), installed, version, "vllm")
    assert preflight.vllm_check(target).status == status


@pytest.mark.parametrize(
    ("state", "status"),
    [
        (State.APPLIED, "ok"),
        (State.PRISTINE, "warn"),
        (State.NOT_INSTALLED, "warn"),
        (State.HALF_APPLIED, "warn"),
        (State.LEFTOVER, "warn"),
        (State.CHANGED, "FAIL"),
        (State.OTHER_VERSION, "FAIL"),
    ],
)
def test_every_patch_state_is_judged(state: State, status: str) -> None:
    report: Any = SimpleNamespace(
        state=state,
        target=SimpleNamespace(root=Path("/x")),
        patch=SimpleNamespace(patch_id="0123456789abcdef"),
        message="layer.py in /x: changed; run: uv pip install --reinstall vllm",
    )
    check = preflight.patch_check(report)
    assert check.status == status
    assert check.next or status == "ok"


def no_cache(_: str) -> None:
    return None


def test_a_model_on_the_hub_in_the_cache_or_out_of_reach(tmp_path: Path) -> None:
    def check(status: int | None, cached: Path | None = None) -> Check:
        return preflight.model_check("org/moe", False, lambda _: status, lambda _: cached)

    assert check(200).status == "ok"
    assert check(None, tmp_path).status == "ok"
    assert check(None).status == "FAIL" and "can't be reached" in check(None).fact
    assert check(404).status == "FAIL" and "404" in check(404).fact


def test_a_local_model_must_be_a_moe_checkpoint(tmp_path: Path) -> None:
    def check() -> Check:
        return preflight.model_check(str(tmp_path), False, lambda _: None, no_cache)

    assert check().status == "FAIL" and "config.json" in check().fact
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"num_hidden_layers": 2}))
    assert check().status == "FAIL" and "dense" in check().fact
    config.write_text(json.dumps({"num_hidden_layers": 2, "num_experts": 8}))
    assert check().status == "ok"


@pytest.mark.parametrize("name", ["auto", "demo", "tiny"])
def test_without_a_gpu_the_repositorys_checkpoints_need_no_network(name: str) -> None:
    def asked(_: str) -> None:
        pytest.fail("asked the hub")

    assert preflight.model_check(name, False, asked, no_cache).status == "ok"


def test_a_demo_model_that_was_deleted_can_be_had_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = replace(models.PRESETS["demo"], model=str(tmp_path / "demo_model"))
    monkeypatch.setitem(models.PRESETS, "demo", gone)
    check = preflight.model_check("demo", False)
    assert check.status == "FAIL"
    assert check.next.startswith("git checkout -- ")


def test_vllm_is_looked_for_where_it_would_be_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / ".venv" / "lib" / "python3.12" / "site-packages"
    site.mkdir(parents=True)
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    assert preflight.vllm_root({}, tmp_path) == site
    active = str(tmp_path / "not-made-yet")
    assert preflight.vllm_root({"VIRTUAL_ENV": active}, tmp_path) == Path(active)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "another"))
    assert preflight.vllm_root({}, tmp_path) == tmp_path / "another"


def test_disk_counts_what_the_next_run_adds() -> None:
    bare = preflight.disk_needed(cuda=False, installed=False, model_missing=True)
    cuda = preflight.disk_needed(cuda=True, installed=False, model_missing=True)
    done = preflight.disk_needed(cuda=True, installed=True, model_missing=False)
    assert done < bare < cuda


def test_the_exit_code_follows_the_worst_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [Check("a", "ok", "fine"), Check("b", "warn", "hm", "/place", "do this")]
    monkeypatch.setattr(preflight, "look", lambda _: lines)
    # Options that are for profile are none of its business.
    assert command.main(["--brief", "--mode", "log", "--repeats", "1"]) == 0
    assert capsys.readouterr().out == "warn  b          hm  [/place]  -> do this\n"
    lines.append(Check("c", "FAIL", "broken", next="mend it"))
    assert command.main([]) == 1
    assert "1 of 3 checks FAILED" in capsys.readouterr().out


def test_a_patch_that_is_missing_is_a_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: Path | None) -> None:
        raise UserError("cannot read the patch x.patch: gone; run: git checkout x.patch")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(patch_state, "inspect", missing)
    (check,) = [check for check in preflight.look("tiny") if check.name == "patch"]
    assert check.status == "FAIL" and "git checkout" in check.next


def test_it_runs_where_nothing_is_installed() -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-m", "expert_profiler", "preflight", "--model", "tiny"],
        cwd=REPO,
        env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    names = [line.split()[1] for line in done.stdout.splitlines()[:-1]]
    assert {"python", "disk", "memory", "device", "vllm", "patch", "model"} <= set(names)
