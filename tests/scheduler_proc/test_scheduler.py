"""The scheduler's rules, one at a time: batching, chunks, admission, preemption, stopping, refusing, aborting."""

from __future__ import annotations

import pytest
from scheduler_fakes import EOS, VOCAB_SIZE, FakeEngine, make_scheduler, tokenized, undisturbed

from minisgl.messages import FinishReason, RequestError, TokenizedRequest
from minisgl.sampling_params import Grammar, SamplingParams
from minisgl.scheduler_proc.adjustments import Refusal
from minisgl.scheduler_proc.request import StepPlan
from minisgl.scheduler_proc.scheduler import SampledTokens, Scheduler

ENDLESS = {"ignore_eos": True, "max_new_tokens": 20}


def shape(plan: StepPlan | None) -> list[tuple[int, int, int, bool]]:
    assert plan is not None
    return [(row.request.rid, row.start, row.length, row.sample) for row in plan.rows]


def step(scheduler: Scheduler, engine: FakeEngine) -> SampledTokens:
    plan = scheduler.plan()
    assert plan is not None
    return scheduler.retire(plan, engine.retire(engine.launch(plan)))


def run_out(scheduler: Scheduler, engine: FakeEngine) -> dict[int, tuple[list[int], FinishReason]]:
    """Step until nothing is left; each request's tokens and end."""
    answers: dict[int, tuple[list[int], FinishReason]] = {}
    while scheduler.running or scheduler.waiting:
        sampled = step(scheduler, engine)
        for rid, token_id, finish in zip(sampled.rids, sampled.token_ids, sampled.finishes, strict=True):
            answers[rid] = ([*answers.get(rid, ([],))[0], token_id], finish)
    return answers


def feed(scheduler: Scheduler, *token_ids: int) -> SampledTokens:
    """Run one step whose engine samples these tokens."""
    plan = scheduler.plan()
    assert plan is not None
    return scheduler.retire(plan, list(token_ids))


def test_decode_rows_come_first_and_prompts_fill_the_rest_of_the_step() -> None:
    scheduler, engine = make_scheduler(step_tokens=8)
    scheduler.submit(tokenized(1, [5, 6, 7], **ENDLESS))
    step(scheduler, engine)
    scheduler.submit(tokenized(2, [8] * 4, **ENDLESS))
    scheduler.submit(tokenized(3, [9] * 10, **ENDLESS))
    plan = scheduler.plan()
    assert shape(plan) == [(1, 3, 1, True), (2, 0, 4, True), (3, 0, 3, False)]
    assert plan is not None and plan.decode_rows == 1


def test_a_long_prompt_is_computed_in_chunks_while_others_decode() -> None:
    scheduler, engine = make_scheduler(step_tokens=8)
    scheduler.submit(tokenized(1, [5], **ENDLESS))
    step(scheduler, engine)
    scheduler.submit(tokenized(2, list(range(1, 21)), **ENDLESS))
    shapes = []
    for _ in range(4):
        plan = scheduler.plan()
        shapes.append(shape(plan))
        assert plan is not None
        scheduler.retire(plan, engine.retire(engine.launch(plan)))
    assert [rows[1:] for rows in shapes] == [
        [(2, 0, 7, False)],
        [(2, 7, 7, False)],
        [(2, 14, 6, True)],
        [(2, 20, 1, True)],
    ]
    assert all(rows[0][0] == 1 for rows in shapes)


def test_prompts_advance_though_decode_rows_fill_the_step() -> None:
    scheduler, engine = make_scheduler(page_size=4, step_tokens=4)
    for rid in range(1, 5):
        scheduler.submit(tokenized(rid, [rid], **ENDLESS))
    step(scheduler, engine)
    scheduler.submit(tokenized(5, [7] * 6, **ENDLESS))
    assert shape(scheduler.plan())[4:] == [(5, 0, 4, False)]


def test_admission_stops_at_max_running() -> None:
    scheduler, engine = make_scheduler(max_running=2)
    for rid in (1, 2, 3):
        scheduler.submit(tokenized(rid, [rid], **ENDLESS))
    step(scheduler, engine)
    assert (scheduler.running, scheduler.waiting) == (2, 1)
    scheduler.abort(1)
    step(scheduler, engine)
    assert (scheduler.running, scheduler.waiting) == (2, 0)


def test_admission_leaves_each_running_request_a_page_to_grow() -> None:
    scheduler, engine = make_scheduler(num_pages=4, page_size=4)
    scheduler.submit(tokenized(1, [1] * 4, max_new_tokens=8, ignore_eos=True))
    scheduler.submit(tokenized(2, [2] * 12, max_new_tokens=1))
    step(scheduler, engine)
    assert (scheduler.running, scheduler.waiting) == (1, 1)


