# SPDX-License-Identifier: Apache-2.0
"""The header and the end record of one file of a log, of either format."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expert_profiler.errors import UserError

#: Tables of counts are this wide at most; the recorder's ids are 16 bits wide.
MOST_EXPERTS = 1 << 16

RECORD_AGAIN = "record again with: ./test.sh"


@dataclass(frozen=True)
class LayerInfo:
    """One entry of the header's ``layers``."""

    layer: int
    top_k: int
    num_experts: int


@dataclass(frozen=True)
class Meta:
    """The header. A public logger's header stops at ``top_k``; what it lacks is None or empty."""

    model_id: str
    layers_logged: tuple[int, ...]
    top_k: int | None
    schema_version: int | None
    num_experts: int | None
    layers: tuple[LayerInfo, ...]
    files: tuple[str, ...]
    raw: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class End:
    """The end record, or the sum of all files' end records."""

    reason: str
    rows: int
    rows_flagged: int
    drops: dict[str, int]
    self_check: str
    failed_checks: tuple[str, ...]
    raw: dict[str, Any] = field(repr=False)

    @property
    def dropped(self) -> int:
        return sum(self.drops.values())


@dataclass(frozen=True)
class LogFile:
    """What the two ends of one file say. Offsets and sizes in bytes."""

    path: Path
    size: int
    meta: Meta
    end: End | None
    end_offset: int  # where the end record starts; the size of what is complete if there is none
    partial_bytes: int  # length of an unfinished last line, left out of everything
    parts: tuple[Path, ...] = ()  # of a Parquet log

    @property
    def finished(self) -> bool:
        return self.end is not None and self.partial_bytes == 0


def bad_line_error(path: Path, number: int, reason: str) -> UserError:
    return UserError(f"{path}, line {number}: {reason}; {RECORD_AGAIN}")


def parse_object(text: bytes) -> dict[str, Any] | None:
    """The JSON object in ``text``, if it is one."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def parse_header(path: Path, line: bytes) -> Meta:
    """The header; ``path`` is where it stands."""
    try:
        raw = json.loads(line)
        _check_text(raw)
    except (ValueError, RecursionError):
        raise bad_line_error(path, 1, "not valid JSON, so not the header of a route log") from None
    if not isinstance(raw, dict) or raw.get("type") != "meta":
        found = f'"type": {json.dumps(raw.get("type"))}' if isinstance(raw, dict) else "no object"
        raise bad_line_error(path, 1, f'the header ("type": "meta") must come first, found {found}')
    try:
        return _parse_meta(raw)
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise bad_line_error(path, 1, f"malformed header: {error}") from None


def _check_text(raw: object) -> None:
    """Raise ValueError for what UTF-8 can't encode: JSON can escape half a surrogate pair."""
    json.dumps(raw, ensure_ascii=False).encode()


def _parse_meta(raw: dict[str, Any]) -> Meta:
    files = raw.get("files")
    layers = [
        LayerInfo(
            layer=int(entry["layer"]),
            top_k=int(entry["top_k"]),
            num_experts=int(entry["num_experts"]),
        )
        for entry in _list(raw, "layers")
    ]
    declared = [item.num_experts for item in layers] + [_optional_int(raw, "num_experts") or 0]
    if not 0 <= max(declared) <= MOST_EXPERTS:
        raise ValueError(f"num_experts is {max(declared)}, and no model has that many")
    return Meta(
        model_id=str(raw.get("model_id", "unknown model")),
        layers_logged=tuple(int(layer) for layer in _list(raw, "layers_logged")),
        top_k=_optional_int(raw, "top_k"),
        schema_version=_optional_int(raw, "schema_version"),
        num_experts=_optional_int(raw, "num_experts"),
        layers=tuple(layers),
        files=tuple(str(name) for name in files) if isinstance(files, list) else (),
        raw=raw,
    )


def _list(raw: dict[str, Any], key: str) -> list[Any]:
    value = raw.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise TypeError(f"{key} is not a list")
    return value


def _optional_int(raw: dict[str, Any], key: str) -> int | None:
    value = raw.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(f"{key} is not an integer")
    return value


def parse_end(path: Path, raw: dict[str, Any]) -> End:
    """The end record; ``path`` is where it stands."""
    try:
        _check_text(raw)
        check = raw.get("self_check") or {}
        return End(
            reason=str(raw.get("reason", "unknown")),
            rows=int(raw["rows"]),
            rows_flagged=int(raw.get("rows_flagged", 0)),
            drops={str(cause): int(count) for cause, count in raw.get("drops", {}).items()},
            self_check=str(check.get("verdict", "absent")),
            failed_checks=tuple(
                f"{item.get('name')}: {item.get('detail', '')}".rstrip(": ")
                for item in check.get("checks", [])
                if item.get("verdict") == "fail"
            ),
            raw=raw,
        )
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        reason = f"missing {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path}, last line: malformed end record: {reason}; {RECORD_AGAIN}") from (
            None
        )


def merge_ends(ends: list[End | None]) -> End | None:
    """One end record for a run whose ranks wrote several files; None if any of them has none."""
    whole = [end for end in ends if end is not None]
    if len(whole) != len(ends) or not whole:
        return None
    drops: Counter[str] = Counter()
    for end in whole:
        drops.update(end.drops)
    # The worst verdict speaks for the run: "fail", else anything that is no pass.
    verdicts = [end.self_check for end in whole if end.self_check != "pass"]
    verdicts.sort(key=lambda verdict: verdict != "fail")
    return End(
        reason=whole[0].reason,
        rows=sum(end.rows for end in whole),
        rows_flagged=sum(end.rows_flagged for end in whole),
        drops=dict(drops),
        self_check=verdicts[0] if verdicts else "pass",
        failed_checks=tuple(check for end in whole for check in end.failed_checks),
        raw=whole[0].raw,
    )
