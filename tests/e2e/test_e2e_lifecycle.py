"""The real stack's beginnings and ends: nothing is left behind, and a failure says why in its last line."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from real_server import Crowd, RealServer, all_gone, chat, send_signal, starting, until

from minisgl.demo_model import demo_model_dir
from minisgl.host import run_directory

COUNTS = [chat(f"Count from 1 to {last}.", max_new_tokens=300) for last in (45, 50, 55, 60)]
"""Answers of about 200 tokens: long enough not to be over before the test has seen them begin."""
ENDLESS = [chat("Count to 100.", max_new_tokens=4000, ignore_eos=True)] * 4

Launch = Callable[..., RealServer]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Starts servers that do not outlive the test."""
    running: list[Iterator[RealServer]] = []

    def start(*settings: str) -> RealServer:
        running.append(starting(tmp_path / f"log-{len(running)}", *settings))
        return next(running[-1])

    yield start
    for server in running:
        next(server, None)


def nothing_left(server: RealServer, processes: list[psutil.Process]) -> bool:
    """Whether a launcher that has ended took its processes and its run directory with it."""
    # multiprocessing's resource tracker notices the launcher's end by itself, some milliseconds later.
    until(lambda: all_gone(processes))
    return not server.run_dirs()


async def answers_to(server: RealServer, bodies: list[dict[str, Any]]) -> list[str]:
    """The texts that clients get who ask all this at once."""
    crowd = Crowd(server.url)
    crowd.add(bodies)
    await crowd.finish(60)
    assert all(reply.complete for reply in crowd.replies)
    return [reply.text for reply in crowd.replies]


def last_line(server: RealServer) -> str:
    return server.output().strip().splitlines()[-1]


# ---- ends -----------------------------------------------------------------------------------------------------------


def test_sigterm_lets_running_requests_finish(launch: Launch) -> None:
    server = launch()
    server.wait_ready()
    processes = server.processes()
    assert len(server.run_dirs()) == 1

    async def scenario() -> None:
        whole = await answers_to(server, COUNTS)
        crowd = Crowd(server.url)
        crowd.add(COUNTS)
        await crowd.until_streaming(4)
        # They must not be over before the late one comes.
        scheduler = server.worker_pids()["scheduler-0"]
        send_signal(scheduler, signal.SIGSTOP)
        send_signal(server.pid, signal.SIGTERM)
        until(lambda: any("draining" in problem for problem in server.health()[1]["problems"]))
        crowd.add(COUNTS[:1])
        await crowd.until_ended(1)
        send_signal(scheduler, signal.SIGCONT)
        await crowd.finish(60)
        *streaming, late = crowd.replies
        assert [reply.text for reply in streaming] == whole and all(reply.complete for reply in streaming)
        assert late.status == 503 and late.refused

    asyncio.run(scenario())
    assert server.wait_exit() == 0
    assert nothing_left(server, processes)
    assert "Traceback" not in server.output()


def test_a_second_sigterm_ends_streams_with_an_error(launch: Launch) -> None:
    server = launch()
    server.wait_ready()
    processes = server.processes()

    async def scenario() -> None:
        crowd = Crowd(server.url)
        crowd.add(ENDLESS)
        await crowd.until_streaming(4)
        send_signal(server.pid, signal.SIGTERM)
        await asyncio.sleep(0.5)
        assert server.process.poll() is None, "the first one waits for the streams"
        send_signal(server.pid, signal.SIGTERM)
        await crowd.finish(30)
        assert all(reply.refused and reply.end["code"] == "shutting_down" for reply in crowd.replies if reply.end)
        assert all(reply.end for reply in crowd.replies)

    asyncio.run(scenario())
    assert server.wait_exit() == 1
    assert nothing_left(server, processes)


def test_sigkill_of_the_launcher_leaves_nothing(launch: Launch) -> None:
    server = launch()
    server.wait_ready()
    processes = server.processes()
    assert len(processes) >= 5

    async def scenario() -> None:
        crowd = Crowd(server.url)
        crowd.add(ENDLESS)
        await crowd.until_streaming(4)
        send_signal(server.pid, signal.SIGKILL)
        await crowd.finish(30)

    asyncio.run(scenario())
    server.process.wait(5)
    until(lambda: all_gone(processes))
    with run_directory():
        assert not server.run_dirs(), "nobody was left to remove it, but the next start does"


@pytest.mark.parametrize("after", [0.3, 1.1, 2.2])
def test_sigkill_of_the_launcher_during_the_start_leaves_nothing(launch: Launch, after: float) -> None:
    server = launch()
    time.sleep(after)
    processes = server.processes()
    send_signal(server.pid, signal.SIGKILL)
    server.process.wait(5)
    until(lambda: all_gone(processes))
    with run_directory():
        assert not server.run_dirs()


