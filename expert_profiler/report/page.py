# SPDX-License-Identifier: Apache-2.0
"""Render pages from templates: self-contained HTML that opens offline and prints on A4.

Templates escape every value, so that no name, id or prompt of a log becomes markup.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2


def render(template: str, **values: Any) -> str:
    """The page of a template in ``templates/`` with these values."""
    return environment().get_template(template).render(values)


@cache
def environment() -> jinja2.Environment:
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    found.filters |= {"number": number, "base64": lambda png: base64.b64encode(png).decode("ascii")}
    found.tests["known"] = lambda value: value is not None and not math.isnan(value)
    found.globals["numeric_columns"] = numeric_columns
    return found


def numeric_columns(header: Sequence[object], rows: Sequence[Sequence[object]]) -> list[bool]:
    """Of each column of a table, whether every cell is a number or has no value."""
    return [
        bool(rows) and all(row[i] is None or isinstance(row[i], int | float) for row in rows)
        for i in range(len(header))
    ]


def number(value: object, digits: int = 4) -> object:
    """1234567 -> "1,234,567"; 0.123456 -> "0.1235"; no value -> a dash; text as it is."""
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
        return round(data, 9) if math.isfinite(data) else None
    return data
