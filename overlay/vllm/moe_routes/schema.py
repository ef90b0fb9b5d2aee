# SPDX-License-Identifier: Apache-2.0
"""The records of a route log: their kinds, fields, types and Parquet footer keys.

The recorder writes by this module and every reader reads by it. Standard library only: the
analysis library loads it without vLLM.
"""

from enum import IntEnum
from typing import Any, NamedTuple

#: One record of a log, as the object that its JSON line holds.
Record = dict[str, Any]

SCHEMA_VERSION = 1

#: A record's ``type``, in the order in which the kinds stand in a log.
META, ROUTE, PASS, REQUEST, END = "meta", "route", "pass", "request", "end"

PHASES = ("prefill", "decode")
#: A forward pass is "prefill" when all its tokens are prompt tokens, "decode" when none is.
FORWARD_MODES = ("prefill", "decode", "mixed")


class Flag(IntEnum):
    """Why a row is not part of its request's sequence, or not for the first time."""

    NONE = 0
    #: The position was executed before: preemption threw its KV cache away.
    RECOMPUTED = 1
    #: Executed after the request had stopped: asynchronous scheduling runs one step ahead.
    OVERRUN = 2
    #: A draft token that the model did not confirm: another token took its position.
    REJECTED = 3


#: The flags as a route record names them; a row without a flag has no such field.
FLAGS = tuple(flag.name.lower() for flag in Flag if flag)

#: Keys of a Parquet part's footer: the header in every part, request records as JSON lines, and
#: the end record in the last part.
FOOTER_META, FOOTER_REQUESTS, FOOTER_END = (
    b"moe_routes.meta",
    b"moe_routes.requests",
    b"moe_routes.end",
)


class Field(NamedTuple):
    """One field of a record.

    Attributes:
        name: its key in JSON and its column in Parquet.
        kind: "string", "int16", "int32", "int64", "ids" (a list of expert ids), "weights" (a list
            of floats) or "label" (one of a few strings).
        required: whether a reader refuses a record without it. What is not required is missing
            from logs of public loggers.
    """

    name: str
    kind: str
    required: bool = True


#: One token in one layer.
ROUTE_FIELDS = (
    Field("req_id", "string"),
    Field("token_idx", "int32"),
    Field("layer", "int16"),
    Field("topk_ids", "ids"),
    Field("topk_weights", "weights"),
    Field("phase", "label", required=False),
    Field("forward_pass_id", "int64", required=False),
    Field("flag", "label", required=False),
)

#: The keys of the other records, in their order in a line. One forward pass of mode per_pass:
PASS_KEYS = (
    *("forward_pass_id", "batch_size", "latency", "seq_lens_sum", "forward_mode"),
    *("expert_activation", "type", "rank", "prefill_tokens", "decode_tokens"),
    *("total_activated_experts", "expert_utilization", "max_over_mean"),
)
#: One request of mode per_token. In a Parquet footer ``after_rows`` follows.
REQUEST_KEYS = (
    *("type", "req_id", "raw_id", "num_prompt_tokens", "cached_tokens", "missed_tokens"),
    *("positions", "rows_flagged", "rows_dropped", "finished"),
)
#: The end of a log. ``next`` and ``error`` are there for some reasons only, ``expert_counts`` in
#: mode per_pass; ``rows_flagged`` and what is about requests in mode per_token.
END_KEYS = (
    *("type", "reason", "next", "error", "rows", "rows_flagged", "passes", "passes_unfinished"),
    *("passes_by_mode", "tokens", "requests", "cached_tokens", "missed_tokens", "bytes"),
    *("drops", "rows_skipped", "self_check", "expert_counts", "end_time"),
)
