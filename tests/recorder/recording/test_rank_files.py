# SPDX-License-Identifier: Apache-2.0
"""Which file a rank writes, and the names of all ranks' files."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm.moe_routes.errors import RouteLogError
from vllm.moe_routes.recording.rank_files import Rank, main_path, rank_files

from tests.support.build import a_layer

MAIN = Path("/logs/x.jsonl")
STAGES = [[a_layer(0), a_layer(1)], [a_layer(2)], [a_layer(3)]]
EVERY = [item for stage in STAGES for item in stage]


@pytest.mark.parametrize(
    ("dp", "pp", "name"),
    [(0, 0, "x.jsonl"), (0, 2, "x.pp2.jsonl"), (1, 0, "x.dp1.jsonl"), (1, 1, "x.dp1.pp1.jsonl")],
)
def test_every_rank_has_its_own_file_and_all_are_named(dp: int, pp: int, name: str) -> None:
    path, names = rank_files(MAIN, Rank(dp, pp, 0), 2, STAGES, EVERY)
    assert path == Path("/logs") / name
    assert names == [
        *("x.jsonl", "x.pp1.jsonl", "x.pp2.jsonl"),
        *("x.dp1.jsonl", "x.dp1.pp1.jsonl", "x.dp1.pp2.jsonl"),
    ]


def test_a_stage_without_a_chosen_layer_writes_nothing_and_the_next_one_the_main_file() -> None:
    chosen = [a_layer(2), a_layer(3)]
    assert rank_files(MAIN, Rank(0, 1, 0), 1, STAGES, chosen) == (MAIN, ["x.jsonl", "x.pp2.jsonl"])


def test_the_file_that_a_command_names_goes_before_the_switchs() -> None:
    assert main_path("/logs/y.jsonl", MAIN, "per_token") == Path("/logs/y.jsonl")
    assert main_path(None, MAIN, "per_token") == MAIN


@pytest.mark.parametrize(
    ("named", "default", "told"),
    [
        (None, None, "mode per_pass writes a file; name it with path="),
        ("x.csv", MAIN, "does not end in .jsonl or .parquet"),
        (None, Path("/logs/x.parquet"), "does not end in .jsonl, which mode per_pass writes"),
    ],
)
def test_a_file_that_is_not_named_or_does_not_fit_the_mode_is_refused(
    named: str | None, default: Path | None, told: str
) -> None:
    with pytest.raises(RouteLogError, match=told):
        main_path(named, default, "per_pass")
