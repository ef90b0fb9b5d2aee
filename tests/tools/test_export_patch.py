"""export_patch.py: one home per byte, and the same bytes on every machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expert_profiler.errors import UserError
from expert_profiler.patch.git_environment import git_environment
from expert_profiler.patch.patch_file import parse_patch
from tests.support.patch_kit import (
    ADDED,
    PATCHED,
    REPO,
    WHEEL,
    Wheel,
    check_wheels,
    export_patch,
    make_wheel,
    patch_bytes,
)


class Project:
    """A pristine tree, an edited tree, an overlay and the patch between them."""

    def __init__(self, folder: Path) -> None:
        self.pristine, self.edited = folder / "pristine", folder / "edited"
        self.overlay, self.patch = folder / "overlay", folder / "the.patch"
        for tree, files in (
            (self.pristine, WHEEL),
            (self.edited, WHEEL | PATCHED | ADDED),
            (self.overlay, ADDED),
        ):
            for path, content in files.items():
                (tree / path).parent.mkdir(parents=True, exist_ok=True)
                (tree / path).write_bytes(content)

    def run(self, *arguments: str | Path) -> int:
        where = ["--patch", str(self.patch), "--overlay", str(self.overlay)]
        return int(export_patch.main([*where, *map(str, arguments)]))

    def derive(self) -> int:
        return self.run("--hooks-from", self.pristine, self.edited)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_the_patch_is_made_from_scratch(project: Project) -> None:
    assert project.derive() == 0
    assert project.patch.read_bytes() == patch_bytes()
    assert [f.path for f in parse_patch(project.patch.read_bytes()).files] == sorted(
        [*PATCHED, *ADDED]
    )


def test_a_second_export_changes_no_byte(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.derive()
    before = project.patch.stat()
    assert project.run() == 0
    assert project.derive() == 0
    assert project.patch.stat().st_ino == before.st_ino
    assert "unchanged" in capsys.readouterr().out
    assert sorted(p.name for p in project.patch.parent.iterdir()) == [
        *("edited", "overlay", "pristine", "the.patch"),
    ]


def test_an_overlay_edit_reaches_the_patch_and_the_hooks_stay(project: Project) -> None:
    project.derive()
    before = {f.path: f.raw for f in parse_patch(project.patch.read_bytes()).files}
    (project.overlay / "vllm/routes/core.py").write_text("core = 2\n")
    (project.overlay / "vllm/routes/formats/text.py").unlink()
    (project.overlay / "vllm/routes/more.py").write_text("more = 1\n")
    assert project.run() == 0
    after = {f.path: f.raw for f in parse_patch(project.patch.read_bytes()).files}
    assert {p: after[p] for p in PATCHED} == {p: before[p] for p in PATCHED}
    assert b"+core = 2\n" in after["vllm/routes/core.py"]
    assert after.keys() - before.keys() == {"vllm/routes/more.py"}
    assert before.keys() - after.keys() == {"vllm/routes/formats/text.py"}


def test_byte_code_is_not_exported(project: Project) -> None:
    cache = project.overlay / "vllm/routes/__pycache__"
    cache.mkdir()
    (cache / "core.cpython-311.pyc").write_bytes(b"\0")
    (cache / "notes.txt").write_bytes(b"\0")
    (project.overlay / "vllm/routes/old.pyc").write_bytes(b"\0")
    project.derive()
    assert b"pyc" not in project.patch.read_bytes()


def test_check_passes_and_names_what_drifted(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.derive()
    assert project.run("--check") == 0
    bytes_before = project.patch.read_bytes()
    (project.overlay / "vllm/routes/core.py").write_text("core = 2\n")
    (project.overlay / "vllm/routes/more.py").write_text("more = 1\n")
    capsys.readouterr()
    assert project.run("--check") == 1
    assert capsys.readouterr().out.splitlines() == [
        "drifted: vllm/routes/core.py",
        "drifted: vllm/routes/more.py",
        "the.patch is out of date; run: tools/export_patch.py",
    ]
    assert project.patch.read_bytes() == bytes_before


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        (b"forgets the\n", b"forgets  the\n", "(header)"),
        (b"diff --git a/vllm/routes/core.py", b"", None),
    ],
)
def test_check_sees_every_byte(
    project: Project, capsys: pytest.CaptureFixture[str], old: bytes, new: bytes, name: str | None
) -> None:
    project.derive()
    data = project.patch.read_bytes()
    assert old in data
    project.patch.write_bytes(data.replace(old, new))
    if name is None:
        with pytest.raises(UserError, match="damaged at line"):
            project.run("--check")
    else:
        assert project.run("--check") == 1
        assert f"drifted: {name}" in capsys.readouterr().out


def test_check_sees_a_wrong_order(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project.derive()
    data = project.patch.read_bytes()
    first, *rest = re.split(rb"(?=^diff --git )", data, flags=re.MULTILINE)
    project.patch.write_bytes(first + b"".join(reversed(rest)))
    assert project.run("--check") == 1
    assert "order" in capsys.readouterr().out


def test_user_settings_change_nothing(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.derive()
    expected = project.patch.read_bytes()
    home = tmp_path / "home"
    home.mkdir()
    (home / "attributes").write_text("*.py -diff\n")
    (home / ".gitconfig").write_text(
        f"[core]\n\tautocrlf = true\n\tquotepath = true\n\tattributesFile = {home}/attributes\n"
        "[diff]\n\tnoprefix = true\n\tmnemonicPrefix = true\n\talgorithm = patience\n"
        "\tcontext = 1\n\tinterHunkContext = 30\n\texternal = false\n\tcolorMoved = zebra\n"
        "\tindentHeuristic = false\n[color]\n\tui = always\n"
    )
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("GIT_EXTERNAL_DIFF", "false")
    monkeypatch.setenv("GIT_DIFF_OPTS", "--unified=9")
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "diff.context")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "7")
    monkeypatch.chdir(tmp_path)
    project.patch.unlink()
    project.derive()
    assert project.patch.read_bytes() == expected


def test_only_python_files_of_both_trees_become_hooks(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    for tree, text in ((project.pristine, "a"), (project.edited, "b")):
        (tree / "vllm/data.json").write_text(text)
        (tree / "outside.py").write_text(text)
    (project.edited / "vllm/stray.py").write_text("stray = 1\n")
    (project.pristine / "vllm/gone.py").write_text("gone = 1\n")
    project.derive()
    assert project.patch.read_bytes() == patch_bytes()
    assert "left out: vllm/stray.py is new and not in overlay/" in capsys.readouterr().err


def test_an_overlay_file_never_replaces_one_of_the_wheel(project: Project) -> None:
    (project.overlay / "vllm/envs.py").write_text("mine = 1\n")
    with pytest.raises(UserError, match="would replace a file of the wheel"):
        project.derive()
    assert not project.patch.exists()


def test_a_hooked_file_in_the_overlay_is_refused(project: Project) -> None:
    project.derive()
    (project.overlay / "vllm/envs.py").write_text("mine = 1\n")
    with pytest.raises(UserError, match=r"vllm/envs\.py is both hooked and in"):
        project.run()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vllm/routes/a b.py", b"", "rename it"),
        ("vllm/routes/é.py", b"", "rename it"),
        ("vllm/routes/x.bin", b"\0", "is binary"),
    ],
)
def test_what_a_patch_cannot_carry_is_refused(
    project: Project, name: str, content: bytes, message: str
) -> None:
    (project.overlay / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        project.derive()
    assert not project.patch.exists()


def test_a_link_in_the_overlay_is_refused(project: Project) -> None:
    (project.overlay / "vllm/routes/link.py").symlink_to("core.py")
    with pytest.raises(UserError, match="symbolic link"):
        project.derive()


def test_without_a_patch_the_hooks_must_come_from_somewhere(project: Project) -> None:
    with pytest.raises(UserError, match="--hooks-from PRISTINE EDITED"):
        project.run()
    with pytest.raises(UserError, match="no vllm/ folder in"):
        project.run("--hooks-from", project.patch.parent, project.edited)


def test_new_file_sections_are_those_of_git(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    repo.mkdir()
    files = ADDED | {"vllm/routes/crlf.py": b"a\r\n\r\nb", "vllm/routes/newlines.py": b"\n\n"}
    for path, content in files.items():
        (repo / path).parent.mkdir(parents=True, exist_ok=True)
        (repo / path).write_bytes(content)

    def git(*arguments: str) -> bytes:
        return subprocess.run(
            ["git", *arguments],
            cwd=repo,
            env=git_environment(repo),
            capture_output=True,
            check=True,
        ).stdout

    git("init", "-q")
    git("add", "-A")
    expected = git("diff", "--cached", "--full-index", "--no-color")
    ours = [export_patch.new_file_section(path, files[path]) for path in sorted(files)]
    assert b"".join(ours) == expected


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.sampled_from([b"def f():\n", b"    x = 1\n", b"\n", b"y\r\n", b"# z\n"])),
    st.lists(st.sampled_from([b"def f():\n", b"    x = 1\n", b"\n", b"y\r\n", b"# z\n"])),
)
def test_hook_sections_are_proved_when_made(before: list[bytes], after: list[bytes]) -> None:
    old, new = b"".join(before), b"".join(after)
    if old != new:
        section = export_patch.hook_section("vllm/x.py", old, new)
        assert section.startswith(b"diff --git a/vllm/x.py b/vllm/x.py\nindex ")


def _fake(tmp_path: Path) -> Wheel:
    wheel = make_wheel(tmp_path)
    wheel.dist_info("vllm", "0.15.1")
    return wheel


def test_git_and_patch_take_it_without_offset_or_fuzz(tmp_path: Path) -> None:
    """The header confuses neither of them, and the fence keeps git honest inside a repository."""
    wheel = _fake(tmp_path)
    assert check_wheels.check_root(wheel.root, wheel.patch) == []


def test_the_wheel_check_does_notice(tmp_path: Path) -> None:
    wheel = _fake(tmp_path)
    record = wheel.root / "vllm-0.15.1.dist-info/RECORD"
    record.write_text(record.read_text().replace("sha256=", "sha256=x", 1).replace("envs.py", "e"))
    assert "vllm/envs.py: not the sha256 in RECORD" in check_wheels.check_root(
        wheel.root, wheel.patch
    )
    shifted = wheel.patch.read_bytes().replace(b"@@ -22,7 +23,7 @@", b"@@ -21,7 +22,7 @@")
    assert shifted != wheel.patch.read_bytes()
    wheel.patch.write_bytes(shifted)
    problems = check_wheels._run(
        ["patch", "-p1", "--fuzz=0", "--dry-run", "-i", str(wheel.patch)], wheel.root
    )
    assert any("offset" in problem for problem in problems)


def test_the_script_runs_from_anywhere(project: Project, tmp_path: Path) -> None:
    command = [sys.executable, str(REPO / "tools/export_patch.py"), "--patch", str(project.patch)]
    result = subprocess.run(
        [*command, "--check"],
        cwd=tmp_path,
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: no patch at {project.patch} to take the hooks from")
