# SPDX-License-Identifier: Apache-2.0
"""The live page in a real browser, against a stand-in for the server."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import numpy as np
import pytest

from tests.support import browser
from tests.support.browser import Page
from tests.support.fake_server import KINDS, PAGE, FakeModel, FakeServer

pytestmark = pytest.mark.skipif(bool(browser.missing()), reason=browser.missing() or "-")

HOSTILE = (
    "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"
)

TIMES = "\N{MULTIPLICATION SIGN}"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Page]:
    with browser.chromium() as page:
        yield page


@pytest.fixture
def page(chromium: Page) -> Page:
    """The browser with the look of a desktop in light, whatever an earlier test chose."""
    chromium.look()
    return chromium


def run_passes(model: FakeModel, passes: int) -> None:
    """As many prefill, decode and mixed passes on every replica."""
    for replica in range(model.dp):
        for _ in range(passes):
            for prefill, decode in ((120, 0), (0, 9), (31, 7)):
                model.run_pass(prefill, decode, replica)


def recorded(**settings: object) -> FakeModel:
    """A model that records and has seen some passes."""
    model = FakeModel(**settings)
    model.start()
    run_passes(model, 5)
    return model


def table(page: Page, name: str) -> list[list[str]]:
    code = "return [...document.querySelectorAll(`#${arguments[0]} tbody tr`)].map("
    return page.script(code + "(row) => [...row.children].map((cell) => cell.textContent))", name)


def test_recording_is_started_and_stopped_from_the_keyboard_and_the_counts_rise(page: Page) -> None:
    model = FakeModel()
    with FakeServer(model) as server:
        page.open(server.url)
        page.wait("what to do first", lambda: "press Start" in page.text("empty"))
        assert not page.find("stop").is_enabled() and not page.find("reset").is_enabled()
        page.start("stat")
        assert model.recording and model.mode == "stat"
        assert not page.find("start").is_enabled() and not page.find("mode").is_enabled()
        page.wait("Stop has the focus that Start had", lambda: page.focused() == "stop")

        run_passes(model, 3)
        page.wait("the first tokens", lambda: page.number("tokens") == 3 * 167)
        assert page.number("passes") == 9 and page.number("rows") == 3 * 167 * 24
        assert (page.number("prefill"), page.number("decode")) == (3 * 151, 3 * 16)
        run_passes(model, 4)
        page.wait("more tokens", lambda: page.number("tokens") == 7 * 167)
        area = (
            "return view.rates.reduce((sum, one) => "
            "sum + (one.to - one.from) * (one.prefill + one.decode), 0)"
        )
        assert page.script(area) == pytest.approx(7 * 167), "the rates add up to the tokens"

        page.stop()
        assert not model.recording and page.number("tokens") == 7 * 167
        page.wait("Start has the focus that Stop had", lambda: page.focused() == "start")
    assert page.complaints() == []


def test_every_choice_is_shown_once_whatever_the_parallel_sizes(page: Page) -> None:
    """Replicas are summed; pipeline stages and tensor-parallel copies see the same tokens."""
    model = recorded(layers=[1, 2, 4, 5, 7], experts=13, dp=2, pp=2, tp=2)
    model.stop()
    total = sum(model.counts[kind].sum(axis=0) for kind in KINDS)
    with FakeServer(model, root_path="/some/proxy") as server:
        page.open(server.url)
        page.wait("the tokens", lambda: page.number("tokens") == 2 * 5 * 167)
        assert page.number("passes") == 30 and page.number("rows") == 2 * 5 * 167 * 5
        page.script("document.getElementById('table-box').open = true")
        page.wait("the numbers per layer", lambda: len(table(page, "table")) == 5)
        for row, layer, loads in zip(table(page, "table"), model.layers, total, strict=True):
            balance = loads.max() / loads.mean()
            chosen = f"{np.count_nonzero(loads)} of 13"
            most = int(loads.max())
            assert row[:3] == [str(layer), f"{loads.sum():,}", chosen]
            assert row[3:] == [str(loads.argmax()), f"{most:,}", f"{balance:.2f}"]
        assert len(table(page, "workers")) == 8
    assert page.complaints() == []


def test_the_heat_map_is_read_with_the_arrow_keys_for_each_kind_of_pass(page: Page) -> None:
    model = recorded(layers=[0, 2, 3], experts=16)
    with FakeServer(model) as server:
        page.open(server.url)
        page.wait("the map", lambda: page.find("cells").is_displayed())
        page.tab_to("cells")
        page.press("ARROW_DOWN", "ARROW_RIGHT", "ARROW_RIGHT", "ARROW_RIGHT", "ARROW_LEFT")

        def says(loads: np.ndarray, layer: int, expert: int) -> bool:
            """The readout has the cell's count, share and ratio to even."""
            share = loads[expert] / loads.sum()
            shown = page.text("readout")
            return (
                shown.startswith(f"Layer {layer}, expert {expert}: {loads[expert]:,} choice")
                and f"{100 * share:.{2 if share < 0.1 else 1}f}% of the layer's" in shown
                and f"{share * 16:.2f} {TIMES} the even share" in shown
            )

        total = sum(model.counts[kind][0, 1] for kind in KINDS)
        assert says(total, layer=2, expert=2)
        assert page.script("return spoken.textContent") == page.text("readout")
        page.press("END", "PAGE_DOWN")
        assert page.text("readout").startswith("Layer 3, expert 15:")
        page.press("HOME", "ARROW_UP")
        page.press("TAB")
        assert page.focused() != "cells", "Tab leaves the map"
        for kind in KINDS:
            page.script(f"document.querySelector('[value={kind}]').click()")
            assert says(model.counts[kind][0, 1], layer=2, expert=0)
    assert page.complaints() == []


