# SPDX-License-Identifier: Apache-2.0
"""Bytes that nobody meant: every reader answers with figures or with one line, and soon."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import random
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from vllm.moe_routes.config import VARIABLES, RouteLogConfig
from vllm.moe_routes.errors import RouteLogError
from vllm.moe_routes.layers import parse_selection, select

from expert_profiler import errors
from expert_profiler.commands import convert, sql, validate
from expert_profiler.errors import UserError
from expert_profiler.log import conversion, open_log, row_identity, validation
from expert_profiler.log.outputs import read_positions
from tests.faults.table import FULL
from tests.support import logs
from tests.support.build import QUICK, a_layer
from tests.support.paths import REPO

pytestmark = pytest.mark.timeout(600)

MANY = settings(
    QUICK,
    max_examples=1500 if FULL else 30,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def one_line(text: str, path: Path | None = None) -> None:
    """An error says what and where, in one line that fits a screen or two."""
    assert text.strip(), "it says something"
    assert "\n" not in text.strip() and "\r" not in text.strip(), text[:500]
    assert len(text) < 1000, f"{len(text)} characters"
    assert "Traceback" not in text
    if path is not None:
        assert path.name in text, text


def answers(read: Callable[[], object], path: Path) -> bool:
    """Whether ``read`` gave an answer; if not, it raised a ``UserError`` worth reading."""
    try:
        read()
    except UserError as error:
        one_line(str(error), path)
        return False
    return True


def ask_everything(path: Path) -> None:
    """What the scripts ask of a log."""
    with open_log(path) as log:
        log.counts()
        validation.weight_faults(log)
        _ = log.notes
        row_identity.cached_tokens(log)
        log.query("SELECT count(*), max(token_idx) FROM routes")


def sound_log(path: Path) -> bytes:
    return logs.write_log(path, logs.run_rows()).read_bytes()


# ---- bytes ---------------------------------------------------------------------------------


def damaged(data: bytes, rng: random.Random) -> bytes:
    """One thing done to a file, as disks, editors and copying do it."""
    at = rng.randrange(len(data) + 1)
    size = rng.choice([1, 1, 2, 7, 100])
    kind = rng.randrange(9)
    lines = data.splitlines(keepends=True)
    line = rng.randrange(len(lines))
    if kind == 0:
        return data[:at]
    if kind == 1 and data:
        at = min(at, len(data) - 1)
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + data[at + size :]
    if kind == 3:
        return data[:at] + rng.randbytes(size) + data[at:]
    if kind == 4:
        return b"".join(lines[:line] + lines[line : line + 1] * 2 + lines[line + 1 :])
    if kind == 5:
        return b"".join(lines[:line] + lines[line + 1 :])
    if kind == 6:
        rng.shuffle(lines)
        return b"".join(lines)
    if kind == 7:
        return data[:at] + bytes(size) + data[at:]
    return data.replace(b"\n", b"\r\n") if at % 2 else b"\xef\xbb\xbf" + data


@MANY
@given(seed=st.integers(0, 1 << 40), times=st.integers(1, 3))
def test_a_damaged_log_is_read_or_refused_in_one_line(
    tmp_path: Path, seed: int, times: int
) -> None:
    path, rng = tmp_path / "x.jsonl", random.Random(seed)
    data = sound_log(path)
    for _ in range(times):
        data = damaged(data, rng) or b" "
    path.write_bytes(data)
    answers(lambda: ask_everything(path), path)


@MANY
@given(data=st.binary(max_size=300))
def test_any_bytes_are_no_log(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(data)
    assert not answers(lambda: ask_everything(path), path)


@MANY
@given(seed=st.integers(0, 1 << 40))
def test_damaged_outputs_are_read_or_refused_in_one_line(tmp_path: Path, seed: int) -> None:
    path, rng = tmp_path / "outputs.jsonl", random.Random(seed)
    path.write_bytes(damaged(logs.write_outputs(path).read_bytes(), rng))
    answers(lambda: read_positions(path), path)


@MANY
@given(seed=st.integers(0, 1 << 40))
def test_a_damaged_parquet_log_is_read_or_refused_in_one_line(tmp_path: Path, seed: int) -> None:
    pytest.importorskip("pyarrow")
    rng, source = random.Random(seed), tmp_path / "x.jsonl"
    log = tmp_path / "x.parquet"
    if not source.exists():
        sound_log(source)
        conversion.convert(source, log)
    parts = sorted(log.glob("*.parquet"))
    part = rng.choice(parts)
    whole = part.read_bytes()
    try:
        part.write_bytes(damaged(whole, rng))
        answers(lambda: ask_everything(log), log)
    finally:
        part.write_bytes(whole)


# ---- values --------------------------------------------------------------------------------

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 70), 1 << 70),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=8),
    st.just("<script>alert(1)</script>"),
    st.just("a\nb\rc\x00d"),
    st.just("\ud800"),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


KEYS = sorted(
    {*logs.meta(), *logs.route("0", 0, 0, [0, 1])}
    | {"rows", "drops", "rows_flagged", "self_check", "next", "sample", "part", "flag"}
    | {"cached_tokens", "reason"}
)


@MANY
@given(
    where=st.sampled_from(["meta", "route", "request", "end"]),
    key=st.sampled_from(KEYS),
    value=values,
)
# DuckDB cuts the message it makes of this line within a character, depending on the path's length.
@example(
    "meta", "cached_tokens", [None, [None], {"": "<script>alert(1)</script>"}, {"0\x80": None}]
)
def test_a_wrong_value_anywhere_is_read_or_refused_in_one_line(
    tmp_path: Path, where: str, key: str, value: Any
) -> None:
    path = tmp_path / "x.jsonl"
    lines = [json.loads(line) for line in sound_log(path).splitlines()]
    lines.insert(-1, {"type": "request", "req_id": "0", "cached_tokens": 0})
    next(line for line in lines if line["type"] == where)[key] = value
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    answers(lambda: ask_everything(path), path)


def _deep(n: int) -> bytes:
    return b'{"type":"meta","model_id":' + b"[" * n + b"]" * n + b"}\n"


HOSTILE: dict[str, Callable[[bytes], bytes]] = {
    "deep nesting in the header": lambda data: _deep(100_000) + data,
    "deep nesting in a row": lambda data: data + b"[" * 200_000 + b"]" * 200_000 + b"\n",
    "an unfinished deep row": lambda data: data + b'{"a":' * 200_000,
    "gzip": gzip.compress,
    "a huge integer": lambda data: data.replace(b'"token_idx": 0', b'"token_idx": ' + b"9" * 5000),
    "a huge integer in the header": lambda data: data.replace(b"1234", b"9" * 5000, 1),
    "a huge integer in the end": lambda data: re.sub(
        rb'("rows": )\d+(, "rows_flagged")', rb"\g<1>" + b"9" * 5000 + rb"\2", data
    ),
    "a huge exponent": lambda data: data.replace(b'"top_k": 2', b'"top_k": 1e400', 1),
    "NaN": lambda data: data.replace(b'"layer": 0', b'"layer": NaN'),
    "duplicate keys": lambda data: data.replace(b'"layer": 0', b'"layer": 0, "layer": 1'),
    "CRLF": lambda data: data.replace(b"\n", b"\r\n"),
    "a byte order mark": lambda data: b"\xef\xbb\xbf" + data,
    "UTF-16": lambda data: data.decode().encode("utf-16"),
    "two headers": lambda data: data.splitlines(keepends=True)[0] + data,
    "two logs in one": lambda data: data * 2,
    "an expert id of a billion": lambda data: data.replace(
        b'"topk_ids": [0, 1]', b'"topk_ids": [1000000000, 1]'
    ),
    "a billion experts": lambda data: data.replace(
        b'"num_experts": 8', b'"num_experts": 1000000000'
    ),
    "a billion layers": lambda data: data.replace(b'"layer": 1,', b'"layer": 1000000000,'),
    "a header that names itself": lambda data: data.replace(
        b'"moe_routes.jsonl"', b'"x.jsonl", "x.jsonl"'
    ),
    "a header that names a way out": lambda data: data.replace(
        b'"moe_routes.jsonl"', b'"../../../etc/passwd"'
    ),
    "an end that names itself": lambda data: data.replace(
        b'"reason": "stop"', b'"reason": "rotate", "next": "x.jsonl"'
    ),
    "an end that names a way out": lambda data: data.replace(
        b'"reason": "stop"', b'"reason": "rotate", "next": "../x.jsonl"'
    ),
    "NUL bytes": lambda data: data + bytes(1 << 20),
    "only newlines": lambda data: b"\n" * 100_000,
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files_are_read_or_refused_in_one_line(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(HOSTILE[what](sound_log(path)))
    answers(lambda: ask_everything(path), path)


def test_a_line_of_a_gigabyte_costs_no_gigabyte(tmp_path: Path) -> None:
    """In a process that may not have much more memory than it starts with."""
    path = tmp_path / "x.jsonl"
    data = sound_log(path)
    size = (1 << 30) if FULL else (96 << 20)
    with path.open("ab") as file:
        file.truncate(len(data) + size)  # a hole: NUL bytes that take no room
        file.seek(0, io.SEEK_END)
        file.write(b"\n")
    found = subprocess.run(
        [sys.executable, "make_hist.py", str(path), "--out", str(tmp_path / "x.png")],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=280,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30)),
    )
    assert found.returncode == errors.EXIT_CODE, found.stderr[-800:]
    one_line(found.stderr.splitlines()[-1], path)


# ---- command lines -------------------------------------------------------------------------

words = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["--force", "--out", "--layer", "-1", "99999999999999999999", "--", "-", "",
                     "/", "..", "/dev/null", "/proc/self/mem", "x" * 5000, "--rows", "--names",
                     "SELECT 1", "'; DROP TABLE routes; --", "\udcff"]),
)  # fmt: skip
PROGRAMS: dict[str, Callable[[list[str]], int]] = {
    "validate": validate.main,
    "sql": sql.main,
    "convert": convert.main,
}


@pytest.mark.parametrize("program", PROGRAMS)
@MANY
@given(arguments=st.lists(words, max_size=4), with_log=st.booleans())
def test_any_command_line_is_answered_in_a_line(
    tmp_path: Path, program: str, arguments: list[str], with_log: bool
) -> None:
    log = tmp_path / "x.jsonl"
    if not log.exists():
        sound_log(log)
    given = [str(log), *arguments] if with_log else arguments
    given = [word for word in given if "\0" not in word]  # no command line holds one
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: Any = errors.run(lambda: PROGRAMS[program](given))
        except SystemExit as end:  # argparse
            code = end.code
    assert code in (0, 1, 2), code
    assert "Traceback" not in err.getvalue()
    if code == 2:
        told = [line for line in err.getvalue().splitlines() if "error:" in line]
        assert len(told) == 1, err.getvalue()[-2000:]
        assert len(told[0]) < 2_000 + 5 * sum(map(len, given)), "no longer than what it is about"


# ---- environment variables -------------------------------------------------------------------

settings_text = st.one_of(
    st.text(max_size=20).filter(lambda text: "\0" not in text),
    st.sampled_from(["", " ", "0", "1", "-1", "1e309", "nan", "inf", "9" * 5000, "1/0", "1/1/1",
                     "1/٣", "½", "1K", "1T", "K", "0x10", "x.jsonl\n", "\udcff.jsonl",
                     "x.jsonl", "y.parquet", "per_pass", "stat", "rotate", "0-999999",
                     ",".join(["0-9999"] * 2000), "a" * 100_000]),
)  # fmt: skip


@settings(MANY, max_examples=20_000 if FULL else 500)
@given(env=st.dictionaries(st.sampled_from(sorted(VARIABLES)), settings_text, max_size=5))
def test_any_environment_is_taken_or_refused_in_one_line(env: dict[str, str]) -> None:
    try:
        config = RouteLogConfig.from_env(env)
    except RouteLogError as error:
        one_line(str(error))
        return
    if config is not None:
        with contextlib.suppress(RouteLogError):
            select(config.layers, [a_layer(0), a_layer(1)])


@settings(MANY, max_examples=5000 if FULL else 200)
@given(text=settings_text)
def test_any_selection_of_layers_is_taken_or_refused_in_one_line(text: str) -> None:
    try:
        chosen = parse_selection(text)
    except RouteLogError as error:
        one_line(str(error))
    else:
        assert chosen is None or len(chosen) <= 1_000_001
