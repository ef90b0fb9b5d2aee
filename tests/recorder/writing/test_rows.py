# SPDX-License-Identifier: Apache-2.0
"""Which request, position and phase a row of the buffer belongs to.

The big tests run a scheduler of their own that knows, token by token, what it does; the recorder
is told what vLLM tells it and has to find the same.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.moe_routes.schema import Flag
from vllm.moe_routes.writing.rows import Request, RequestBook, Step, StopRule, external_id

from tests.support.build import QUICK, THOROUGH, a_step

# ---- a scheduler that knows the truth ------------------------------------------------------


@dataclass
class Life:
    """One request, as the scheduler sees it."""

    raw_id: str
    prompt: int
    tokens: list[int]
    rule: StopRule
    most: int  # generated tokens
    computed: int  # where it starts, or goes on
    started: bool = False
    stopping: bool = False  # stopped, but the step after is under way
    ended: bool = False  # by itself, not aborted
    # what the recording should know
    seen: bool = False
    cached: int = 0
    missed: int = 0
    high: int = 0
    counted: list[int] = field(default_factory=list)
    flagged: int = 0


@dataclass
class Row:
    life: Life
    position: int
    token: int
    is_decode: bool
    flag: Flag


class Scheduler:
    """Random steps: chunks, cached prefixes, preemption, aborts, early stops."""

    def __init__(self, rnd: random.Random, runs_ahead: bool) -> None:
        self.rnd = rnd
        self.runs_ahead = runs_ahead
        self.recording = False
        self.live: list[Life] = []
        self.all: list[Life] = []
        self.finished: list[str] = []

    def start_recording(self) -> None:
        self.recording = True
        self.finished = []
        # What would stop a running request is not known to a recording that starts later: see
        # test_the_row_after_the_stop_token_is_overrun_in_a_recording_that_joined_later.
        self.live = [life for life in self.live if not life.stopping]
        for life in self.live:
            if life.started:
                life.rule = StopRule(frozenset(), 0)

    def add(self) -> None:
        rnd = self.rnd
        prompt = rnd.randint(1, 12)
        name = f"{rnd.choice(['7', '7', '0_7', 'a-b', 'cmpl-x-0'])}-{len(self.all):08x}"
        tokens = [rnd.randint(0, 5) for _ in range(prompt)]
        stops = frozenset(rnd.sample(range(6), rnd.choice([0, 0, 1, 2])))  # empty: ignore_eos
        life = Life(
            raw_id=name,
            prompt=prompt,
            tokens=tokens,
            rule=StopRule(stops, rnd.choice([0, 0, 1, 3])),
            most=rnd.randint(1, 8),
            computed=rnd.choice([0, 0, rnd.randint(0, prompt - 1)]),
        )
        self.live.append(life)
        self.all.append(life)

    def end(self, life: Life) -> None:
        self.live.remove(life)
        if life.started:
            self.finished.append(life.raw_id)

    def preempt(self, life: Life) -> None:
        if life.started and not life.stopping:
            life.computed = self.rnd.choice([0, 0, self.rnd.randint(0, life.computed)])

    def step(self) -> tuple[Step, list[Row]]:
        rnd = self.rnd
        for _ in range(rnd.randint(0, 2)):
            self.add()
        if self.live and rnd.random() < 0.15:
            self.preempt(rnd.choice(self.live))
        if self.live and rnd.random() < 0.1:
            self.end(rnd.choice(self.live))
        finished, self.finished = self.finished, []
        rows: list[Row] = []
        batch: list[tuple[str, int, int, int]] = []
        new: dict[str, StopRule | None] = {}
        chosen = [life for life in self.live if rnd.random() < 0.7]
        rnd.shuffle(chosen)
        for life in chosen:
            left = len(life.tokens) - life.computed
            n = left if rnd.random() < 0.5 else rnd.randint(1, left)
            batch.append((life.raw_id, life.computed, n, life.prompt))
            if not life.started:
                new[life.raw_id] = life.rule if self.runs_ahead else None
            self._note(life, n, rows)
            life.started = True
            life.computed += n
        step = a_step(batch, new=new, finished=finished)
        for life in [life for life in self.live if life.stopping]:
            self._end_itself(life)
        for life in chosen:
            if life in self.live and life.computed == len(life.tokens):
                self._sample(life)
        return step, rows

    def _note(self, life: Life, n: int, rows: list[Row]) -> None:
        if self.recording and not life.seen:
            life.seen = True
            life.high = life.computed
            life.cached = 0 if life.started else life.computed
            life.missed = life.computed if life.started else 0
        for position in range(life.computed, life.computed + n):
            flag = Flag.NONE
            if life.stopping:
                flag = Flag.OVERRUN
            elif position < life.high:
                flag = Flag.RECOMPUTED
            row = Row(life, position, life.tokens[position], position >= life.prompt, flag)
            rows.append(row)
            if self.recording and flag:
                life.flagged += 1
            elif self.recording:
                life.counted.append(position)
        life.high = max(life.high, life.computed + n)

    def _sample(self, life: Life) -> None:
        life.tokens.append(self.rnd.randint(0, 5))
        generated = len(life.tokens) - life.prompt
        if generated >= life.most:  # known beforehand, so nothing runs ahead of it
            self._end_itself(life)
        elif life.tokens[-1] in life.rule.token_ids and generated >= life.rule.min_tokens:
            if self.runs_ahead:
                life.stopping = True
            else:
                self._end_itself(life)

    def _end_itself(self, life: Life) -> None:
        life.ended = True
        self.end(life)


def _record(seed: int, steps: int, runs_ahead: bool, late: bool) -> tuple[Scheduler, list[Request]]:
    """Run both side by side and compare every row; return what the recording says at the end."""
    rnd = random.Random(seed)
    scheduler = Scheduler(rnd, runs_ahead)
    for _ in range(rnd.randint(1, 6) if late else 0):
        scheduler.step()
    scheduler.start_recording()
    book = RequestBook()
    ended: list[Request] = []
    names: dict[str, str] = {}
    for _ in range(steps):
        step, rows = scheduler.step()
        ended += book.finish(step.finished)
        tokens = np.array([row.token for row in rows], dtype=np.int32)
        table = book.place(step, tokens if runs_ahead else None)
        assert len(table.req_ids) == int(step.num_scheduled_tokens.sum()) == len(rows)
        assert table.positions.tolist() == [row.position for row in rows]
        assert table.is_decode.tolist() == [row.is_decode for row in rows]
        assert [Flag(flag) for flag in table.flags] == [row.flag for row in rows]
        for req_id, row in zip(table.req_ids, rows, strict=True):
            assert names.setdefault(req_id, row.life.raw_id) == row.life.raw_id
            assert req_id in (row.life.raw_id, external_id(row.life.raw_id))
    return scheduler, ended + book.finish_all()


#: A plain generator, because hypothesis' own costs a second a schedule.
SEEDS = st.integers(0, 2**32 - 1)
STEPS = st.integers(1, 30)
MODES = pytest.mark.parametrize("runs_ahead", [False, True], ids=["in step", "runs ahead"])
STARTS = pytest.mark.parametrize("late", [False, True], ids=["from the start", "joins later"])


@MODES
@STARTS
@THOROUGH
@given(seed=SEEDS, steps=STEPS)
def test_every_row_of_a_random_schedule_is_placed_and_flagged_as_it_ran(
    seed: int, steps: int, runs_ahead: bool, late: bool
) -> None:
    scheduler, requests = _record(seed, steps, runs_ahead, late)
    seen = {life.raw_id: life for life in scheduler.all if life.seen}
    assert {request.raw_id for request in requests} == set(seen)
    assert len({request.req_id for request in requests}) == len(requests) == len(seen)
    for request in requests:
        life = seen[request.raw_id]
        assert request.num_prompt_tokens == life.prompt
        assert request.cached_tokens == life.cached
        assert request.missed_tokens == life.missed
        assert request.rows_flagged == life.flagged
        assert request.positions == len(life.counted)


@MODES
@STARTS
@THOROUGH
@given(seed=SEEDS, steps=STEPS)
def test_every_position_counts_once_and_adds_up_to_the_sequence(
    seed: int, steps: int, runs_ahead: bool, late: bool
) -> None:
    scheduler, requests = _record(seed, steps, runs_ahead, late)
    by_raw_id = {request.raw_id: request for request in requests}
    for life in scheduler.all:
        if not life.seen:
            continue
        request = by_raw_id[life.raw_id]
        first = life.cached + life.missed
        assert life.counted == list(range(first, first + request.positions))
        if life.ended:  # prompt + generated - 1: the last token is sampled but never routed
            assert first + request.positions == len(life.tokens) - 1


@QUICK
@given(seed=SEEDS, steps=STEPS, runs_ahead=st.booleans())
def test_positions_and_flagged_rows_add_up_to_the_scheduled_ones(
    seed: int, steps: int, runs_ahead: bool
) -> None:
    scheduler = Scheduler(random.Random(seed), runs_ahead)
    scheduler.start_recording()
    book, scheduled, requests = RequestBook(), 0, []
    for _ in range(steps):
        step, rows = scheduler.step()
        requests += book.finish(step.finished)
        book.place(step, np.array([row.token for row in rows]) if runs_ahead else None)
        scheduled += int(step.num_scheduled_tokens.sum())
    requests += book.finish_all()
    assert sum(item.positions + item.rows_flagged for item in requests) == scheduled


# ---- the cases one by one ------------------------------------------------------------------


def _flags(book: RequestBook, step: Step, tokens: list[int] | None = None) -> list[str]:
    table = book.place(step, None if tokens is None else np.array(tokens))
    return [Flag(flag).name.lower() for flag in table.flags]


def test_rows_of_several_requests_stand_in_batch_order() -> None:
    book = RequestBook()
    book.place(a_step([("a-00000000", 0, 3, 3)]), None)
    table = book.place(a_step([("b-00000000", 0, 2, 4), ("a-00000000", 3, 1, 3)]), None)
    assert table.req_ids == ["b", "b", "a"]
    assert table.positions.tolist() == [0, 1, 3]
    assert table.is_decode.tolist() == [False, False, True]
    assert table.flags.tolist() == [0, 0, 0]


def test_a_cached_prefix_is_reported_and_not_invented() -> None:
    book = RequestBook()
    table = book.place(a_step([("a", 16, 4, 20)], new={"a": None}), None)
    assert table.positions.tolist() == [16, 17, 18, 19]
    (request,) = book.finish_all()
    assert (request.cached_tokens, request.missed_tokens, request.positions) == (16, 0, 4)


def test_a_request_that_ran_before_the_recording_has_missed_tokens_not_cached_ones() -> None:
    book = RequestBook()
    book.place(a_step([("a", 16, 1, 10)], new={}), None)
    (request,) = book.finish_all()
    assert (request.cached_tokens, request.missed_tokens, request.positions) == (0, 16, 1)


def test_a_preempted_request_repeats_its_prompt_and_its_output_as_recomputed() -> None:
    book = RequestBook()
    book.place(a_step([("a", 0, 3, 3)]), None)
    book.place(a_step([("a", 3, 1, 3)], new={}), None)
    assert _flags(book, a_step([("a", 0, 5, 3)], new={})) == ["recomputed"] * 4 + ["none"]
    (request,) = book.finish_all()
    assert (request.positions, request.rows_flagged) == (5, 4)


def test_a_preempted_request_in_chunks_stays_recomputed_up_to_where_it_was() -> None:
    book = RequestBook()
    book.place(a_step([("a", 0, 4, 4)]), None)
    assert _flags(book, a_step([("a", 0, 2, 4)], new={})) == ["recomputed"] * 2
    assert _flags(book, a_step([("a", 2, 3, 4)], new={})) == ["recomputed"] * 2 + ["none"]


EOS = 9


def _stopping(*, min_tokens: int = 0, stops: frozenset[int] = frozenset({EOS})) -> RequestBook:
    """A request of three prompt tokens (the last one EOS) that runs ahead; its prompt has run."""
    book = RequestBook()
    rule = StopRule(stops, min_tokens)
    step = a_step([("a", 0, 3, 3)], new={"a": rule})
    assert _flags(book, step, [1, 2, EOS]) == ["none"] * 3
    return book


def test_the_row_after_the_stop_token_is_overrun() -> None:
    book = _stopping()
    assert _flags(book, a_step([("a", 3, 1, 3)], new={}), [4]) == ["none"]
    assert _flags(book, a_step([("a", 4, 1, 3)], new={}), [EOS]) == ["overrun"]
    (request,) = book.finish_all()
    assert (request.positions, request.rows_flagged) == (4, 1)


def test_a_stop_token_as_the_very_first_one_leaves_the_prompt_only() -> None:
    book = _stopping()
    assert _flags(book, a_step([("a", 3, 1, 3)], new={}), [EOS]) == ["overrun"]


def test_a_stop_token_inside_the_prompt_stops_nothing() -> None:
    assert _flags(_stopping(), a_step([("a", 3, 1, 3)], new={}), [4]) == ["none"]


def test_a_stop_token_before_min_tokens_stops_nothing() -> None:
    book = _stopping(min_tokens=2)
    assert _flags(book, a_step([("a", 3, 1, 3)], new={}), [EOS]) == ["none"]
    assert _flags(book, a_step([("a", 4, 1, 3)], new={}), [EOS]) == ["overrun"]


def test_with_ignore_eos_nothing_is_overrun() -> None:
    book = _stopping(stops=frozenset())
    assert _flags(book, a_step([("a", 3, 1, 3)], new={}), [EOS]) == ["none"]


def test_an_engine_that_does_not_run_ahead_has_no_overrun_rows() -> None:
    book = RequestBook()
    book.place(a_step([("a", 0, 3, 3)]), None)
    assert _flags(book, a_step([("a", 3, 1, 3)], new={})) == ["none"]


def test_the_row_after_the_stop_token_is_overrun_in_a_recording_that_joined_later() -> None:
    book = RequestBook()
    step = a_step([("a", 3, 1, 3)], new={}, joined={"a": StopRule(frozenset([EOS]), 0)})
    assert _flags(book, step, [4]) == ["none"]
    assert _flags(book, a_step([("a", 4, 1, 3)], new={}), [EOS]) == ["overrun"]


def test_a_session_that_goes_on_with_more_prompt_is_not_overrun() -> None:
    """A resumed streaming request is scheduled as new under its id, with a longer prompt."""
    book = RequestBook()
    rule = {"a": StopRule(frozenset([EOS]), 0)}
    assert _flags(book, a_step([("a", 0, 3, 3)], new=rule), [1, 1, 1]) == ["none"] * 3
    resumed = a_step([("a", 3, 5, 8)], new={"a": None})
    assert _flags(book, resumed, [9, EOS, 9, 9, 9]) == ["none"] * 5
    assert _flags(book, a_step([("a", 8, 1, 8)], new={}), [EOS]) == ["overrun"]
    (request,) = book.finish(["a"])
    assert (request.num_prompt_tokens, request.positions, request.rows_flagged) == (8, 8, 1)


def test_the_replay_of_a_lost_row_is_its_first_and_counts() -> None:
    book = RequestBook()
    lost = np.zeros(4, dtype=bool)
    book.place(a_step([("a", 0, 4, 3)]), None, lost)
    book.place(a_step([("a", 4, 1, 3)], new={}), None)
    replay = book.place(a_step([("a", 0, 5, 3)], new={}), None)
    assert replay.flags.tolist() == [0, 0, 0, 0, Flag.RECOMPUTED]
    again = book.place(a_step([("a", 0, 5, 3)], new={}), None)
    assert again.flags.tolist() == [Flag.RECOMPUTED] * 5
    (request,) = book.finish(["a"])
    assert (request.positions, request.rows_flagged, request.rows_dropped) == (5, 6, 4)


def test_a_step_without_requests_has_no_rows() -> None:
    table = RequestBook().place(a_step(), None)
    assert table.req_ids == []
    assert len(table.positions) == len(table.is_decode) == len(table.flags) == 0


def test_a_request_without_rows_in_a_step_changes_nothing() -> None:
    book = RequestBook()
    table = book.place(a_step([("a", 0, 0, 3), ("b", 0, 2, 3)]), None)
    assert table.req_ids == ["b", "b"]


def test_finishing_an_unknown_request_is_no_error() -> None:
    assert RequestBook().finish(["never-seen"]) == []


def test_a_request_ends_once() -> None:
    book = RequestBook()
    book.place(a_step([("a", 0, 3, 3)]), None)
    assert [item.raw_id for item in book.finish(["a"])] == ["a"]
    assert book.finish(["a"]) == book.finish_all() == []


# ---- ids -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw_id", "shown"),
    [
        ("7-1a2b3c4d", "7"),
        ("0_7-1a2b3c4d", "0_7"),  # a child of n > 1
        ("cmpl-abc-0-1a2b3c4d", "cmpl-abc-0"),
        ("a-1a2b3c4d-5e6f7a8b", "a-1a2b3c4d"),  # only vLLM's own eight digits go
        ("7", "7"),
        ("", ""),
        ("-1a2b3c4d", ""),
        ("1a2b3c4d", "1a2b3c4d"),
        ("7-1A2B3C4D", "7-1A2B3C4D"),
        ("7-1a2b3c4", "7-1a2b3c4"),
        ("7-1a2b3c4d5", "7-1a2b3c4d5"),
        ("7-1a2b3c4g", "7-1a2b3c4g"),
        ("7_1a2b3c4d", "7_1a2b3c4d"),
    ],
)
def test_a_request_is_shown_without_the_digits_that_vllm_appends(raw_id: str, shown: str) -> None:
    assert external_id(raw_id) == shown


@QUICK
@given(st.text(), st.integers(0, 2**32 - 1))
def test_whatever_a_client_calls_its_request_is_what_it_reads(name: str, digits: int) -> None:
    assert external_id(f"{name}-{digits:08x}") == name


def test_an_id_used_twice_is_told_apart_by_vllms_own() -> None:
    book = RequestBook()
    both = [("7-00000001", 0, 1, 1), ("7-00000002", 0, 1, 1)]
    assert book.place(a_step(both), None).req_ids == ["7", "7-00000002"]


def test_an_id_used_again_after_its_request_ended_is_told_apart_too() -> None:
    book = RequestBook()
    book.place(a_step([("7-00000001", 0, 1, 1)]), None)
    book.finish(["7-00000001"])
    assert book.place(a_step([("7-00000002", 0, 1, 1)]), None).req_ids == ["7-00000002"]


def test_the_children_of_one_request_are_requests_of_their_own() -> None:
    book = RequestBook()
    rows = [("0_7-00000001", 0, 1, 1), ("1_7-00000001", 0, 1, 1)]
    assert book.place(a_step(rows), None).req_ids == ["0_7", "1_7"]


def test_even_a_client_that_guesses_vllms_id_shares_no_id() -> None:
    book = RequestBook()
    names = ["7-00000002-00000003", "7-00000001", "7-00000002"]
    table = book.place(a_step([(name, 0, 1, 1) for name in names]), None)
    assert len(set(table.req_ids)) == 3


@THOROUGH
@given(
    start=st.integers(0, 5),
    prompt=st.integers(1, 16),
    steps=st.lists(
        st.tuples(st.integers(0, 9), st.integers(1, 9), st.booleans(), st.booleans()), max_size=12
    ),
    rule=st.none() | st.builds(StopRule, st.frozensets(st.integers(0, 3)), st.integers(0, 4)),
)
def test_a_chunk_of_prompt_is_taken_at_once_as_its_rows_are_one_by_one(
    start: int,
    prompt: int,
    steps: list[tuple[int, int, bool, bool]],
    rule: StopRule | None,
) -> None:
    """A chunk at some position, or where the request stands, recorded or not."""
    one, many = (Request("r", "r-0", prompt, rule, next_position=start) for _ in range(2))
    for position, size, goes_on, recorded in steps:
        first = many.next_position if goes_on else position
        rows = range(first, first + size)
        flags = [one.take(row, row % 4, recorded) for row in rows]
        if recorded and many.take_prompt(first, size):
            assert flags == [Flag.NONE] * size
        else:
            assert [many.take(row, row % 4, recorded) for row in rows] == flags
        assert one == many


def test_the_chunks_of_a_prompt_are_taken_at_once() -> None:
    request = Request("r", "r-0", 8, None)
    assert [request.take_prompt(0, 5), request.take_prompt(5, 3)] == [True, True]
    assert (request.positions, request.next_position) == (8, 8)
    assert not request.take_prompt(4, 4), "a replay has flags"
    assert not request.take_prompt(8, 2), "these are generated"
