# SPDX-License-Identifier: Apache-2.0
"""What the machine says of itself is understood."""

from __future__ import annotations

from pathlib import Path

from expert_profiler.run import machine
from expert_profiler.run.machine import GpuMemory


def test_what_nvidia_smi_prints_is_understood() -> None:
    assert machine.parse_gpu("NVIDIA A10G, 23028 MiB, 22000 MiB") == GpuMemory(
        "NVIDIA A10G", 23028 << 20, 22000 << 20
    )


def test_memory_is_the_containers_limit_where_that_is_less(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  2000 kB\nMemAvailable:  1000 kB\n")
    assert machine.available_memory(meminfo, tmp_path) == 1000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("100\n")
    assert machine.available_memory(meminfo, tmp_path) == 1000 * 1024
    (tmp_path / "memory.max").write_text("5000\n")
    assert machine.available_memory(meminfo, tmp_path) == 4900
    assert machine.available_memory(tmp_path / "absent", tmp_path) is None


def test_a_missing_library_is_found_out() -> None:
    assert machine.missing_libraries(["libc.so.6"]) == []
    assert machine.missing_libraries(["libnosuch.so.9"]) == ["libnosuch.so.9"]


def test_the_processor_has_a_name() -> None:
    assert machine.cpu_name()
