# SPDX-License-Identifier: Apache-2.0
"""The patch file: a strict parser, and hunks applied without fuzz or offset.

Git writes the blob id before and after into every file section, so the patch is its own manifest.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from expert_profiler.errors import IN_CHECKOUT, UserError
from expert_profiler.resources import PATCH

NO_BLOB = "0" * 40
#: What to do about a patch that is not as it was made, in an error.
DAMAGED = "the patch is damaged; run: git checkout or tools/export_patch.py"

_BASE = re.compile(rb"^Base: vllm (\S+)$", re.MULTILINE)
_DIFF = re.compile(rb"diff --git a/(\S+) b/(\S+)")
_INDEX = re.compile(rb"index ([0-9a-f]{40})\.\.([0-9a-f]{40})(?: 100(?:644|755))?")
_HUNK = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@(?: .*)?")
_MODE = re.compile(rb"new file mode 100(644|755)")
SAFE_PATH = re.compile(r"vllm(?:/[A-Za-z0-9_.-]+)+")


@dataclass(frozen=True)
class Hunk:
    """One hunk; line numbers count from 1, lines keep their line ends."""

    old_start: int
    old_lines: tuple[bytes, ...]
    new_start: int
    new_lines: tuple[bytes, ...]


@dataclass(frozen=True)
class FileChange:
    """One file section of the patch; blob ids are 40 hex digits."""

    path: str  # relative to the root, "vllm/..."
    before: str | None  # None: the patch adds this file
    after: str
    executable: bool
    hunks: tuple[Hunk, ...]
    raw: bytes  # the section as it stands in the patch


@dataclass(frozen=True)
class Patch:
    """A parsed patch, sections in file order."""

    name: str
    base_version: str
    files: tuple[FileChange, ...]

    @property
    def patch_id(self) -> str:
        """Sha256 over "<blob after> <path>" lines sorted by path: names the patched files."""
        lines = (f"{f.after} {f.path}\n" for f in sorted(self.files, key=lambda f: f.path))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def load_patch(path: Path | None = None) -> Patch:
    """Read and verify a patch file; the project's own by default."""
    path = PATCH if path is None else path
    try:
        data = path.read_bytes()
    except OSError as error:
        mended = f"git checkout -- {shlex.quote(path.name)}"
        if not IN_CHECKOUT:
            mended = "pip install --force-reinstall --no-deps vllm-expert-profiler"
        raise UserError(f"cannot read the patch {path}: {error.strerror}; run: {mended}") from error
    return parse_patch(data, str(path))


