# SPDX-License-Identifier: Apache-2.0
"""The records of a route log: their kinds, fields, types and Parquet footer keys.

The recorder writes by this module and every reader reads by it. Standard library only: the
analysis library loads it without vLLM.
"""

from typing import NamedTuple

SCHEMA_VERSION = 1

#: A record's ``type``, in the order in which the kinds stand in a log.
META, ROUTE, PASS, REQUEST, END = "meta", "route", "pass", "request", "end"

PHASES = ("prefill", "decode")
#: A forward pass is "prefill" when all its tokens are prompt tokens, "decode" when none is.
FORWARD_MODES = ("prefill", "decode", "mixed")
#: Why a row is not part of its request's sequence, or not for the first time.
FLAGS = ("recomputed", "overrun", "rejected")

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
