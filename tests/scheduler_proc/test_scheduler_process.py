"""The scheduler process: its loop on real pipes with an engine that needs no model, and the real process."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from scheduler_fakes import EOS, VOCAB_SIZE, FakeEngine, tokenized, undisturbed
from worker_process import Wiring, WorkerProcess, take, take_until

from minisgl.channels import Inbox, Outbox
from minisgl.config import ModelSpec, ServerConfig
from minisgl.demo_model import demo_model_dir
from minisgl.messages import (
    AbortRequest,
    FinishReason,
    Message,
    RequestError,
    Shutdown,
    TokenBatch,
    TokenizedRequest,
    WorkerDown,
    WorkerUp,
    make_request_id,
)
from minisgl.model_source import resolve_model
from minisgl.pulse import Pulse
from minisgl.sampling_params import SamplingParams
from minisgl.scheduler_proc.core import ReplicaCore
from minisgl.scheduler_proc.main import serve
from minisgl.scheduler_proc.request import StepPlan
from minisgl.worker import Worker

MODEL = ModelSpec("", "fake", "fake", 64, VOCAB_SIZE, (EOS,), "Fake")
ENDLESS = {"ignore_eos": True, "max_new_tokens": 50}


class ServingThread:
    """`serve` in a thread, with two detokenizers that the test reads."""

    def __init__(self, wiring: Wiring, engine: FakeEngine) -> None:
        spec = wiring.spec("scheduler", MODEL, detokenizer_workers=2)
        self._pulse = Pulse()
        self.worker = Worker(spec, self._pulse.worker_end)
        self.worker.open_inbox(TokenizedRequest, AbortRequest)
        self.detokenizers = [wiring.inbox(f"detokenizer-{index}", 1, TokenBatch, RequestError) for index in range(2)]
        self.error: BaseException | None = None
        self._outbox = Outbox(spec.inbox_address)
        self._core = ReplicaCore(engine, spec.config, MODEL)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        try:
            serve(self.worker, self._core)
        except RuntimeError as error:
            self.error = error

    def send(self, *messages: Message) -> None:
        for message in messages:
            self._outbox.send(message)

    def announce_detokenizers(self) -> None:
        for index, inbox in enumerate(self.detokenizers):
            self.send(WorkerUp(f"detokenizer-{index}", 1, inbox.address))

    def stop(self) -> None:
        self.send(Shutdown())
        self.join()
        self._outbox.close()
        self.worker.close()

    def join(self) -> None:
        self._thread.join(timeout=20)
        assert not self._thread.is_alive()


class SteppedEngine(FakeEngine):
    """Computes one step per permit that the test gives."""

    def __init__(self) -> None:
        super().__init__()
        self.permits = threading.Semaphore(0)
        self.broken = False

    def retire(self, step: Any) -> list[int]:
        assert self.permits.acquire(timeout=20)
        if self.broken:
            raise RuntimeError("the fake device is broken")
        return super().retire(step)


class PreparingEngine(FakeEngine):
    """Can prepare a few things when idle; each takes until the test lets it end."""

    def __init__(self) -> None:
        super().__init__()
        self.history: list[str] = []
        self.begun, self.permits = threading.Semaphore(0), threading.Semaphore(0)
        self.left = 3

    def stay_ahead(self, pages_used: int) -> None: ...

    def prepare_next(self, pages_used: int) -> bool:
        if not self.left:
            return False
        self.left -= 1
        self.history.append("prepare")
        self.begun.release()
        assert self.permits.acquire(timeout=20)
        return True

    def launch(self, plan: StepPlan) -> Any:
        self.history.append("step")
        return super().launch(plan)


@pytest.fixture
def wiring() -> Iterator[Wiring]:
    wiring = Wiring()
    yield wiring
    wiring.close()


@pytest.fixture
def start(wiring: Wiring) -> Iterator[Callable[..., ServingThread]]:
    threads = []

    def start(engine: FakeEngine) -> ServingThread:
        threads.append(ServingThread(wiring, engine))
        return threads[-1]

    yield start
    for thread in threads:
        thread.stop()


def rows(messages: list[Any]) -> dict[int, tuple[list[int], FinishReason]]:
    """Each request's tokens and last finish."""
    found: dict[int, tuple[list[int], FinishReason]] = {}
    for batch in messages:
        for rid, token_id, finish in zip(batch.rids, batch.token_ids, batch.finishes, strict=True):
            found[rid] = ([*found.get(rid, ([],))[0], token_id], finish)
    return found


def until_ended(inbox: Inbox, *rids: int) -> dict[int, tuple[list[int], FinishReason]]:
    def ended(messages: list[Any]) -> bool:
        return all(rid in (found := rows(messages)) and bool(found[rid][1]) for rid in rids)

    return rows(take_until(inbox, ended))