def test_a_request_as_large_as_the_pool_runs_when_nobody_else_does() -> None:
    scheduler, engine = make_scheduler(num_pages=200, page_size=1, context_length=200, step_tokens=1000)
    prompt = [3] * 199
    assert scheduler.submit(tokenized(1, prompt, max_new_tokens=1)) is None
    assert run_out(scheduler, engine)[1] == undisturbed(prompt, SamplingParams(max_new_tokens=1), 1)


def test_nobody_overtakes_the_first_in_line() -> None:
    scheduler, engine = make_scheduler(num_pages=4, page_size=4)
    scheduler.submit(tokenized(1, [1] * 4, **{**ENDLESS, "max_new_tokens": 4}))
    step(scheduler, engine)
    scheduler.submit(tokenized(2, [2] * 12, **{**ENDLESS, "max_new_tokens": 4}))
    scheduler.submit(tokenized(3, [3], **{**ENDLESS, "max_new_tokens": 1}))
    step(scheduler, engine)
    assert (scheduler.running, scheduler.waiting) == (1, 2)


def test_under_pressure_the_newest_gives_way_and_still_answers_the_same() -> None:
    scheduler, engine = make_scheduler(num_pages=6, page_size=2)
    prompts = {1: [1, 2], 2: [3, 4], 3: [5, 6]}
    for rid, prompt in prompts.items():
        scheduler.submit(tokenized(rid, prompt, ignore_eos=True, max_new_tokens=8))
    answers = run_out(scheduler, engine)
    assert scheduler.preemptions > 0
    sampling = SamplingParams(ignore_eos=True, max_new_tokens=8)
    assert answers == {rid: undisturbed(prompt, sampling, 8) for rid, prompt in prompts.items()}
    assert scheduler.pages.free == 6


def test_a_preempted_request_is_next_in_line_with_its_tokens() -> None:
    scheduler, engine = make_scheduler(num_pages=4, page_size=2)
    scheduler.submit(tokenized(1, [1, 2], ignore_eos=True, max_new_tokens=6))
    scheduler.submit(tokenized(2, [3, 4], ignore_eos=True, max_new_tokens=6))
    step(scheduler, engine)
    scheduler.submit(tokenized(3, [5], ignore_eos=True, max_new_tokens=1))
    while not scheduler.preemptions:
        step(scheduler, engine)
    assert (scheduler.running, scheduler.waiting) == (1, 2)
    restarts = []
    while scheduler.waiting:
        plan = scheduler.plan()
        assert plan is not None
        restarts += shape(plan)[plan.decode_rows :]
        scheduler.retire(plan, engine.retire(engine.launch(plan)))
    assert [rid for rid, *_ in restarts] == [2, 3]
    # Prompt and generated tokens are computed again in one go, and only the token after them is new.
    _, start, length, sample = restarts[0]
    assert (start, sample) == (0, True) and length > 2


def test_eos_ends_a_request_and_ignore_eos_does_not() -> None:
    scheduler, _ = make_scheduler()
    scheduler.submit(tokenized(1, [5], max_new_tokens=4))
    scheduler.submit(tokenized(2, [6], max_new_tokens=4, ignore_eos=True))
    sampled = feed(scheduler, EOS, EOS)
    assert sampled.finishes == [FinishReason.STOP, FinishReason.NONE]
    assert sampled.token_ids == [EOS, EOS]


def test_stop_ids_end_a_request_also_with_ignore_eos() -> None:
    scheduler, _ = make_scheduler()
    scheduler.submit(tokenized(1, [5], max_new_tokens=4, ignore_eos=True, stop_token_ids=(9,)))
    assert feed(scheduler, 8).finishes == [FinishReason.NONE]
    assert feed(scheduler, 9).finishes == [FinishReason.STOP]


def test_stop_ids_outside_the_vocabulary_are_left_out() -> None:
    scheduler, _ = make_scheduler()
    scheduler.submit(tokenized(1, [5], max_new_tokens=4, ignore_eos=True, stop_token_ids=(9, 10**6)))
    plan = scheduler.plan()
    assert plan is not None and plan.rows[0].request.stop_ids == {9}


def test_max_new_tokens_ends_with_length_and_stop_wins_over_it() -> None:
    scheduler, _ = make_scheduler()
    scheduler.submit(tokenized(1, [5], max_new_tokens=2))
    scheduler.submit(tokenized(2, [5], max_new_tokens=2))
    assert feed(scheduler, 8, 8).finishes == [FinishReason.NONE, FinishReason.NONE]
    assert feed(scheduler, 8, EOS).finishes == [FinishReason.LENGTH, FinishReason.STOP]
    assert scheduler.plan() is None


