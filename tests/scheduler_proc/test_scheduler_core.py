"""One replica's core: what it hands to the detokenizer, from the first row of a request to its one end."""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import Any

import pytest
from scheduler_fakes import EOS, VOCAB_SIZE, FakeEngine, tokenized, undisturbed

from minisgl.config import ModelSpec, ServerConfig
from minisgl.messages import NO_TOKEN, FinishReason, StreamOpen, TokenBatch
from minisgl.sampling_params import SamplingParams
from minisgl.scheduler_proc.core import ReplicaCore, scheduler_limits
from minisgl.scheduler_proc.request import StepPlan
from minisgl.timeline import STAMPS

MODEL = ModelSpec("", "fake", "fake", 64, VOCAB_SIZE, (EOS,), "Fake")


def make_core(engine: FakeEngine | None = None, **settings: object) -> ReplicaCore:
    return ReplicaCore(engine or FakeEngine(), ServerConfig(**settings), MODEL, replica=3, epoch=7)  # type: ignore[arg-type]


def run_out(core: ReplicaCore) -> list[TokenBatch]:
    batches = []
    while core.busy:
        batch = core.step()
        if batch is not None:
            batches.append(batch)
    return batches


def opened(batches: list[TokenBatch]) -> dict[int, StreamOpen]:
    return {stream.rid: stream for batch in batches for stream in batch.opened}


def test_a_request_is_opened_with_its_first_row_and_ends_once() -> None:
    core = make_core()
    core.submit(tokenized(1, [5, 6], max_new_tokens=4, ignore_eos=True, stop=("a", "b"), no_stop_trim=True))
    batches = run_out(core)
    assert [len(batch.opened) for batch in batches] == [1, 0, 0, 0]
    stream = batches[0].opened[0]
    assert (stream.rid, stream.prompt_tokens, stream.cached_tokens, stream.stop) == (1, 2, 0, ["a", "b"])
    assert (stream.skip_special_tokens, stream.no_stop_trim) == (True, True)
    tokens, _ = undisturbed([5, 6], SamplingParams(max_new_tokens=4, ignore_eos=True), 4)
    assert [token_id for batch in batches for token_id in batch.token_ids] == tokens
    finishes = [finish for batch in batches for finish in batch.finishes]
    assert finishes == [FinishReason.NONE] * 3 + [FinishReason.LENGTH]
    assert all((batch.replica, batch.epoch) == (3, 7) for batch in batches)
    assert all(before.retired_ns <= after.launched_ns for before, after in pairwise(batches))
    assert all(batch.launched_ns <= batch.retired_ns for batch in batches)
    assert core.step() is None


def test_stamps_reach_the_first_token_in_order() -> None:
    core = make_core(max_running_requests=1)
    for rid in (1, 2, 3):
        core.submit(tokenized(rid, [rid], max_new_tokens=2, ignore_eos=True))
    core.abort(3)
    streams = opened(run_out(core))
    for stream in streams.values():
        assert len(stream.stamps) == STAMPS.index("first_token") + 1
        assert stream.stamps == sorted(stream.stamps)
    queue = {rid: stream.stamps[5] - stream.stamps[4] for rid, stream in streams.items()}
    assert queue[2] > queue[1]


def test_a_preempted_request_keeps_its_first_stamps() -> None:
    core = make_core(FakeEngine(num_pages=6, page_size=2))
    for rid in (1, 2, 3):
        core.submit(tokenized(rid, [rid, rid], max_new_tokens=8, ignore_eos=True))
    batches = run_out(core)
    assert core.stats()["preemptions"] > 0
    assert sum(len(batch.opened) for batch in batches) == 3
    assert all(stream.stamps[5] <= batches[0].launched_ns for stream in opened(batches).values())


def test_aborts_are_answered_before_the_next_step() -> None:
    core = make_core()
    core.submit(tokenized(1, [5], max_new_tokens=9, ignore_eos=True))
    core.submit(tokenized(2, [6], max_new_tokens=9, ignore_eos=True))
    core.step()
    core.submit(tokenized(3, [7], max_new_tokens=9, ignore_eos=True))
    for rid in (3, 1, 1, 99):
        core.abort(rid)
    batch = core.step()
    assert batch is not None
    assert (batch.rids, batch.token_ids) == ([3, 1], [NO_TOKEN, NO_TOKEN])
    assert batch.finishes == [FinishReason.ABORT, FinishReason.ABORT]
    assert [stream.rid for stream in batch.opened] == [3], "only the one without a row before needs an introduction"
    assert {rid for later in run_out(core) for rid in later.rids} == {2}


