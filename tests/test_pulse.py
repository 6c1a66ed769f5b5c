"""Heartbeats between two ends of a real socket pair, and what an idle loop says of itself."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from minisgl.channels import Inbox, Outbox, ipc_address
from minisgl.config import ModelSpec, ServerConfig, WorkerSpec
from minisgl.messages import Drain, Heartbeat, Hello, Shutdown, encode
from minisgl.pulse import Pulse, beat
from minisgl.worker import Worker


@pytest.fixture
def pulse() -> Iterator[Pulse]:
    pulse = Pulse()
    yield pulse
    pulse.worker_end.close()
    pulse.close()


def heartbeat(number: int, **stats: object) -> Heartbeat:
    return Heartbeat("tokenizer-0", 1, number, 0, stats)


def test_heartbeats_wait_in_order_until_they_are_taken(pulse: Pulse) -> None:
    assert pulse.take() == []
    for number in range(5):
        beat(pulse.worker_end, heartbeat(number))
    assert pulse.take() == [heartbeat(number) for number in range(5)]
    assert pulse.take() == []


def test_a_supervisor_that_does_not_look_holds_nobody_up(pulse: Pulse) -> None:
    for number in range(10_000):
        beat(pulse.worker_end, heartbeat(number))
    waited = pulse.take()
    assert waited == [heartbeat(number) for number in range(len(waited))]
    assert 0 < len(waited) < 10_000
    beat(pulse.worker_end, heartbeat(7))
    assert pulse.take() == [heartbeat(7)], "there is room again"


def test_a_large_heartbeat_arrives_whole(pulse: Pulse) -> None:
    large = heartbeat(1, figures=list(range(50_000)))
    beat(pulse.worker_end, large)
    assert pulse.take() == [large]


def test_what_is_no_heartbeat_is_skipped(pulse: Pulse) -> None:
    for frame in (os.urandom(100), encode(Shutdown()), encode(heartbeat(1))[:-1]):
        pulse.worker_end.send(frame)
    beat(pulse.worker_end, heartbeat(2))
    assert pulse.take() == [heartbeat(2)]


def test_either_end_may_be_gone(pulse: Pulse) -> None:
    beat(pulse.worker_end, heartbeat(1))
    pulse.worker_end.close()
    assert pulse.take() == [heartbeat(1)]
    assert pulse.take() == []
    orphan = Pulse()
    orphan.close()
    beat(orphan.worker_end, heartbeat(1))
    orphan.worker_end.close()


def test_a_loop_that_waits_is_not_stuck_and_one_that_works_ages(tmp_path: Path, pulse: Pulse) -> None:
    run_dir = str(tmp_path)
    control = Inbox(ipc_address(run_dir, "s", 1), {Hello})
    model = ModelSpec(run_dir, "none", "none", 1024, 100, (0,), "None")
    spec = WorkerSpec("t-0", "t", 0, 1, ipc_address(run_dir, "t", 1), control.address, 1, ServerConfig(), model)
    worker = Worker(spec, pulse.worker_end)
    worker.open_inbox(Drain)
    sender = Outbox(spec.inbox_address)
    try:
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
    finally:
        sender.close()
        worker.close()
        control.close()