def test_a_cell_of_the_heat_map_is_where_it_is_pointed_at_and_darker_with_more_load(
    page: Page,
) -> None:
    model = recorded(layers=[0, 2, 3], experts=16)
    total = sum(model.counts[kind][0] for kind in KINDS)
    luminance = """
        const image = cells.getContext('2d').getImageData(0, 0, cells.width, cells.height);
        return view.rows.map((row, y) => row.loads.map((_, x) => {
          const [left, top] = [(x + 0.5) * map.cell, map.above + (y + 0.3) * map.high];
          const at = 4 * (Math.floor(top) * image.width + Math.floor(left));
          const [r, g, b] = image.data.slice(at, at + 3);
          return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        }))"""
    with FakeServer(model) as server:
        page.open(server.url)
        page.wait("the map", lambda: page.find("cells").is_displayed())
        lights = np.array(page.script(luminance))
        never = total == 0
        assert never.sum() == 1 and (lights[never] > 254).all(), "never chosen: no colour"
        ratio = total / total.mean(axis=1, keepdims=True)
        order = np.argsort(ratio[~never])
        assert np.all(np.diff(lights[~never][order]) <= 1), "one step of rounding aside"
        page.point_at("cells", *page.script("return [5.5 * map.cell, map.above + 2.5 * map.high]"))
        assert page.text("readout").startswith(f"Layer 3, expert 5: {total[2, 5]:,} choice")
    assert page.complaints() == []


def test_the_key_is_asked_for_kept_in_the_tab_and_forgotten(page: Page) -> None:
    with FakeServer(recorded(), api_key="s3cret") as server:
        page.open(server.url)
        page.wait("the question", lambda: page.focused() == "key")
        assert page.find("key").get_attribute("type") == "password"
        page.press("wrong", "ENTER")
        page.wait("the refusal", lambda: "refused" in page.text("key-said"))
        page.find("key").click()
        page.press("s3cret", "ENTER")
        page.wait("the figures", lambda: page.number("tokens") == 5 * 167)
        assert not page.find("key-form").is_displayed()
        page.driver.refresh()
        page.wait("the figures again", lambda: page.number("tokens") == 5 * 167)
        assert "s3cret" not in page.script("return document.documentElement.outerHTML")
        page.find("forget").click()
        page.wait("the question again", lambda: page.find("key-form").is_displayed())
        assert page.script("return sessionStorage.length") == 0
        page.wait("old figures are gone", lambda: not page.find("figures").is_displayed())
    assert all("401" in message for message in page.complaints())


def test_a_reset_is_confirmed_first_and_starts_from_zero(page: Page) -> None:
    model = recorded()
    with FakeServer(model) as server:
        page.open(server.url)
        page.wait("the tokens", lambda: page.number("tokens") == 5 * 167)
        page.tab_to("reset")
        page.press("ENTER")
        assert "835 tokens" in page.text("confirm-text")
        page.press("ESCAPE")
        assert page.focused() == "reset" and page.number("tokens") == 835
        page.press("ENTER", "TAB", "ENTER")
        page.wait("zero", lambda: "no forward pass yet" in page.text("empty"))
        assert model.recording and "from zero" in page.text("said")
        run_passes(model, 1)
        page.wait("counts from zero", lambda: page.number("tokens") == 167)
        page.stop()
        page.find("reset").click()
        page.find("confirm-yes").click()
        page.wait("nothing", lambda: "No recording yet" in page.text("empty"))
        assert not page.find("reset").is_enabled()
    assert page.complaints() == []


def test_what_the_server_refuses_stands_on_the_page(page: Page) -> None:
    model = FakeModel()
    with FakeServer(model) as server:
        page.open(server.url)
        page.wait("the controls", lambda: page.find("layers").is_enabled())
        page.tab_to("layers")  # selects what stands there
        page.press("three", "ENTER")
        page.wait("the reason", lambda: "layers='three'" in page.text("said"))
        assert "HTTP 400" in page.text("said") and not model.recording
        assert page.find("layers").get_attribute("value") == "three", "kept for mending"

        server.broken["/expert_distribution_status"] = 503
        page.wait("the outage", lambda: "did not answer in time" in page.text("alerts"))
        assert "old" in page.text("alerts")
        server.broken.clear()
        page.wait("the recovery", lambda: not page.find("alerts").is_displayed())


