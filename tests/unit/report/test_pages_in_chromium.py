# SPDX-License-Identifier: Apache-2.0
"""Report and comparison in a real browser: what a log says is text there, whatever it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import make_hist
from expert_profiler.commands import compare
from tests.support import browser, logs
from tests.support.browser import Page

pytestmark = pytest.mark.skipif(bool(browser.missing()), reason=browser.missing() or "-")


def hostile(number: int) -> str:
    """Markup that changes the page's title, in the ways that work where nothing is escaped."""
    run = f"document.title = 'owned {number}'"
    return f'<script>{run}</script><img src=x onerror="{run}"></title><svg onload="{run}">'


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser.chromium() as page:
        yield page


def write_hostile_log(path: Path, number: int, prompts: bool = False) -> Path:
    """Markup as the model's name, the device's, every request's id, and in the prompts."""
    rows = [{**row, "req_id": hostile(number) + row["req_id"]} for row in logs.run_rows()]
    facts = {"model_id": hostile(number), "device": hostile(number), "dtype": hostile(number)}
    header = logs.meta(**facts, files=[path.name])
    logs.write_log(path, rows, header, end={"drops": {hostile(number): 3}})
    if prompts:
        lines = [json.loads(line) for line in logs.write_outputs(path.with_name("outputs.jsonl"))
                 .read_text().splitlines()]  # fmt: skip
        for line in lines:
            line |= {"prompt": hostile(9), "text": hostile(9)}
            line["req_id"] = hostile(number) + line["req_id"]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        path.with_name("outputs.jsonl").write_text(text)
    return path


def check_shown_as_text(page: Page, made: Path, texts: list[str]) -> None:
    page.open(made.as_uri())
    # Errors of pictures that are none, and scripts, have run by then.
    page.wait("the page", lambda: page.script("return document.readyState") == "complete")
    body = page.script("return document.body.textContent")
    assert "owned" not in page.driver.title or "<script>" in page.driver.title
    for text in texts:
        assert text in body
    elements = "return [...document.querySelectorAll(arguments[0])].length"
    for selector in ("script", "svg", "iframe", "[onerror]", "[onload]", "img:not([src^='data:'])"):
        assert page.script(elements, selector) == 0, selector
    assert page.complaints() == []


def test_markup_in_a_log_shows_as_text_in_its_report(page: Page, tmp_path: Path) -> None:
    log = write_hostile_log(tmp_path / f"a{hostile(1).replace('/', '|')[:80]}.jsonl", 1, True)
    code = make_hist.main([str(log), "--out", str(tmp_path / "x.png"), "--report", str(tmp_path)])
    assert code == 1, "it lost rows, and says so on the page"
    made = tmp_path / "report.html"
    check_shown_as_text(page, made, [hostile(1)])
    assert page.driver.title == f"Experts of {hostile(1)}"
    assert "owned 9" not in made.read_text(), "a report holds nothing of a prompt"


def test_markup_in_logs_shows_as_text_in_their_comparison(page: Page, tmp_path: Path) -> None:
    paths = [write_hostile_log(tmp_path / f"{n}.jsonl", n) for n in (1, 2)]
    names = f"{hostile(3)},{hostile(4)}"
    compare.main([*map(str, paths), "--out", str(tmp_path), "--names", names])
    check_shown_as_text(page, tmp_path / "compare.html", [hostile(n) for n in (1, 2, 3, 4)])
    assert page.driver.title == f"Comparison of {hostile(3)}, {hostile(4)}"
