# SPDX-License-Identifier: Apache-2.0
"""Which requests a log of a sample holds, by the recorder's own rule."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")
#: How a header states the rule that :func:`chosen` follows.
RULE = "blake2b-64(req_id) % n == 0"


def one_in(header: Mapping[str, Any]) -> int:
    """The n of a sample of one request in n; 1 where all requests are recorded."""
    sample = header.get("sample")
    n = sample.get("one_in") if isinstance(sample, dict) and sample.get("rule") == RULE else 1
    return n if isinstance(n, int) and n > 0 else 1


def chosen(req_id: str, n: int) -> bool:
    """Whether the recorder records this request when it samples one in ``n``."""
    digest = hashlib.blake2b(req_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % n == 0


def sampled(by_request: Mapping[str, T], header: Mapping[str, Any]) -> dict[str, T]:
    """The entries of the requests that a log with this header must hold."""
    n = one_in(header)
    return {req: value for req, value in by_request.items() if n == 1 or chosen(req, n)}
