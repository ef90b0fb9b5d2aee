# SPDX-License-Identifier: Apache-2.0
"""Log: open, read, count, query and check a route log of any format.

    from expert_profiler.log import open_log

    with open_log("moe_routes.jsonl") as log:
        shares = log.counts(layer=0).per_expert / log.counts(layer=0).per_expert.sum()
        longest = log.query("SELECT req_id, max(token_idx) FROM routes GROUP BY req_id")

``RouteLog.counts`` gives how often each expert was chosen, [layers, phases, experts];
``RouteLog.query`` answers SQL over the rows; ``RouteLog.notes`` says what speaks against the log.
"""

from expert_profiler.log.route_log import RouteLog, open_log

__all__ = ["RouteLog", "open_log"]
