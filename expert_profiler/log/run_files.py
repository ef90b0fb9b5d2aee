# SPDX-License-Identifier: Apache-2.0
"""Find the files of one run: one a rank, or several where their size was bounded."""

from __future__ import annotations

from pathlib import Path

from expert_profiler.errors import UserError
from expert_profiler.log import line_file, part_files
from expert_profiler.log.log_file import RECORD_AGAIN, LogFile


def open_file(path: Path) -> LogFile:
    """Read the header and the end record of the log at ``path``, of either format."""
    if part_files.is_dataset(path):
        return part_files.open_dataset(path)
    return line_file.open_lines(path)


def open_run(path: Path) -> list[LogFile]:
    """The named log and its siblings of the same run, in the header's order."""
    main = open_file(path)
    names = list(main.meta.files)
    if path.name not in names:
        names[:1] = [path.name]  # renamed since it was written; the main file comes first
    files = []
    for name in names:
        if Path(name).name != name:
            raise UserError(
                f'{path}, line 1: "files" must hold plain file names, found {name!r}; '
                f"{RECORD_AGAIN}"
            )
        sibling = path.with_name(name)
        if name != path.name and not sibling.exists():
            raise UserError(
                f"{sibling} is missing: {path.name} says that it belongs to the same run "
                f"({len(names)} files); copy it to {path.parent}"
            )
        files.append(main if name == path.name else open_file(sibling))
    listed = {file.path.name for file in files}
    return [part for file in files for part in _with_followers(file, listed)]


def _with_followers(file: LogFile, listed: set[str]) -> list[LogFile]:
    """The file and its followers, which the recording went on in when the file was full.

    listed: names of the run's files so far; the followers' are added.
    """
    chain = [file]
    while (end := chain[-1].end) is not None and (name := end.raw.get("next")) is not None:
        last = chain[-1].path
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise UserError(
                f'{last}, last line: "next" must hold a plain file name, found {name!r:.80}; '
                f"{RECORD_AGAIN}"
            )
        if name in listed:
            raise UserError(
                f'{last}, last line: "next" names {name}, which is read already; {RECORD_AGAIN}'
            )
        if not last.with_name(name).exists():
            raise UserError(
                f"{last.with_name(name)} is missing: {last.name} says that the run goes on there; "
                f"copy it to {last.parent}"
            )
        listed.add(name)
        chain.append(open_file(last.with_name(name)))
    return chain
