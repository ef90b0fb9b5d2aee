# SPDX-License-Identifier: Apache-2.0
"""make_hist.py as its user meets it: figures, plot, refusals, exit codes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import make_hist
from expert_profiler import errors, resources
from expert_profiler.log.expert_counts import Counts
from expert_profiler.report import histogram
from tests.support.logs import PNG, meta, route, run_rows, write_log, write_public_log
from tests.support.paths import REPO


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args: str) -> int:
    return errors.run(lambda: make_hist.main(list(args)))


def four_choices(folder: Path, **end: object) -> Path:
    """Experts 0, 1, 2, 3 chosen 4, 2, 1, 1 times, of 4."""
    pairs = [[0, 1], [0, 1], [0, 2], [0, 3]]
    rows = [
        route("0", i, 0, pair, phase="prefill" if i < 3 else "decode")
        for i, pair in enumerate(pairs)
    ]
    header = meta(layers=(0,), experts=4)
    return write_log(folder / "moe_routes.jsonl", rows, header, end=dict(end))


def test_figures_of_a_hand_made_log(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    four_choices(folder)
    assert run() == 0
    out = " ".join(capsys.readouterr().out.split())
    for fact in (
        "rows 4 (prefill 3, decode 1)",
        "requests 1",
        "top 1 expert 0: 4 (50.00%)",
        "top 2 expert 1: 2 (25.00%)",
        "top 3 expert 2: 1 (12.50%)",
        "entropy 1.750 bits of at most 2.000 (normalised 0.875)",
        "effective experts 3.4 of 4",
        "max/mean 2.00",
        "never used 0 experts",
        f"next: {resources.program()} validate --routes moe_routes.jsonl --hist expert_hist",
    ):
        assert fact in out
    assert (folder / "expert_hist.png").read_bytes().startswith(PNG[:8])
    assert sorted(p.name for p in folder.iterdir()) == ["expert_hist.png", "moe_routes.jsonl"]


def test_never_used_experts_come_from_the_headers_number(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_log(folder / "moe_routes.jsonl", [route("0", 0, 0, [5, 0])], meta(experts=60))
    assert run() == 0
    out = capsys.readouterr().out
    assert "58 experts: 1, 2, 3, 4, 6" in out
    assert "of at most 5.907" in out


def test_one_layer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_log(folder / "moe_routes.jsonl", run_rows())
    assert run("--layer", "1", "--out", "one.png") == 0
    assert "layer 1" in capsys.readouterr().out
    assert (folder / "one.png").exists()


def test_marked_rows_on_request(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*run_rows(), route("0", 0, 0, [1, 2], flag="recomputed")]
    write_log(folder / "moe_routes.jsonl", rows)
    assert run() == 0
    assert "1 marked rows" in capsys.readouterr().out
    assert run("--include-flagged", "--force") == 0
    out = capsys.readouterr().out
    assert "25 (prefill 11" in out
    assert "marked rows" not in out


def test_a_public_loggers_log(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_public_log(folder / "moe_routes.jsonl", run_rows())
    assert run() == 0
    assert "24 (unknown 24)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "end",
    [
        {"self_check": {"verdict": "fail", "checks": []}},
        {"drops": {"queue_full": 3}},
        {"rows": 99},
    ],
)
def test_a_log_that_lost_rows_is_plotted_but_fails(
    folder: Path, capsys: pytest.CaptureFixture[str], end: dict[str, object]
) -> None:
    four_choices(folder, **end)
    assert run() == 1
    assert "note " in capsys.readouterr().out
    assert (folder / "expert_hist.png").exists()


def test_a_log_cut_short_is_plotted_but_fails(folder: Path) -> None:
    write_log(folder / "moe_routes.jsonl", run_rows(), finished=False)
    assert run() == 1
    assert (folder / "expert_hist.png").exists()


def test_an_existing_plot_is_kept_unless_forced(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    four_choices(folder)
    (folder / "expert_hist.png").write_bytes(b"mine")
    assert run() == 2
    assert "--force" in capsys.readouterr().err
    assert (folder / "expert_hist.png").read_bytes() == b"mine"
    assert run("--force") == 0
    assert (folder / "expert_hist.png").read_bytes().startswith(PNG[:8])


BAD_INPUT = {
    "missing log": ([], "no log at moe_routes.jsonl"),
    "unknown layer": (["log.jsonl", "--layer", "9"], "no layer 9; choose --layer from: 0-1"),
    "out is a folder": (["log.jsonl", "--out", "."], "is a directory"),
    "out in no folder": (["log.jsonl", "--out", "no/x.png"], "mkdir -p no"),
    "out is the log": (["log.jsonl", "--out", "log.jsonl", "--force"], "is the log itself"),
    "only marked rows": (["marked.jsonl"], "add --include-flagged"),
}


@pytest.mark.parametrize(("args", "fact"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_line_and_writes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], args: list[str], fact: str
) -> None:
    write_log(folder / "log.jsonl", run_rows())
    write_log(folder / "marked.jsonl", [route("0", 0, 0, [1, 2], flag="overrun")])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert run(*args) == 2
    err = capsys.readouterr().err
    assert fact in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_failed_write_leaves_the_old_plot_and_no_scraps(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    four_choices(folder)
    (folder / "expert_hist.png").write_bytes(b"mine")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert run("--force") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert (folder / "expert_hist.png").read_bytes() == b"mine"
    assert sorted(p.name for p in folder.iterdir()) == ["expert_hist.png", "moe_routes.jsonl"]


def test_the_script_runs_from_another_folder(folder: Path) -> None:
    four_choices(folder)
    done = subprocess.run(
        [sys.executable, str(REPO / "make_hist.py")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_help_needs_no_heavy_import(folder: Path) -> None:
    code = (
        "import sys, make_hist\n"
        "try: make_hist.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print({'duckdb', 'matplotlib', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("set()\n")


# ---- the plot ----------------------------------------------------------------------------------


def some_counts(experts: int, layers: int = 2, phases: int = 2) -> Counts:
    rng = np.random.default_rng(experts)
    values = rng.integers(1, 1000, size=(layers, phases, experts))
    values[0, 0, :3] += 3000  # neighbours, where labels would collide
    names = ("prefill", "decode") if phases == 2 else ("unknown",)
    return Counts(tuple(range(layers)), names, values, values.sum(axis=2) // 2)


@pytest.mark.parametrize("cautions", [(), ("rows were lost", "a long story " * 60)])
@pytest.mark.parametrize("phases", [1, 2])
@pytest.mark.parametrize("experts", [2, 8, 60, 128, 256, 512])
def test_no_text_of_the_plot_overlaps_or_leaves_it(
    experts: int, phases: int, cautions: tuple[str, ...]
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = histogram.expert_histogram(
        some_counts(experts, phases=phases),
        model_id="/a very/long path/$x$/" * 20,
        requests=25,
        id_space="logical",
        cautions=cautions,
    )
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    boxes = [
        (text.get_text(), text.get_window_extent(renderer))
        for text in drawn_texts(figure)
        if text.get_text().strip() and text.get_visible()
    ]
    width, height = canvas.get_width_height()
    for i, (words, box) in enumerate(boxes):
        assert 0 <= box.x0 <= box.x1 <= width, words
        assert 0 <= box.y0 <= box.y1 <= height, words
        for other_words, other in boxes[i + 1 :]:
            assert not box.overlaps(other), (words, other_words)


def drawn_texts(figure: Any) -> Iterator[Any]:
    """All text that reaches the paper; ticks beyond an axis' limits keep text but are not drawn."""
    yield from figure.texts
    for axes in [*figure.axes, *figure.axes[0].child_axes]:
        yield from axes.texts
        if axes.get_legend() is not None:
            yield from axes.get_legend().get_texts()
        for axis in (axes.xaxis, axes.yaxis):
            if not axis.get_visible():
                continue
            yield axis.label
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks(len(axis.get_majorticklocs())):
                if low <= tick.get_loc() <= high:
                    yield from (tick.label1, tick.label2)


