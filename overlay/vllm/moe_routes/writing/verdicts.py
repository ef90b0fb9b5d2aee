# SPDX-License-Identifier: Apache-2.0
"""The verdict on a recording: checks by name, each "pass" or "fail" with a detail. Pure."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.moe_routes.counts import Shape, lost_choices
from vllm.moe_routes.layers import MoELayer

#: One check of a verdict: ``name``, ``verdict`` and ``detail``.
Check = dict[str, str]
#: As it stands in a log's end record: ``verdict`` and ``checks``.
Verdict = dict[str, Any]


def verdict(checks: Iterable[Check]) -> Verdict:
    """The verdict that checks add up to: one that failed fails all."""
    listed = list(checks)
    return {"verdict": _passed(not any(_failed(check) for check in listed)), "checks": listed}


def merged(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict on several logs: of every check, what the first log says that failed it."""
    same_checks = zip(*(one["checks"] for one in verdicts), strict=True)
    return verdict(next(filter(_failed, same), same[-1]) for same in same_checks)


def check_none(name: str, found: int, what: str) -> Check:
    """Passes where nothing was found; ``what`` follows the number in the detail."""
    return {"name": name, "verdict": _passed(not found), "detail": f"{found} {what}"}


def check_unfinished(passes: int) -> Check:
    """Passes where no forward pass began without ending."""
    return check_none("every pass that began ended", passes, "passes began and raised an error")


def check_layers(
    name: str, off: npt.NDArray[Any], layers: Sequence[MoELayer], tokens: int, found: str
) -> Check:
    """Passes where nothing is off in any layer; else names the first of those where it is.

    Args:
        name: of the check.
        off: [L] integers.
        layers: the recorded layers, in slot order.
        tokens: how many were looked at, in every layer.
        found: the detail of a failure; ``{}`` stands for how much is off in all layers.
    """
    slots = np.flatnonzero(off)
    detail = f"{tokens} tokens x {len(layers)} layers"
    if slots.size:
        indices = ",".join(str(layers[i].layer) for i in slots[:8])
        more = ",…" if slots.size > 8 else ""
        detail = f"{found.format(np.abs(off).sum())}, in layers {indices}{more}"
    return {"name": name, "verdict": _passed(not slots.size), "detail": detail}


def check_counts(
    counts: npt.NDArray[Any], tokens: int, shape: Shape, dropped: int, unfinished: int
) -> list[Check]:
    """The checks of a mode that keeps counts only.

    Args:
        counts: [L, width].
        tokens: executed tokens of the passes counted.
        shape: what was counted over.
        dropped: tokens of passes that were dropped.
        unfinished: passes that began and never ended.
    """
    lost = lost_choices(counts, tokens, shape)
    surplus = counts[:, :-1].sum(axis=1) - shape.top_k * tokens
    off = "off by {} choices"
    fired = "every layer fired in every pass, expert ids in range"
    return [
        check_layers(fired, lost, shape.layers, tokens, off),
        check_layers("choices = tokens x top_k", surplus, shape.layers, tokens, off),
        check_none("no pass was dropped", dropped, "tokens in dropped passes"),
        check_unfinished(unfinished),
    ]


def _failed(check: Check) -> bool:
    return check["verdict"] == "fail"


def _passed(passed: bool) -> str:
    return "pass" if passed else "fail"