def test_ctrl_c_during_the_start_is_a_clean_end(launch: Launch) -> None:
    server = launch()
    until(lambda: "scheduler-0" in server.output(), 60)
    processes = server.processes()
    # As a terminal does it: to every process of the launcher's group.
    os.killpg(server.pid, signal.SIGINT)
    assert server.wait_exit() == 0
    assert nothing_left(server, processes)
    assert "Traceback" not in server.output()


# ---- failing starts -------------------------------------------------------------------------------------------------


@pytest.fixture
def model_copy(tmp_path: Path) -> Path:
    """The demo model, to be broken."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in demo_model_dir().iterdir():
        if file.suffix in (".json", ".safetensors", ".jinja"):
            shutil.copy(file, copy)
    return copy


def fails(server: RealServer) -> str:
    """Wait for a launch to fail; its last line."""
    processes = server.processes() if server.process.poll() is None else []
    assert server.wait_exit(60) == 1
    assert nothing_left(server, processes)
    return last_line(server)


def test_a_directory_without_a_model(launch: Launch, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    line = fails(launch("--model", str(empty)))
    assert line.startswith("minisgl: ") and "config.json" in line and str(empty) in line


def test_weights_that_are_cut_short(launch: Launch, model_copy: Path) -> None:
    weights = model_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    line = fails(launch("--model", str(model_copy)))
    assert line.startswith(f"minisgl: {weights} is damaged")


def test_weights_of_another_shape(launch: Launch, model_copy: Path) -> None:
    config = json.loads((model_copy / "config.json").read_text())
    (model_copy / "config.json").write_text(json.dumps({**config, "intermediate_size": 512}))
    line = fails(launch("--model", str(model_copy)))
    assert line.startswith("minisgl: scheduler-0 failed to start: ")
    assert "mlp" in line or "shape" in line or "size" in line


def test_a_tokenizer_that_is_no_tokenizer(launch: Launch, model_copy: Path) -> None:
    (model_copy / "tokenizer.json").write_text('{"version": "1.0"}')
    line = fails(launch("--model", str(model_copy)))
    assert line.startswith("minisgl: ") and "tokenizer" in line


def test_a_scheduler_that_is_killed_while_it_loads(launch: Launch) -> None:
    server = launch()
    until(lambda: "scheduler-0: importing torch" in server.output(), 60)
    for process in server.processes()[1:]:
        if b"sgl:scheduler-0" in (Path("/proc") / str(process.pid) / "comm").read_bytes():
            process.kill()
    assert fails(server) == "minisgl: scheduler-0 was killed by signal 9 (out of memory?)"


def test_a_port_that_is_taken(launch: Launch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = fails(launch("--port", str(port)))
    owner = rf"(by pid {os.getpid()} {psutil.Process().name()})"
    assert line == f"minisgl: port {port} is in use {owner}: choose another with --port"


# ---- several of each ------------------------------------------------------------------------------------------------


def test_two_of_each_process_share_the_work_and_fail_alone(launch: Launch) -> None:
    several = ("--dp-size", "2", "--http-workers", "2", "--tokenizer-workers", "2", "--detokenizer-workers", "2")
    server = launch(*several)
    server.wait_ready()
    pids = server.worker_pids()
    assert len(pids) == 8
    both = ("scheduler-0", "scheduler-1")
    before = {name: server.stats(name).get("tokens_generated", 0) for name in both}

    async def scenario() -> list[str]:
        whole = await answers_to(server, COUNTS)
        crowd = Crowd(server.url)
        crowd.add(COUNTS * 4)
        await crowd.until_streaming(16)
        send_signal(pids["scheduler-1"], signal.SIGKILL)
        await crowd.finish(60)
        for reply, text in zip(crowd.replies, whole * 4, strict=True):
            assert reply.text == text if reply.complete else reply.refused and text.startswith(reply.text)
        complete = sum(reply.complete for reply in crowd.replies)
        assert complete >= 6, "the other replica's streams did not notice"
        assert complete < 16, "the dead replica had streams of its own"
        return whole

    whole = asyncio.run(scenario())
    until(lambda: server.stats("scheduler-0")["tokens_generated"] > before["scheduler-0"])
    until(lambda: server.health()[0] == 200, 30)
    now = server.worker_pids()
    assert {name for name in pids if now[name] != pids[name]} == {"scheduler-1"}
    # Whichever way a request goes, it is answered; and both replicas take their share again.
    assert asyncio.run(answers_to(server, COUNTS * 2)) == whole * 2
    until(lambda: all(server.stats(name).get("tokens_generated", 0) > 0 for name in both))
    server.process.send_signal(signal.SIGTERM)
    assert server.wait_exit() == 0
