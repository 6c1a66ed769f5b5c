"""What the supervisor concludes about one worker from times alone."""

from __future__ import annotations

from typing import Any

import pytest

from minisgl.config import ServerConfig
from minisgl.messages import Health, Heartbeat
from minisgl.worker import REST_SECONDS
from minisgl.worker_record import Limits, State, WorkerRecord

AWAKE_ALL_THE_TIME = float("-inf")


class NoProcess:
    pid = 4711

    def __init__(self, *heartbeats: Heartbeat) -> None:
        self._heartbeats = list(heartbeats)
        self.stopped = False

    def kill(self) -> None: ...

    def heartbeats(self) -> list[Heartbeat]:
        waiting, self._heartbeats = self._heartbeats, []
        return waiting

    def leave(self, health: Health) -> None: ...


def ready_worker(kind: str = "tokenizer", process: NoProcess | None = None, **settings: Any) -> WorkerRecord:
    """A worker that was last heard at 100.0."""
    worker = WorkerRecord(kind, 0, Limits.of(kind, ServerConfig(**settings)), epoch=1)
    worker.begin(90.0, process or NoProcess(), "ipc:///somewhere")
    worker.state, worker.heard_at = State.READY, 100.0
    return worker


@pytest.mark.parametrize(
    ("now", "loop_age", "problem"),
    [
        (100.6, 0.0, ""),
        (100.9, 0.0, "tokenizer-0 has not answered for 0.9 s"),
        (100.1, 1.8, ""),
        (100.1, 2.0, "tokenizer-0 has made no progress for 2.1 s"),
    ],
)
def test_silence_and_stalls_are_problems(now: float, loop_age: float, problem: str) -> None:
    worker = ready_worker()
    worker.loop_age = loop_age
    assert worker.problem(now, AWAKE_ALL_THE_TIME) == problem


def test_a_scheduler_may_be_away_for_a_long_step() -> None:
    worker = ready_worker("scheduler", watchdog_timeout=300.0, hang_timeout=10.0)
    worker.loop_age = 29.0
    assert not worker.problem(100.1, AWAKE_ALL_THE_TIME)
    worker.loop_age = 31.0
    assert "no progress for 31.1 s" in worker.problem(100.1, AWAKE_ALL_THE_TIME)
    assert not worker.hang_verdict(100.1, AWAKE_ALL_THE_TIME)
    worker.loop_age = 300.0
    assert worker.hang_verdict(100.1, AWAKE_ALL_THE_TIME) == "hung: no progress for 300.1 s"


def test_a_hang_needs_the_hang_timeout() -> None:
    worker = ready_worker(hang_timeout=10.0)
    assert not worker.hang_verdict(109.9, AWAKE_ALL_THE_TIME)
    assert worker.hang_verdict(110.1, AWAKE_ALL_THE_TIME) == "hung: no answer for 10.1 s"


def test_only_the_time_the_supervisor_was_awake_counts() -> None:
    worker = ready_worker(hang_timeout=10.0)
    worker.loop_age = 60.0
    assert not worker.problem(160.0, watched_since=159.8)
    assert not worker.hang_verdict(160.0, watched_since=159.8)
    assert worker.problem(161.0, watched_since=159.8) == "tokenizer-0 has not answered for 1.2 s"
    assert worker.hang_verdict(170.0, watched_since=159.8)


def heartbeat(at: float, rests: bool) -> Heartbeat:
    return Heartbeat("tokenizer-0", 1, int(at * 1e9), 0, rests, {})


def test_a_worker_that_rests_is_alive_until_its_next_heartbeat_is_due() -> None:
    worker = ready_worker(process=NoProcess(heartbeat(101.0, False), heartbeat(101.4, True)))
    for now in (101.5, 130.0, 101.4 + REST_SECONDS):
        worker.take_pulse(now)
        assert worker.may_rest(now) and not worker.problem(now, AWAKE_ALL_THE_TIME)
    late = 101.4 + REST_SECONDS + 1.5
    worker.take_pulse(late)
    assert not worker.may_rest(late)
    assert worker.problem(late, AWAKE_ALL_THE_TIME) == "tokenizer-0 has not answered for 1.5 s"


def test_the_silence_of_a_worker_that_has_stirred_counts() -> None:
    worker = ready_worker(process=NoProcess(heartbeat(101.4, True), heartbeat(120.0, False)))
    worker.take_pulse(120.1)
    assert not worker.may_rest(120.1) and not worker.problem(120.1, AWAKE_ALL_THE_TIME)
    worker.take_pulse(121.0)
    assert worker.problem(121.0, AWAKE_ALL_THE_TIME) == "tokenizer-0 has not answered for 1.0 s"


def test_a_resting_worker_that_the_system_has_stopped_is_silent_from_then_on() -> None:
    process = NoProcess(heartbeat(101.4, True))
    worker = ready_worker(process=process)
    worker.take_pulse(101.5)
    process.stopped = True
    worker.take_pulse(130.0)
    assert not worker.may_rest(130.0)
    assert not worker.problem(130.0, AWAKE_ALL_THE_TIME), "a moment ago it was seen to live"
    worker.take_pulse(130.8)
    assert worker.problem(130.8, AWAKE_ALL_THE_TIME) == "tokenizer-0 has not answered for 0.8 s"
    worker.take_pulse(141.0)
    assert worker.hang_verdict(141.0, AWAKE_ALL_THE_TIME) == "hung: no answer for 11.0 s"
    process.stopped = False
    worker.take_pulse(141.1)
    assert worker.may_rest(141.1) and not worker.problem(141.1, AWAKE_ALL_THE_TIME)


def test_restarts_back_off_and_are_forgiven() -> None:
    worker = ready_worker()
    delays = []
    now = 1000.0
    for _ in range(9):
        worker.end(now, "killed by signal 9")
        delays.append(worker.restart_at() - now)
        now += 0.1
    assert delays == pytest.approx([0, 0.5, 1, 2, 4, 8, 16, 32, 32])
    assert worker.recent_deaths() == 9
    worker.end(now + 61, "killed by signal 9")
    assert worker.recent_deaths() == 1
    assert worker.restart_at() == now + 61


def test_a_death_is_told_until_the_next_life_is_ready() -> None:
    worker = ready_worker()
    worker.end(200.0, "killed by signal 9")
    told = "tokenizer-0 died (killed by signal 9) 0.3 s ago and is being restarted"
    assert worker.problem(200.3, AWAKE_ALL_THE_TIME) == told
    worker.begin(200.3, NoProcess(), "ipc:///elsewhere")
    worker.stage = "loading"
    assert worker.state is State.RESTARTING
    assert worker.problem(200.3, AWAKE_ALL_THE_TIME) == told + ": loading"
    worker.state = State.READY
    assert not worker.problem(200.3, AWAKE_ALL_THE_TIME)
