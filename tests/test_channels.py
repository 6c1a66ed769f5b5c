"""The pipes: real ZeroMQ sockets, real unix sockets, real processes; garbage is counted and changes nothing."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest
import zmq

from minisgl import messages
from minisgl.channels import Inbox, Outbox, Peers, ipc_address
from minisgl.messages import (
    MAX_FRAME_BYTES,
    AbortRequest,
    GenerateRequest,
    Message,
    RequestError,
    Shutdown,
    TokenBatch,
    WorkerUp,
    encode,
)
from minisgl.sampling_params import SamplingParams


@pytest.fixture
def address(tmp_path: Path) -> str:
    return ipc_address(str(tmp_path), "scheduler-0", 1)


@pytest.fixture
def inbox(address: str) -> Iterator[Inbox]:
    inbox = Inbox(address, {AbortRequest, RequestError})
    yield inbox
    inbox.close()


@pytest.fixture
def raw(address: str, inbox: Inbox) -> Iterator[zmq.Socket[bytes]]:
    """A sender that speaks ZeroMQ but not the protocol."""
    sender = zmq.Context.instance().socket(zmq.PUSH)
    sender.connect(address)
    yield sender
    sender.close(0)


def receive(inbox: Inbox, count: int, seconds: float = 20.0) -> list[Message]:
    """The next `count` messages; fails when they do not come."""
    received: list[Message] = []
    deadline = time.monotonic() + seconds
    while len(received) < count:
        assert time.monotonic() < deadline, f"only {len(received)} of {count} messages came"
        inbox.wait(50)
        received += inbox.drain()
    return received


def test_messages_arrive_in_order(address: str, inbox: Inbox) -> None:
    outbox = Outbox(address)
    for rid in range(2000):
        outbox.send(AbortRequest(rid))
    assert [message.rid for message in receive(inbox, 2000) if isinstance(message, AbortRequest)] == list(range(2000))
    assert not inbox.dropped
    outbox.close()


def test_a_sender_may_come_before_its_receiver(address: str) -> None:
    outbox = Outbox(address)
    outbox.send(AbortRequest(1))
    inbox = Inbox(address, {AbortRequest})
    assert receive(inbox, 1) == [AbortRequest(1)]
    outbox.close()
    inbox.close()


def test_an_inbox_stays_awake_for_a_while_after_tokens_and_only_then(address: str) -> None:
    inbox, outbox = Inbox(address, {AbortRequest, TokenBatch}, busy_poll_seconds=0.3), Outbox(address)

    def cpu_seconds_of_a_wait() -> float:
        began = time.thread_time()
        assert not inbox.wait(150)
        return time.thread_time() - began

    outbox.send(AbortRequest(1))
    receive(inbox, 1)
    assert cpu_seconds_of_a_wait() < 0.01
    outbox.send(TokenBatch(0, 1, 1, 0, 0))
    receive(inbox, 1)
    # Others may want this CPU.
    assert cpu_seconds_of_a_wait() > 0.02
    outbox.send(TokenBatch(0, 1, 2, 0, 0))
    receive(inbox, 1)
    began = time.monotonic()
    assert not inbox.wait(400)
    assert time.monotonic() - began < 0.6, "it looked for 300 ms and then slept for 400"
    outbox.send(AbortRequest(2))
    assert receive(inbox, 1) == [AbortRequest(2)]
    assert cpu_seconds_of_a_wait() < 0.01
    outbox.close()
    inbox.close()


def test_an_attached_inbox_stays_awake_for_a_while_after_tokens(address: str) -> None:
    async def main() -> None:
        inbox, outbox = Inbox(address, {TokenBatch}, busy_poll_seconds=0.2), Outbox(address)
        loop, arrived = asyncio.get_running_loop(), list[Message]()
        inbox.attach(loop, arrived.extend)
        for _ in range(2):
            outbox.send(TokenBatch(0, 1, 1, 0, 0))
            began = time.monotonic()
            while not arrived:
                assert time.monotonic() < began + 10
                await asyncio.sleep(0.01)
            arrived.clear()
            assert inbox._next_slice is not None
            while inbox._next_slice is not None:
                assert time.monotonic() < began + 10
                await asyncio.sleep(0.01)
            assert time.monotonic() > began + 0.2
        inbox.detach(loop)
        inbox.close()
        outbox.close()

    asyncio.run(main())


def test_garbage_frames_are_dropped_and_counted(inbox: Inbox, raw: zmq.Socket[bytes]) -> None:
    malformed = [b"", b"\x00", os.urandom(1000), b"\x91" * 10_000, msgpack.packb([2, messages.PROTOCOL_VERSION + 1, 1])]
    for frame in malformed:
        raw.send(frame)
    raw.send_multipart([encode(AbortRequest(1)), encode(AbortRequest(2))])
    raw.send(encode(Shutdown()))
    raw.send(encode(AbortRequest(7)))
    assert receive(inbox, 1) == [AbortRequest(7)]
    assert inbox.dropped == {"malformed": len(malformed), "multipart": 1, "unexpected_type": 1}


def test_an_oversized_frame_ends_only_its_own_connection(address: str, inbox: Inbox, raw: zmq.Socket[bytes]) -> None:
    outbox = Outbox(address)
    outbox.send(AbortRequest(1))
    raw.send(bytes(MAX_FRAME_BYTES + 1))
    assert receive(inbox, 1) == [AbortRequest(1)]
    assert not inbox.wait(300)
    outbox.send(AbortRequest(2))
    assert receive(inbox, 1) == [AbortRequest(2)]
    outbox.close()


def test_the_largest_legal_frame_arrives(address: str, inbox: Inbox) -> None:
    outbox = Outbox(address)
    message = RequestError(1, 500, "big", "")
    message.message = "x" * (MAX_FRAME_BYTES - len(encode(message)) - 4)
    assert MAX_FRAME_BYTES - 8 < len(encode(message)) <= MAX_FRAME_BYTES
    outbox.send(message)
    assert receive(inbox, 1) == [message]
    outbox.close()


def test_raw_bytes_on_the_unix_socket_change_nothing(address: str, inbox: Inbox) -> None:
    greeting = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00NULL" + bytes(48)
    for garbage in (
        b"",
        b"\x00",
        b"GET / HTTP/1.1\r\n\r\n",
        os.urandom(100_000),
        greeting,
        greeting + os.urandom(5000),
    ):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(address.removeprefix("ipc://"))
        try:
            connection.sendall(garbage)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except BrokenPipeError:
            pass  # It hung up on us before it had read all.
        connection.close()
    outbox = Outbox(address)
    outbox.send(AbortRequest(3))
    assert receive(inbox, 1) == [AbortRequest(3)]
    outbox.close()


def test_an_attached_inbox_delivers_everything_and_starves_nobody(address: str, inbox: Inbox) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        batches: list[list[Message]] = []
        turns_of_others = 0
        inbox.attach(loop, batches.append)
        outbox = Outbox(address)
        for rid in range(5000):
            outbox.send(AbortRequest(rid))
        deadline = time.monotonic() + 30
        while sum(map(len, batches)) < 5000:
            assert time.monotonic() < deadline
            turns_of_others += 1
            await asyncio.sleep(0)
        assert [message.rid for batch in batches for message in batch] == list(range(5000))  # type: ignore[union-attr]
        assert len(batches) >= 5000 // 16 and turns_of_others >= len(batches) - 1
        # Detached, it stays quiet; attached again, nothing was lost.
        inbox.detach(loop)
        outbox.send(AbortRequest(1))
        await asyncio.sleep(0.1)
        assert sum(map(len, batches)) == 5000
        inbox.attach(loop, batches.append)
        while sum(map(len, batches)) < 5001:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        inbox.detach(loop)
        outbox.close()

    asyncio.run(scenario())


def test_closing_an_inbox_removes_its_socket(address: str, inbox: Inbox) -> None:
    path = Path(address.removeprefix("ipc://"))
    assert path.is_socket()
    inbox.close()
    assert not path.exists()


# ---- Peers ----------------------------------------------------------------------------------------------------------


class Lives:
    """Successive inboxes of one worker, each at a new address."""

    def __init__(self, run_dir: Path, worker: str) -> None:
        self._run_dir = str(run_dir)
        self.worker = worker
        self.inboxes: list[Inbox] = []

    def start(self, epoch: int) -> WorkerUp:
        address = ipc_address(self._run_dir, self.worker, epoch)
        self.inboxes.append(Inbox(address, {AbortRequest}))
        return WorkerUp(self.worker, epoch, address)

    def close(self) -> None:
        for inbox in self.inboxes:
            inbox.close()


@pytest.fixture
def lives(tmp_path: Path) -> Iterator[Lives]:
    lives = Lives(tmp_path, "scheduler-1")
    yield lives
    lives.close()


def test_peers_hold_messages_while_a_worker_is_down(lives: Lives) -> None:
    peers = Peers("scheduler", 2)
    assert peers.alive() == []
    peers.send(1, AbortRequest(1))
    assert peers.up(lives.start(epoch=1)) == 1
    assert peers.alive() == [1]
    peers.send(1, AbortRequest(2))
    assert receive(lives.inboxes[0], 2) == [AbortRequest(1), AbortRequest(2)]

    assert peers.down("scheduler-1", 1) == 1
    assert peers.alive() == []
    peers.send(1, AbortRequest(3))
    peers.send(1, AbortRequest(4))
    assert peers.up(lives.start(epoch=2)) == 1
    peers.send(1, AbortRequest(5))
    assert receive(lives.inboxes[1], 3) == [AbortRequest(3), AbortRequest(4), AbortRequest(5)]
    assert not lives.inboxes[0].wait(50), "nothing went to the former life"
    peers.close()


def test_peers_can_give_back_what_waits(lives: Lives) -> None:
    peers = Peers("scheduler", 2)
    peers.send(1, AbortRequest(1))
    assert peers.take_waiting(1) == [AbortRequest(1)]
    assert peers.take_waiting(1) == []
    peers.up(lives.start(epoch=1))
    assert not lives.inboxes[0].wait(100)
    peers.close()


def test_late_news_of_a_former_life_changes_nothing(lives: Lives) -> None:
    peers = Peers("scheduler", 2)
    first, second = lives.start(epoch=1), lives.start(epoch=2)
    peers.up(second)
    peers.up(first)
    assert peers.down("scheduler-1", 1) is None
    assert peers.alive() == [1] and peers.epochs == [0, 2]
    peers.send(1, AbortRequest(9))
    assert receive(lives.inboxes[1], 1) == [AbortRequest(9)]
    peers.close()


def test_peers_mind_their_own_kind() -> None:
    peers = Peers("scheduler", 2)
    assert peers.up(WorkerUp("http-0", 1, "ipc:///nowhere")) is None
    assert peers.up(WorkerUp("scheduler-2", 1, "ipc:///nowhere")) is None
    assert peers.down("tokenizer-0", 1) is None
    assert peers.index_of("scheduler-1") == 1
    assert peers.alive() == []


# ---- between processes ----------------------------------------------------------------------------------------------

LAST_WORDS = """
import os, sys
from minisgl.channels import deliver
from minisgl.messages import AbortRequest
deliver(sys.argv[1], *(AbortRequest(rid) for rid in range(3)))
os._exit(1)
"""


def test_last_words_arrive_though_the_process_ends_at_once(address: str, inbox: Inbox) -> None:
    for _ in range(3):
        subprocess.run([sys.executable, "-c", LAST_WORDS, address], cwd=Path(messages.__file__).parents[1], timeout=30)
        assert receive(inbox, 3) == [AbortRequest(0), AbortRequest(1), AbortRequest(2)]


def test_last_words_to_nobody_do_not_hang(tmp_path: Path) -> None:
    from minisgl.channels import deliver

    started = time.monotonic()
    deliver(f"ipc://{tmp_path}/nobody", AbortRequest(1), timeout_ms=300)
    assert time.monotonic() - started < 10


def test_a_flood_is_neither_dropped_nor_does_it_block_the_sender(address: str, inbox: Inbox) -> None:
    outbox = Outbox(address)
    request = GenerateRequest(1, "x" * 200, SamplingParams(), [1, 2])
    started = time.monotonic()
    for _ in range(20_000):
        outbox.send(request)
    outbox.send(AbortRequest(5))
    assert time.monotonic() - started < 30
    assert receive(inbox, 1, seconds=30) == [AbortRequest(5)]
    assert inbox.dropped == {"unexpected_type": 20_000}
    outbox.close()