def test_no_stop_before_min_new_tokens() -> None:
    scheduler, _ = make_scheduler()
    scheduler.submit(tokenized(1, [5], max_new_tokens=9, min_new_tokens=2))
    assert feed(scheduler, EOS).finishes == [FinishReason.NONE]
    assert feed(scheduler, EOS).finishes == [FinishReason.NONE]
    assert feed(scheduler, EOS).finishes == [FinishReason.STOP]


@pytest.mark.parametrize(("num_pages", "limit"), [(64, 32), (5, 20)])
def test_max_new_tokens_none_means_what_context_and_pool_allow(num_pages: int, limit: int) -> None:
    scheduler, engine = make_scheduler(num_pages=num_pages, page_size=4, context_length=32)
    scheduler.submit(tokenized(1, [5] * 3, max_new_tokens=None, ignore_eos=True))
    tokens, finish = run_out(scheduler, engine)[1]
    assert (len(tokens), finish) == (limit - 3, FinishReason.LENGTH)


@pytest.mark.parametrize(
    ("prompt", "sampling", "code", "words"),
    [
        ([], {}, "invalid_request", ["empty"]),
        ([40], {}, "invalid_request", ["40", "0 to 39"]),
        ([-1], {}, "invalid_request", ["-1"]),
        ([1], {"max_new_tokens": 0}, "invalid_request", ["max_new_tokens", "at least 1"]),
        ([1], {"temperature": -1.0}, "invalid_request", ["temperature"]),
        ([1] * 20, {"max_new_tokens": 30}, "context_length_exceeded", ["20", "30", "50", "48"]),
        ([1] * 48, {"max_new_tokens": None}, "context_length_exceeded", ["48", "49"]),
        ([1] * 20, {"max_new_tokens": 21}, "kv_capacity_exceeded", ["20", "21", "41", "40", "--max-total-tokens"]),
    ],
)
def test_what_can_never_run_is_refused_with_the_numbers(
    prompt: list[int], sampling: dict[str, object], code: str, words: list[str]
) -> None:
    scheduler, _ = make_scheduler(num_pages=10, page_size=4, context_length=48)
    refusal = scheduler.submit(tokenized(7, prompt, **sampling))
    assert refusal is not None
    assert (refusal.rid, refusal.status, refusal.code) == (7, 400, code)
    assert all(word in refusal.message for word in words)
    assert scheduler.plan() is None


def test_a_request_id_in_use_is_ignored() -> None:
    scheduler, engine = make_scheduler()
    assert scheduler.submit(tokenized(1, [5], max_new_tokens=2, ignore_eos=True)) is None
    assert scheduler.submit(tokenized(1, [6], max_new_tokens=3, ignore_eos=True)) is None
    assert len(run_out(scheduler, engine)[1][0]) == 2


def test_abort_ends_once_in_every_state() -> None:
    scheduler, engine = make_scheduler(num_pages=8, page_size=4, max_running=3, step_tokens=4)
    for rid, length in ((1, 2), (2, 10), (3, 2)):
        scheduler.submit(tokenized(rid, [rid] * length, **ENDLESS))
    step(scheduler, engine)
    assert (scheduler.running, scheduler.waiting) == (2, 1)
    for rid, state in ((3, "waiting"), (2, "between chunks"), (1, "running")):
        ended = scheduler.abort(rid)
        assert ended is not None and ended.finish is FinishReason.ABORT, state
        assert scheduler.abort(rid) is None, state
    assert scheduler.abort(99) is None
    assert scheduler.pages.free == 8
    assert scheduler.plan() is None


def test_abort_in_flight_drops_the_token_and_holds_the_pages_until_the_step_is_done() -> None:
    scheduler, engine = make_scheduler(num_pages=8, page_size=4)
    scheduler.submit(tokenized(1, [1] * 5, **ENDLESS))
    plan = scheduler.plan()
    assert plan is not None
    in_flight = engine.launch(plan)
    scheduler.abort(1)
    assert (scheduler.pages.free, scheduler.pages.retiring) == (6, 2)
    assert scheduler.retire(plan, engine.retire(in_flight)).rids == []
    assert (scheduler.pages.free, scheduler.pages.retiring) == (8, 0)


