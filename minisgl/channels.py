"""ZeroMQ pipes between the processes: the only file that imports zmq.

Every process owns exactly one Inbox (PULL, it binds) and one Outbox (PUSH, connects) per peer it talks to. Pipes are
one-way. Sockets have no high-water mark: what may be in flight is bounded at admission, so a send never blocks and
never drops. A restarted process gets a fresh address, so nothing meant for its dead predecessor can reach it.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import zmq

from minisgl.messages import (
    MAX_FRAME_BYTES,
    DeltaBatch,
    GenerateRequest,
    MalformedMessage,
    Message,
    TokenBatch,
    TokenizedRequest,
    WorkerUp,
    decode,
    encode,
)

_DRAIN_LIMIT = 512
"""Messages taken per wake-up before other work gets its turn."""
_SLICE = 16
"""The same on an event loop, whose other work is clients: with 256 rows a message, 16 take http about 6 ms."""

_TRAFFIC = (GenerateRequest, TokenizedRequest, TokenBatch, DeltaBatch)
"""Messages that others follow soon; what comes all the time keeps nobody awake."""


def _context() -> zmq.Context[zmq.Socket[bytes]]:
    return zmq.Context.instance()


def ipc_address(run_dir: str, worker: str, epoch: int) -> str:
    """The inbox address of one life (epoch) of a worker on this host."""
    return f"ipc://{run_dir}/{worker}.{epoch}"


class Inbox:
    """The receiving end of every pipe into one process.

    Frames that are not a message of this protocol, or not of a type in `accepts`, are dropped and counted in
    `dropped` by reason; they never raise.

    Args:
        busy_poll_seconds: how long after a request or tokens to look for the next message without sleeping. Waking an
            idle CPU takes longer than most of what is done with a message.
    """

    def __init__(self, address: str, accepts: Iterable[type[Message]], busy_poll_seconds: float = 0.0) -> None:
        self.address = address
        self.dropped: Counter[str] = Counter()
        self._accepts = frozenset(accepts)
        self._busy_poll_seconds = busy_poll_seconds
        self._awake_until = 0.0
        self._next_slice: asyncio.Handle | None = None
        self._socket = _context().socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._socket.bind(address)

    def wait(self, timeout_ms: int) -> bool:
        """Wait until something can be received, at most `timeout_ms`."""
        now = time.monotonic()
        deadline = now + timeout_ms / 1e3
        while now < min(self._awake_until, deadline):
            if self._socket.poll(0):
                return True
            now = time.monotonic()
        return bool(self._socket.poll(max(0, round((deadline - now) * 1e3))))

    def receive(self) -> Message | None:
        """The next message, or None when nothing waits. Never blocks."""
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return None
            if len(frames) != 1:
                self.dropped["multipart"] += 1
                continue
            try:
                message = decode(frames[0])
            except MalformedMessage:
                self.dropped["malformed"] += 1
                continue
            if type(message) in self._accepts:
                if self._busy_poll_seconds and type(message) in _TRAFFIC:
                    self._awake_until = time.monotonic() + self._busy_poll_seconds
                return message
            self.dropped["unexpected_type"] += 1

    def drain(self, limit: int = _DRAIN_LIMIT) -> list[Message]:
        """Everything that waits now, at most `limit` messages."""
        messages: list[Message] = []
        while len(messages) < limit and (message := self.receive()) is not None:
            messages.append(message)
        return messages

    def attach(self, loop: asyncio.AbstractEventLoop, handler: Callable[[list[Message]], None]) -> None:
        """Call `handler` from the event loop with each batch of messages that arrived together.

        ZeroMQ's descriptor is edge-triggered, so every wake-up reads until nothing is left; a long queue is taken in
        slices, one each turn of the loop, so that its other work is not starved.
        """

        def read_slice() -> None:
            messages = self.drain(_SLICE)
            again = messages or time.monotonic() < self._awake_until
            self._next_slice = loop.call_soon(read_slice) if again else None
            if messages:
                handler(messages)

        def on_readable() -> None:
            if self._next_slice is None:
                read_slice()

        loop.add_reader(self._socket.FD, on_readable)
        self._next_slice = loop.call_soon(read_slice)

    def detach(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.remove_reader(self._socket.FD)
        if self._next_slice is not None:
            self._next_slice.cancel()
            self._next_slice = None

    def close(self) -> None:
        self._socket.close()
        if self.address.startswith("ipc://"):
            Path(self.address.removeprefix("ipc://")).unlink(missing_ok=True)


class Outbox:
    """The sending end of one pipe. Sending never blocks; closing drops what the peer has not yet taken."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = _context().socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address)

    def send(self, message: Message) -> None:
        self._socket.send(encode(message), zmq.NOBLOCK)

    def close(self) -> None:
        self._socket.close()


def deliver(address: str, *messages: Message, timeout_ms: int = 1000) -> None:
    """Send messages and wait until they have left; for a process that is about to exit."""
    with zmq.Context() as context:
        socket = context.socket(zmq.PUSH)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.LINGER, timeout_ms)
        socket.connect(address)
        for message in messages:
            socket.send(encode(message))
        socket.close()


class Peers:
    """Outboxes to all workers of one kind, kept right through restarts by WorkerUp and WorkerDown.

    While a worker is down its messages wait here in order; the next WorkerUp of that worker sends them.
    """

    def __init__(self, kind: str, count: int) -> None:
        self.names = [f"{kind}-{index}" for index in range(count)]
        self.epochs = [0] * count
        self._outboxes: list[Outbox | None] = [None] * count
        self._waiting: list[list[Message]] = [[] for _ in range(count)]

    def send(self, index: int, message: Message) -> None:
        outbox = self._outboxes[index]
        if outbox is None:
            self._waiting[index].append(message)
        else:
            outbox.send(message)

    def index_of(self, worker: str) -> int | None:
        """The index of a worker's name, None when it is of another kind."""
        return self.names.index(worker) if worker in self.names else None

    def alive(self) -> list[int]:
        return [index for index, outbox in enumerate(self._outboxes) if outbox is not None]

    def up(self, message: WorkerUp) -> int | None:
        """Take a worker's new address; its index, or None when the message is not about this kind."""
        index = self.index_of(message.worker)
        if index is not None and message.epoch > self.epochs[index]:
            self._close(index)
            outbox = self._outboxes[index] = Outbox(message.address)
            self.epochs[index] = message.epoch
            for waiting in self._waiting[index]:
                outbox.send(waiting)
            self._waiting[index].clear()
        return index

    def down(self, worker: str, epoch: int) -> int | None:
        """Forget a dead worker's address; its index, or None when it is of another kind or already replaced."""
        index = self.index_of(worker)
        if index is None or epoch < self.epochs[index]:
            return None
        self._close(index)
        return index

    def take_waiting(self, index: int) -> list[Message]:
        """Remove and return what waits for a worker that is down (to send it elsewhere)."""
        waiting, self._waiting[index] = self._waiting[index], []
        return waiting

    def deliver(self, index: int, messages: Sequence[Message]) -> None:
        """Send last words to a worker, if it is up, and wait until they have left."""
        outbox = self._outboxes[index]
        if outbox is not None and messages:
            deliver(outbox.address, *messages)

    def close(self) -> None:
        for index in range(len(self.names)):
            self._close(index)

    def _close(self, index: int) -> None:
        outbox, self._outboxes[index] = self._outboxes[index], None
        if outbox is not None:
            outbox.close()
