"""The shape of the shipped patch: small hooks, own code in its own folder, nothing else."""

from __future__ import annotations

import ast
import io

import pytest
from unidiff import PatchedFile, PatchSet

from expert_profiler.patch import patch_file
from tests.support.patch_kit import PATCH, REPO, export_patch

LAYER = "vllm/model_executor/layers/fused_moe/layer.py"


@pytest.fixture(scope="module")
def patch() -> PatchSet:
    return PatchSet(io.StringIO(PATCH.read_text(encoding="utf-8", errors="strict"), newline=""))


@pytest.fixture(scope="module")
def hooks(patch: PatchSet) -> list[PatchedFile]:
    return [file for file in patch if not file.is_added_file]


def test_hooks_add_under_40_lines_in_all_existing_files_together(hooks: list[PatchedFile]) -> None:
    added = {file.path: file.added for file in hooks}
    assert 0 < sum(added.values()) < 40, added


def test_no_file_is_removed_or_renamed(patch: PatchSet) -> None:
    assert [f.path for f in patch if f.is_removed_file or f.is_rename] == []


def test_new_files_are_in_two_folders_and_are_those_of_the_overlay(patch: PatchSet) -> None:
    added = {file.path for file in patch if file.is_added_file}
    overlay = REPO / "overlay"
    assert added == {
        path.relative_to(overlay).as_posix()
        for path in (overlay / "vllm").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    folders = ("vllm/moe_routes/", "vllm/entrypoints/serve/expert_distribution/")
    assert {path for path in added if not path.startswith(folders)} == set()


def test_layer_py_has_both_calls_and_qwen2_moe_is_untouched(patch: PatchSet) -> None:
    lines = [
        line.value
        for file in patch
        if file.path == LAYER
        for hunk in file
        for line in hunk
        if line.is_added
    ]
    assert any("_log_moe_routes(" in line for line in lines)
    assert any("_write_moe_log_header(" in line for line in lines)
    assert not any(file.path.endswith("qwen2_moe.py") for file in patch)


def test_sections_are_sorted_and_unique(patch: PatchSet) -> None:
    paths = [file.path for file in patch]
    assert paths == sorted(set(paths))


def test_the_header_says_what_why_base_and_how_to_drop_it() -> None:
    header = PATCH.read_text(encoding="utf-8").partition("\ndiff --git ")[0]
    for field in (
        "Description: ",
        "Origin: ",
        "Base: vllm 0.15.1\n",
        "Drop: ./apply_patch.sh revert",
    ):
        assert field in header


def test_the_patch_is_what_export_patch_writes(capsys: pytest.CaptureFixture[str]) -> None:
    assert export_patch.main(["--check"]) == 0, capsys.readouterr().out


def test_the_recorder_hashes_exactly_the_hooked_files(hooks: list[PatchedFile]) -> None:
    """Else the patch_id in a log's header would not be the one that check prints."""
    tree = ast.parse((REPO / "overlay/vllm/moe_routes/recording/provenance.py").read_text())
    (names,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and [getattr(t, "id", "") for t in node.targets] == ["HOOKED_FILES"]
    )
    assert sorted(names) == sorted(file.path for file in hooks)
    assert len(patch_file.load_patch(PATCH).patch_id) == 64
