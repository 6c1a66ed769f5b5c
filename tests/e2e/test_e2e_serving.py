"""The real stack serves, and keeps its promises while its processes are killed, stopped and fed garbage."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import zmq
from real_server import Crowd, HealthLog, RealServer, Reply, ask, chat, send_signal, starting, until

from minisgl.messages import (
    AbortRequest,
    DeltaBatch,
    Dispatched,
    FinishReason,
    GenerateRequest,
    Opening,
    RequestError,
    StreamOpen,
    TokenBatch,
    TokenizedRequest,
    encode,
)
from minisgl.sampling_params import SamplingParams

HANG_TIMEOUT = 4.0
QUESTIONS = [
    "Tell me a short story.",
    "Count from 1 to 15.",
    "Hello! My name is Ada.",
    "What is 123 plus 456?",
    "What day comes after Monday?",
    "Spell the word elephant.",
    "给我讲一个故事。",
    "Tell me a story about a dragon.",
]
LONG = [
    chat(f"Tell me a story about a {who}.") for who in ("duck", "robot", "king", "frog", "girl", "fox", "cat", "owl")
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    log = tmp_path_factory.mktemp("server") / "log"
    for server in starting(log, "--hang-timeout", str(HANG_TIMEOUT)):
        server.wait_ready()
        yield server


@pytest.fixture(scope="module")
def expected(server: RealServer) -> list[str]:
    """The undisturbed answers to LONG."""
    return [ask(server.url, body).text for body in LONG]


@pytest.fixture(autouse=True)
def healthy(server: RealServer) -> Iterator[None]:
    """Every test finds a healthy server, and leaves one behind that has nothing in flight."""
    yield
    until(lambda: is_healthy(server), 60)
    until(lambda: idle(server))
    assert server.stats("scheduler-0")["kv_pages_leaked"] == 0
    until(lambda: server.stats("http-0")["in_flight"] == 0)


def is_healthy(server: RealServer) -> bool:
    try:
        return server.health()[0] == 200
    except httpx.HTTPError:
        return False


def idle(server: RealServer) -> bool:
    stats = server.stats("scheduler-0")
    return (stats.get("running"), stats.get("waiting")) == (0, 0)


# ---- serving --------------------------------------------------------------------------------------------------------


def test_the_ready_notice_says_what_where_and_how(server: RealServer) -> None:
    notice = server.output()
    assert re.search(rf"minisgl serves demo on cpu .*in float32: {server.url} \(ready in [\d.]+ s\)", notice)
    assert f"curl -N {server.url}/generate" in notice
    status, health = server.health()
    assert (status, health["problems"]) == (200, [])
    assert {name: worker["state"] for name, worker in health["workers"].items()} == {
        "http-0": "ready",
        "tokenizer-0": "ready",
        "detokenizer-0": "ready",
        "scheduler-0": "ready",
    }


def test_an_idle_stack_hardly_wakes(server: RealServer) -> None:
    """On a machine where each costs ten milliseconds, three times a second are 3 % of a core.

    Waking is counted, not timed: what it costs is the machine's affair. Some five a minute and process are foreseen.
    """

    def woken() -> int:
        """How often a thread of the stack has gone to sleep so far."""
        states = [
            state.read_text()
            for process in server.processes()
            for state in Path(f"/proc/{process.pid}/task").glob("*/status")
        ]
        return sum(int(state.split("\nvoluntary_ctxt_switches:")[1].split()[0]) for state in states)

    # Kernels, memory and caches are prepared in the first idle seconds.
    time.sleep(3)
    before, started = woken(), time.monotonic()
    time.sleep(10)
    assert (woken() - before) / (time.monotonic() - started) < 3


def test_the_notices_curl_command_works(server: RealServer) -> None:
    import shlex

    command = next(line for line in server.output().splitlines() if line.startswith("  curl"))
    words = shlex.split(command)
    body = json.loads(words[words.index("-d") + 1])
    reply = ask(server.url, {**body, "temperature": 0})
    assert reply.complete and reply.text


def test_greedy_answers_equal_transformers(server: RealServer) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from minisgl.demo_model import demo_model_dir

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(demo_model_dir())
    model = AutoModelForCausalLM.from_pretrained(demo_model_dir(), dtype=torch.float32)
    for question in QUESTIONS:
        reply = ask(server.url, chat(question))
        assert reply.complete and reply.end is not None
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**prompt, do_sample=False, max_new_tokens=64)
        ids = output[0, prompt["input_ids"].shape[1] :]
        assert reply.text == tokenizer.decode(ids, skip_special_tokens=True)
        assert reply.end["usage"]["completion_tokens"] == len(ids)
        assert reply.end["finish_reason"] == ("length" if len(ids) == 64 else "stop")


def test_sixteen_streams_at_once_get_what_each_gets_alone(server: RealServer, expected: list[str]) -> None:
    async def scenario() -> None:
        crowd = Crowd(server.url)
        crowd.add(LONG * 2)
        await crowd.finish(60)
        assert [reply.text for reply in crowd.replies] == expected * 2
        assert all(reply.complete for reply in crowd.replies)
        assert all(len(reply.deltas) > 3 for reply in crowd.replies), "text comes as it is generated"

    asyncio.run(scenario())


def test_hops_add_up_to_the_time_to_first_byte(server: RealServer) -> None:
    reply = ask(server.url, chat("Hello!"))
    assert reply.end is not None
    timing = reply.end["timing"]
    assert sum(timing["hops_us"].values()) == pytest.approx(timing["ttfb_us"], rel=0.02)
    assert len(timing["hops_us"]) == 10


# ---- clients that leave ---------------------------------------------------------------------------------------------


def test_clients_that_leave_free_their_pages(server: RealServer) -> None:
    async def scenario() -> None:
        crowd = Crowd(server.url)
        crowd.add([chat(f"Count to {n}.", max_new_tokens=4000, ignore_eos=True) for n in range(12)])
        await crowd.until_streaming(12)
        until(lambda: server.stats("scheduler-0")["running"] == 12)
        await crowd.leave(12)
        freed_after = until(lambda: server.stats("scheduler-0")["running"] == 0)
        stats = server.stats("scheduler-0")
        assert stats["kv_pages_free"] + stats.get("kv_pages_cached", 0) == stats["kv_pages_total"]
        assert freed_after < 5

    asyncio.run(scenario())
    until(lambda: server.stats("http-0")["aborting"] == 0)
    until(lambda: server.stats("detokenizer-0")["streams"] == 0)


# ---- deaths and hangs -----------------------------------------------------------------------------------------------


def check_replies(replies: list[Reply], expected: list[str], connections_may_break: bool) -> None:
    """Nothing lost, nothing corrupt: a complete answer, or a true beginning of it and an explicit error."""
    for reply, text in zip(replies, expected, strict=True):
        assert text.startswith(reply.text), "what a client was sent is a part of the right answer"
        if reply.complete:
            assert reply.text == text
        else:
            assert reply.refused or (connections_may_break and reply.broken), reply


@pytest.mark.parametrize("worker", ["scheduler-0", "tokenizer-0", "detokenizer-0", "http-0"])
def test_a_killed_worker_costs_no_reply(server: RealServer, expected: list[str], worker: str) -> None:
    async def scenario() -> None:
        log, crowd = HealthLog(), Crowd(server.url)
        watcher = asyncio.create_task(log.watch(server.url))
        pids = server.worker_pids()
        # Half of the clients have been sent text by the time of the death, the others' requests are on the way.
        crowd.add(LONG)
        await crowd.until_streaming(len(LONG))
        crowd.add(LONG)
        await asyncio.sleep(0.01)
        killed_at = send_signal(pids[worker], signal.SIGKILL)
        crowd.add(LONG[:1])
        await crowd.finish(60)
        newcomer = crowd.replies.pop()
        assert newcomer.complete and newcomer.text == expected[0], "who comes after the death just waits a little"
        check_replies(crowd.replies, expected * 2, connections_may_break=worker == "http-0")
        if worker in ("scheduler-0", "detokenizer-0"):
            late = crowd.replies[len(LONG) :]
            assert any(reply.complete for reply in late), "a request that had shown nothing is done again"
            assert all(reply.deltas for reply in late if reply.refused), "and does not end with an error"
        if worker != "http-0":  # Without it a question for the health just waits for its next life.
            await asyncio.wait_for(log.until_bad_then_good(killed_at), 60)
            noticed_after, problems = log.first_bad(killed_at)
            assert noticed_after < HANG_TIMEOUT / 2
            assert any(problem.startswith(f"{worker} died (killed by signal 9)") for problem in problems)
        watcher.cancel()

    asyncio.run(scenario())
    until(lambda: server.health()[1]["workers"][worker]["state"] == "ready")
    assert server.health()[1]["workers"][worker]["restarts"] >= 1
    again = ask(server.url, LONG[0])
    assert again.complete and again.text == expected[0]


def test_a_stopped_scheduler_is_reported_in_time_and_goes_on_where_it_was(
    server: RealServer, expected: list[str]
) -> None:
    async def scenario() -> None:
        log, crowd = HealthLog(), Crowd(server.url)
        watcher = asyncio.create_task(log.watch(server.url))
        pid = server.worker_pids()["scheduler-0"]
        crowd.add(LONG)
        await crowd.until_streaming(4)
        stopped_at = send_signal(pid, signal.SIGSTOP)
        await asyncio.wait_for(log.until_bad(stopped_at), HANG_TIMEOUT - 1)
        send_signal(pid, signal.SIGCONT)
        await crowd.finish(60)
        await asyncio.wait_for(log.until_bad_then_good(stopped_at), 30)
        watcher.cancel()
        assert [reply.text for reply in crowd.replies] == expected
        _, problems = log.first_bad(stopped_at)
        assert problems[0].startswith("scheduler-0 has not answered for ")

    asyncio.run(scenario())


def test_a_process_that_hangs_for_good_is_replaced(server: RealServer, expected: list[str]) -> None:
    restarts = server.health()[1]["workers"]["tokenizer-0"]["restarts"]
    send_signal(server.worker_pids()["tokenizer-0"], signal.SIGSTOP)
    reply = ask(server.url, LONG[0], seconds=HANG_TIMEOUT + 30)
    assert reply.complete and reply.text == expected[0], "the request waited for the replacement"
    assert server.health()[1]["workers"]["tokenizer-0"]["restarts"] == restarts + 1


def test_a_stopped_launcher_is_reported_and_blames_nobody_when_it_goes_on(server: RealServer) -> None:
    before = server.worker_pids()
    stopped_at = send_signal(server.pid, signal.SIGSTOP)
    try:
        until(lambda: server.health()[0] == 503)
        problems = server.health()[1]["problems"]
        assert time.monotonic() - stopped_at < HANG_TIMEOUT
        assert problems[0].startswith("the supervisor has been silent for ")
        assert ask(server.url, LONG[0]).complete, "the ring turns without it"
        time.sleep(HANG_TIMEOUT)
    finally:
        send_signal(server.pid, signal.SIGCONT)
    until(lambda: server.health()[0] == 200)
    time.sleep(0.5)
    assert server.worker_pids() == before


# ---- garbage --------------------------------------------------------------------------------------------------------


def garbage_frames(rng: random.Random) -> list[bytes]:
    frames = [rng.randbytes(rng.randrange(400)) for _ in range(50)]
    for frame in [encode(message) for message in well_formed_nonsense(rng)]:
        frames += [frame, frame[: rng.randrange(len(frame))], frame + b"\x00"]
        broken = bytearray(frame)
        broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        frames.append(bytes(broken))
    return frames


def well_formed_nonsense(rng: random.Random) -> list[Any]:
    """Legal data messages about requests, workers and replicas that do not exist."""
    rids = [rng.randrange(-(2**63), 2**63), rng.randrange(2**56), -1, 0, 99 << 56]
    messages: list[Any] = []
    for rid in rids:
        messages += [
            AbortRequest(rid),
            RequestError(rid, 500, "nonsense", "nonsense"),
            Dispatched(77, 3, [rid]),
            GenerateRequest(rid, "", SamplingParams(), []),
            GenerateRequest(rid, [1, 2], SamplingParams(max_new_tokens=1), [0] * 40),
            GenerateRequest(rid, [{"role": 3}], SamplingParams(stop=("",)), []),
            TokenizedRequest(rid, [], SamplingParams(), []),
            TokenizedRequest(rid, [3], SamplingParams(max_new_tokens=1), []),
            TokenizedRequest(rid ^ 1, [10**6, -3], SamplingParams(temperature=float("nan"), top_k=-9), []),
            TokenBatch(0, 1, 1, 0, 0, [], [rid], [5], [FinishReason.NONE]),
            TokenBatch(
                99, 0, -1, 0, 0, [StreamOpen(rid, 1, 0, [""], True, False, [])], [rid], [-7], [FinishReason.STOP]
            ),
            DeltaBatch([rid], ["x"], [1], [9], [FinishReason.STOP], [Opening(0, 1, 0, [])], {0: "x"}),
        ]
    return messages


def test_garbage_on_every_socket_is_dropped_and_counted(server: RealServer, expected: list[str]) -> None:
    rng = random.Random(11)
    before = server.worker_pids()
    (run_dir,) = server.run_dirs()
    sockets = sorted(path for path in run_dir.iterdir() if path.is_socket())
    assert {path.name.partition(".")[0] for path in sockets} >= {*before, "supervisor"}

    async def scenario() -> None:
        crowd = Crowd(server.url)
        crowd.add(LONG)
        await crowd.until_streaming(4)
        for path in sockets:
            await asyncio.to_thread(molest, path, rng)
        await crowd.finish(60)
        assert [reply.text for reply in crowd.replies] == expected

    asyncio.run(scenario())
    assert server.worker_pids() == before, "nobody died"
    until(lambda: all(server.stats(worker)["frames_dropped"] > 50 for worker in before))
    assert ask(server.url, LONG[1]).text == expected[1]


def molest(path: Path, rng: random.Random) -> None:
    sender = zmq.Context.instance().socket(zmq.PUSH)
    sender.connect(f"ipc://{path}")
    for frame in garbage_frames(rng):
        sender.send(frame)
    sender.send_multipart([b"two", b"frames"])
    sender.close(10_000)
    for raw in (b"", b"GET / HTTP/1.0\r\n\r\n", rng.randbytes(20_000)):
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(path))
                connection.sendall(raw)
        except OSError:
            assert path.exists(), "hanging up on garbage is right, disappearing is not"


# ---- privacy --------------------------------------------------------------------------------------------------------


def test_only_the_http_port_listens_and_only_on_loopback(server: RealServer) -> None:
    listening = [
        connection.laddr
        for process in server.processes()
        for connection in psutil.Process(process.pid).net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert {f"http://{address.ip}:{address.port}" for address in listening} == {server.url}
    (run_dir,) = server.run_dirs()
    assert run_dir.stat().st_mode & 0o777 == 0o700
    assert os.getpid() not in {process.pid for process in server.processes()}
