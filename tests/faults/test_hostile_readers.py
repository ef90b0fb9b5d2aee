"""What lies beside a log, and every script that reads one, given bytes and values nobody meant."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from expert_profiler import convert, export, validate
from expert_profiler.log.outputs import read_outputs
from expert_profiler.log.route_log import open_log
from expert_profiler.log.vocabulary import read_tokens
from expert_profiler.report import comparison
from expert_profiler.report.report_data import collect
from expert_profiler.resources import DEMO_MODEL
from expert_profiler.run import models, preflight, profile_options, profiling
from expert_profiler.run.prompts import read_prompts
from tests.faults.table import FULL
from tests.faults.test_hostile import answers, ask_everything, damaged, sound_log, values
from tests.support import logs
from tests.support.build import QUICK

pytestmark = pytest.mark.timeout(900)

MANY = settings(
    QUICK,
    max_examples=300 if FULL else 30,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
SLOW = settings(MANY, max_examples=60 if FULL else 6)
DEMO = DEMO_MODEL


def leaves(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to everything inside a JSON value, itself included."""
    found = [path]
    if isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            found += leaves(value, (*path, key))
    return found


def replaced(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with one thing in it replaced."""
    if not path:
        return value
    data = copy.deepcopy(data)
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return data


huge = st.sampled_from([10**400, -(10**400), 1e308, "9" * 5000, [[[]]], {}, [], "", True])
anything = st.one_of(values, huge)


# ---- beside the log --------------------------------------------------------------------------


@MANY
@given(where=st.sampled_from(leaves(logs.timing())), value=anything)
def test_a_wrong_value_in_timing_json_is_a_failed_check(
    tmp_path: Path, where: tuple[Any, ...], value: Any
) -> None:
    path = tmp_path / "timing.json"
    path.write_text(json.dumps(replaced(logs.timing(), where, value)))
    [*_, check, _] = validate.validate({"timing": path})
    assert check.name == "timing" and "\n" not in check.detail and len(check.detail) < 1000


@MANY
@given(data=st.one_of(st.binary(max_size=200), st.just(b"[" * 200_000), st.just(b"9" * 5000)))
def test_any_bytes_beside_a_log_are_looked_at(tmp_path: Path, data: bytes) -> None:
    folder = tmp_path / "run"
    if not folder.exists():
        logs.write_run(folder)
    for name in ("timing.json", "prompts.txt", "expert_hist.png", "outputs.jsonl"):
        sound = (folder / name).read_bytes()
        (folder / name).write_bytes(data)
        keys = {value: key for key, value in validate.NAMES.items()}
        answers(lambda key=keys[name], path=folder / name: validate.validate({key: path}), folder)
        if name == "outputs.jsonl":
            both = {"routes": folder / "moe_routes.jsonl", "outputs": folder / name}
            answers(lambda both=both: validate.validate(both), folder / name)
        (folder / name).write_bytes(sound)


@MANY
@given(data=st.one_of(st.binary(max_size=200), st.text(max_size=80).map(str.encode)))
def test_any_prompts_file_is_read_or_refused_in_one_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(data)
    answers(lambda: read_prompts(path), path)


@MANY
@given(
    key=st.sampled_from(["req_id", "prompt_token_ids", "token_ids"]),
    value=st.one_of(anything, st.lists(anything, max_size=3)),
)
def test_a_wrong_value_in_outputs_is_read_or_refused_in_one_line(
    tmp_path: Path, key: str, value: Any
) -> None:
    path = tmp_path / "outputs.jsonl"
    lines = [json.loads(line) for line in logs.write_outputs(path).read_bytes().splitlines()]
    lines[0][key] = value
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers(lambda: read_outputs(path), path)
    answers(lambda: read_tokens(path), path)


# ---- a checkpoint ----------------------------------------------------------------------------


def look_at_checkpoint(folder: Path) -> None:
    """What run_profile.py and the preflight ask of a checkpoint before an engine starts."""
    check = preflight.model_check(str(folder), False, lambda _: None, lambda _: None)
    assert "\n" not in check.fact
    preset = models.resolve(str(folder), has_gpu=False)
    config = models.read_config(preset.model)
    assert config is not None
    models.check_config(preset.model, config, "0")
    args = profile_options.parse(["--model", str(folder)], "")
    profiling.engine_settings(args, preset, config, on_cpu=True)


CONFIG = json.loads((DEMO / "config.json").read_text())


@MANY
@given(
    where=st.sampled_from([*leaves(CONFIG), ("text_config",), ("max_position_embeddings",)]),
    value=anything,
)
def test_a_wrong_value_in_a_checkpoints_config_is_read_or_refused_in_one_line(
    tmp_path: Path, where: tuple[Any, ...], value: Any
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(replaced(CONFIG, where, value)))
    answers(lambda: look_at_checkpoint(tmp_path), tmp_path)


@MANY
@given(data=st.one_of(st.binary(max_size=200), st.just(b"[" * 200_000)))
def test_any_bytes_in_a_checkpoint_are_read_or_refused_in_one_line(
    tmp_path: Path, data: bytes
) -> None:
    (tmp_path / "README.md").write_bytes(data)
    (tmp_path / "config.json").write_bytes(data)
    answers(lambda: look_at_checkpoint(tmp_path), tmp_path)


@SLOW
@given(seed=st.integers(0, 1 << 40))
def test_a_damaged_tokenizer_or_outputs_is_told_in_one_line(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    log = tmp_path / "x.jsonl"
    sound_log(log)
    outputs = logs.write_outputs(tmp_path / "outputs.jsonl")
    shutil.copy(DEMO / "tokenizer.json", folder)
    broken = rng.choice([folder / "tokenizer.json", outputs])
    data = broken.read_bytes()
    broken.write_bytes(damaged(data, rng) if rng.random() < 0.7 else rng.randbytes(50))

    def report() -> None:
        with open_log(log, weights=True) as found:
            collect(found, outputs=outputs, tokenizer=folder)

    answers(report, broken)


# ---- other logs ------------------------------------------------------------------------------


def test_a_log_of_passes_is_refused_by_name(tmp_path: Path) -> None:
    path = a_log_of_passes(tmp_path)
    assert not answers(lambda: ask_everything(path), path)


def a_log_of_passes(folder: Path) -> Path:
    from types import SimpleNamespace

    from vllm.moe_routes.recorder import control

    from tests.faults.victim import Load, arm

    path = folder / "passes.jsonl"
    path.unlink(missing_ok=True)
    runner = arm(path, mode="per_pass")
    Load(runner).step()
    assert control(SimpleNamespace(model_runner=runner), "stop")["ok"]
    return path


@MANY
@given(seed=st.integers(0, 1 << 40))
def test_a_damaged_log_of_passes_is_refused_in_one_line(tmp_path: Path, seed: int) -> None:
    path, whole = tmp_path / "x.jsonl", tmp_path / "passes.jsonl"
    if not whole.exists():
        a_log_of_passes(tmp_path)
    path.write_bytes(damaged(whole.read_bytes(), random.Random(seed)))
    answers(lambda: ask_everything(path), path)


FOOTERS = ("moe_routes.meta", "moe_routes.requests", "moe_routes.end")


@settings(MANY, max_examples=200 if FULL else 20)
@given(
    name=st.sampled_from(FOOTERS),
    value=st.one_of(
        st.none(), st.binary(max_size=40), anything.map(lambda v: json.dumps(v).encode()),
        st.just(b"[" * 200_000), st.just(b'{"rows":' + b"9" * 5000 + b"}"),
    ),
    inside=st.booleans(),
    number=st.integers(0, 1 << 20),
)  # fmt: skip
def test_a_wrong_footer_of_a_part_is_read_or_refused_in_one_line(
    tmp_path: Path, name: str, value: bytes | None, inside: bool, number: int
) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    source, log = tmp_path / "x.jsonl", tmp_path / "x.parquet"
    if not source.exists():
        sound_log(source)
    convert.convert(source, log, force=True)
    part = sorted(log.glob("*.parquet"))[-1]
    table = pq.read_table(part)
    footer = dict(table.schema.metadata or {})
    if inside and value is not None and name.encode() in footer:
        # One thing within the footer instead of all of it.
        whole = json.loads(footer[name.encode()])
        ways = leaves(whole)
        try:
            new = json.loads(value)
        except (ValueError, RecursionError):
            new = None
        value = json.dumps(replaced(whole, ways[number % len(ways)], new)).encode()
    if value is None:
        footer.pop(name.encode(), None)
    else:
        footer[name.encode()] = value
    part.unlink()
    pq.write_table(table.replace_schema_metadata(footer), part)
    answers(lambda: ask_everything(log), log)


# ---- the scripts that read all of a log ------------------------------------------------------


def use_everything(log: Path, out: Path) -> list[Callable[[], object]]:
    """compare, export, convert and the report, without the drawing."""

    def report() -> None:
        with open_log(log, weights=True) as found:
            collect(found)

    def exported(format_: str) -> Callable[[], object]:
        target = out / f"x{export.SUFFIXES[format_][-1]}"
        return lambda: export.main([str(log), "--format", format_, "--out", str(target), "--force"])

    return [
        report,
        lambda: comparison.compared([comparison.read_run(log, name) for name in "ab"]),
        lambda: convert.convert(log, out / "x.parquet", force=True),
        *(exported(format_) for format_ in export.SUFFIXES),
    ]


KEYS = sorted(
    {*logs.meta(), *logs.route("0", 0, 0, [0, 1])} | {"rows", "drops", "rows_flagged", "flag"}
)


@settings(SLOW, max_examples=60 if FULL else 4)
@given(
    where=st.sampled_from(["meta", "route", "end"]),
    key=st.sampled_from(KEYS),
    value=anything,
    seed=st.one_of(st.none(), st.integers(0, 1 << 40)),
)
@example(where="meta", key="device", value="\ud800", seed=None)
@example(where="end", key="reason", value="\ud800", seed=None)
def test_every_script_answers_for_a_damaged_log_in_one_line(
    tmp_path: Path,
    where: str,
    key: str,
    value: Any,
    seed: int | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "x.jsonl"
    data = sound_log(path)
    if seed is None:
        lines = [json.loads(line) for line in data.splitlines()]
        next(line for line in lines if line["type"] == where)[key] = value
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        path.write_bytes(damaged(data, random.Random(seed)) or b" ")
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    for use in use_everything(path, out):
        answers(use, path)
    capsys.readouterr()
