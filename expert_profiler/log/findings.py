# SPDX-License-Identifier: Apache-2.0
"""Check a log by its own records and rows; every check can state its finding in a sentence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from expert_profiler.log.log_file import End, LogFile
from expert_profiler.log.usable_rows import IdenticalRuns

#: "warn": something that a public logger's or a one-mode run's artifacts lack by nature.
Verdict = Literal["pass", "FAIL", "skip", "warn"]


class Check(NamedTuple):
    """One question asked of a log or another artifact of a run.

    Attributes:
        name: what is asked.
        verdict: the answer.
        detail: one line, what was found.
        findings: sentences for the reader of a report, where the answer makes its metrics wrong or
            doubtful.
    """

    name: str
    verdict: Verdict
    detail: str
    findings: tuple[str, ...] = ()


def check(name: str, good: bool, passed: str, failed: str, *findings: str) -> Check:
    """A check that passes or fails, with the detail and the findings of its verdict."""
    return Check(name, "pass", passed) if good else Check(name, "FAIL", failed, findings)


def listed(items: Iterable[object], limit: int = 6) -> str:
    """1, 2, 3 and 4 more."""
    words = list(map(str, items))
    text = ", ".join(words[:limit])
    return text if len(words) <= limit else f"{text} and {len(words) - limit} more"


def end_record(
    files: Sequence[LogFile], end: End | None, *, rows: int, flagged: int, public: bool
) -> list[Check]:
    """Whether the log is complete and right by its own account. Its findings: rows are lost.

    Args:
        files: of the run.
        end: their end records as one.
        rows: rows in the log, flagged ones included.
        flagged: flagged rows.
        public: a public logger wrote it, without end records.
    """
    cut = []
    for file in files:
        if file.partial_bytes:
            cut.append(
                f"{file.path.name} is cut short inside its last line: "
                f"{file.partial_bytes} bytes left out"
            )
        elif file.end is None and not public:
            cut.append(f"{file.path.name} has no end record: the run was cut short")
    absent = "end record absent: loss cannot be ruled out"
    if end is None:
        verdict: Verdict = "FAIL" if cut else "warn"
        names = ("nothing dropped", "self-check", "end totals")
        return [
            Check("complete", verdict, "; ".join(cut) or absent, tuple(cut)),
            *(Check(name, "skip", "no end record") for name in names),
        ]
    drops = ", ".join(f"{cause} {n:,}" for cause, n in end.drops.items()) or "no causes listed"
    dropped = ", ".join(f"{n:,} {cause}" for cause, n in end.drops.items() if n)
    failed = "; ".join(end.failed_checks)
    totals = [("rows", end.rows, rows), ("flagged rows", end.rows_flagged, flagged)]
    for file in files:
        size = file.end.raw.get("bytes") if file.end else None
        if isinstance(size, int):
            totals.append((f"bytes of {file.path.name}", size, file.end_offset))
    wrong = [
        f"{name}: {said:,} said, {held:,} found" for name, said, held in totals if said != held
    ]
    against = []
    if end.self_check == "fail":  # an absent verdict is no pass, but says nothing against the rows
        against = [f"the recorder's self-check failed: {failed or 'no detail given'}"]
    fewer = []
    if rows != end.rows:
        fewer = [f"the end record says {end.rows:,} rows, the log holds {rows:,}"]
    return [
        check("complete", not cut, f"end record present, reason {end.reason!r}", "; ".join(cut),
              *cut),
        check("nothing dropped", not end.dropped, drops, drops,
              f"the recorder dropped rows: {dropped}"),
        check("self-check", end.self_check == "pass", "the recorder's own verdict: pass",
              failed or f"verdict {end.self_check!r}", *against),
        check("end totals", not wrong,
              f"rows {end.rows:,}, flagged {end.rows_flagged:,}, bytes as found",
              "; ".join(wrong), *fewer),
    ]  # fmt: skip


def plain_rows(num_rows: int, repeats: int, runs: IdenticalRuns) -> list[Check]:
    """Whether the unflagged rows can all be tokens. Its findings: the metrics are doubtful.

    Args:
        num_rows: unflagged rows.
        repeats: those that repeat a (request, position, layer).
        runs: of identical rows.
    """
    rows = f"{num_rows:,} rows"
    return [
        check(
            "no duplicates",
            not repeats,
            f"{rows}, each (request, position, layer) once",
            f"{repeats:,} of {rows} repeat a (request, position, layer)",
            f"{repeats:,} rows repeat a (request, position, layer)",
        ),
        check(
            "no warm-up rows",
            not runs.rows,
            "no long run of identical rows",
            f"{runs.rows:,} of {rows} ({runs.share:.1%}) in runs of identical rows, "
            f"longest {runs.longest:,}, in layers {listed(runs.layers)}",
            f"{runs.rows:,} of {rows} ({runs.share:.1%}) lie in long runs of identical rows "
            f"(longest {runs.longest:,}): warm-up or padding was probably logged as tokens",
        ),
    ]


def sentences(checks: Iterable[Check]) -> list[str]:
    """The findings of all checks."""
    return [finding for one in checks for finding in one.findings]
