# SPDX-License-Identifier: Apache-2.0
"""Count everything that report and comparison show, in one pass over a log's tokens.

Only tables of experts are kept, so memory depends on the model and not on the log.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
#: The cache curve costs the most time; it needs no more tokens than this.
CACHE_TOKENS = 50_000


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
    tokens, requests: how many there are.
    """

    def __init__(self, log: RouteLog, top_k: Sequence[int], groups: int, classes: int) -> None:
        self.layers, self.phases, self.top_k = log.layers, log.phases, tuple(top_k)
        self.num_experts = log.num_experts
        layers, phases, experts = len(log.layers), len(log.phases), log.num_experts

        def zeros(*size: int) -> Ints:
            return np.zeros(size, dtype=np.int64)

        self.by_group = zeros(groups, layers, phases, experts)
        self.rows = zeros(layers, phases)
        self.mass: Floats = np.zeros((layers, phases, experts))
        self.pairs = zeros(layers, experts, experts)
        self.transitions = zeros(max(0, layers - 1), experts, experts)
        self.shared, self.neighbours = zeros(layers, phases), zeros(layers, phases)
        self.cache_hits, self.cache_accesses = zeros(layers, experts), zeros(layers)
        self.cache_phase = "decode" if "decode" in log.phases else "all"
        self.joint = zeros(layers, classes, experts) if classes else None
        self.labelled = self.tokens = self.requests = 0

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
    groups = min(len(tokens.request_names(log)), MAX_GROUPS)
    top_ks = tokens.top_ks(log, condition)
    counts = TokenCounts(log, top_ks, groups, 0 if labels is None else classes)
    counting = _TokenPass(counts)
    for batch in tokens.batches(log, condition, on_tokens=on_tokens):
        counting.add(batch, None if labels is None else labels(batch))
    if counts.tokens == 0:
        raise UserError(f"{log.path} has no row to report on; see: {program()} validate")
    counts.requests = len(counting.requests)
    counts.by_group = counts.by_group[counts.by_group.any(axis=(1, 2, 3))]
    return counts


class _TokenPass:
    """One pass over the tokens, which fills ``counts``."""

    def __init__(self, counts: TokenCounts) -> None:
        self.counts = counts
        self.experts = counts.num_experts
        self.requests: set[int] = set()
        self.last: TokenBatch | None = None
        self.cache_taken = 0
        self.recent = [np.zeros(0, dtype=np.int64)] * len(counts.layers)
        self.phase_of = np.full(len(PHASES), -1)
        for place, phase in enumerate(counts.phases):
            self.phase_of[PHASES.index(phase)] = place

    def add(self, batch: TokenBatch, labels: npt.NDArray[np.int8] | None) -> None:
        counts, experts = self.counts, self.experts
        counts.tokens += len(batch)
        self.requests.update(np.unique(batch.request).tolist())
        phase = self.phase_of[batch.phase]
        cached = self._cached_tokens(batch)
        if labels is not None:
            counts.labelled += int((labels >= 0).sum())
        pairs, before = self._neighbours(batch)
        for layer, k in enumerate(counts.top_k):
            ids = batch.ids[:, layer, :k].astype(np.int64)
            has = ids[:, 0] >= 0 if k else np.zeros(len(batch), dtype=bool)
            if not has.any():
                continue
            self._count(layer, batch, phase, ids, has)
            counts.pairs[layer] += coactivation.pair_counts(ids[has], experts)
            self._reuse(layer, ids, has, phase, pairs, before)
            self._cache(layer, ids[has & cached])
            if labels is not None and counts.joint is not None:
                known = has & (labels >= 0)
                counts.joint[layer] += token_types.joint_counts(
                    labels[known], ids[known], counts.joint.shape[1], experts
                )
            if layer + 1 < len(counts.layers) and (next_k := counts.top_k[layer + 1]):
                after = batch.ids[:, layer + 1, :next_k]
                both = has & (after[:, 0] >= 0)
                counts.transitions[layer] += coactivation.transition_counts(
                    ids[both], after[both], experts, experts
                )
        self.last = batch.part(slice(-1, None))

    def _count(
        self, layer: int, batch: TokenBatch, phase: Ints, ids: Ints, has: npt.NDArray[np.bool_]
    ) -> None:
        ids, phase = ids[has], phase[has]
        # Few requests meet in a batch: count those, not all groups.
        groups, at = np.unique(batch.request[has] % len(self.counts.by_group), return_inverse=True)
        phases = len(self.counts.phases)
        keys = ((at * phases + phase) * self.experts)[:, None] + ids
        size = phases * self.experts
        found = np.bincount(keys.ravel(), minlength=len(groups) * size)
        self.counts.by_group[groups, layer] += found.reshape(len(groups), phases, self.experts)
        self.counts.rows[layer] += np.bincount(phase, minlength=phases)
        weights = batch.weights[has, layer, : ids.shape[1]]
        for number in range(phases):
            chosen = phase == number
            self.counts.mass[layer, number] += usage.weight_mass(
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
        phases = len(self.counts.phases)
        self.counts.shared[layer] += np.bincount(phase[both], shared, minlength=phases).astype(
            np.int64
        )
        self.counts.neighbours[layer] += np.bincount(phase[both], minlength=phases)

    def _cached_tokens(self, batch: TokenBatch) -> npt.NDArray[np.bool_]:
        """[n] bool: the tokens that the cache curve counts: decode where phases are known."""
        wanted = np.ones(len(batch), dtype=bool)
        if self.counts.cache_phase == "decode":
            wanted = batch.phase == PHASES.index("decode")
        room = CACHE_TOKENS - self.cache_taken
        wanted &= np.cumsum(wanted) <= room
        self.cache_taken += int(wanted.sum())
        return wanted

    def _cache(self, layer: int, ids: Ints) -> None:
        """Count the hits of a cache that holds what the last batch left, replayed oldest first."""
        if not len(ids):
            return
        accesses = np.concatenate([self.recent[layer], ids.ravel()])
        distances = lru.stack_distances(accesses, self.experts)[len(self.recent[layer]) :]
        self.counts.cache_hits[layer] += lru.hits(distances, self.experts)
        self.counts.cache_accesses[layer] += len(distances)
        experts, backwards = np.unique(accesses[::-1], return_index=True)
        self.recent[layer] = experts[np.argsort(-backwards)]
