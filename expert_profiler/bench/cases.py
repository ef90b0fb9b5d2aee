# SPDX-License-Identifier: Apache-2.0
"""What is measured, and in which order. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

#: The baseline of every pair in one engine: patched, and the recorder taken off the model, which
#: is what an engine runs whose switch is unset.
BASE = "unset"
#: The baseline against itself: its interval must hold 1, or the machine is too noisy to tell.
AA = "aa"
#: The method of public loggers; see ``yardstick``.
YARDSTICK = "yardstick"


class Mode(NamedTuple):
    """One way to run an engine.

    Attributes:
        name: as it stands in the report.
        recorder: mode that the recorder is configured to; None: it does not record.
        suffix: of the file it writes, where it writes one.
        layers: selection of layers.
        target: largest paired ratio that is aimed at, where the project aims at one.
    """

    name: str
    recorder: str | None = None
    suffix: str | None = None
    layers: str = "all"
    target: float | None = None


MODES = {
    item.name: item
    for item in (
        Mode(BASE),
        Mode(AA),
        Mode("armed", target=1.003),
        Mode("stat", "stat", target=1.005),
        Mode("per_pass", "per_pass", ".jsonl", target=1.008),
        Mode("parquet_layer0", "per_token", ".parquet", "0"),
        Mode("parquet", "per_token", ".parquet", target=1.010),
        Mode("jsonl_layer0", "per_token", ".jsonl", "0"),
        Mode("jsonl", "per_token", ".jsonl", target=1.020),
        Mode(YARDSTICK),
    )
}
HEADLINE_MODES = (AA, "armed", "stat", "per_pass", "parquet", "jsonl", YARDSTICK)
MATRIX_MODES = (
    "armed", "stat", "per_pass", "parquet_layer0", "parquet", "jsonl_layer0", "jsonl",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One load: ``batch`` requests at once, of the same length.

    Attributes:
        prompt_tokens: of every request.
        batch: requests.
        output_tokens: of every request.
    """

    prompt_tokens: int
    batch: int
    output_tokens: int

    @property
    def name(self) -> str:
        return f"prompt {self.prompt_tokens}, batch {self.batch}"

    @property
    def routed_tokens(self) -> int:
        """Tokens that a forward pass runs for: a request's last token is never an input."""
        return self.batch * (self.prompt_tokens + self.output_tokens - 1)


class Cell(NamedTuple):
    """A case of the matrix, and the modes that it is run in."""

    case: Case
    modes: tuple[str, ...]


#: Of every mode of a cell.
MATRIX_PAIRS = 1


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        headline: the case of the targets, and its pairs a mode.
        matrix: the other cases.
        processes: interleaved rounds of unpatched and unset engines; 0: none.
        profiled: the headline's load for longer, so that what a recording takes once hardly counts.
        fit: loads and layer counts that the cost is fitted over.
        synthetic_rows: rows of the writer's throughput, a format.
        sustained_seconds: of the writer's paced run.
        simulated_minutes: of the memory run.
    """

    headline: Case
    headline_pairs: int
    matrix: tuple[Cell, ...]
    processes: int
    profiled: Case
    fit: tuple[tuple[int, str], ...]
    synthetic_rows: int
    sustained_seconds: float
    simulated_minutes: float


#: Prompt tokens of a pass above which it takes seconds on two cores.
LONG = 2_000


def cell(prompt_tokens: int, batch: int) -> Cell:
    """A case of the full matrix: long passes in two modes only."""
    modes = ("parquet", "jsonl") if prompt_tokens * batch > LONG else MATRIX_MODES
    return Cell(Case(prompt_tokens, batch, output_tokens=8), modes)


FULL = Plan(
    headline=Case(prompt_tokens=16, batch=25, output_tokens=8),
    headline_pairs=20,
    matrix=tuple(cell(prompt, batch) for prompt in (16, 128, 512) for batch in (1, 8, 32)),
    processes=3,
    profiled=Case(prompt_tokens=16, batch=25, output_tokens=96),
    fit=tuple((batch, layers) for batch in (1, 8, 25) for layers in ("0", "0-11", "all")),
    synthetic_rows=4_000_000,
    sustained_seconds=60,
    simulated_minutes=30,
)
QUICK = Plan(
    headline=Case(prompt_tokens=4, batch=2, output_tokens=3),
    headline_pairs=2,
    matrix=(Cell(Case(4, 1, 3), MATRIX_MODES),),
    processes=0,
    profiled=Case(prompt_tokens=4, batch=2, output_tokens=4),
    fit=((1, "0"), (1, "all"), (2, "0"), (2, "all")),
    synthetic_rows=100_000,
    sustained_seconds=1,
    simulated_minutes=0.2,
)


class Slot(NamedTuple):
    """One pass of a round.

    Attributes:
        mode: what it runs in.
        base: index in the round of the baseline pass that it is paired with; its own index for the
            baseline.
    """

    mode: str
    base: int


def schedule(modes: Sequence[str], number: int) -> list[Slot]:
    """The passes of one round: a baseline pass next to every mode's pass.

    Two modes share a baseline pass, one runs before it and one after it: ``m b m  m b m``. Rounds
    rotate the modes, and every other one runs backwards, so that no mode keeps a place.

    Args:
        modes: other than the baseline.
        number: of the round, from 0.
    """
    turn = (number // 2) % max(1, len(modes))
    order = [*modes[turn:], *modes[:turn]]
    if number % 2:
        order.reverse()
    slots: list[Slot] = []
    for i in range(0, len(order), 2):
        base = len(slots) + 1
        slots += [Slot(order[i], base), Slot(BASE, base)]
        slots += [Slot(mode, base) for mode in order[i + 1 : i + 2]]
    return slots
