# SPDX-License-Identifier: Apache-2.0
"""Whether the Hugging Face hub can be reached, in bounded time and without any package."""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.request
from pathlib import Path

TIMEOUT_S = 2.5
_TRUE = {"1", "on", "yes", "true"}


def answer(path: str, timeout: float = TIMEOUT_S) -> int | None:
    """HTTP status of ``GET <hub>/<path>``; None where no answer comes within ``timeout`` seconds.

    Follows HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN and the proxy variables. The request runs in a
    thread of its own because looking up a host name heeds no timeout.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in _TRUE:
        return None
    result: list[int] = []
    thread = threading.Thread(target=_request, args=(path, timeout, result), daemon=True)
    thread.start()
    thread.join(timeout)
    return result[0] if result else None


def _request(path: str, timeout: float, result: list[int]) -> None:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    request = urllib.request.Request(f"{endpoint}/{path}", method="GET")  # noqa: S310
    if token := os.environ.get("HF_TOKEN"):
        # Not sent on to another host, should the hub redirect.
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:  # noqa: S310
            result.append(response.status)
    except urllib.error.HTTPError as error:
        result.append(error.code)
    except (OSError, ValueError):
        pass  # no network, no such host, an endpoint that is no URL: no answer


def cached_model(model: str) -> Path | None:
    """The snapshot folder of a hub model in the local cache, if its config is there."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    snapshots = cache / f"models--{model.replace('/', '--')}" / "snapshots"
    configs = sorted(snapshots.glob("*/config.json"))
    return configs[-1].parent if configs else None
