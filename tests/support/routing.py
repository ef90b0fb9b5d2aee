# SPDX-License-Identifier: Apache-2.0
"""Random token-level routing for tests of the token metrics."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st


@st.composite
def routings(draw: st.DrawFn, min_tokens: int = 1) -> tuple[Any, int]:
    """(topk_ids [tokens, K], experts): different ids in a row, skewed, so that some never occur."""
    experts = draw(st.integers(1, 8))
    top_k = draw(st.integers(1, experts))
    tokens = draw(st.integers(min_tokens, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = rng.random((tokens, experts)) + draw(st.sampled_from([0, 0.1, 1])) * np.arange(experts)
    return np.argsort(-scores, axis=1)[:, :top_k], experts


def requests_of(tokens: int, seed: int) -> tuple[Any, Any]:
    """Random (request [tokens], position [tokens]), sorted, with gaps between positions."""
    rng = np.random.default_rng(seed)
    request = np.sort(rng.integers(0, 3, tokens))
    position = np.cumsum(rng.integers(1, 3, tokens))
    return request, position
