# SPDX-License-Identifier: Apache-2.0
"""Each check of the validator passes on a sound run and fails on the fault it is there for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from expert_profiler import errors
from expert_profiler.artifacts import NAMES
from expert_profiler.commands import validate
from expert_profiler.log import validation
from expert_profiler.log.findings import Check
from tests.support.logs import (
    Record,
    meta,
    route,
    run_rows,
    timing,
    write_log,
    write_outputs,
    write_public_log,
    write_run,
)


def verdicts(folder: Path) -> dict[str, str]:
    return {check.name: check.verdict for check in checks_of(folder)}


def checks_of(folder: Path) -> list[Check]:
    return validation.validate(
        {key: folder / name for key, name in NAMES.items() if (folder / name).exists()}
    )


def run(*args: str) -> int:
    return errors.run(lambda: validate.main(args))


def test_a_sound_run_passes_every_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(verdicts(write_run(tmp_path)).values()) == {"pass"}
    assert run("--dir", str(tmp_path)) == run(str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert "12 = sum(prompt + generated - 1) of 2 requests, in each of 2 layers" in out
    assert out.endswith("16 pass\n")


def log(
    rows: Callable[[list[Record]], list[Record]] = lambda rows: rows,
    header: Record | None = None,
    end: Record | None = None,
    finished: bool = True,
) -> Callable[[Path], object]:
    """A mutation that rewrites the route log."""
    return lambda folder: write_log(
        folder / "moe_routes.jsonl", rows(run_rows()), header, end, finished
    )


def change(position: int, **fields: object) -> Callable[[list[Record]], list[Record]]:
    def apply(rows: list[Record]) -> list[Record]:
        rows[position] |= fields
        return rows

    return apply


def without(key: str, record: Record) -> Record:
    return {name: value for name, value in record.items() if name != key}


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def broken_timing(mode: str, key: str, value: object) -> Callable[[Path], object]:
    figures = timing()
    figures[mode][key] = value
    return text("timing.json", json.dumps(figures))


def warm_up(rows: list[Record]) -> list[Record]:
    return [*(route("w", i, n, [1, 2]) for i in range(80) for n in (0, 1)), *rows]


NAN = {"topk_weights": [float("nan"), 0.1]}
FAILED = {"verdict": "fail", "checks": []}

MUTATIONS: list[tuple[str, str, Callable[[Path], object]]] = [
    *(
        ("header", f"no {key}", log(header=without(key, meta())))
        for key in validation.META_KEYS
    ),
    ("header", "seed is text", log(header=meta(seed="1234"))),
    ("header", "no layers", log(header=meta(layers_logged=[]))),
    ("route lines", "no phase", log(lambda rows: [without("phase", rows[0]), *rows[1:]])),
    ("route lines", "unknown phase", log(change(5, phase="warm-up"))),
    ("route lines", "no pass id", log(lambda r: [without("forward_pass_id", r[0]), *r[1:]])),
    ("route lines", "unknown flag", log(change(3, flag="odd"))),
    ("route lines", "layer is text", log(change(3, layer="1"))),
    ("route lines", "fractional id", log(change(3, topk_ids=[1.5, 2]))),
    ("complete", "no end", log(finished=False)),
    ("nothing dropped", "drops", log(end={"drops": {"queue_full": 2}})),
    ("self-check", "failed", log(end={"self_check": FAILED})),
    ("self-check", "absent", log(end={"self_check": None})),
    ("end totals", "rows", log(end={"rows": 23})),
    ("end totals", "flagged", log(end={"rows_flagged": 1})),
    ("end totals", "bytes", log(end={"bytes": 17})),
    ("layers", "a row fewer in one", log(lambda rows: rows[:-1])),
    ("layers", "one never fired", log(header=meta(layers=(0, 1, 2)))),
    ("layers", "one not announced", log(header=meta(layers=(0,)))),
    ("expert ids", "too high", log(change(0, topk_ids=[8, 1]))),
    ("expert ids", "negative", log(change(0, topk_ids=[-1, 1]))),
    ("expert ids", "twice in a row", log(change(0, topk_ids=[1, 1]))),
    ("top-k", "one id more", log(change(0, topk_ids=[1, 2, 3], topk_weights=[1, 1, 1]))),
    ("top-k", "no ids", log(change(0, topk_ids=[], topk_weights=[]))),
    ("weights", "one fewer", log(change(0, topk_weights=[1]))),
    ("weights", "negative", log(change(0, topk_weights=[0.5, -0.5]))),
    ("weights", "not a number", log(change(0, **NAN))),
    ("weights", "infinite", log(change(0, topk_weights=[float("inf"), 0.5]))),
    ("no duplicates", "a row twice", log(lambda rows: [*rows, rows[0]])),
    ("no warm-up rows", "warm-up", log(warm_up)),
    ("row identity", "a position gone", log(lambda rows: rows[:-2])),
    ("row identity", "wrong lengths", lambda f: write_outputs(f / "outputs.jsonl", [(3, 4)])),
    ("prompts", "one more", text("prompts.txt", "1\n\n---\n\n2\n\n---\n\n3")),
    ("prompts", "none", text("prompts.txt", "\n")),
    ("timing", "no mode", text("timing.json", json.dumps(without("log", timing())))),
    ("timing", "not JSON", text("timing.json", "{")),
    ("timing", "a list", text("timing.json", "[]")),
    ("timing", "zero time", broken_timing("log", "wall_time_sec", 0)),
    ("timing", "text", broken_timing("no_log", "tokens_per_sec", "4.5")),
    ("timing", "true", broken_timing("no_log", "tokens_generated", True)),
    ("timing", "bad repeat", broken_timing("log", "repeats", [{"wall_time_sec": 1}])),
    ("plot", "another format", text("expert_hist.png", "GIF89a")),
    ("plot", "half", lambda f: (f / "expert_hist.png").write_bytes(
        (f / "expert_hist.png").read_bytes()[:-9])),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "mutate"),
    [(name, mutate) for name, _, mutate in MUTATIONS],
    ids=[f"{name}: {what}" for name, what, _ in MUTATIONS],
)
def test_a_fault_fails_its_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, mutate: Callable[[Path], object]
) -> None:
    mutate(write_run(tmp_path))
    assert verdicts(tmp_path)[name] == "FAIL"
    assert run("--dir", str(tmp_path)) == 1
    assert f"FAIL  {name}" in capsys.readouterr().out


def test_every_check_has_a_fault_that_fails_it(tmp_path: Path) -> None:
    assert set(verdicts(write_run(tmp_path))) == {name for name, *_ in MUTATIONS}


def test_public_artifacts_pass_with_what_they_lack_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path)
    write_public_log(tmp_path / "moe_routes.jsonl", run_rows())
    (tmp_path / "outputs.jsonl").unlink()
    found = verdicts(tmp_path)
    assert "FAIL" not in found.values()
    assert {name for name, verdict in found.items() if verdict == "warn"} == {
        "route lines",
        "complete",
    }
    assert run("--dir", str(tmp_path)) == 0
    assert "end record absent" in capsys.readouterr().out


def test_a_public_log_cut_inside_a_line_fails(tmp_path: Path) -> None:
    path = write_public_log(tmp_path / "moe_routes.jsonl", run_rows())
    path.write_bytes(path.read_bytes()[:-9])
    assert verdicts(tmp_path)["complete"] == "FAIL"


def test_marked_rows_are_outside_the_identity(tmp_path: Path) -> None:
    write_run(tmp_path)
    marked = route("0", 0, 0, [1, 2], flag="recomputed")
    log(lambda rows: [*rows, marked, marked])(tmp_path)
    assert set(verdicts(tmp_path).values()) == {"pass"}


def test_one_mode_alone_is_a_warning_when_the_file_says_so(tmp_path: Path) -> None:
    write_run(tmp_path)
    figures = without("no_log", timing()) | {"overhead": None}
    (tmp_path / "timing.json").write_text(json.dumps(figures))
    assert verdicts(tmp_path)["timing"] == "warn"


def test_a_named_artifact_is_looked_at_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path)
    assert run("--timing", str(tmp_path / "timing.json")) == 0
    assert capsys.readouterr().out.endswith("3 skip, 1 pass\n")
    assert run("--dir", str(tmp_path), "--timing", str(tmp_path / "prompts.txt")) == 1


@pytest.mark.parametrize(
    ("args", "fact"),
    [
        (["--dir", "nowhere"], "no directory nowhere"),
        (["--routes", "nowhere.jsonl"], "no file nowhere.jsonl"),
        ([], "no artifacts in"),
        (["--routes", "broken.jsonl"], "line 1: not valid JSON"),
    ],
)
def test_unusable_input_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    fact: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jsonl").write_text("x\n")
    assert run(*args) == 2
    err = capsys.readouterr().err
    assert fact in err
    assert err.count("\n") == 1
