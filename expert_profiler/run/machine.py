# SPDX-License-Identifier: Apache-2.0
"""What this machine is: processor, memory, GPUs, libraries. Reads, and changes nothing."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class GpuMemory:
    """One GPU's memory in bytes, as ``nvidia-smi`` reports it."""

    name: str
    total: int
    free: int


def gpus() -> list[GpuMemory]:
    """The CUDA devices of this machine, without initialising CUDA in this process."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        return []
    return [parse_gpu(line) for line in answer.stdout.splitlines() if line.strip()]


def parse_gpu(line: str) -> GpuMemory:
    """``"NVIDIA A10G, 23028 MiB, 22000 MiB"`` -> :class:`GpuMemory`."""
    name, *sizes = (part.strip() for part in line.rsplit(",", 2))
    return GpuMemory(name, *(int(size.split()[0]) << 20 for size in sizes))


def cpu_name() -> str:
    """The processor's name, as Linux tells it; else the architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def available_memory(
    meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Bytes that a new process can use: of the machine, or less where a container is limited."""
    try:
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):  # no cgroup v2, or "max": no limit
        return available
    return min(available, max(limit - used, 0))


def missing_libraries(names: Sequence[str] = ("libnuma.so.1",)) -> list[str]:
    """Those of the shared libraries that the loader does not find."""
    missing = []
    for name in names:
        try:
            ctypes.CDLL(name)
        except OSError:
            missing.append(name)
    return missing
