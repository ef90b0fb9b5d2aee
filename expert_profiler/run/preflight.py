# SPDX-License-Identifier: Apache-2.0
"""Judge a machine before anything is installed or run on it: one line a fact, and the remedy.

Standard library only, and it changes nothing.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from expert_profiler.errors import IN_CHECKOUT, UserError
from expert_profiler.patch import patch_state, targets
from expert_profiler.resources import ROOT
from expert_profiler.run import hub, machine, models

VLLM_VERSION = "0.15.1"
GB = 10**9
#: What installs, patches and runs.
RUN = "./test.sh" if IN_CHECKOUT else "expert-profiler profile"
INSTALL = "./test.sh" if IN_CHECKOUT else "pip install 'vllm-expert-profiler[cuda]' (or [cpu])"

# Disk that the first run takes: an environment (8.1 GB measured for the CPU lock), the
# installer's own copies while it works, and the model where one is downloaded.
DISK_CPU, DISK_CUDA, DISK_GPTQ_MODEL, DISK_INSTALLED = 12 * GB, 20 * GB, 9 * GB, 1 * GB
# Main memory: the engine's process and a 2 GiB KV cache, beside the script that drives it.
MEMORY_LEAST, MEMORY_EASY = 4 * GB, 7 * GB
# Weights of the GPTQ model (8.4 GB) with working memory.
GPU_EASY = 14 * GB


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    status: str  # "ok", "warn" or "FAIL"
    fact: str
    place: str = ""
    next: str = ""  # a command, or words where no command helps


# ---- the checks, each a pure function of what was measured ---------------------


def python_check(version: Sequence[int], executable: str) -> Check:
    fact = f"Python {'.'.join(map(str, version[:3]))}"
    if (3, 10) <= tuple(version[:2]) <= (3, 13):
        return Check("python", "ok", fact, executable)
    remedy = "install Python 3.10 to 3.13 and put it first on PATH as python3"
    return Check("python", "FAIL", f"{fact} is outside 3.10 to 3.13", executable, remedy)


def platform_check(system: str, machine: str) -> Check:
    fact = f"{system} {machine}"
    if system == "Linux" and machine in ("x86_64", "aarch64"):
        return Check("platform", "ok", fact)
    remedy = "use a Linux machine, or a Linux container"
    return Check("platform", "FAIL", f"{fact}: vLLM has no wheels for it", next=remedy)


def installer_check(uv: str | None, has_venv: bool) -> Check:
    """``has_venv``: whether this Python can make an environment with pip in it."""
    if uv is not None:
        return Check("installer", "ok", "uv", uv)
    if has_venv:
        return Check("installer", "ok", "python3 -m venv; uv will be installed into .venv")
    fact = "neither uv on PATH nor ensurepip in this Python"
    return Check("installer", "FAIL", fact, sys.executable, "apt-get install python3-venv")


def disk_check(free: int, needed: int, place: Path) -> Check:
    """``free`` and ``needed`` in bytes."""
    fact = f"{free / GB:.0f} GB free, {needed / GB:.0f} GB needed"
    if free >= needed:
        return Check("disk", "ok", fact, str(place))
    remedy = "free some space, or clone the repository on a larger disk"
    return Check("disk", "FAIL", fact, str(place), remedy)


def memory_check(available: int | None) -> Check:
    """``available`` in bytes; None where the system doesn't say."""
    if available is None:
        return Check("memory", "warn", "unknown", "/proc/meminfo")
    fact = f"{available / GB:.1f} GB available"
    if available < MEMORY_LEAST:
        fact += f", {MEMORY_LEAST / GB:.0f} GB needed"
        return Check("memory", "FAIL", fact, next="stop other programs, or use a larger machine")
    if available < MEMORY_EASY:
        return Check("memory", "warn", f"{fact}: tight", next=f"VLLM_CPU_KVCACHE_SPACE=1 {RUN}")
    return Check("memory", "ok", fact)