def test_each_detokenizer_gets_its_own_requests(start: Callable[..., ServingThread]) -> None:
    serving = start(FakeEngine())
    sampling = SamplingParams(ignore_eos=True, max_new_tokens=5)
    # Sent before the detokenizers are known: nothing may be lost.
    for rid in (10, 11, 12):
        serving.send(tokenized(rid, [rid % VOCAB_SIZE], ignore_eos=True, max_new_tokens=5))
    serving.announce_detokenizers()
    for index, rids in ((0, [10, 12]), (1, [11])):
        answers = until_ended(serving.detokenizers[index], *rids)
        assert answers == {rid: undisturbed([rid % VOCAB_SIZE], sampling, 5) for rid in rids}


def test_log_probabilities_go_with_their_rows_to_the_detokenizer(start: Callable[..., ServingThread]) -> None:
    serving = start(FakeEngine())
    fields = {"ignore_eos": True, "max_new_tokens": 3, "logprobs": 0, "prompt_logprobs_from": 1}
    for rid in (10, 11, 12):
        serving.send(tokenized(rid, [5, rid], **fields))
    serving.announce_detokenizers()
    for index, rids in ((0, [10, 12]), (1, [11])):
        rows_due = 3 * len(rids)
        messages = take_until(
            serving.detokenizers[index], lambda found, due=rows_due: sum(len(batch.rids) for batch in found) == due
        )
        found: dict[int, list[tuple[bool, list[int], list[float]]]] = {rid: [] for rid in rids}
        for batch in messages:
            for part in batch.logprobs:
                found[batch.rids[part.row]].append((part.of_prompt, part.token_ids, part.values))
        for rid in rids:
            tokens, _ = undisturbed([5, rid], SamplingParams(ignore_eos=True, max_new_tokens=3), 3)
            # The fake engine's values are positions.
            answer = [(False, [token_id], [float(place)]) for place, token_id in enumerate(tokens, 2)]
            assert found[rid] == [(True, [rid], [1.0]), *answer]


def test_refusals_go_to_the_detokenizer_of_the_request(start: Callable[..., ServingThread]) -> None:
    serving = start(FakeEngine())
    serving.announce_detokenizers()
    serving.send(tokenized(11, []))
    [error] = take(serving.detokenizers[1])
    assert (error.rid, error.status) == (11, 400)


def test_an_abort_ends_a_running_request(start: Callable[..., ServingThread]) -> None:
    engine = SteppedEngine()
    serving = start(engine)
    serving.announce_detokenizers()
    serving.send(tokenized(10, [5], **ENDLESS))
    engine.permits.release()
    assert take(serving.detokenizers[0])[0].finishes == [FinishReason.NONE]
    serving.send(AbortRequest(10), AbortRequest(10), AbortRequest(77))
    engine.permits.release(100)
    assert until_ended(serving.detokenizers[0], 10)[10][1] is FinishReason.ABORT


def test_an_idle_engine_prepares_and_a_request_waits_for_one_preparation_at_most(
    start: Callable[..., ServingThread],
) -> None:
    engine = PreparingEngine()
    serving = start(engine)
    serving.announce_detokenizers()
    assert engine.begun.acquire(timeout=20)
    serving.send(tokenized(10, [5], ignore_eos=True, max_new_tokens=3))
    # The engine prepares; the request waits in the inbox by the time that it may end.
    time.sleep(0.2)
    engine.permits.release()
    until_ended(serving.detokenizers[0], 10)
    for _ in range(2):
        assert engine.begun.acquire(timeout=20)
        engine.permits.release()
    serving.send(tokenized(12, [5], ignore_eos=True, max_new_tokens=2))
    until_ended(serving.detokenizers[0], 12)
    assert engine.history == ["prepare", *["step"] * 3, "prepare", "prepare", *["step"] * 2]


def test_requests_of_a_dead_http_process_end_and_no_others(start: Callable[..., ServingThread]) -> None:
    engine = SteppedEngine()
    serving = start(engine)
    serving.announce_detokenizers()
    dead, successor, other = make_request_id(0, 1, 2), make_request_id(0, 2, 4), make_request_id(1, 1, 6)
    for rid in (dead, successor, other):
        serving.send(tokenized(rid, [5], ignore_eos=True, max_new_tokens=9))
    engine.permits.release()
    take_until(serving.detokenizers[0], lambda messages: bool(messages))
    serving.send(WorkerDown("http-0", 1, "killed"))
    # The engine waits in a step; with all steps allowed before the news has arrived, the requests could end first.
    time.sleep(0.2)
    engine.permits.release(100)
    answers = until_ended(serving.detokenizers[0], dead, successor, other)
    serving.send(tokenized(dead + 2, [5], max_new_tokens=9), tokenized(successor + 2, [5], max_new_tokens=9))
    assert set(until_ended(serving.detokenizers[0], successor + 2)) == {successor + 2}, "sent before its http died"
    assert {rid: finish for rid, (_, finish) in answers.items()} == {
        dead: FinishReason.ABORT,
        successor: FinishReason.LENGTH,
        other: FinishReason.LENGTH,
    }