def test_a_step_planned_ahead_of_a_finish_is_discarded() -> None:
    scheduler, _ = make_scheduler(num_pages=8, page_size=4)
    scheduler.submit(tokenized(1, [1] * 3, max_new_tokens=10))
    first, second = scheduler.plan(), scheduler.plan()
    assert first is not None and second is not None
    assert shape(second) == [(1, 3, 1, True)]
    assert scheduler.retire(first, [EOS]).finishes == [FinishReason.STOP]
    assert scheduler.pages.retiring == 1
    assert scheduler.retire(second, [7]).rids == []
    assert scheduler.pages.free == 8


def test_no_step_is_planned_ahead_of_the_length_limit() -> None:
    scheduler, _ = make_scheduler()
    scheduler.submit(tokenized(1, [1] * 3, max_new_tokens=1))
    first = scheduler.plan()
    assert first is not None
    assert scheduler.plan() is None
    assert scheduler.retire(first, [7]).finishes == [FinishReason.LENGTH]


# ---- prefix cache ----


def test_a_second_turn_computes_only_what_is_new() -> None:
    scheduler, engine = make_scheduler(page_size=4, caches=True)
    first = run(scheduler, engine, tokenized(1, [7] * 10, max_new_tokens=6, ignore_eos=True))
    # 16 tokens are known, the last of them was never computed: three full pages stay.
    scheduler.submit(tokenized(2, [7] * 10 + first + [1, 2], max_new_tokens=1))
    plan = scheduler.plan()
    assert plan is not None
    row = plan.rows[0]
    assert (row.start, row.start + row.length) == (12, 18)
    assert row.request.cached_tokens == 12
    assert (
        scheduler.retire(plan, engine.retire(engine.launch(plan))).token_ids
        == undisturbed([7] * 10 + first + [1, 2], SamplingParams(max_new_tokens=1), 1)[0]
    )


def test_the_last_prompt_token_is_always_computed() -> None:
    scheduler, engine = make_scheduler(page_size=4, caches=True)
    for rid in (1, 2):
        run(scheduler, engine, tokenized(rid, [3] * 8, max_new_tokens=1))
    scheduler.submit(tokenized(3, [3] * 8, max_new_tokens=1))
    plan = scheduler.plan()
    assert plan is not None
    assert (plan.rows[0].start, plan.rows[0].length) == (4, 4)


def test_requests_beside_each_other_share_a_prompt() -> None:
    scheduler, engine = make_scheduler(num_pages=12, page_size=4, step_tokens=16, caches=True)
    scheduler.submit(tokenized(1, [5] * 16 + [1], max_new_tokens=8, ignore_eos=True))
    plan = scheduler.plan()
    assert plan is not None
    scheduler.retire(plan, engine.retire(engine.launch(plan)))
    plan = scheduler.plan()
    assert plan is not None
    scheduler.retire(plan, engine.retire(engine.launch(plan)))
    scheduler.submit(tokenized(2, [5] * 16 + [2], max_new_tokens=8, ignore_eos=True))
    plan = scheduler.plan()
    assert plan is not None
    pages = [row.request.pages for row in plan.rows]
    assert pages[0][:4] == pages[1][:4]
    assert scheduler.leaked_pages() == 0


def test_cached_prefixes_make_room_for_running_requests() -> None:
    scheduler, engine = make_scheduler(num_pages=6, page_size=2, context_length=12, caches=True)
    for rid in range(1, 9):
        prompt = [rid] * 5
        answer = run(scheduler, engine, tokenized(rid, prompt, max_new_tokens=7, ignore_eos=True))
        assert answer == undisturbed(prompt, SamplingParams(max_new_tokens=7, ignore_eos=True), 7)[0]
    assert scheduler.preemptions == 0
    assert scheduler.available_pages == 6


def run(scheduler: Scheduler, engine: FakeEngine, message: TokenizedRequest) -> list[int]:
    """One request alone, to its end; its tokens."""
    assert scheduler.submit(message) is None
    return run_out(scheduler, engine)[message.rid][0]


class FakeMask:
    """A TokenMask that the fake engine does not heed."""

    def __init__(self, ready: bool = True) -> None:
        self.ready = ready
        self.problem: Refusal | None = None
        self.ended = False
        self.accepted: list[int] = []

    def fill(self, row: object) -> None:
        raise AssertionError("the fake engine samples without it")

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)


def test_who_needs_the_last_token_waits_for_it_while_others_run_ahead() -> None:
    scheduler, engine = make_scheduler()
    scheduler.submit(tokenized(1, [5], **ENDLESS))
    scheduler.submit(tokenized(2, [6], grammar=Grammar("json_object", ""), **ENDLESS), FakeMask())
    in_flight = []
    planned = []
    for _ in range(5):
        plan = scheduler.plan()
        assert plan is not None
        planned.append([row.request.rid for row in plan.rows])
        in_flight.append((plan, engine.launch(plan)))
        if len(in_flight) > 1:
            plan, launched = in_flight.pop(0)
            scheduler.retire(plan, engine.retire(launched))
    assert planned == [[1, 2], [1], [1, 2], [1], [1, 2]]


