# SPDX-License-Identifier: Apache-2.0
"""Expert parallelism: how even the load of the ranks is, by where the experts lie.

``counts`` is [experts], the choices of one layer; a rank's load is the choices of the experts on
it. ``replicated`` follows the greedy rules of DeepSeek's EPLB (one node, one group of experts):
copies go one by one to the expert with the most load a copy, then copies go, the heaviest first,
to the rank with the least load that has a free slot. Copies of an expert share its load evenly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from expert_profiler.metrics.usage import Counts1D, Floats

Ints: TypeAlias = "npt.NDArray[np.int64]"


def linear(num_experts: int, ranks: int) -> Ints:
    """Neighbouring ids on one rank; the first ranks take one more where it does not come out even.

    [experts] int64, the rank of each expert, as vLLM's "linear" placement.
    linear(5, 2) = [0, 0, 0, 1, 1].
    """
    size, more = divmod(num_experts, ranks)
    return np.repeat(np.arange(ranks), [size + (rank < more) for rank in range(ranks)])


def round_robin(num_experts: int, ranks: int) -> Ints:
    """Expert e on rank e mod ranks, as vLLM's "round_robin" placement. [experts] int64.

    round_robin(5, 2) = [0, 1, 0, 1, 0].
    """
    return np.arange(num_experts) % ranks


def rank_loads(counts: Counts1D, rank_of: Ints, ranks: int) -> Floats:
    """The choices that each rank's experts take.

    counts: [..., experts]; rank_of: [experts]. [..., ranks] float64.
    rank_loads([4, 2, 1], [0, 1, 1], 2) = [4, 3].
    """
    loads = np.zeros((*counts.shape[:-1], ranks))
    for rank in range(ranks):
        loads[..., rank] = counts[..., rank_of == rank].sum(axis=-1)
    return loads


def balance(loads: Counts1D) -> Floats:
    """mean(load of the ranks) / max(load of the ranks).

    loads: [..., ranks]. [...] float64, no unit, 1/ranks (one rank does all) to 1 (even): the share
    of the slowest rank's time in which the average rank works. NaN without load.
    balance([4, 3]) = 3.5 / 4 = 0.875.
    """
    most = np.asarray(loads.max(axis=-1), dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(most > 0, loads.mean(axis=-1) / most, np.nan)


@dataclass(frozen=True)
class Replicated:
    """A placement with copies. slots = ranks * slots a rank, rank by rank.

    expert: [ranks, slots a rank] int64, the logical expert in each slot.
    copies: [experts] int64, at least 1.
    """

    expert: Ints
    copies: Ints

    def loads(self, counts: Counts1D) -> Floats:
        """[..., ranks] float64: each copy takes 1 / copies of its expert's choices."""
        share = counts / self.copies
        return np.asarray(share[..., self.expert].sum(axis=-1), dtype=np.float64)


def copies(counts: Counts1D, slots: int) -> Ints:
    """How many copies each expert gets, at least one, ``slots`` in all. [experts] int64.

    copies([8, 3, 1], 5) = [3, 1, 1]: 8 > 3, then 8/2 > 3.
    """
    found = np.ones(len(counts), dtype=np.int64)
    for _ in range(slots - len(counts)):
        found[np.argmax(counts / found)] += 1
    return found


def replicated(counts: Counts1D, ranks: int, extra: int) -> Replicated:
    """Greedy placement with ``extra`` copies beyond one an expert, planned for these counts.

    experts + extra must be a multiple of ranks: each rank has as many slots.
    """
    slots = len(counts) + extra
    if slots % ranks:
        raise ValueError(f"{len(counts)} experts + {extra} copies are no multiple of {ranks} ranks")
    number = copies(counts, slots)
    each = np.repeat(np.arange(len(counts)), number)
    share = (counts / number)[each]
    capacity = slots // ranks
    loads, held = np.zeros(ranks), np.zeros(ranks, dtype=np.int64)
    placed: list[list[int]] = [[] for _ in range(ranks)]
    for slot in np.argsort(-share, kind="stable"):
        rank = int(np.argmin(np.where(held < capacity, loads, np.inf)))
        placed[rank].append(int(each[slot]))
        loads[rank] += share[slot]
        held[rank] += 1
    return Replicated(np.array(placed, dtype=np.int64), number)


def fewest_extra(num_experts: int, ranks: int) -> int:
    """The fewest copies, at least one a rank, that make the slots a multiple of the ranks.

    fewest_extra(60, 8) = 12: 72 slots, 9 a rank. fewest_extra(256, 8) = 8.
    """
    return ranks + -num_experts % ranks
