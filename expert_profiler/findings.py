"""What is found out about a log: counts, runs of identical rows, the row identity."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PHASES = ("prefill", "decode", "unknown")


@dataclass(frozen=True)
class Counts:
    """How often each expert was chosen.

    values: [layers, phases, experts] int64; rows: [layers, phases] int64, the rows behind them.
    Expert ids are logical and run from 0 to experts - 1.
    """

    layers: tuple[int, ...]
    phases: tuple[str, ...]
    values: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]

    @property
    def num_experts(self) -> int:
        return int(self.values.shape[2])

    @property
    def per_expert(self) -> npt.NDArray[np.int64]:
        """[experts] int64: over all layers and phases."""
        total: npt.NDArray[np.int64] = self.values.sum(axis=(0, 1))
        return total

    @property
    def per_phase(self) -> npt.NDArray[np.int64]:
        """[phases, experts] int64: over all layers."""
        total: npt.NDArray[np.int64] = self.values.sum(axis=0)
        return total

    def phase_rows(self) -> dict[str, int]:
        return dict(zip(self.phases, self.rows.sum(axis=0).tolist(), strict=True))


@dataclass(frozen=True)
class Contamination:
    """Rows inside runs of at least ``reader.CONTAMINATION_RUN`` identical rows of one layer."""

    rows: int
    share: float  # of all unflagged rows, 0 to 1
    longest_run: int
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Identity:
    """The row identity: unique positions a layer = sum(prompt + generated - 1) - cached."""

    expected: int
    cached: int
    requests: int
    per_layer: dict[int, int]
    mismatches: tuple[str, ...]  # one sentence a request whose positions differ

    @property
    def holds(self) -> bool:
        return not self.mismatches and all(n == self.expected for n in self.per_layer.values())


def selection(
    cells: npt.NDArray[np.int64], layers: tuple[int, ...], include_flagged: bool
) -> npt.NDArray[np.int64]:
    """Those of ``cells`` ([n, 3 or more]: layer, phase, flagged, …) that are asked for."""
    mask = np.isin(cells[:, 0], layers)
    return cells[mask if include_flagged else mask & (cells[:, 2] == 0)]


def phase_codes(cells: npt.NDArray[np.int64]) -> list[int]:
    """The phases to show: both known ones whenever one occurs, "unknown" only if it occurs."""
    seen = set(cells[:, 1].tolist())
    return [code for code in (0, 1) if seen & {0, 1}] + ([2] if 2 in seen else [])
