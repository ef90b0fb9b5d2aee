# SPDX-License-Identifier: Apache-2.0
"""What must hold for every recorded row, checked on every recorded row."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.moe_routes.layers import MoELayer
from vllm.moe_routes.writing.verdicts import Check, check_layers


class SelfCheck:
    """Counts violations while a recording is written; :meth:`checks` lists them.

    Args:
        layers: the recorded layers, in slot order.
        not_an_id: the value of an element that no layer wrote.
    """

    def __init__(self, layers: Sequence[MoELayer], not_an_id: int) -> None:
        self._layers = list(layers)
        self._not_an_id = not_an_id
        size = len(layers)
        self._missing = np.zeros(size, dtype=np.int64)
        self._out_of_range = np.zeros(size, dtype=np.int64)
        self._repeated = np.zeros(size, dtype=np.int64)
        self._bad_weight = np.zeros(size, dtype=np.int64)
        self._written = np.zeros(size, dtype=np.int64)
        self._scheduled = 0
        self._dropped = 0
        #: Whether nothing was wrong with any row of the last pass.
        self.was_clean = False
        #: Layers that chose the same top_k, so that a step is checked in as few calls as possible.
        self._groups = [
            (top_k, np.array([i for i, item in enumerate(layers) if item.top_k == top_k]))
            for top_k in sorted({item.top_k for item in layers})
        ]
        self._num_experts = np.array([item.num_experts for item in layers])

    def dropped(self, num_rows: int) -> None:
        """Account for a pass whose routes were dropped."""
        self._scheduled += num_rows
        self._dropped += num_rows

    def step(
        self, num_scheduled: int, topk_ids: npt.NDArray[Any], topk_weights: npt.NDArray[Any]
    ) -> npt.NDArray[Any]:
        """Check one pass.

        Args:
            num_scheduled: tokens that the scheduler says the pass has.
            topk_ids: [n, L, K].
            topk_weights: [n, L, K] float32.

        Returns:
            [n, L] bool: which rows were captured and hold ids that exist. Only these may be
            written: the others are counted as lost.
        """
        self._scheduled += num_scheduled
        self.was_clean = self._is_clean(topk_ids, topk_weights)
        if self.was_clean:
            self._written += len(topk_ids)
            return np.ones(topk_ids.shape[:2], dtype=bool)
        good = np.empty(topk_ids.shape[:2], dtype=bool)
        for top_k, slots in self._groups:
            ids = topk_ids[:, slots, :top_k]
            weights = topk_weights[:, slots, :top_k]
            missing = (ids == self._not_an_id).any(axis=2)
            outside = ((ids < 0) | (ids >= self._num_experts[slots][None, :, None])).any(axis=2)
            ordered = np.sort(ids, axis=2)
            repeated = (ordered[..., 1:] == ordered[..., :-1]).any(axis=2) & ~missing
            with np.errstate(invalid="ignore"):
                bad_weight = ~(np.isfinite(weights) & (weights >= 0)).all(axis=2) & ~missing
            self._missing[slots] += missing.sum(axis=0)
            self._out_of_range[slots] += (outside & ~missing).sum(axis=0)
            self._repeated[slots] += repeated.sum(axis=0)
            self._bad_weight[slots] += bad_weight.sum(axis=0)
            good[:, slots] = ~(missing | outside)
        self._written += good.sum(axis=0)
        return good

    def _is_clean(self, topk_ids: npt.NDArray[Any], topk_weights: npt.NDArray[Any]) -> bool:
        """Whether nothing at all is wrong with a pass: as it should be, and quick to see."""
        if len(self._groups) != 1 or self._groups[0][0] != topk_ids.shape[2] or not topk_ids.size:
            return False
        low, high = topk_weights.min(), topk_weights.max()
        if not (low >= 0 and high < np.inf):  # NaN compares false
            return False
        # not_an_id is no expert of any layer, so this sees it too.
        if topk_ids.min() < 0 or topk_ids.max() >= self._num_experts.min():
            return False
        by_rank = np.ascontiguousarray(topk_ids.transpose(2, 0, 1))
        # Every rank against the one after it, the second after it, …: much quicker than sorting.
        return not any(
            (by_rank[shift:] == by_rank[:-shift]).any() for shift in range(1, len(by_rank))
        )

    @property
    def rows_not_captured(self) -> int:
        """Rows left out because their layer did not fire or wrote ids that do not exist."""
        return int(self._missing.sum() + self._out_of_range.sum())

    def checks(self) -> list[Check]:
        """The checks, as they stand in a verdict."""
        lost = self._scheduled - self._written - self._dropped
        return [
            check_layers(name, bad, self._layers, self._scheduled, "{} rows")
            for name, bad in (
                ("every layer fired in every pass", self._missing),
                ("expert ids in range", self._out_of_range),
                ("expert ids distinct within a row", self._repeated),
                ("weights finite and not negative", self._bad_weight),
                ("rows = scheduled tokens", np.abs(lost) + self._dropped),
            )
        ]