def test_a_token_mask_sees_every_token_once() -> None:
    scheduler, engine = make_scheduler(num_pages=6, page_size=2)
    mask = FakeMask()
    scheduler.submit(tokenized(1, [5, 6], max_new_tokens=6))
    scheduler.submit(tokenized(2, [7, 8], max_new_tokens=6, grammar=Grammar("json_object", "")), mask)
    answers = run_out(scheduler, engine)
    assert scheduler.preemptions > 0
    assert mask.accepted == answers[2][0] == undisturbed([7, 8], SamplingParams(max_new_tokens=6), 6)[0]


def test_a_request_whose_mask_is_not_ready_holds_up_no_other() -> None:
    scheduler, engine = make_scheduler()
    late, gone, wrong = FakeMask(ready=False), FakeMask(ready=False), FakeMask(ready=False)
    for rid, mask in ((1, late), (2, gone), (3, wrong)):
        assert scheduler.submit(tokenized(rid, [5], **ENDLESS), mask) is None
    assert scheduler.plan() is None
    assert (scheduler.running, scheduler.waiting, scheduler.held) == (0, 3, 3)
    scheduler.submit(tokenized(4, [6], **ENDLESS))
    assert step(scheduler, engine).rids == [4]
    assert scheduler.abort(2) is not None
    wrong.problem = Refusal(400, "invalid_grammar", "no")
    late.ready = gone.ready = wrong.ready = True
    assert set(step(scheduler, engine).rids) == {1, 4}
    assert scheduler.take_refused() == [RequestError(3, 400, "invalid_grammar", "no")]
    assert scheduler.take_refused() == []
    assert set(run_out(scheduler, engine)) == {1, 4}
    assert scheduler.leaked_pages() == 0


def test_a_mask_ends_its_request_or_breaks_it_off() -> None:
    scheduler, engine = make_scheduler()
    ending, breaking = FakeMask(), FakeMask()
    scheduler.submit(tokenized(1, [5], **ENDLESS), ending)
    scheduler.submit(tokenized(2, [6], **ENDLESS), breaking)
    step(scheduler, engine)
    ending.ended = True
    breaking.problem = Refusal(400, "invalid_grammar", "too slow")
    sampled = step(scheduler, engine)
    assert (sampled.rids, sampled.finishes) == ([1], [FinishReason.STOP])
    assert scheduler.take_refused() == [RequestError(2, 400, "invalid_grammar", "too slow")]
    assert list(scheduler.rids()) == [] and scheduler.leaked_pages() == 0
    assert scheduler.submit(tokenized(3, [6], **ENDLESS), breaking) == RequestError(
        3, 400, "invalid_grammar", "too slow"
    )


def test_a_bias_for_a_token_that_is_none_is_refused() -> None:
    scheduler, _ = make_scheduler()
    assert scheduler.submit(tokenized(1, [5], max_new_tokens=4, logit_bias=((VOCAB_SIZE - 1, 1.0),))) is None
    refusal = scheduler.submit(tokenized(2, [5], max_new_tokens=4, logit_bias=((VOCAB_SIZE, 1.0),)))
    assert (
        refusal is not None and refusal.status == 400 and f"logit_bias names token id {VOCAB_SIZE}" in refusal.message
    )


def test_a_long_prompt_is_cut_finer_beside_decoding_rows() -> None:
    scheduler, engine = make_scheduler(num_pages=40, context_length=150, step_tokens=64, fine_chunk=20)
    scheduler.submit(tokenized(1, [5], **ENDLESS))
    scheduler.submit(tokenized(2, list(range(7, 17)) * 2, **ENDLESS))
    scheduler.submit(tokenized(3, [6] * 70, **ENDLESS))
    lengths = []
    for _ in range(7):
        plan = scheduler.plan()
        assert plan is not None
        lengths.append({row.request.rid: row.length for row in plan.rows})
        scheduler.retire(plan, engine.retire(engine.launch(plan)))
    # Nothing decodes at first; then 20 tokens a step, decode rows counted, and the rest.
    assert lengths[0] == {1: 1, 2: 20, 3: 43}
    assert lengths[1] == {1: 1, 2: 1, 3: 18}
    assert lengths[2] == {1: 1, 2: 1, 3: 9}
    assert lengths[3] == {1: 1, 2: 1, 3: 1}
