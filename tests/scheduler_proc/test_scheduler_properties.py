"""The scheduler under every order of events that hypothesis can think of, with a pool that is always too small.

`depth` is how many steps may be launched before the oldest is retired: 0 is one step at a time, above 0 is overlap.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduler_fakes import VOCAB_SIZE, make_scheduler, tokenized, undisturbed

from minisgl.messages import FinishReason, Logprobs, RequestError, TokenizedRequest
from minisgl.scheduler_proc.request import StepPlan

CONTEXT_LENGTH = 30
TOKEN_IDS = st.integers(0, VOCAB_SIZE - 1)
SAMPLING = st.fixed_dictionaries(
    {
        "max_new_tokens": st.one_of(st.none(), st.integers(1, 12)),
        "ignore_eos": st.booleans(),
        "stop_token_ids": st.lists(st.integers(0, VOCAB_SIZE + 5), max_size=3).map(tuple),
        "min_new_tokens": st.sampled_from([0, 0, 1, 5]),
        "presence_penalty": st.sampled_from([0.0, 1.0]),
        "logprobs": st.sampled_from([None, 0]),
        "prompt_logprobs_from": st.sampled_from([None, 0, 1, 4]),
    }
)


class SchedulerMachine(RuleBasedStateMachine):
    """Submits, steps and aborts; follows each request to its one terminal event."""

    @initialize(
        num_pages=st.integers(3, 9),
        page_size=st.sampled_from([1, 2, 2, 3, 4]),
        max_running=st.integers(1, 6),
        step_tokens=st.sampled_from([1, 3, 8, 30]),
        depth=st.integers(0, 2),
        caches=st.booleans(),
        fine_chunk=st.sampled_from([None, 2]),
    )
    def start(
        self,
        num_pages: int,
        page_size: int,
        max_running: int,
        step_tokens: int,
        depth: int,
        caches: bool,
        fine_chunk: int | None,
    ) -> None:
        self.scheduler, self.engine = make_scheduler(
            num_pages, page_size, CONTEXT_LENGTH, max_running, step_tokens, caches, fine_chunk
        )
        self.capacity = min(num_pages * page_size, CONTEXT_LENGTH)
        self.depth = depth
        self.submitted: dict[int, TokenizedRequest] = {}
        self.alive: list[int] = []
        """Accepted and not ended, in order of arrival."""
        self.output: dict[int, list[int]] = {}
        self.in_flight: deque[tuple[StepPlan, Any]] = deque()
        self.sent_pages: dict[int, tuple[list[int], list[int]]] = {}
        """Of each request the list of pages that a step was launched with, and what was in it."""

    @rule(
        prompt=st.one_of(
            st.lists(TOKEN_IDS, max_size=9),
            # Few beginnings, so that prompts share prefixes.
            st.tuples(st.sampled_from([1, 2]), st.integers(1, 6), st.lists(TOKEN_IDS, max_size=3)).map(
                lambda parts: [parts[0]] * parts[1] + parts[2]
            ),
        ),
        sampling=SAMPLING,
    )
    def submit(self, prompt: list[int], sampling: dict[str, Any]) -> None:
        rid = len(self.submitted) + 1
        message = tokenized(rid, prompt, **sampling)
        self.submitted[rid] = message
        limit = sampling["max_new_tokens"]
        fits = len(prompt) >= 1 and len(prompt) + (limit or 1) <= self.capacity
        consistent = limit is None or sampling["min_new_tokens"] <= limit
        refusal = self.scheduler.submit(message)
        assert (refusal is None) == (fits and consistent)
        if refusal is None:
            self.alive.append(rid)
            self.output[rid] = []
        else:
            assert isinstance(refusal, RequestError) and refusal.status == 400

    @precondition(lambda self: self.submitted)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        rid = data.draw(st.sampled_from(sorted(self.submitted)))
        ended = self.scheduler.abort(rid)
        assert (ended is not None) == (rid in self.alive)
        if ended is not None:
            assert ended.finish is FinishReason.ABORT
            assert ended.token_ids == self.submitted[rid].input_ids + self.output[rid]
            self.alive.remove(rid)

    @rule()
    def flush(self) -> None:
        assert self.scheduler.flush_cache() == (not self.alive)
        if not self.alive:
            assert self.scheduler.available_pages + self.scheduler.pages.retiring == self.scheduler.pages.total
            assert self.scheduler.cache is None or self.scheduler.cache.cached_pages == 0

    @rule(steps=st.integers(1, 12))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.launch()
            if len(self.in_flight) > self.depth:
                self.retire()

    def launch(self) -> None:
        plan = self.scheduler.plan()
        if plan is None:
            assert self.in_flight or not self.alive, "nothing is planned although requests wait"
            if self.in_flight:
                self.retire()
            return
        assert len(plan.rows) == len({row.request.rid for row in plan.rows}) <= self.scheduler.limits.max_running
        prompt_tokens = sum(row.length for row in plan.rows[plan.decode_rows :])
        assert prompt_tokens <= self.scheduler.limits.step_tokens
        if not self.in_flight:
            assert self.alive[0] in [row.request.rid for row in plan.rows], "the oldest request was passed over"
        for row in plan.rows:
            pages, rid = row.request.pages, row.request.rid
            sent_list, sent = self.sent_pages.get(rid, ([], []))
            assert sent_list is not pages or pages[: len(sent)] == sent, "a list of pages did more than grow"
            self.sent_pages[rid] = pages, list(pages)
        self.in_flight.append((plan, self.engine.launch(plan)))

    @precondition(lambda self: self.in_flight)
    @rule()
    def retire(self) -> None:
        plan, step = self.in_flight.popleft()
        token_ids = self.engine.retire(step)
        sampled = self.scheduler.retire(plan, token_ids, self.engine.logprobs(step))
        opened = [request.rid for request in sampled.opened]
        assert opened == [rid for rid in sampled.rids if not self.output[rid]]
        assert [repr(part) for part in sampled.logprobs] == [
            repr(part)
            for row, rid in enumerate(sampled.rids)
            for part in self.logprobs(row, rid, sampled.token_ids[row])
        ]
        for rid, token_id, finish in zip(sampled.rids, sampled.token_ids, sampled.finishes, strict=True):
            assert rid in self.alive, "a row after the request's end"
            self.output[rid].append(token_id)
            expected, expected_finish = self.answer_alone(rid)
            assert self.output[rid] == expected[: len(self.output[rid])]
            if finish is not FinishReason.NONE:
                assert (self.output[rid], finish) == (expected, expected_finish)
                self.alive.remove(rid)

    def logprobs(self, row: int, rid: int, token_id: int) -> Iterator[Logprobs]:
        """What must come with a row whose token is not counted as output yet; a token's value is its position."""
        prompt, sampling = self.submitted[rid].input_ids, self.submitted[rid].sampling
        start = sampling.prompt_logprobs_from
        if not self.output[rid] and start is not None:
            values = [float(position) if position else math.nan for position in range(start, len(prompt))]
            yield Logprobs(row, True, prompt[start:], values)
        if sampling.logprobs is not None:
            yield Logprobs(row, False, [token_id], [float(len(prompt) + len(self.output[rid]))])

    def answer_alone(self, rid: int) -> tuple[list[int], FinishReason]:
        message = self.submitted[rid]
        return undisturbed(message.input_ids, message.sampling, self.capacity - len(message.input_ids))

    @invariant()
    def every_page_is_in_one_place(self) -> None:
        cached = self.scheduler.cache.pages() if self.scheduler.cache else ()
        self.scheduler.pages.check(cached, owned=self.scheduler.owned_pages())
        assert self.scheduler.leaked_pages() == 0

    @invariant()
    def requests_are_served_in_order_of_arrival(self) -> None:
        assert sorted(self.scheduler.rids()) == self.alive
        running = [request.rid for request in self.scheduler._running]
        waiting = [request.rid for request in self.scheduler._waiting]
        assert running + waiting == self.alive

    def teardown(self) -> None:
        if not hasattr(self, "alive"):
            return
        # Generous: every token of every request alone, recomputed after each preemption.
        for _ in range(40 * CONTEXT_LENGTH * (len(self.alive) + 1)):
            if not self.alive and not self.in_flight:
                break
            self.run(1)
            self.every_page_is_in_one_place()
        assert not self.alive, "requests never ended"
        assert self.scheduler.available_pages == self.scheduler.pages.total


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=100, stateful_step_count=50)