def device_check(gpus: Sequence[machine.GpuMemory], has_nvidia_smi: bool) -> Check:
    if not gpus and has_nvidia_smi:
        fact = "nvidia-smi is there but lists no GPU; the CPU will be used"
        return Check("device", "warn", fact, shutil.which("nvidia-smi") or "", "nvidia-smi")
    if not gpus:
        return Check("device", "ok", "no CUDA GPU; the CPU will be used")
    first = gpus[0]
    fact = f"{len(gpus)} x {first.name}, {first.free / GB:.0f} of {first.total / GB:.0f} GB free"
    if first.free < GPU_EASY:
        remedy = f"{RUN} --model demo, or free the GPU: nvidia-smi"
        return Check("device", "warn", f"{fact}: too little for --model gptq", next=remedy)
    return Check("device", "ok", fact)


def libraries_check(missing: Sequence[str]) -> Check:
    """``missing``: shared libraries that vllm-cpu's kernels are linked to, by soname."""
    if not missing:
        return Check("libraries", "ok", "libnuma.so.1")
    fact = f"{', '.join(missing)} is missing; vllm-cpu's kernels don't load without it"
    remedy = "apt-get install libnuma1 (Fedora: dnf install numactl-libs)"
    return Check("libraries", "FAIL", fact, next=remedy)


def compiler_check(compiler: str | None) -> Check:
    if compiler is not None:
        return Check("compiler", "ok", "C++ compiler", compiler)
    fact = "no C++ compiler: eager mode works, compiled mode on CPU does not"
    return Check("compiler", "warn", fact, next="apt-get install g++ (only for --no-enforce-eager)")


def vllm_check(target: targets.Target) -> Check:
    if not target.installed or target.version is None:
        return Check("vllm", "warn", "not installed yet", str(target.root), INSTALL)
    fact = f"{target.distribution or 'vllm'} {target.version}"
    if target.base_version == VLLM_VERSION:
        return Check("vllm", "ok", fact, str(target.root))
    fact += f", but the patch is for {VLLM_VERSION}"
    remedy = f"move that environment away, then {INSTALL}"
    return Check("vllm", "FAIL", fact, str(target.root), remedy)


def patch_check(report: patch_state.Report) -> Check:
    """The verdict on a patch's state: what applying it again mends is a warning."""
    state = report.state
    place = str(report.target.root)
    if state is patch_state.State.APPLIED:
        return Check("patch", "ok", f"applied, id {report.patch.patch_id[:12]}", place)
    if state is patch_state.State.NOT_INSTALLED:
        return Check("patch", "warn", "nothing to patch yet", next=INSTALL)
    if state is patch_state.State.PRISTINE:
        return Check("patch", "warn", "not applied yet", place, patch_state.SCRIPT)
    fact, _, remedy = report.message.partition("; run: ")
    mendable = state in (patch_state.State.HALF_APPLIED, patch_state.State.LEFTOVER)
    return Check("patch", "warn" if mendable else "FAIL", fact, next=remedy)


def model_check(
    name: str,
    has_gpu: bool,
    answer: Callable[[str], int | None] = hub.answer,
    cached: Callable[[str], Path | None] = hub.cached_model,
) -> Check:
    """Whether the model behind ``--model`` can be had: built, on disk, cached, or on the hub."""
    preset = models.resolve(name, has_gpu=has_gpu)
    model = preset.model
    if preset.missing():
        if preset is models.PRESETS["tiny"]:
            fact = "tiny checkpoint, random weights, not built yet"
            return Check("model", "ok", fact, model, f"{RUN} builds it")
        fact = f"the {preset.kind} is missing"
        return Check("model", "FAIL", fact, model, preset.remade_by or "")
    try:
        config = models.read_config(model)
        if config is not None:
            models.check_config(model, config, "all")
            return Check("model", "ok", f"{preset.kind}, on this disk", model)
    except UserError as error:
        fact, _, remedy = str(error).rpartition("; ")
        return Check("model", "FAIL", fact, next=remedy)
    if (folder := cached(model)) is not None:
        return Check("model", "ok", f"{model}, in the hub cache", str(folder))
    status = answer(f"api/models/{model}")
    if status == 200:
        return Check("model", "ok", f"{model}, on the hub")
    if status is None:
        fact = f"{model} is not in the cache and the hub can't be reached"
    else:
        fact = f"the hub answered {status} for {model}"
    remedy = f"{RUN} --model demo, or --model FOLDER of a checkpoint"
    return Check("model", "FAIL", fact, next=remedy)


