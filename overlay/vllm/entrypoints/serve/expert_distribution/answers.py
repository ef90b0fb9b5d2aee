# SPDX-License-Identifier: Apache-2.0
"""What the workers said, as the routes' JSON. Pure."""

import time
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from vllm.entrypoints.serve.expert_distribution.names import relative
from vllm.moe_routes.schema import FORWARD_MODES

Reply = dict[str, Any]


def status(replies: Sequence[Reply]) -> dict[str, Any]:
    """GET /expert_distribution_status."""
    first = replies[0]
    since = [r["since"] for r in replies if r["recording"] and r.get("since") is not None]
    return {
        "status": "success",
        "available": True,
        "mode": first["mode"],
        "layers": first["layers"],
        "path": relative(first["directory"], first["next_path"]),
        "recording": any(r["recording"] for r in replies),
        "closing": any(r["closing"] for r in replies),
        "since": min(since, default=None),
        "now": time.time(),
        "model": first["model"],
        "num_workers": len(replies),
        "agreement": agreement(replies),
        "workers": [worker(r) for r in replies],
    }


def worker(reply: Reply) -> dict[str, Any]:
    """One worker's part of the status."""
    so_far = reply.get("so_far", {})
    return {
        "rank": reply["global_rank"],
        **reply["rank"],
        "records": reply["writes"],
        "mode": reply.get("recorded_mode", reply["mode"]),
        "recording": reply["recording"],
        "since": reply.get("since"),
        "stopped_at": reply.get("stopped_at"),
        "passes": so_far.get("passes_by_mode", dict.fromkeys(FORWARD_MODES, 0)),
        "tokens": so_far.get("tokens", {"prefill": 0, "decode": 0}),
        "rows": so_far.get("rows", 0),
        "bytes": so_far.get("bytes", 0),
        "drops": so_far.get("drops", {}),
        "files": _files(reply),
        "waiting_bytes": reply.get("waiting_bytes", 0),
        "waiting_passes": reply.get("waiting_passes", 0),
        "self_check": reply.get("self_check"),
        "error": reply.get("error"),
    }


def agreement(replies: Sequence[Reply]) -> dict[str, Any]:
    """Whether the workers are in one state, and stages of one engine saw the same passes."""
    states = {(r["mode"], r["layers"], r["recording"]) for r in replies}
    if len(states) > 1:
        return {"ok": False, "detail": f"workers differ in mode, layers or state: {sorted(states)}"}
    waiting = sum(r.get("waiting_passes", 0) for r in replies)
    engines: dict[int, set[tuple[Any, ...]]] = {}
    for r in replies:
        if r["writes"] and "so_far" in r:
            seen = (*r["so_far"]["passes_by_mode"].values(), *r["so_far"]["tokens"].values())
            engines.setdefault(r["rank"]["dp"], set()).add(seen)
    differ = [dp for dp, seen in engines.items() if len(seen) > 1]
    if differ and not waiting:
        return {"ok": False, "detail": f"stages of engine {differ[0]} counted different passes"}
    same = f"{len(replies)} workers in the same state" if len(replies) > 1 else "one worker"
    if waiting:
        return {"ok": True, "detail": f"{same}; {waiting} passes wait to be written"}
    if all(len(seen) == 1 for seen in engines.values()) and len(replies) > len(engines) > 0:
        return {"ok": True, "detail": f"{same}; stages counted the same passes and tokens"}
    return {"ok": True, "detail": same}


def summary(replies: Sequence[Reply]) -> dict[str, Any]:
    """POST /dump_expert_distribution: the part that ``summary_only=true`` ends with."""
    return {
        "status": "success",
        "num_workers": len(replies),
        "summary": {"workers": [_summary_of(r) for r in recording_workers(replies)]},
    }


def full(replies: Sequence[Reply]) -> dict[str, Any]:
    """POST /dump_expert_distribution?summary_only=false."""
    return {
        **summary(replies),
        "workers": [_full_of(r) for r in recording_workers(replies)],
    }


def recording_workers(replies: Sequence[Reply]) -> list[Reply]:
    """Those that hold counts. Tensor-parallel copies hold none, so nothing is counted twice."""
    return [r for r in replies if "counts" in r]


def _summary_of(reply: Reply) -> dict[str, Any]:
    so_far = reply["so_far"]
    passes = so_far["passes"]
    balance = reply["layer_balance"]
    return {
        "rank": reply["global_rank"],
        "recording_mode": reply["recorded_mode"],
        "num_layers": len(reply["layers"]),
        "num_experts": reply["num_experts"],
        "num_records": passes,
        "sample_record": _sample(reply) if passes else None,
        "passes": so_far["passes_by_mode"],
        "tokens": so_far["tokens"],
        "rows": so_far["rows"],
        "expert_choices": int(_counts(reply).sum()),
        "max_over_mean": round(float(np.mean(balance)), 4) if balance else None,
        "bytes": so_far["bytes"],
        "drops": so_far["drops"],
        "files": _files(reply),
        "self_check": reply["self_check"],
        "error": reply["error"],
    }


def _sample(reply: Reply) -> dict[str, Any]:
    """The first pass's record; of the modes that keep no records, what all passes add up to."""
    names = ("total_activated_experts", "avg_activated_per_layer", "expert_utilization")
    first = reply.get("first_record")
    if first is not None:
        values = {**first, "avg_activated_per_layer": first["expert_activation"]}
        return {"forward_pass_id": first["forward_pass_id"], "rank": first["rank"]} | {
            name: values[name] for name in names
        }
    return {
        "forward_pass_id": reply["so_far"]["passes"] - 1,
        "rank": reply["global_rank"],
        **{name: reply["activation"][name] for name in names},
        "over_all_passes": True,
    }


def _full_of(reply: Reply) -> dict[str, Any]:
    counts = _counts(reply)
    records = msgspec.json.decode(reply.get("records", b"[]"))
    shape = (len(records), *counts.shape[1:])
    by_pass = np.frombuffer(reply.get("record_counts", b""), dtype="<i4").reshape(shape)
    for record, own in zip(records, by_pass, strict=True):
        record["expert_counts"] = own.tolist()
    passes = reply["so_far"]["passes"] if reply["recorded_mode"] == "per_pass" else 0
    return {
        "rank": reply["global_rank"],
        "recording_mode": reply["recorded_mode"],
        "layers": reply["layers"],
        "num_experts": reply["num_experts"],
        "top_k": reply["top_k"],
        "counts": dict(zip(FORWARD_MODES, counts.tolist(), strict=True)),
        "records": records,
        "records_omitted": passes - len(records),
        "files": _files(reply),
        "rows": reply["so_far"]["rows"],
        "bytes": reply["so_far"]["bytes"],
    }


def _counts(reply: Reply) -> "np.ndarray[Any, Any]":
    """[3, L, E] int64."""
    return np.frombuffer(reply["counts"], dtype="<i8").reshape(reply["shape"])


def _files(reply: Reply) -> list[str]:
    """In order, where a recording with a bound went on in a next file."""
    return [str(relative(reply["directory"], path)) for path in reply.get("files", ())]
