# SPDX-License-Identifier: Apache-2.0
"""The page: log text is never markup, numbers are short, no two texts of a picture overlap."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from expert_profiler.log import open_log
from expert_profiler.log.token_counts import count_tokens
from expert_profiler.report import log_metrics, page, report_charts
from tests.support.logs import meta, route, write_log

EVIL = "<script>alert('x')</script>&\""


def test_text_is_escaped_and_markup_is_not() -> None:
    macros = page.environment().get_template("macros.html.j2").module
    made = macros.table(["<b>", "n"], [[EVIL, 1234], ["x", float("nan")]])  # type: ignore[attr-defined]
    assert "<script" not in made and "&lt;script&gt;" in made
    assert "<th>&lt;b&gt;" in made
    assert '<td class="n">1,234</td>' in made and '<td class="n">-</td>' in made
    picture = macros.picture(b"", EVIL)  # type: ignore[attr-defined]
    assert "<figure>" in picture
    assert '"' not in picture.split('alt="')[1].split('">')[0]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.123456, "0.1235"), (1234567, "1,234,567"), (123456.7, "123,457"), (2.0, "2"), (None, "-")],
)
def test_numbers_are_short(value: object, text: str) -> None:
    assert page.number(value) == text


def test_json_has_no_nan() -> None:
    data = {"a": [float("nan"), np.float64(1.5), np.array([1, 2])], 3: None}
    assert json.loads(page.as_json(data)) == {"a": [None, 1.5, [1, 2]], "3": None}


def test_nothing_overlaps_in_a_large_models_pictures(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    layers = range(3, 64)  # as wide and as deep as DeepSeek-V3
    rows = [
        route(str(req), t, layer, rng.permutation(256)[:8].tolist(), phase=phase)
        for req in range(2)
        for t, phase in enumerate(["prefill", "decode", "decode"])
        for layer in layers
    ]
    path = write_log(tmp_path / "log.jsonl", rows, meta(layers=layers, experts=256, top_k=8))
    with open_log(path) as log:
        found = count_tokens(log)
    entries = log_metrics.by_layer(found)
    drawn = [
        report_charts.load_maps(found)[0][1],
        report_charts.evenness(found, entries),
        report_charts.together(found, entries)[0],
        report_charts.caching(found, entries),
        report_charts.parallel(log_metrics.expert_parallel(found)),
    ]
    for figure in drawn:
        assert figure is not None
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer = canvas.get_renderer()
        boxes = []
        for axes in figure.axes:
            assert axes.get_xlabel() or axes.get_ylabel()  # with its unit
            texts = [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
            texts += axes.get_legend().get_texts() if axes.get_legend() else []
            for axis in (axes.xaxis, axes.yaxis):
                low, high = sorted(axis.get_view_interval())
                for tick in axis.get_major_ticks():
                    if low <= tick.get_loc() <= high:
                        texts += [tick.label1, tick.label2]
            boxes += [
                (text.get_text(), text.get_window_extent(renderer))
                for text in texts
                if text.get_visible() and text.get_text()
            ]
        for (name, one), (other, two) in itertools.combinations(boxes, 2):
            assert not one.overlaps(two), (name, other)
        for name, box in boxes:
            assert box.x0 >= -1 and box.x1 <= figure.bbox.width + 1, name
            assert box.y0 >= -1 and box.y1 <= figure.bbox.height + 1, name