def test_losses_failed_checks_and_ranks_that_disagree_stand_on_top(page: Page) -> None:
    model = recorded(failing=True, name=HOSTILE)
    with FakeServer(model) as server:
        page.open(server.url)
        page.wait("the warning", lambda: page.find("alerts").is_displayed())
        warning = page.text("alerts")
        lost = 5 * 167 * 24 // 90 + 3 + 1
        assert f"{lost:,} rows lost (queue_full {lost - 1:,}, not_captured 1)" in warning
        assert "ranks do not agree" in warning and "no space left on device" in warning
        assert "check failed: ids of a row are distinct" in warning
        assert page.number("lost") == lost and page.text("check") == "fail"
        spoken = page.script("return document.getElementById('alarm').textContent")
        assert "rows are lost" in spoken and str(lost) not in spoken, "not read anew each second"
    assert page.complaints() == []


def test_markup_from_the_server_is_shown_as_text(page: Page) -> None:
    model = recorded(name=HOSTILE)
    model.path = model.spec = f"{HOSTILE}.jsonl"
    elements = "return document.querySelectorAll('script, img').length"
    with FakeServer(model) as server:
        page.open(server.url)
        page.wait("the name", lambda: page.text("model") == HOSTILE)
        page.wait("the map", lambda: page.find("cells").is_displayed())
        page.script("document.querySelectorAll('details').forEach((box) => { box.open = true; })")
        assert table(page, "workers")[0][-1] == f"{HOSTILE}.jsonl"
        assert page.script(elements) == 1 and page.driver.title == "Expert distribution"
    assert page.complaints() == []
    assert "innerHTML" not in PAGE.read_text() and "insertAdjacentHTML" not in PAGE.read_text()


def test_the_page_asks_nobody_but_its_server() -> None:
    source = PAGE.read_text()
    assert re.findall(r"https?://", source) == []
    assert re.findall(r"""(?:src|href)=["'](?!data:)""", source) == []


@pytest.mark.parametrize("width", [360, 1280])
def test_a_large_model_fits_the_window_in_both_themes(page: Page, width: int) -> None:
    model = recorded(layers=list(range(3, 64)), experts=256, name="a" * 300, failing=True)
    grounds, lights = [], []
    code = (
        "return Array.from({length: 21}, (_, i) => ramp(i / 20).match(/[0-9]+/g).map(Number))"
        ".map(([r, g, b]) => 0.2126 * r + 0.7152 * g + 0.0722 * b)"
    )
    with FakeServer(model) as server:
        for theme in ("light", "dark"):
            page.look(width, theme=theme)
            page.open(server.url)
            page.wait("the map", lambda: page.find("cells").is_displayed())
            boxes = "document.querySelectorAll('details').forEach((box) => { box.open = true; })"
            page.script(boxes)
            assert page.overflow() <= 0
            cell = page.script("return [map.cell, map.high]")
            assert min(cell) >= 4, "a cell is wide enough to be pointed at"
            grounds.append(page.script("return getComputedStyle(document.body).backgroundColor"))
            lights.append(page.script(code))
    assert grounds[0] != grounds[1]
    assert np.all(np.diff(lights[0]) < 0), "in light, more load is darker, also in greyscale"
    assert np.all(np.diff(lights[1]) > 0), "in dark, more load is lighter"
    assert page.complaints() == []


@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_nothing_moves_for_those_who_asked_for_that(page: Page, motion: str) -> None:
    page.look(motion=motion)
    animation = (
        "return getComputedStyle(document.getElementById('state'), '::before').animationName"
    )
    with FakeServer(recorded()) as server:
        page.open(server.url)
        page.wait("recording", page.recording)
        assert page.script(animation) == ("none" if motion == "reduce" else "beat")


def test_a_hidden_tab_asks_for_nothing_and_wakes_up(page: Page) -> None:
    hide = (
        "Object.defineProperty(document, 'hidden', {configurable: true, get: () => arguments[0]});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    with FakeServer(recorded()) as server:
        page.open(server.url)
        page.wait("the map", lambda: page.find("cells").is_displayed())
        page.script(hide.replace("arguments[0]", "true"))
        time.sleep(0.5)  # the look that was under way
        asked = len(server.requests)
        time.sleep(2.5)
        assert len(server.requests) == asked
        page.script(hide.replace("arguments[0]", "false"))
        page.wait("the next look", lambda: len(server.requests) > asked)
        routes = {path for _, path in server.requests}
        assert routes == {"/expert_distribution_status", "/dump_expert_distribution"}
