# SPDX-License-Identifier: Apache-2.0
"""One pass over a log's tokens that counts everything the report and the comparison ask for.

Only tables of experts are kept, so memory depends on the model and not on the log.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from expert_profiler.errors import UserError
from expert_profiler.log import tokens
from expert_profiler.log.route_log import RouteLog
from expert_profiler.log.schema import PHASES
from expert_profiler.log.tokens import TokenBatch
from expert_profiler.log.usable_rows import UNFLAGGED
from expert_profiler.metrics import coactivation, lru, reuse, token_types, usage
from expert_profiler.metrics.usage import Floats
from expert_profiler.resources import program

Ints: TypeAlias = "npt.NDArray[np.int64]"
Labeller: TypeAlias = Callable[[TokenBatch], "npt.NDArray[np.int8]"]

#: Requests are resampled in at most so many groups; with more requests, each group is every n-th.
MAX_GROUPS = 256
#: The cache curve is the dearest metric; it needs no more tokens than this.
CACHE_TOKENS = 50_000


@dataclass
class TokenCounts:
    """Counts of usable rows. G groups of requests, L layers, P phases, E experts.

    by_group: [G, L, P, E] int64 choices. rows: [L, P] int64. mass: [L, P, E] float64 weight.
    pairs: [L, E, E] int64, ``coactivation.pair_counts`` of each layer.
    transitions: [L - 1, E, E] int64, ``coactivation.transition_counts`` to the next logged layer.
    shared: [L, P] int64, the sum of ``reuse.overlaps``; neighbours: [L, P] int64, the pairs behind
    it, by the phase of the later token.
    cache_hits: [L, E] int64, ``lru.hits`` of a warm cache with one request after another;
    cache_accesses: [L] int64; cache_phase: which tokens these are.
    joint: [L, classes, E] int64 choices by token class, where there are labels; labelled: tokens.
    """

    layers: tuple[int, ...]
    phases: tuple[str, ...]
    top_k: tuple[int, ...]
    num_experts: int
    requests: int
    by_group: Ints
    rows: Ints
    mass: Floats
    pairs: Ints
    transitions: Ints
    shared: Ints
    neighbours: Ints
    cache_hits: Ints
    cache_accesses: Ints
    cache_phase: str
    joint: Ints | None = None
    labelled: int = 0
    tokens: int = 0

    @property
    def counts(self) -> Ints:
        """[L, P, E] int64 choices."""
        return np.asarray(self.by_group.sum(axis=0))

    @property
    def per_layer(self) -> Ints:
        """[L, E] int64 choices of all phases."""
        return np.asarray(self.counts.sum(axis=1))

    @property
    def layer_groups(self) -> Ints:
        """[G, L, E] int64 choices of all phases."""
        return np.asarray(self.by_group.sum(axis=2))

    def phase(self, name: str) -> Ints:
        """[L, E] int64 choices of one phase, zeros where the log has none of it."""
        if name not in self.phases:
            return np.zeros_like(self.per_layer)
        return np.asarray(self.counts[:, self.phases.index(name)])


def count_tokens(
    log: RouteLog,
    condition: str = UNFLAGGED,
    *,
    classes: int = 0,
    labels: Labeller | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> TokenCounts:
    """Read all tokens of the rows that satisfy ``condition`` once.

    labels, if given, tells the class of each token of a batch, 0 to classes - 1, or -1 for none.
    """
    log.counts()  # refuses ids that the header does not allow
    codes = [PHASES.index(phase) for phase in log.phases]
    requests = len(tokens.request_names(log))
    work = _Pass(
        layers=len(log.layers),
        codes=codes,
        experts=log.num_experts,
        top_k=tokens.top_ks(log, condition),
        groups=min(requests, MAX_GROUPS),
        classes=classes if labels is not None else 0,
    )
    for batch in tokens.batches(log, condition, on_tokens=on_tokens):
        work.add(batch, None if labels is None else labels(batch))
    if work.tokens == 0:
        raise UserError(f"{log.path} has no row to report on; see: {program()} validate")
    return TokenCounts(
        layers=log.layers,
        phases=log.phases,
        top_k=tuple(work.top_k),
        num_experts=work.experts,
        requests=int(work.seen.sum()),
        by_group=work.by_group[work.by_group.any(axis=(1, 2, 3))],
        rows=work.rows,
        mass=work.mass,
        pairs=work.pairs,
        transitions=work.transitions,
        shared=work.shared,
        neighbours=work.neighbours,
        cache_hits=work.cache_hits,
        cache_accesses=work.cache_accesses,
        cache_phase="decode" if 1 in codes else "all",
        joint=work.joint if work.classes else None,
        labelled=work.labelled,
        tokens=work.tokens,
    )


@dataclass
class _Pass:
    layers: int
    codes: list[int]
    experts: int
    top_k: list[int]
    groups: int
    classes: int
    tokens: int = 0
    labelled: int = 0
    last: TokenBatch | None = None
    cache_taken: int = 0

    def __post_init__(self) -> None:
        def zeros(*size: int) -> Ints:
            return np.zeros(size, dtype=np.int64)

        shape = self.layers, len(self.codes), self.experts
        self.by_group, self.rows = zeros(self.groups, *shape), zeros(*shape[:2])
        self.mass = np.zeros(shape)
        self.pairs = zeros(self.layers, self.experts, self.experts)
        self.transitions = zeros(max(0, self.layers - 1), self.experts, self.experts)
        self.shared, self.neighbours = zeros(*shape[:2]), zeros(*shape[:2])
        self.cache_hits, self.cache_accesses = zeros(self.layers, self.experts), zeros(self.layers)
        self.joint = zeros(self.layers, self.classes, self.experts)
        self.seen = np.zeros(0, dtype=bool)
        self.recent: list[Ints] = [np.zeros(0, dtype=np.int64)] * self.layers
        self.phase_of = np.full(len(PHASES), -1)
        self.phase_of[self.codes] = np.arange(len(self.codes))

    def add(self, batch: TokenBatch, labels: npt.NDArray[np.int8] | None) -> None:
        self.tokens += len(batch)
        if batch.request[-1] >= len(self.seen):
            grown = np.zeros(int(batch.request[-1]) + 1, dtype=bool)
            grown[: len(self.seen)] = self.seen
            self.seen = grown
        self.seen[batch.request] = True
        phase = self.phase_of[batch.phase]
        cached = self._cached_tokens(batch)
        if labels is not None:
            self.labelled += int((labels >= 0).sum())
        pairs, before = self._neighbours(batch)
        for layer in range(self.layers):
            k = self.top_k[layer]
            ids = batch.ids[:, layer, :k].astype(np.int64)
            has = ids[:, 0] >= 0 if k else np.zeros(len(batch), dtype=bool)
            if not has.any():
                continue
            self._count(layer, batch, phase, ids, has)
            self.pairs[layer] += coactivation.pair_counts(ids[has], self.experts)
            self._reuse(layer, ids, has, phase, pairs, before)
            self._cache(layer, ids[has & cached])
            if labels is not None:
                known = has & (labels >= 0)
                self.joint[layer] += token_types.joint_counts(
                    labels[known], ids[known], self.classes, self.experts
                )
            if layer + 1 < self.layers and (next_k := self.top_k[layer + 1]):
                after = batch.ids[:, layer + 1, :next_k]
                both = has & (after[:, 0] >= 0)
                self.transitions[layer] += coactivation.transition_counts(
                    ids[both], after[both], self.experts, self.experts
                )
        self.last = batch.part(slice(-1, None))

    def _count(
        self, layer: int, batch: TokenBatch, phase: Ints, ids: Ints, has: npt.NDArray[np.bool_]
    ) -> None:
        ids, phase = ids[has], phase[has]
        # Few requests meet in a batch: count those, not all groups.
        groups, at = np.unique(batch.request[has] % self.groups, return_inverse=True)
        phases = len(self.codes)
        keys = ((at * phases + phase) * self.experts)[:, None] + ids
        size = phases * self.experts
        found = np.bincount(keys.ravel(), minlength=len(groups) * size)
        self.by_group[groups, layer] += found.reshape(len(groups), phases, self.experts)
        self.rows[layer] += np.bincount(phase, minlength=phases)
        weights = batch.weights[has, layer, : ids.shape[1]]
        for number in range(phases):
            chosen = phase == number
            self.mass[layer, number] += usage.weight_mass(
                ids[chosen], weights[chosen], self.experts
            )

    def _neighbours(self, batch: TokenBatch) -> tuple[npt.NDArray[np.bool_], TokenBatch | None]:
        """[n] bool: token t follows the token before it, the last batch's last token for t = 0."""
        last = self.last
        request, position = batch.request, batch.position
        first = last is not None and bool(
            request[0] == last.request[0] and position[0] == last.position[0] + 1
        )
        return np.concatenate([[first], reuse.neighbours(request, position)]), last

    def _reuse(
        self,
        layer: int,
        ids: Ints,
        has: npt.NDArray[np.bool_],
        phase: Ints,
        pairs: npt.NDArray[np.bool_],
        before: TokenBatch | None,
    ) -> None:
        none = np.full((1, ids.shape[1]), -1, dtype=np.int64)
        previous = none if before is None else before.ids[:, layer, : ids.shape[1]]
        chain = np.concatenate([previous, ids])
        both = pairs & has & np.concatenate([previous[:, 0] >= 0, has[:-1]])
        shared = reuse.overlaps(chain, both)
        phases = len(self.codes)
        self.shared[layer] += np.bincount(phase[both], shared, minlength=phases).astype(np.int64)
        self.neighbours[layer] += np.bincount(phase[both], minlength=phases)

    def _cached_tokens(self, batch: TokenBatch) -> npt.NDArray[np.bool_]:
        """[n] bool: the tokens that the cache curve counts: decode where phases are known."""
        wanted = batch.phase == 1 if 1 in self.codes else np.ones(len(batch), dtype=bool)
        room = CACHE_TOKENS - self.cache_taken
        wanted &= np.cumsum(wanted) <= room
        self.cache_taken += int(wanted.sum())
        return wanted

    def _cache(self, layer: int, ids: Ints) -> None:
        """Go on with the cache as the last batch left it: replay its experts, oldest first."""
        if not len(ids):
            return
        accesses = np.concatenate([self.recent[layer], ids.ravel()])
        distances = lru.stack_distances(accesses, self.experts)[len(self.recent[layer]) :]
        self.cache_hits[layer] += lru.hits(distances, self.experts)
        self.cache_accesses[layer] += len(distances)
        experts, backwards = np.unique(accesses[::-1], return_index=True)
        self.recent[layer] = experts[np.argsort(-backwards)]
