# SPDX-License-Identifier: Apache-2.0
"""How often each expert was chosen, by layer and phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expert_profiler.log.schema import PHASES

Ints = npt.NDArray[np.int64]


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
    choices: Ints, rows: Ints, layers: Sequence[int], phases: Sequence[str], num_experts: int
) -> Counts:
    """The counts in two tables.

    choices: [n, 5]: layer, phase code, flagged, expert, number; rows: [n, 4]: the same without
    expert.
    """
    codes = [PHASES.index(phase) for phase in phases]
    found = []
    for table, size in ((choices, (num_experts,)), (rows, ())):
        place = np.searchsorted(layers, table[:, 0]), np.searchsorted(codes, table[:, 1])
        found.append(np.zeros((len(layers), len(codes), *size), dtype=np.int64))
        np.add.at(found[-1], (*place, *table[:, 3:-1].T), table[:, -1])
    return Counts(tuple(layers), tuple(phases), *found)
