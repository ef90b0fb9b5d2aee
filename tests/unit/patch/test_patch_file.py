# SPDX-License-Identifier: Apache-2.0
"""The patch is its own manifest; a damaged one is refused."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expert_profiler.errors import UserError
from expert_profiler.patch import actions, patch_file, patch_state
from tests.support.patch_kit import (
    ADDED,
    PATCHED,
    Wheel,
    make_wheel,
    patch_bytes,
    snapshot,
)


def test_patch_id_is_the_hash_of_the_patched_files(wheel: Wheel) -> None:
    """The recorder inside vLLM computes the same from the installed files."""
    actions.apply(wheel.root, wheel.patch)
    lines = b""
    for path in sorted([*PATCHED, *ADDED]):
        content = wheel.read(path)
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324
        lines += f"{blob} {path}\n".encode()
    assert patch_file.load_patch(wheel.patch).patch_id == hashlib.sha256(lines).hexdigest()


def test_blob_ids_are_those_of_git(tmp_path: Path) -> None:
    for content in (b"", b"a\r\nb", b"\xff\x00"):
        (tmp_path / "f").write_bytes(content)
        command = ["git", "hash-object", "--no-filters", str(tmp_path / "f")]
        git = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
        assert patch_file.blob_id(content) == git.stdout.strip()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"Base: vllm 0.15.1\n", b"", "no line 'Base: vllm VERSION'"),
        (b"+core = 1", b"+core = 2", r"vllm/routes/core\.py do not give its blob id"),
        (b"a/vllm/envs.py b/vllm/envs.py", b"a/../envs.py b/../envs.py", "one plain path"),
        (b"a/vllm/envs.py b/vllm/envs.py", b"a/vllm/envs.py b/vllm/x.py", "one plain path"),
        (b"new file mode 100644", b"new file mode 120000", "damaged at line"),
        (b"\n+HOOK", b"\nHOOK", "damaged at line"),
        (b"+HOOK\n", b"", "damaged at line"),
        (b"@@ -1,6 +1,7 @@", b"@@ -1,6 +1,9 @@", "damaged at line"),
        (b"+++ b/vllm/envs.py", b"+++ b/vllm/env.py", "damaged at line"),
        (b"diff --git", b"GIT binary patch\ndiff --git", "damaged at line"),
    ],
)
def test_a_damaged_patch_is_refused(wheel: Wheel, old: bytes, new: bytes, message: str) -> None:
    data = wheel.patch.read_bytes()
    before = snapshot(wheel.root)
    where = data.rindex(old) if old == b"diff --git" else data.index(old)
    wheel.patch.write_bytes(data[:where] + new + data[where + len(old) :])
    with pytest.raises(UserError, match=message):
        actions.apply(wheel.root, wheel.patch)
    assert snapshot(wheel.root) == before


def test_hunks_that_give_another_blob_change_nothing(wheel: Wheel) -> None:
    before = snapshot(wheel.root)
    wheel.patch.write_bytes(wheel.patch.read_bytes().replace(b"+HOOK\n", b"+HACK\n"))
    with pytest.raises(UserError, match=r"hunks for vllm/envs\.py do not give blob"):
        actions.apply(wheel.root, wheel.patch)
    assert snapshot(wheel.root) == before


def test_a_missing_patch_is_one_line(wheel: Wheel) -> None:
    wheel.patch.unlink()
    with pytest.raises(UserError, match=r"cannot read the patch .*run: git checkout"):
        patch_state.inspect(wheel.root, wheel.patch)


LINES = st.lists(
    st.sampled_from(
        [b"a\n", b"b\n", b"c\r\n", b"\n", b"\f\n", b"\xe2\x80\xa8\n", b"- x\n", b"@@\n"]
    ),
    max_size=40,
)
TEXTS = st.builds(lambda lines, cut: b"".join(lines)[: -1 if cut else None], LINES, st.booleans())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(before=TEXTS, after=TEXTS, new=TEXTS)
def test_any_edit_goes_forth_and_back(
    tmp_path_factory: pytest.TempPathFactory, before: bytes, after: bytes, new: bytes
) -> None:
    wheel = make_wheel(tmp_path_factory.mktemp("any"))
    wheel.write({"vllm/envs.py": before})
    start = snapshot(wheel.root)
    hooked = {} if before == after else {"vllm/envs.py": after}
    wheel.patch.write_bytes(patch_bytes({"vllm/envs.py": before}, hooked, {"vllm/new/n.py": new}))
    actions.apply(wheel.root, wheel.patch)
    assert wheel.read("vllm/envs.py") == after
    assert wheel.read("vllm/new/n.py") == new
    actions.revert(wheel.root, wheel.patch)
    assert snapshot(wheel.root) == start