def sha256_of_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def blob_id(content: bytes) -> str:
    """The id that git gives to a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def parse_patch(data: bytes, name: str = "patch") -> Patch:
    """Parse strictly: what is not understood is an error, never skipped.

    ``data`` is a DEP-3 style header with a line "Base: vllm VERSION", then
    sections as ``git diff --full-index`` writes them for changed and added
    text files.
    """
    parser = _Parser(data.split(b"\n"), name)
    while parser.line is not None and not parser.line.startswith(b"diff --git "):
        parser.at += 1
    header = b"\n".join(parser.lines[: parser.at])
    base = _BASE.search(header)
    if base is None:
        raise UserError(f"{name} has no line 'Base: vllm VERSION'; run: tools/export_patch.py")
    files: list[FileChange] = []
    while parser.line is not None:
        files.append(parser.section())
    if not files:
        raise UserError(f"{name} holds no file section; run: tools/export_patch.py")
    paths = [f.path for f in files]
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"{name} has two sections for {path}; run: tools/export_patch.py")
    for file in files:
        if file.before is None and blob_id(transformed(b"", file)) != file.after:
            raise UserError(
                f"{name} is damaged: the lines of {file.path} do not give its blob id; "
                "run: tools/export_patch.py"
            )
    return Patch(name, base.group(1).decode(), tuple(files))


class _Parser:
    """A cursor over the patch's lines (without their b"\\n")."""

    def __init__(self, lines: list[bytes], name: str) -> None:
        # A file that ends in a newline splits into one empty piece too many.
        self.lines = lines[:-1] if lines and lines[-1] == b"" else lines
        self.name = name
        self.at = 0

    @property
    def line(self) -> bytes | None:
        return self.lines[self.at] if self.at < len(self.lines) else None

    def fail(self, what: str) -> UserError:
        return UserError(
            f"{self.name} is damaged at line {self.at + 1}: {what}; "
            "run: git checkout or tools/export_patch.py"
        )

    def expect(self, literal: bytes) -> None:
        if self.line != literal:
            raise self.fail(f"expected {literal.decode()!r}")
        self.at += 1

    def match(self, pattern: re.Pattern[bytes], what: str) -> re.Match[bytes]:
        found = pattern.fullmatch(self.line) if self.line is not None else None
        if found is None:
            raise self.fail(f"expected {what}")
        self.at += 1
        return found

    def section(self) -> FileChange:
        start = self.at
        head = self.match(_DIFF, "'diff --git a/PATH b/PATH'")
        path = head.group(2).decode("ascii", "replace")
        if head.group(1) != head.group(2) or not SAFE_PATH.fullmatch(path) or ".." in path:
            self.at -= 1
            raise self.fail("a section must be about one plain path under vllm/")
        executable = False
        is_new = self.line is not None and self.line.startswith(b"new file mode ")
        if is_new:
            mode = self.match(_MODE, "mode 100644 or 100755")
            executable = mode.group(1) == b"755"
        index = self.match(_INDEX, "'index BLOB..BLOB' with full blob ids (no renames, deletions)")
        before, after = index.group(1).decode(), index.group(2).decode()
        if is_new != (before == NO_BLOB) or after == NO_BLOB:
            self.at -= 1
            raise self.fail("blob ids that fit neither a changed nor an added file")
        hunks: list[Hunk] = []
        if self.line is not None and self.line.startswith(b"--- "):
            self.expect(b"--- /dev/null" if is_new else b"--- a/" + head.group(1))
            self.expect(b"+++ b/" + head.group(2))
            while self.line is not None and self.line.startswith(b"@@ "):
                hunks.append(self.hunk())
        if not hunks and not (is_new and after == blob_id(b"")):
            raise self.fail("expected a hunk")
        raw = b"".join(line + b"\n" for line in self.lines[start : self.at])
        return FileChange(path, None if is_new else before, after, executable, tuple(hunks), raw)

    def hunk(self) -> Hunk:
        head = self.match(_HUNK, "a hunk header")
        old_left, new_left = (int(head.group(g) or 1) for g in (2, 4))
        old: list[bytes] = []
        new: list[bytes] = []
        while old_left or new_left:
            line = self.line
            if line is None or line[:1] not in (b" ", b"-", b"+"):
                raise self.fail("expected a hunk line")
            body = line[1:] + b"\n"
            self.at += 1
            if self.line is not None and self.line.startswith(b"\\ "):
                body = body[:-1]  # "\ No newline at end of file"
                self.at += 1
            if line[:1] != b"+":
                old.append(body)
                old_left -= 1
            if line[:1] != b"-":
                new.append(body)
                new_left -= 1
        if old_left or new_left:
            raise self.fail("a hunk that does not fit its header")
        return Hunk(int(head.group(1)), tuple(old), int(head.group(3)), tuple(new))


def transformed(content: bytes, file: FileChange, *, reverse: bool = False) -> bytes:
    """``content`` with the hunks of ``file`` applied, or with ``reverse`` undone.

    Every hunk must match exactly, at exactly its line; the caller proves the
    result by blob id.
    """
    # Not splitlines(): only b"\n" ends a line here, as it does for git.
    lines = content.split(b"\n")
    source = [line + b"\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])
    result: list[bytes] = []
    done = 0
    for hunk in file.hunks:
        start, old, new_start, new = (
            (hunk.new_start, hunk.new_lines, hunk.old_start, hunk.old_lines)
            if reverse
            else (hunk.old_start, hunk.old_lines, hunk.new_start, hunk.new_lines)
        )
        # An empty side names the line before it, all others their first line.
        at = start - 1 if old else start
        result += source[done:at]
        fits = done <= at and tuple(source[at : at + len(old)]) == old
        if not fits or len(result) != (new_start - 1 if new else new_start):
            raise UserError(f"hunk at line {start} does not fit {file.path}; the patch is damaged")
        result += new
        done = at + len(old)
    return b"".join(result + source[done:])
