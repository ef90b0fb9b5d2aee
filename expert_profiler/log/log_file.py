"""One log file: its header, its end record and where it is broken.

Nothing here reads the route rows themselves, so the cost does not depend on the file's size;
:func:`find_bad_line` is the exception and runs only when something is already known to be wrong.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import msgspec

from expert_profiler.errors import UserError

# No line this tool can use is longer; what is, is not a line.
MAX_LINE_BYTES = 16 * 1024 * 1024
#: Tables of counts are this wide at most; the recorder's ids are 16 bits wide.
MOST_EXPERTS = 1 << 16
_TAIL_BYTES = 64 * 1024

RECORD_AGAIN = "record again with: ./test.sh"


@dataclass(frozen=True)
class LayerInfo:
    """One entry of the header's ``layers``."""

    layer: int
    name: str
    top_k: int
    num_experts: int
    source: str


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
    """What the two ends of one log say. Offsets and sizes in bytes."""

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


def open_file(path: Path) -> LogFile:
    """Read the header and the end record of the log at ``path``."""
    from expert_profiler.log import part_files

    if part_files.is_dataset(path):
        return part_files.open_dataset(path)
    size = _require_log(path)
    with path.open("rb") as file:
        meta = parse_header(path, file.readline(MAX_LINE_BYTES))
        last, offset, partial = _read_tail(path, file, size)
    end = parse_end(path, last) if last.get("type") == "end" else None
    return LogFile(path, size, meta, end, offset if end else size - partial, partial)


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
    """The log and those it went on in, where its size was bounded.

    listed: names of the run's logs so far; the followers' are added.
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


def find_bad_line(path: Path, public: bool = True) -> tuple[int, str] | None:
    """The first line that is not a complete record: (1-based line number, reason), else None.

    public: route lines need no phase and no forward_pass_id. An unfinished last line is not
    reported: that is a log cut short, not a malformed one.
    """
    route = _PUBLIC_ROUTE if public else _ROUTE
    decode = msgspec.json.Decoder(route | _REQUEST | _META | _END).decode
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                if not line.strip() or not line.endswith(b"\n"):
                    continue
                return number, _plain_reason(error)
    return None


def raise_bad_line(files: Sequence[LogFile]) -> None:
    """Name the first malformed line of JSONL ``files``; returns when there is none."""
    for file in files:
        if not file.parts and (found := find_bad_line(file.path)):
            raise bad_line_error(file.path, *found)


def bad_line_error(path: Path, number: int, reason: str) -> UserError:
    return UserError(f"{path}, line {number}: {reason}; {RECORD_AGAIN}")


def _record(kind: str, *fields: tuple[Any, ...]) -> Any:
    return msgspec.defstruct(f"_{kind.title()}", fields, tag_field="type", tag=kind)


_ROUTE_FIELDS = (
    ("req_id", str | int),
    ("token_idx", int),
    ("layer", int),
    ("topk_ids", list[int]),
    ("topk_weights", list[float]),
)
_PHASE = Literal["prefill", "decode"]
_FLAG = ("flag", Literal["recomputed", "overrun", "rejected"] | None, None)
_ROUTE = _record("route", *_ROUTE_FIELDS, ("phase", _PHASE), ("forward_pass_id", int), _FLAG)
_PUBLIC_ROUTE = _record("route", *_ROUTE_FIELDS, ("phase", _PHASE | None, None), _FLAG)
_REQUEST = _record("request", ("req_id", str | int), ("cached_tokens", int | None, None))
_META = _record("meta")
_END = _record("end")


def _plain_reason(error: Exception) -> str:
    text = str(error)
    if isinstance(error, msgspec.ValidationError):
        return f"not a valid record: {text}"
    return f"not valid JSON: {text}"


def _require_log(path: Path) -> int:
    """The size of a file that can be a log, or the reason why it cannot be one."""
    if path.is_dir():
        raise UserError(
            f"{path} is a directory, not a log; name the file: {path / 'moe_routes.jsonl'}"
        )
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(4096)
    except FileNotFoundError:
        raise UserError(f"no log at {path}; make one with: ./test.sh, or name yours") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check: ls -l {path}") from None
    if not head.strip():
        raise UserError(f"{path} is empty; {RECORD_AGAIN}")
    if head.startswith(b"\x1f\x8b"):
        raise UserError(f"{path} is gzip-compressed; unpack it first: gunzip -k {path}")
    # NUL cannot stand in JSON text; the prefix is zstd's. Damage further down
    # is a malformed line and gets its number.
    if head.startswith(b"PAR1"):
        raise UserError(
            f"{path} is a binary file, one part of a Parquet log; name its directory: {path.parent}"
        )
    if b"\0" in head.partition(b"\n")[0] or head.startswith(b"\x28\xb5\x2f\xfd"):
        raise UserError(f"{path} is a binary file, not a JSONL log; {RECORD_AGAIN}")
    return size


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
    """JSON can escape half a character, which no page and no other log can hold: ValueError."""
    json.dumps(raw, ensure_ascii=False).encode()


def _parse_meta(raw: dict[str, Any]) -> Meta:
    files = raw.get("files")
    layers = [
        LayerInfo(
            layer=int(entry["layer"]),
            name=str(entry.get("name", "")),
            top_k=int(entry["top_k"]),
            num_experts=int(entry["num_experts"]),
            source=str(entry.get("source", "router")),
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


def _read_tail(path: Path, file: IO[bytes], size: int) -> tuple[dict[str, Any], int, int]:
    """The last complete line, its offset and the length of an unfinished line after it."""
    span = _TAIL_BYTES
    while True:
        start = max(0, size - span)
        file.seek(start)
        tail = file.read(size - start)
        complete, newline, rest = tail.rpartition(b"\n")
        # An unterminated line that parses is a whole line whose newline is missing.
        if rest.strip() and (record := _object(rest)) is not None:
            return record, size - len(rest), 0
        text = complete.rstrip()
        line_start = text.rfind(b"\n") + 1
        if line_start > 0 or start == 0 or span > MAX_LINE_BYTES:
            break
        span *= 8
    record = _object(text[line_start:])
    if newline and record is None:
        number, reason = find_bad_line(path) or (0, "not valid JSON")
        raise bad_line_error(path, number, reason)
    return record or {}, start + line_start, len(rest)


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


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
    drops: dict[str, int] = {}
    for end in whole:
        for cause, count in end.drops.items():
            drops[cause] = drops.get(cause, 0) + count
    verdicts = [end.self_check for end in whole]
    # The worst verdict speaks for the run: anything that is not a pass.
    verdict = next((verdict for verdict in verdicts if verdict != "pass"), "pass")
    if "fail" in verdicts:
        verdict = "fail"
    return End(
        reason=whole[0].reason,
        rows=sum(end.rows for end in whole),
        rows_flagged=sum(end.rows_flagged for end in whole),
        drops=drops,
        self_check=verdict,
        failed_checks=tuple(check for end in whole for check in end.failed_checks),
        raw=whole[0].raw,
    )
