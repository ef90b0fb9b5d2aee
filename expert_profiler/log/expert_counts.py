# SPDX-License-Identifier: Apache-2.0
"""How often each expert was chosen, by layer and phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expert_profiler.log.schema import PHASES

Ints = npt.NDArray[np.int64]


class OutsideError(Exception):
    """An id that the header's number of experts does not allow: (layer, id)."""


@dataclass(frozen=True)
class Counts:
    """How often each expert was chosen.

    values: [layers, phases, experts] int64; rows: [layers, phases] int64, the rows behind them.
    Expert ids are logical and run from 0 to experts - 1.
    """

    layers: tuple[int, ...]
    phases: tuple[str, ...]
    values: Ints
    rows: Ints

    @property
    def num_experts(self) -> int:
        return int(self.values.shape[2])

    @property
    def per_expert(self) -> Ints:
        """[experts] int64: over all layers and phases."""
        return np.asarray(self.values.sum(axis=(0, 1)))

    @property
    def per_phase(self) -> Ints:
        """[phases, experts] int64: over all layers."""
        return np.asarray(self.values.sum(axis=0))

    def phase_rows(self) -> dict[str, int]:
        return dict(zip(self.phases, self.rows.sum(axis=0).tolist(), strict=True))


def from_cells(
    choices: Ints,
    rows: Ints,
    layers: Sequence[int],
    phases: Sequence[str],
    num_experts: int,
    include_flagged: bool,
) -> Counts:
    """The counts of some layers, from the tables of all.

    Args:
        choices: [n, 5]: layer, phase, flagged, expert, number.
        rows: [n, 4]: layer, phase, flagged, number.
        layers: ascending.
        phases: in the order of their codes; those of all rows.

    Raises:
        OutsideError: an id is not 0 to num_experts - 1.
    """
    codes = [PHASES.index(phase) for phase in phases]
    choices, rows = (
        table[np.isin(table[:, 0], layers) & (include_flagged | (table[:, 2] == 0))]
        for table in (choices, rows)
    )
    outside = choices[(choices[:, 3] < 0) | (choices[:, 3] >= num_experts)]
    if outside.size:
        raise OutsideError(int(outside[0, 0]), int(outside[0, 3]))
    counts = Counts(
        tuple(layers),
        tuple(phases),
        np.zeros((len(layers), len(codes), num_experts), dtype=np.int64),
        np.zeros((len(layers), len(codes)), dtype=np.int64),
    )
    for table, target in ((choices, counts.values), (rows, counts.rows)):
        place = np.searchsorted(layers, table[:, 0]), np.searchsorted(codes, table[:, 1])
        np.add.at(target, (*place, *table[:, 3:-1].T), table[:, -1])
    return counts
