# SPDX-License-Identifier: Apache-2.0
"""Which file a rank writes, and the names of all ranks' files. Pure."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from vllm.moe_routes import config
from vllm.moe_routes.errors import RouteLogError
from vllm.moe_routes.layers import MoELayer


class Rank(NamedTuple):
    """A worker's place, by parallel dimension."""

    dp: int
    pp: int
    tp: int


def main_path(named: str | None, default: Path | None, mode: str) -> Path:
    """The file of the first rank.

    Args:
        named: by the command that starts a recording, or by the one that configures it.
        default: of VLLM_LOG_MOE.
        mode: what is to be recorded there.

    Raises:
        RouteLogError: none is named, or its name does not fit the mode.
    """
    main = default if named is None else config.log_path(named)
    if main is None:
        raise RouteLogError(f"mode {mode} writes a file; name it with path=")
    return config.log_path(str(main), mode=mode)


def rank_files(
    main: Path,
    rank: Rank,
    num_dp_ranks: int,
    stages: Sequence[Collection[MoELayer]],
    chosen: Collection[MoELayer],
) -> tuple[Path, list[str]]:
    """A rank's file, and the names of all ranks' files.

    Args:
        main: the file of the first rank.
        rank: one that records.
        num_dp_ranks: data-parallel ranks.
        stages: the MoE layers of every pipeline stage.
        chosen: the recorded layers; a stage without one of them writes nothing.
    """
    writers = [stage for stage, own in enumerate(stages) if any(item in own for item in chosen)]
    names = [_name(main, dp, pp, writers[0]) for dp in range(num_dp_ranks) for pp in writers]
    return main.with_name(_name(main, rank.dp, rank.pp, writers[0])), names


def _name(main: Path, dp: int, stage: int, first_stage: int) -> str:
    """``x.jsonl``, or ``x.dp1.jsonl``, ``x.pp1.jsonl``, ``x.dp1.pp1.jsonl``.

    The first data-parallel rank and the first writing stage go without a part of the name.
    """
    parts = [f".dp{dp}"] if dp else []
    parts += [f".pp{stage}"] if stage != first_stage else []
    return f"{main.stem}{''.join(parts)}{main.suffix}"
