# SPDX-License-Identifier: Apache-2.0
"""Record one request in n: the same ones on every rank and in every run."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from vllm.moe_routes.writing.rows import external_id

#: How the header says it.
RULE = "blake2b-64(req_id) % n == 0"


class SampledRows(NamedTuple):
    """What of a pass is recorded.

    Attributes:
        requests: indices into the batch.
        rows: [m] int64, the rows of those requests.
    """

    requests: list[int]
    rows: npt.NDArray[np.int64]


def chosen(req_id: str, one_in: int) -> bool:
    """Whether a request is in the sample.

    Args:
        req_id: as the user knows it, so that whoever holds the outputs can tell too.
        one_in: n of ``1/n``.
    """
    digest = hashlib.blake2b(req_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % one_in == 0


class RequestSample:
    """Which requests of every batch are recorded.

    Args:
        one_in: n of ``1/n``.
    """

    def __init__(self, one_in: int) -> None:
        self._one_in = one_in
        self._chosen: dict[str, bool] = {}

    def forget(self, raw_ids: Iterable[str]) -> None:
        """These requests are over."""
        for raw_id in raw_ids:
            self._chosen.pop(raw_id, None)

    def rows(self, raw_ids: Sequence[str], num_scheduled_tokens: npt.NDArray[Any]) -> SampledRows:
        """The sampled requests of a batch and their rows.

        Args:
            raw_ids: vLLM's own request ids, in batch order.
            num_scheduled_tokens: [R] rows of every request.
        """
        requests = [i for i, raw_id in enumerate(raw_ids) if self._has(raw_id)]
        ends = np.cumsum(num_scheduled_tokens, dtype=np.int64)
        rows = [np.arange(ends[i] - num_scheduled_tokens[i], ends[i]) for i in requests]
        return SampledRows(requests, np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64))

    def _has(self, raw_id: str) -> bool:
        known = self._chosen.get(raw_id)
        if known is None:
            known = self._chosen[raw_id] = chosen(external_id(raw_id), self._one_in)
        return known