def prompts_check(status: int | None) -> Check:
    """``status``: the hub's answer for the GSM8K data set."""
    if status == 200:
        return Check("prompts", "ok", "GSM8K, on the hub")
    return Check("prompts", "ok", "hub out of reach; 25 shipped word problems will be used")


# ---- measuring -----------------------------------------------------------------


def vllm_root(environ: Mapping[str, str] = os.environ, repo: Path = ROOT) -> Path:
    """The site-packages folder to look for vLLM in, which need not exist.

    Of the active environment (test.sh makes .venv that), of the one this Python belongs to, or
    of .venv. Never the system's: nothing here installs into it.
    """
    environment = repo / ".venv"
    if environ.get("VIRTUAL_ENV"):
        environment = Path(environ["VIRTUAL_ENV"])
    elif sys.prefix != sys.base_prefix:
        environment = Path(sys.prefix)
    return next(environment.glob("lib/python3*/site-packages"), environment)


def disk_needed(cuda: bool, installed: bool, model_missing: bool) -> int:
    """Bytes that the next run adds to the disk."""
    environment = DISK_INSTALLED if installed else DISK_CUDA if cuda else DISK_CPU
    return environment + (DISK_GPTQ_MODEL if cuda and model_missing else 0)


def look(model: str) -> list[Check]:
    """Measure this machine and judge it."""
    gpus = machine.gpus()
    # A wheel's patch command changes the vLLM beside it.
    root = vllm_root() if IN_CHECKOUT else targets.find_target().root
    target = targets.target_at(root)
    preset = models.resolve(model, has_gpu=bool(gpus))
    missing = not Path(preset.model).exists() and hub.cached_model(preset.model) is None
    needed = disk_needed(bool(gpus), target.installed, missing)
    checks = [
        python_check(sys.version_info[:3], sys.executable),
        platform_check(platform.system(), platform.machine()),
        installer_check(shutil.which("uv"), importlib.util.find_spec("ensurepip") is not None),
        disk_check(shutil.disk_usage(ROOT).free, needed, ROOT),
        memory_check(machine.available_memory()),
        device_check(gpus, shutil.which("nvidia-smi") is not None),
    ]
    if not gpus:
        checks += [
            libraries_check(machine.missing_libraries()),
            compiler_check(shutil.which("g++")),
        ]
    checks.append(vllm_check(target))
    try:
        checks.append(patch_check(patch_state.inspect(root)))
    except UserError as error:
        fact, _, remedy = str(error).rpartition("; ")
        checks.append(Check("patch", "FAIL", fact, next=remedy))
    checks.append(model_check(model, bool(gpus)))
    checks.append(prompts_check(hub.answer("api/datasets/openai/gsm8k")))
    return checks


# ---- the table -----------------------------------------------------------------


def table(checks: Sequence[Check]) -> str:
    """One line a check: status, name, fact, place in brackets, next command after an arrow."""
    lines = []
    for check in checks:
        place = f"  [{check.place}]" if check.place else ""
        follow = f"  -> {check.next}" if check.next else ""
        lines.append(f"{check.status:<5} {check.name:<10} {check.fact}{place}{follow}")
    return "\n".join(lines)
