"""A self-contained HTML page: text, tables and embedded pictures; opens offline and prints on A4.

Everything that is not ``Html`` is escaped, so that no name, id or prompt of a log becomes markup.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from expert_profiler.errors import UserError


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


STYLE = """
:root { --ink: #222; --quiet: #555; --line: #ccc; --ground: #fff; --box: #f4f6f8; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: var(--ink);
  background: var(--ground); max-width: 66rem; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .4rem; border-top: 1px solid var(--line);
  padding-top: .9rem; }
p { margin: .4rem 0 .8rem; max-width: 50rem; }
.quiet, figcaption { color: var(--quiet); font-size: .9rem; overflow-wrap: anywhere; }
figure { margin: .8rem 0 1.2rem; }
figure img { display: block; width: 100%; height: auto; }
.verdict { border: 2px solid #2b6a3f; background: #eef6f0; padding: .7rem 1rem; margin: 1rem 0; }
.verdict.doubtful { border-color: #8a5a00; background: #fdf5e4; }
.verdict.fail { border-color: #a40000; background: #fdecea; }
.verdict ul { margin: .3rem 0 0; padding-left: 1.2rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11.5rem, 1fr)); gap: .7rem; }
.card { background: var(--box); border: 1px solid var(--line); padding: .7rem .8rem; }
.card .value { font-size: 1.7rem; font-weight: 650; line-height: 1.2; }
.card .name { font-weight: 600; }
.card .note { color: var(--quiet); font-size: .85rem; line-height: 1.35; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; margin: .6rem 0 1rem; }
th, td { text-align: left; padding: .22rem .9rem .22rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
td { min-width: 5.2rem; overflow-wrap: anywhere; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
td.n { min-width: 0; }
td.n { white-space: nowrap; }
@media print {
  @page { size: A4; margin: 14mm; }
  body { font-size: 10.5pt; padding: 0; max-width: none; }
  h2 { break-after: avoid; margin-top: 1.4rem; }
  figure, .card, .verdict, tr { break-inside: avoid; }
  .wide { overflow: visible; }
  .cards { grid-template-columns: repeat(3, 1fr); }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""


def escape(text: object) -> Html:
    """Markup as it is, anything else as text."""
    return text if isinstance(text, Html) else Html(html.escape(str(text), quote=True))


def joined(parts: Iterable[object]) -> Html:
    return Html("".join(escape(part) for part in parts))


def element(tag: str, *parts: object, cls: str = "") -> Html:
    name = f' class="{html.escape(cls, quote=True)}"' if cls else ""
    return Html(f"<{tag}{name}>{joined(parts)}</{tag}>\n")


def section(title: str, *parts: object) -> Html:
    return joined([element("h2", title), *parts])


def picture(png: bytes, alt: str, caption: str = "") -> Html:
    data = base64.b64encode(png).decode("ascii")
    image = Html(f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt, quote=True)}">')
    return element("figure", image, element("figcaption", caption) if caption else "")


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> Html:
    """Numbers stand right and get separators; text stands left. None and NaN are a dash."""
    rows = [list(row) for row in rows]
    numeric = [
        bool(rows) and all(row[i] is None or isinstance(row[i], int | float) for row in rows)
        for i in range(len(header))
    ]

    def line(cells: Sequence[object], tag: str) -> Html:
        return element(
            "tr",
            *(
                element(tag, number(cell), cls="n" if numeric[i] else "")
                for i, cell in enumerate(cells)
            ),
        )

    body = joined(line(row, "td") for row in rows)
    head = element("thead", line(header, "th"))
    return element("div", element("table", head, element("tbody", body)), cls="wide")


def number(value: object, digits: int = 4) -> object:
    """1234567 -> "1,234,567"; 0.123456 -> "0.1235"; no value -> a dash."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value == int(value) and abs(value) < 1e15:
            return f"{int(value):,}"
        return f"{value:,.{digits}g}" if abs(value) < 10**digits else f"{value:,.0f}"
    return value


def document(title: str, *parts: object) -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"{joined(parts)}</body>\n</html>\n"
    )


# ---- files -------------------------------------------------------------------------------------


def prepare(folder: Path, names: Sequence[str], force: bool, option: str) -> None:
    """Make the folder; refuse before the work to overwrite what lies there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {folder} can't be made a folder ({error.strerror})") from None
    existing = [name for name in names if (folder / name).exists()]
    if existing and not force:
        raise UserError(
            f"{', '.join(existing)} exists in {folder}; replace with --force, or choose another "
            f"{option}"
        )


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    scratch = path.with_name(f".{path.name}.part")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another folder") from None
    finally:
        scratch.unlink(missing_ok=True)


def as_json(data: Any) -> str:
    """JSON with NaN as null: JSON has none."""
    return json.dumps(_plain(data), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _plain(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    if hasattr(data, "tolist"):
        return _plain(data.tolist())
    if isinstance(data, float):
        if not math.isfinite(data):
            return None
        return round(data, 9)
    return data