def test_refusals_come_back_from_submit() -> None:
    core = make_core()
    refusal = core.submit(tokenized(1, [5], max_new_tokens=1000))
    assert refusal is not None and refusal.status == 400
    assert not core.busy


def test_an_engine_failure_ends_every_request_with_an_error() -> None:
    core = make_core(FakeEngine(fail_at_step=2))
    for rid in (1, 2, 3):
        core.submit(tokenized(rid, [rid], max_new_tokens=9, ignore_eos=True))
    core.step()
    core.abort(3)
    with pytest.raises(RuntimeError, match="broken"):
        run_out(core)
    errors = core.fail_all(500, "engine_failure", "broken")
    assert [(error.rid, error.status) for error in errors] == [(1, 500), (2, 500)]


def test_statistics_count() -> None:
    core = make_core(FakeEngine(num_pages=8, page_size=4), max_running_requests=1)
    core.submit(tokenized(1, [5] * 5, max_new_tokens=3, ignore_eos=True))
    core.submit(tokenized(2, [5] * 5, max_new_tokens=3, ignore_eos=True))
    core.step()
    stats = core.stats()
    assert (stats["running"], stats["waiting"], stats["kv_pages_free"], stats["kv_pages_total"]) == (1, 1, 6, 8)
    run_out(core)
    stats = core.stats()
    assert (stats["running"], stats["waiting"], stats["kv_pages_free"], stats["kv_pages_leaked"]) == (0, 0, 8, 0)
    assert stats["tokens_generated"] == stats["steps"] == 6


def test_a_leak_is_counted() -> None:
    core = make_core()
    core.scheduler.pages.allocate(2)
    assert core.stats()["kv_pages_leaked"] == 2


@pytest.mark.parametrize(("device", "expected"), [("cpu", (64, 512)), ("cuda:0 (GPU)", (256, 8192))])
def test_limits_follow_the_device_and_the_settings(device: str, expected: tuple[int, int]) -> None:
    limits = scheduler_limits(ServerConfig(), MODEL, device)
    assert (limits.max_running, limits.step_tokens) == expected
    assert (limits.context_length, limits.eos_ids) == (64, {EOS})
    config = ServerConfig(max_running_requests=2, chunked_prefill_size=3, context_length=5)
    limits = scheduler_limits(config, MODEL, device)
    assert (limits.max_running, limits.step_tokens, limits.context_length) == (2, 3, 5)


def test_narration_tells_each_prefill_chunk(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "minisgl")
    core = make_core(narrate=True, chunked_prefill_size=4)
    core.submit(tokenized(1, [5] * 6, max_new_tokens=2))
    run_out(core)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("request 1: prefill of tokens 0..3 (4 tokens, cached 0) took ")
    assert lines[1].startswith("request 1: prefill of tokens 4..5 (2 tokens, cached 0) took ")
    assert len(lines) == 2


class RunAheadEngine(FakeEngine):
    """Has the next step launched before the last one is read, and notes how many were in flight at most."""

    runs_ahead = True
    in_flight = most_in_flight = 0

    def launch(self, plan: StepPlan) -> Any:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        return super().launch(plan)

    def retire(self, step: Any) -> list[int]:
        self.in_flight -= 1
        return super().retire(step)


def test_running_ahead_changes_no_token() -> None:
    """Also with preemptions, aborts, ends found out late, and chunked prompts."""
    requests = {rid: ([rid, rid + 1, rid + 2], SamplingParams(max_new_tokens=3 + rid)) for rid in range(1, 9)}
    engine = RunAheadEngine(num_pages=9, page_size=2)
    core = make_core(engine, chunked_prefill_size=2)
    for rid, (prompt, params) in requests.items():
        core.submit(tokenized(rid, prompt, max_new_tokens=params.max_new_tokens))
    batches: list[TokenBatch] = []
    while core.busy:
        if len(batches) == 3:
            core.abort(8)
        batch = core.step()
        if batch is not None:
            batches.append(batch)
    assert engine.most_in_flight == 2
    assert engine.in_flight == 0
    assert core.stats()["preemptions"] > 0
    assert core.stats()["kv_pages_leaked"] == 0
    assert core.stats()["kv_pages_free"] == 9
    rows = [row for batch in batches for row in zip(batch.rids, batch.token_ids, batch.finishes, strict=True)]
    for rid, (prompt, params) in requests.items():
        tokens, finish = undisturbed(prompt, params, params.max_new_tokens or 0)
        mine = [(token, end) for owner, token, end in rows if owner == rid]
        if rid == 8:
            assert mine[-1] == (NO_TOKEN, FinishReason.ABORT)
        else:
            assert [token for token, _ in mine] == tokens
            assert [end for _, end in mine] == [FinishReason.NONE] * (len(tokens) - 1) + [finish]
