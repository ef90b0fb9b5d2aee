# SPDX-License-Identifier: Apache-2.0
"""The row identity: unique positions a layer = sum(prompt + generated - 1) - cached."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from expert_profiler.log import duck, outputs, part_files, sampling, sources
from expert_profiler.log.route_log import RouteLog

_REQUEST_COLUMNS = {"type": "VARCHAR", "req_id": "VARCHAR", "cached_tokens": "BIGINT"}


@dataclass(frozen=True)
class Identity:
    """A log held against its run's outputs.

    expected: positions a layer; cached: positions that the prefix cache served, not expected;
    per_layer: unique positions found; mismatches: one sentence a request whose positions differ.
    """

    expected: int
    cached: int
    requests: int
    per_layer: dict[int, int]
    mismatches: tuple[str, ...]

    @property
    def holds(self) -> bool:
        return not self.mismatches and all(n == self.expected for n in self.per_layer.values())


def identity_of(log: RouteLog, outputs_path: Path) -> Identity:
    """Hold the log against ``outputs.jsonl``, layer by layer and request by request."""
    positions = sampling.sampled(outputs.read_positions(outputs_path), log.meta.raw)
    cached = cached_tokens(log)
    expected = {req: n - cached.get(req, 0) for req, n in positions.items()}
    found = log.query(
        "SELECT req_id, min(n), max(n), count(*) FROM (SELECT req_id, layer, "
        "count(DISTINCT token_idx) AS n FROM routes WHERE NOT flagged GROUP BY req_id, layer) "
        "GROUP BY req_id"
    )
    seen = {str(req): (int(low), int(high), int(n)) for req, low, high, n in found}
    # A logger that does not know the requests can still satisfy the sums.
    nothing = (0, 0, 0)
    mismatches = []
    if expected.keys() & seen.keys():
        mismatches = [
            f"request {req}: {_span(*seen.get(req, nothing)[:2])} positions, {want} expected"
            for req, want in expected.items()
            if seen.get(req, nothing) != (want, want, len(log.layers))
        ]
        strangers = sorted(seen.keys() - expected.keys())
        mismatches += [f"request {req}: not in the outputs" for req in strangers]
    per_layer = log.query(
        "SELECT layer, count(*) FROM (SELECT DISTINCT req_id, token_idx, layer FROM routes "
        "WHERE NOT flagged) GROUP BY layer"
    )
    return Identity(
        expected=sum(expected.values()),
        cached=sum(cached.get(req, 0) for req in positions),
        requests=len(positions),
        per_layer=dict.fromkeys(log.layers, 0) | {int(layer): int(n) for layer, n in per_layer},
        mismatches=tuple(mismatches),
    )


def cached_tokens(log: RouteLog) -> dict[str, int]:
    """Positions a request that the prefix cache served, which were never routed; none: left out."""
    if log.is_parquet:
        found: dict[str, int] = {}
        for file in log.files:
            for _, record in part_files.requests(file):
                cached, req = int(record.get("cached_tokens") or 0), str(record["req_id"])
                found[req] = max(cached, found.get(req, 0))
        return {req: n for req, n in found.items() if n}
    source = sources.json_lines(log.files, _REQUEST_COLUMNS)
    with duck.errors_named(log.files):
        rows = log.connection.execute(
            f"SELECT req_id, max(cached_tokens) FROM {source} "  # noqa: S608 (paths are quoted)
            "WHERE type = 'request' AND cached_tokens > 0 GROUP BY req_id"
        ).fetchall()
    return {str(req): int(n) for req, n in rows}


def _span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"
