# SPDX-License-Identifier: Apache-2.0
"""A log answers SELECTs over documented relations, reads nothing else and writes nothing."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from expert_profiler.commands import sql
from expert_profiler.errors import UserError
from expert_profiler.log import conversion, open_log
from expert_profiler.log.sql_relations import make_relations
from tests.support.logs import meta, route, run_rows, write_log, write_outputs


@pytest.fixture(params=["jsonl", "parquet"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    rows = [*run_rows(), route("0", 0, 0, [5, 6], [0.5, 0.25], flag="recomputed")]
    path = write_log(tmp_path / "moe_routes.jsonl", rows)
    if request.param == "jsonl":
        return path
    [written] = conversion.convert(path, path.with_suffix(".parquet"))
    return written


def ask(log: Path, query: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    assert sql.main([str(log), query, "--csv"]) == 0
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


def test_routes_are_the_rows_of_the_log(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = ask(log, "FROM routes", capsys)
    assert list(found[0]) == [
        "req_id", "token_idx", "layer", "phase", "forward_pass_id", "flag", "topk_ids",
        "topk_weights",
    ]  # fmt: skip
    assert len(found) == 25
    assert [row["flag"] for row in found] == [""] * 24 + ["recomputed"]
    assert {row["phase"] for row in found} == {"prefill", "decode"}
    assert [json.loads(row["topk_ids"]) for row in found[:24]] == [
        row["topk_ids"] for row in run_rows()
    ]


def test_experts_are_one_row_a_choice(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = ask(log, "SELECT rank, expert, weight FROM experts WHERE flag = 'recomputed'", capsys)
    assert [tuple(row.values()) for row in found] == [("1", "5", "0.5"), ("2", "6", "0.25")]
    [total] = ask(log, "SELECT count(*) AS n, sum(weight) AS w FROM experts", capsys)
    assert total["n"] == "50"
    assert float(total["w"]) == pytest.approx(
        0.75 + sum(sum(row["topk_weights"]) for row in run_rows())
    )


def test_meta_has_a_row_a_file(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    query = "SELECT file, model_id, top_k, header->>'$.seed' AS seed, \"end\"->>'$.rows' AS r"
    [row] = ask(log, f"{query} FROM meta", capsys)
    assert list(row.values()) == [log.name, "tiny/moe", "2", str(meta()["seed"]), "25"]


def test_outputs_join_where_they_are(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    query = "SELECT count(*) AS n FROM routes JOIN outputs USING (req_id)"
    with pytest.raises(UserError, match="outputs does not exist"):
        sql.main([str(log), query])
    write_outputs(log.parent / "outputs.jsonl")
    assert ask(log, query, capsys) == [{"n": "25"}]


def test_the_answer_is_a_table_and_findings_go_to_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_log(tmp_path / "x.jsonl", run_rows(), finished=False)
    assert sql.main([str(path), "SELECT count(*) AS rows_found FROM routes"]) == 0
    printed = capsys.readouterr()
    assert "rows_found" in printed.out
    assert "24" in printed.out
    assert "note: x.jsonl has no end record" in printed.err


def test_a_log_that_findings_were_looked_for_in_is_asked_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run_rows()
    log = write_log(tmp_path / "moe_routes.jsonl", [*rows, rows[0]])
    assert ask(log, "SELECT count(*) AS n FROM routes", capsys) == [{"n": "25"}]
    [written] = conversion.convert(log, log.with_suffix(".parquet"))
    assert ask(written, "SELECT count(*) AS n FROM experts", capsys) == [{"n": "50"}]


@pytest.mark.parametrize(
    "query",
    [
        "COPY (SELECT 1) TO '{tmp}/out.csv'",
        "COPY (SELECT 1) TO '{log}'",
        "SELECT 1; COPY (SELECT 1) TO '{tmp}/out.csv'",
        "CREATE TABLE t AS SELECT 1",
        "DROP TABLE recorded",
        "ATTACH '{tmp}/x.db'",
        "SET enable_external_access = true",
        "EXPLAIN ANALYZE SELECT 1",
        "SELECT * FROM read_text('{tmp}/secret')",
        "SELECT * FROM read_csv('{tmp}/secret')",
        "SELECT * FROM glob('{tmp}/*')",
        "SELECT * FROM '{tmp}/secret.parquet'",
        "SELECT * FROM query('COPY (SELECT 1) TO ''{tmp}/out.csv''')",
        "SELECT nothing FROM routes",
        "SELEKT",
        "",
    ],
)
def test_everything_else_is_refused_in_one_line(log: Path, tmp_path: Path, query: str) -> None:
    (tmp_path / "secret").write_text("1\n")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        sql.main([str(log), query.format(tmp=tmp_path, log=log)])
    assert "\n" not in str(caught.value)
    assert "--help" in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_even_without_the_look_at_the_statement_nothing_is_written(
    log: Path, tmp_path: Path
) -> None:
    import duckdb

    with open_log(log) as opened:
        db = make_relations(opened, None)
        for statement in (f"COPY (SELECT 1) TO '{tmp_path}/out.csv'", "SET threads = 1"):
            with pytest.raises(duckdb.Error):
                db.execute(statement)
    assert not (tmp_path / "out.csv").exists()
