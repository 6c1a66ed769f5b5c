"""The real stack with a replica on each of two GPUs."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from real_server import Crowd, RealServer, ask, chat, send_signal, starting, until

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this needs two CUDA devices"),
]

QUESTIONS = [
    chat(text, max_new_tokens=48, ignore_eos=True)
    for text in (
        "Tell me a story about a duck.",
        "Tell me a story about a king.",
        "Spell the word house.",
        "Count to 30.",
        "What is 123 + 456?",
        "你好",
    )
]
LONG = [chat(f"Tell me story number {number}.", max_new_tokens=1500, ignore_eos=True) for number in range(32)]
BOTH = ("scheduler-0", "scheduler-1")
# Without the prefix cache, a prompt is computed in the same way each time.
ON_GPU = ("--device", "cuda", "--dtype", "bfloat16", "--disable-radix-cache")


@pytest.fixture(scope="module")
def one_replicas_answers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    answers = []
    for server in starting(tmp_path_factory.mktemp("one") / "log", *ON_GPU, "--dp-size", "1"):
        server.wait_ready()
        answers = [ask(server.url, body).text for body in QUESTIONS]
    return answers


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RealServer]:
    # Without --dp-size there is a replica for each device.
    for server in starting(tmp_path / "log", *ON_GPU):
        server.wait_ready()
        yield server


def test_both_gpus_work_and_answer_as_one_does(server: RealServer, one_replicas_answers: list[str]) -> None:
    pids = server.worker_pids()
    assert set(BOTH) <= set(pids)
    # One at a time: a step of one row computes the same on either device.
    assert [ask(server.url, body).text for body in QUESTIONS * 2] == one_replicas_answers * 2
    until(lambda: all(server.stats(name)["tokens_generated"] >= 48 for name in BOTH))
    for device in range(2):
        # Most of a device's memory is its replica's KV pool.
        free, total = torch.cuda.mem_get_info(device)
        assert free < 0.5 * total


def test_a_killed_replica_takes_no_stream_of_the_other_with_it(
    server: RealServer, one_replicas_answers: list[str]
) -> None:
    pids = server.worker_pids()

    async def scenario() -> None:
        crowd = Crowd(server.url)
        crowd.add(LONG)
        await crowd.until_streaming(len(LONG))
        send_signal(pids["scheduler-1"], signal.SIGKILL)
        await crowd.finish(60)
        for reply in crowd.replies:
            assert reply.complete or reply.refused, reply.broken
        complete = sum(reply.complete for reply in crowd.replies)
        assert complete == len(LONG) // 2

    asyncio.run(scenario())
    until(lambda: server.health()[0] == 200, 60)
    now = server.worker_pids()
    assert {name for name in pids if now[name] != pids[name]} == {"scheduler-1"}
    assert [ask(server.url, body).text for body in QUESTIONS * 2] == one_replicas_answers * 2
    until(lambda: all(server.stats(name).get("tokens_generated", 0) > 0 for name in BOTH))
