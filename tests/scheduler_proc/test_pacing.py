"""How much prompt runs beside streams: the gap they see stays under three quiet steps, and the prompt gets on."""

from __future__ import annotations

import pytest
from scheduler_fakes import make_scheduler, tokenized

from minisgl.scheduler_proc.pacing import PROBE_STEPS, PromptPacer

PAGE = 16
STEP_TOKENS = 512


def simulate(
    prompt: int, quiet: float, per_token: float, per_position: float, overhead: float, growth: float = 0.0
) -> list[float]:
    """Seconds of the steps with prompt tokens, while a prompt is computed beside streams.

    A chunk pays for the positions before it. Each step takes the streams `growth` longer than the one before.
    """
    pacer = PromptPacer()
    pacer.observe(0, STEP_TOKENS, STEP_TOKENS * per_token)
    for _ in range(10):
        pacer.observe(32, 0, quiet)
    position, seconds = 0, []
    while position < prompt:
        allowed = pacer.prompt_tokens(32)
        quiet += growth
        if allowed == 0:
            pacer.observe(32, 0, quiet)
            continue
        chunk = min(prompt - position, max(PAGE, min(STEP_TOKENS, STEP_TOKENS if allowed is None else allowed)))
        seconds.append(quiet + overhead + chunk * (per_token + position * per_position))
        pacer.observe(32, chunk, seconds[-1])
        position += chunk
    return seconds


@pytest.mark.parametrize("overhead", [0.0, 0.01])
@pytest.mark.parametrize("per_token", [0.0002, 0.001])
@pytest.mark.parametrize("per_position", [0.0, 1e-8, 1e-7])
def test_no_gap_reaches_three_quiet_steps(per_token: float, per_position: float, overhead: float) -> None:
    quiet = 0.1
    seconds = simulate(16384, quiet, per_token, per_position, overhead)
    assert max(seconds) < 3 * quiet
    # And about as much is computed as a step may cost.
    assert sum(seconds) / len(seconds) > 1.7 * quiet


def test_streams_that_grow_are_not_blamed_on_the_prompt() -> None:
    quiet = 0.1
    settled, growing = (simulate(16384, quiet, 0.001, 1e-7, 0.0, growth) for growth in (0.0, 0.0002))
    assert len(growing) < 1.1 * len(settled)
    assert max(growing) < 1.02 * (quiet + 0.0002 * len(growing) + quiet) < 3 * quiet


def test_streams_that_grow_fast_leave_the_prompt_a_little() -> None:
    quiet = 0.1
    settled, growing = (simulate(16384, quiet, 0.001, 0.0, 0.0, growth) for growth in (0.0, 0.001))
    assert len(growing) < 3 * len(settled)
    # After 100 steps the streams alone take twice as long.
    assert all(seconds < 2.55 * quiet for seconds in growing[:95])


def test_quiet_steps_are_looked_at_now_and_then() -> None:
    pacer = PromptPacer()
    pacer.observe(4, 0, 0.1)
    allowed = []
    for _ in range(3 * PROBE_STEPS + 2):
        allowed.append(pacer.prompt_tokens(4))
        pacer.observe(4, 0 if allowed[-1] == 0 else 10, 0.1 if allowed[-1] == 0 else 0.15)
    # With the first cost of a token nothing is known yet.
    assert [index for index, tokens in enumerate(allowed) if tokens == 0] == [PROBE_STEPS, 2 * PROBE_STEPS + 1]
    assert set(allowed) == {None, 0, 20}


def test_cheap_prompts_are_not_cut() -> None:
    assert len(simulate(16384, 0.1, 1e-5, 0.0, 0.0)) == 16384 // STEP_TOKENS
    assert len(simulate(16384, 0.1, 0.0, 0.0, 0.0)) == 16384 // STEP_TOKENS


def test_one_hiccup_changes_little() -> None:
    pacer = PromptPacer()
    pacer.observe(0, 500, 0.5)
    for _ in range(10):
        pacer.observe(8, 0, 0.1)
    before = pacer.prompt_tokens()
    pacer.observe(8, 0, 60.0)
    after = pacer.prompt_tokens()
    assert before is not None and after is not None
    assert before <= after <= 1.3 * before


def test_nothing_is_cut_before_anything_is_known() -> None:
    pacer = PromptPacer()
    assert pacer.prompt_tokens() is None
    pacer.observe(3, 100, 0.2)
    assert pacer.prompt_tokens() is None


def test_a_crowd_may_hold_up_the_few_that_run_once() -> None:
    pacer = PromptPacer()
    for _ in range(10):
        pacer.observe(1, 0, 0.1)
    pacer.observe(1, 100, 0.2)
    assert pacer.prompt_tokens(1) == pacer.prompt_tokens(1, 0.5) == pacer.prompt_tokens(1, 1.0) == 100
    assert pacer.prompt_tokens(1, 3.0) == 300
    assert pacer.prompt_tokens(1, 31.0) == 400


def test_rows_that_came_since_the_last_quiet_step_lengthen_what_is_quiet() -> None:
    """In seconds 0.1 + 0.01 for each row or prompt token: beside 21 rows as many tokens as double 0.3."""
    pacer = PromptPacer()
    for rows, tokens in ((1, 0), (1, 16), (11, 16), (21, 16)):
        pacer.observe(rows, tokens, 0.09 + 0.01 * (rows + tokens))
    assert pacer.prompt_tokens(21) == pytest.approx(30, abs=1)
    assert pacer.prompt_tokens(1) == pytest.approx(10, abs=1)


def test_a_crowd_is_what_can_begin_in_one_step() -> None:
    scheduler, _ = make_scheduler(num_pages=400, page_size=4, context_length=200, step_tokens=64)
    assert scheduler.waiting_for_each() == 0.0
    scheduler.submit(tokenized(1, [3] * 5, max_new_tokens=8))
    first = scheduler.plan()
    assert first is not None
    scheduler.retire(first, [1])
    for rid in range(2, 6):
        scheduler.submit(tokenized(rid, [3] * 16, max_new_tokens=8))
    assert scheduler.waiting_for_each() == 4.0
    scheduler.submit(tokenized(6, [3], max_new_tokens=8))
    assert scheduler.waiting_for_each() == 0.0


def test_the_plan_keeps_to_it_only_beside_decodes() -> None:
    scheduler, _ = make_scheduler(num_pages=200, page_size=4, context_length=100, step_tokens=64)
    scheduler.submit(tokenized(1, [3] * 5, max_new_tokens=8))
    first = scheduler.plan(beside_decodes=1)
    assert first is not None and [row.length for row in first.rows] == [5]
    scheduler.retire(first, [1])
    scheduler.submit(tokenized(2, [3] * 60, max_new_tokens=8))
    second = scheduler.plan(beside_decodes=7)
    assert second is not None and [row.length for row in second.rows] == [1, 7]
    scheduler.retire(second, [1])
    least = scheduler.plan(beside_decodes=1)
    assert least is not None and [row.length for row in least.rows] == [1, 4]
    scheduler.retire(least, [1])
    none = scheduler.plan(beside_decodes=0)
    assert none is not None and [row.length for row in none.rows] == [1]
    scheduler.abort(1)
    scheduler.retire(none, [1])
    alone = scheduler.plan(beside_decodes=0)
    assert alone is not None and [row.length for row in alone.rows] == [49]
