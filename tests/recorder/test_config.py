# SPDX-License-Identifier: Apache-2.0
"""The switches."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from vllm.moe_routes.config import VARIABLES, RouteLogConfig
from vllm.moe_routes.errors import RouteLogError

PATH = {"VLLM_LOG_MOE": "/logs/x.jsonl"}
LOG = Path("/logs/x.jsonl")


def _config(**switches: str) -> RouteLogConfig:
    config = RouteLogConfig.from_env({**PATH, **switches})
    assert config is not None
    return config


@pytest.mark.parametrize("value", [None, "", "  "])
def test_without_a_path_there_is_no_recorder(value: str | None) -> None:
    assert RouteLogConfig.from_env({} if value is None else {"VLLM_LOG_MOE": value}) is None


def test_without_a_path_the_other_switches_do_nothing() -> None:
    assert RouteLogConfig.from_env({"VLLM_LOG_MOE_QUEUE_MB": "rubbish"}) is None


def test_the_process_environment_is_read_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert RouteLogConfig.from_env() is None
    monkeypatch.setenv("VLLM_LOG_MOE", PATH["VLLM_LOG_MOE"])
    assert RouteLogConfig.from_env() == _config()


def test_a_path_alone_takes_the_defaults() -> None:
    assert _config() == RouteLogConfig(
        path=LOG,
        mode="per_token",
        api=False,
        directory=Path.cwd() / "moe_recordings",
        layers="all",
        autostart=True,
        queue_bytes=256 * 1024 * 1024,
        on_full="block",
        flush_seconds=1.0,
    )


def test_defaults_of_class_and_environment_agree() -> None:
    assert RouteLogConfig(path=LOG) == _config()


def test_every_switch_is_heard() -> None:
    config = _config(
        VLLM_LOG_MOE_MODE="per_pass",
        VLLM_LOG_MOE_API="1",
        VLLM_LOG_MOE_DIR="/recordings",
        VLLM_LOG_MOE_LAYER_METRICS="1",
        VLLM_LOG_MOE_LAYERS="0,3-5",
        VLLM_LOG_MOE_AUTOSTART="0",
        VLLM_LOG_MOE_QUEUE_MB="1.5",
        VLLM_LOG_MOE_ON_FULL="block",
        VLLM_LOG_MOE_WEIGHTS="float16",
        VLLM_LOG_MOE_FLUSH_SECONDS="0.25",
    )
    assert config == RouteLogConfig(
        path=LOG,
        mode="per_pass",
        api=True,
        directory=Path("/recordings"),
        layer_metrics=True,
        layers="0,3-5",
        autostart=False,
        queue_bytes=1572864,
        on_full="block",
        flush_seconds=0.25,
        weights="float16",
    )


def test_the_api_alone_arms_the_recorder_and_never_waits_for_a_disk() -> None:
    config = RouteLogConfig.from_env({"VLLM_LOG_MOE_API": "1"})
    assert config is not None
    assert (config.path, config.api, config.on_full) == (None, True, "drop")
    assert config.mode == "stat"
    assert RouteLogConfig.from_env({"VLLM_LOG_MOE_API": "0"}) is None


def test_stat_writes_no_file_and_says_so() -> None:
    with pytest.raises(RouteLogError, match="stat keeps counts and writes no file"):
        _config(VLLM_LOG_MOE_MODE="stat", VLLM_LOG_MOE_API="1")


def test_only_single_tokens_go_into_parquet() -> None:
    with pytest.raises(RouteLogError, match=r"does not end in \.jsonl"):
        _config(VLLM_LOG_MOE="/logs/x.parquet", VLLM_LOG_MOE_MODE="per_pass")


def test_a_directory_may_be_written_with_a_slash() -> None:
    config = RouteLogConfig.from_env({"VLLM_LOG_MOE": "/logs/x.parquet/"})
    assert config is not None
    assert config.path == Path("/logs/x.parquet")


def test_a_relative_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = RouteLogConfig.from_env({"VLLM_LOG_MOE": " logs/x.jsonl "})
    assert config is not None
    assert config.path == tmp_path / "logs" / "x.jsonl"


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("VLLM_LOG_MOE", "/logs/x.csv", "does not end in .jsonl or .parquet"),
        ("VLLM_LOG_MOE", "/logs/", "does not end in .jsonl or .parquet"),
        ("VLLM_LOG_MOE_WEIGHTS", "bfloat16", "use float32 or float16"),
        ("VLLM_LOG_MOE_AUTOSTART", "true", "use 0 or 1"),
        ("VLLM_LOG_MOE_AUTOSTART", "", "use 0 or 1"),
        ("VLLM_LOG_MOE_MODE", "tokens", "use stat, per_pass or per_token"),
        ("VLLM_LOG_MOE_API", "yes", "use 0 or 1"),
        ("VLLM_LOG_MOE_ON_FULL", "wait", "use block or drop"),
        ("VLLM_LOG_MOE_QUEUE_MB", "many", "use a number from 1 to"),
        ("VLLM_LOG_MOE_QUEUE_MB", "0", "use a number from 1 to"),
        ("VLLM_LOG_MOE_QUEUE_MB", "-5", "use a number from 1 to"),
        ("VLLM_LOG_MOE_QUEUE_MB", "nan", "use a number from 1 to"),
        ("VLLM_LOG_MOE_QUEUE_MB", "inf", "use a number from 1 to"),
        ("VLLM_LOG_MOE_FLUSH_SECONDS", "0", "use a number from 0.01 to 3600"),
        ("VLLM_LOG_MOE_FLUSH_SECONDS", "1s", "use a number from 0.01 to 3600"),
        ("VLLM_LOG_MOE_FLUSH_SECONDS", "nan", "use a number from 0.01 to 3600"),
    ],
)
def test_an_unusable_value_is_refused_in_one_line(name: str, value: str, told: str) -> None:
    with pytest.raises(RouteLogError) as caught:
        RouteLogConfig.from_env({**PATH, name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}=")
    assert value in message
    assert told in message
    assert "\n" not in message


@pytest.mark.parametrize("armed", [True, False])
def test_a_misspelt_switch_is_refused_and_the_real_ones_named(armed: bool) -> None:
    env = {**(PATH if armed else {}), "VLLM_LOG_MOE_LAYER": "0"}
    with pytest.raises(RouteLogError, match="VLLM_LOG_MOE_LAYER is no switch") as caught:
        RouteLogConfig.from_env(env)
    for name in VARIABLES:
        assert name in str(caught.value)


def test_other_variables_of_vllm_are_left_alone() -> None:
    assert RouteLogConfig.from_env({"VLLM_LOGGING_LEVEL": "DEBUG", "VLLM_MOE": "1"}) is None


def test_what_vllm_envs_registers_is_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    unset = {name: read() for name, read in VARIABLES.items()}
    assert unset.pop("VLLM_LOG_MOE") is None
    assert unset["VLLM_LOG_MOE_MODE"] == "stat"
    monkeypatch.setenv("VLLM_LOG_MOE", PATH["VLLM_LOG_MOE"])
    unset["VLLM_LOG_MOE_MODE"] = VARIABLES["VLLM_LOG_MOE_MODE"]()
    assert RouteLogConfig.from_env({**PATH, **unset}) == _config()
    for name, read in VARIABLES.items():
        monkeypatch.setenv(name, "seen")
        assert read() == "seen"


def test_config_needs_nothing_but_the_standard_library() -> None:
    """``vllm.envs`` imports it before torch."""
    import ast

    import vllm.moe_routes.config as module

    tree = ast.parse(Path(str(module.__file__)).read_text())
    imported = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)} | {
        a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names
    }
    ours = {"vllm.moe_routes.errors"}
    assert {name.split(".")[0] for name in imported - ours} <= sys.stdlib_module_names