def test_an_engine_failure_ends_all_requests_and_the_process(start: Callable[..., ServingThread]) -> None:
    engine = SteppedEngine()
    serving = start(engine)
    serving.announce_detokenizers()
    for rid in (11, 13, 10):
        serving.send(tokenized(rid, [5], **ENDLESS))
    # The last one has a row, so all three have been read.
    received: list[Any] = []
    while not received:
        engine.permits.release()
        serving.detokenizers[0].wait(50)
        received = serving.detokenizers[0].drain()
    engine.broken = True
    engine.permits.release()
    for index, rids in ((0, [10]), (1, [11, 13])):
        errors = take_until(serving.detokenizers[index], lambda messages: RequestError in map(type, messages))
        errors += serving.detokenizers[index].drain()
        assert sorted(error.rid for error in errors if type(error) is RequestError) == rids
        assert (errors[-1].status, "the fake device is broken" in errors[-1].message) == (500, True)
    serving.join()
    assert "broken" in str(serving.error)


def test_shutdown_ends_running_requests_with_an_error(start: Callable[..., ServingThread]) -> None:
    engine = SteppedEngine()
    serving = start(engine)
    serving.announce_detokenizers()
    serving.send(tokenized(10, [5], **ENDLESS))
    engine.permits.release()
    take(serving.detokenizers[0])
    serving.send(Shutdown())

    def ended(messages: list[Any]) -> bool:
        # A step at a time: the request must not be through before the message arrives.
        engine.permits.release()
        return RequestError in map(type, messages)

    messages = take_until(serving.detokenizers[0], ended)
    assert (messages[-1].rid, messages[-1].status) == (10, 503)
    serving.join()
    assert serving.error is None


def test_statistics_are_fresh_when_idle(start: Callable[..., ServingThread]) -> None:
    serving = start(FakeEngine(num_pages=64))
    serving.announce_detokenizers()
    serving.send(tokenized(10, [5], ignore_eos=True, max_new_tokens=5))
    until_ended(serving.detokenizers[0], 10)
    serving.send(Shutdown())
    serving.join()
    stats = serving.worker.stats
    assert (stats["running"], stats["kv_pages_free"], stats["tokens_generated"]) == (0, 64, 5)


def test_the_real_process_serves_the_demo_model(wiring: Wiring) -> None:
    settings: dict[str, Any] = {"device": "cpu", "dtype": "float32", "cpu_threads": 1, "max_total_tokens": 512}
    model = resolve_model(ServerConfig(model="demo"), lambda *_: None)
    assert model.directory == str(demo_model_dir())
    with WorkerProcess(wiring, wiring.spec("scheduler", model, **settings)) as process:
        info = process.ready.info
        assert (info["kv_tokens"], info["dtype"], info["page_size"]) == (512, "float32", 16)
        assert (info["max_running_requests"], info["context_length"]) == (64, model.context_length)
        detokenizer = wiring.inbox("detokenizer-0", 1, TokenBatch, RequestError)
        process.announce(detokenizer, "detokenizer-0")
        process.send_frames(b"garbage")
        process.send_frames(b"two", b"parts")
        greedy = SamplingParams(temperature=0.0, max_new_tokens=8, ignore_eos=True)
        process.send(TokenizedRequest(1, [10, 11, 12], greedy, [1, 2, 3, 4]))
        process.send(TokenizedRequest(2, [10, 11, 12], greedy, [1, 2, 3, 4]))
        answers = until_ended(detokenizer, 1, 2)
        assert len(answers[1][0]) == 8 and answers[1] == answers[2]
        process.send(TokenizedRequest(3, [10], SamplingParams(max_new_tokens=400, ignore_eos=True), [1, 2, 3, 4]))
        take_until(detokenizer, lambda messages: bool(messages))
        process.send(AbortRequest(3))
        assert until_ended(detokenizer, 3)[3][1] is FinishReason.ABORT
        # A report from before the first request says that nothing runs, too.
        stats = process.wait_stats(lambda stats: stats.get("running") == 0 and stats.get("frames_dropped") == 2)
        assert (stats["kv_pages_free"], stats["kv_pages_leaked"], stats["frames_dropped"]) == (32, 0, 2)


def test_a_busy_loop_reports_now_and_then(
    start: Callable[..., ServingThread], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("minisgl.scheduler_proc.main.STATS_SECONDS", 0.0)
    monkeypatch.setattr("minisgl.scheduler_proc.main.REPORT_SECONDS", 0.0)
    caplog.set_level(logging.DEBUG, "minisgl.scheduler_proc.main")
    serving = start(FakeEngine(num_pages=64))
    serving.announce_detokenizers()
    serving.send(tokenized(10, [5], ignore_eos=True, max_new_tokens=3))
    until_ended(serving.detokenizers[0], 10)
    lines = [record.getMessage() for record in caplog.records]
    assert lines and all(line.startswith("running 1, waiting 0, KV pages ") for line in lines)
