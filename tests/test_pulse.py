"""Signs of life between two ends of a real socket pair, and what an idle worker says of itself."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from minisgl.channels import Inbox, Outbox, ipc_address
from minisgl.config import ModelSpec, ServerConfig, WorkerSpec
from minisgl.messages import Drain, Health, Heartbeat, Hello, Shutdown, encode
from minisgl.pulse import Pulse, leave, take
from minisgl.worker import Worker


@pytest.fixture
def pulse() -> Iterator[Pulse]:
    pulse = Pulse()
    yield pulse
    pulse.worker_end.close()
    pulse.close()


def heartbeat(number: int, **stats: object) -> Heartbeat:
    return Heartbeat("tokenizer-0", 1, number, 0, False, stats)


def test_heartbeats_wait_in_order_until_they_are_taken(pulse: Pulse) -> None:
    assert pulse.take() == []
    for number in range(5):
        leave(pulse.worker_end, heartbeat(number))
    assert pulse.take() == [heartbeat(number) for number in range(5)]
    assert pulse.take() == []


def test_a_supervisor_that_does_not_look_holds_nobody_up(pulse: Pulse) -> None:
    for number in range(10_000):
        leave(pulse.worker_end, heartbeat(number))
    waited = pulse.take()
    assert waited == [heartbeat(number) for number in range(len(waited))]
    assert 0 < len(waited) < 10_000
    leave(pulse.worker_end, heartbeat(7))
    assert pulse.take() == [heartbeat(7)], "there is room again"


def test_a_large_heartbeat_arrives_whole(pulse: Pulse) -> None:
    large = heartbeat(1, figures=list(range(50_000)))
    leave(pulse.worker_end, large)
    assert pulse.take() == [large]


def test_what_is_no_heartbeat_is_skipped(pulse: Pulse) -> None:
    for frame in (os.urandom(100), encode(Shutdown()), encode(heartbeat(1))[:-1]):
        pulse.worker_end.send(frame)
    leave(pulse.worker_end, heartbeat(2))
    assert pulse.take() == [heartbeat(2)]


def test_health_waits_for_the_worker_to_look(pulse: Pulse) -> None:
    told = [Health([], {"http-0": {"pid": number}}) for number in range(3)]
    for health in told:
        pulse.leave(health)
    leave(pulse.worker_end, heartbeat(1))
    assert take(pulse.worker_end, Health) == told
    assert take(pulse.worker_end, Health) == []
    assert pulse.take() == [heartbeat(1)], "each way is its own"


def test_either_end_may_be_gone(pulse: Pulse) -> None:
    leave(pulse.worker_end, heartbeat(1))
    pulse.worker_end.close()
    assert pulse.take() == [heartbeat(1)]
    assert pulse.take() == []
    orphan = Pulse()
    orphan.close()
    leave(orphan.worker_end, heartbeat(1))
    orphan.worker_end.close()


@pytest.fixture
def worker(tmp_path: Path, pulse: Pulse) -> Iterator[Worker]:
    run_dir = str(tmp_path)
    control = Inbox(ipc_address(run_dir, "s", 1), {Hello})
    model = ModelSpec(run_dir, "none", "none", 1024, 100, (0,), "None")
    spec = WorkerSpec("t-0", "t", 0, 1, ipc_address(run_dir, "t", 1), control.address, 1, ServerConfig(), model)
    worker = Worker(spec, pulse.worker_end)
    worker.open_inbox(Drain)
    yield worker
    worker.close()
    control.close()


def test_a_loop_that_waits_is_not_stuck_and_one_that_works_ages(worker: Worker) -> None:
    sender = Outbox(worker.spec.inbox_address)
    time.sleep(0.05)
    assert worker.heartbeat().loop_age_us >= 50_000
    waiting = threading.Thread(target=worker.wait)
    waiting.start()
    time.sleep(0.2)
    assert worker.heartbeat().loop_age_us == 0
    before = time.monotonic_ns()
    sender.send(Drain())
    waiting.join()
    time.sleep(0.05)
    after = worker.heartbeat()
    assert 50_000 <= after.loop_age_us <= (after.sent_ns - before) // 1000
    sender.close()


def beats_until(pulse: Pulse, rests: bool) -> list[Heartbeat]:
    """The next heartbeats, up to the first that rests, or does not."""
    beats: list[Heartbeat] = []
    deadline = time.monotonic() + 10
    while not any(beat.rests is rests for beat in beats):
        assert time.monotonic() < deadline, beats
        beats += pulse.take()
    return beats


def test_the_heart_of_a_worker_that_waits_rests_until_it_stirs(
    worker: Worker, pulse: Pulse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minisgl.worker.HEARTBEAT_SECONDS", 0.05)
    threading.Thread(target=worker.keep_beating, daemon=True).start()
    time.sleep(0.5)
    beats = pulse.take()
    assert len(beats) > 4 and not any(beat.rests for beat in beats), "its main loop does not wait"
    worker.idle()
    beats_until(pulse, rests=True)
    time.sleep(0.5)
    assert pulse.take() == []
    worker.tick()
    (beat,) = pulse.take()
    assert not beat.rests, "by the main loop's own hand, before it does anything"
    worker.stats["requests"] = 1
    worker.idle()
    assert beats_until(pulse, rests=True)[-1].stats["requests"] == 1


def test_no_stir_is_missed(worker: Worker, pulse: Pulse, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may come at any moment of the heart's way into its rest."""
    monkeypatch.setattr("minisgl.worker.HEARTBEAT_SECONDS", 0.0005)
    switch_interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threading.Thread(target=worker.keep_beating, daemon=True).start()
    try:
        for _ in range(500):
            worker.idle()
            time.sleep(random.random() * 0.003)
            worker.tick()
            pulse.take()
            # Whatever it was about to do: with the main loop at work it beats on.
            beats_until(pulse, rests=False)
    finally:
        sys.setswitchinterval(switch_interval)
        monkeypatch.undo()