def test_the_plot_says_what_it_shows() -> None:
    from matplotlib.text import Text

    figure = histogram.expert_histogram(
        some_counts(8), model_id="tiny/moe", requests=3, cautions=["rows were lost"]
    )
    words = "\n".join(text.get_text() for text in figure.findobj(Text))
    for fact in (
        "Which experts do the tokens go to?",
        "tiny/moe",
        "2 layers added up",
        "3 requests",
        "even use: 12.5%",
        "prefill (prompt tokens)",
        "decode (generated tokens)",
        "of at most 3.000 bits",
        "CAUTION: rows were lost",
        "share of expert choices (%)",
        "#1  expert",
    ):
        assert fact in words


def test_the_bars_are_the_shares() -> None:
    counts = some_counts(8)
    axes = histogram.expert_histogram(counts, model_id="m", requests=1).axes[0]
    heights = np.zeros(8)
    for container in axes.containers:
        heights += [bar.get_height() for bar in container]
    expected = 100 * counts.per_expert / counts.per_expert.sum()
    assert heights == pytest.approx(expected)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [([5, 50, 90], [10, 50, 90]), ([50, 50.5, 51], [30.5, 50.5, 70.5]), ([98, 99], [70, 90])],
)
def test_labels_stand_apart_and_inside(wanted: list[float], expected: list[float]) -> None:
    assert histogram._spread(wanted, 20, 0, 100) == pytest.approx(expected)


def test_the_note_of_a_self_check_reaches_the_user(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check = {"name": "layers", "verdict": "fail", "detail": "layer 7 never fired"}
    four_choices(folder, self_check={"verdict": "fail", "checks": [check]})
    run()
    assert "layer 7 never fired" in capsys.readouterr().out


def test_the_next_command_works_where_it_is_printed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    four_choices(folder)
    assert run() == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next: ")]
    command = ["bash", "-c", line.removeprefix("next: ")]  # as a person pastes it
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    assert "row" in done.stdout
