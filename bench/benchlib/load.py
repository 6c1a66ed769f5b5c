"""Client processes that put one load on one server and keep what every request saw.

Closed loop: `concurrency` sessions run at any time, the next starts when one ends. Open loop: sessions start at given
times whatever the server does. Several processes share the load, so that one Python client is not what is measured;
how busy they were is reported with the result.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait
from typing import Any

from benchlib.client import Connection, Exchange, answer_of, now_ns
from benchlib.stats import time_per_output_token
from benchlib.target import Target
from benchlib.wires import WIRES, Answer
from benchlib.workloads import Session


@dataclass(frozen=True)
class Load:
    """What to do: sessions, and either `concurrency` of them at a time or one `arrivals` time (s) for each."""

    target: Target
    sessions: Sequence[Session]
    concurrency: int = 0
    arrivals: Sequence[float] = ()
    request_timeout: float = 300.0
    fresh_connections: bool = False
    """Connect anew for every request."""
    extra: dict[str, Any] = field(default_factory=dict)
    """More fields for every request body."""


@dataclass(frozen=True)
class RequestRecord:
    """What one request saw. Times are milliseconds from its start (connecting included); `problem` spoils it."""

    started_ns: int
    finished_ns: int
    problem: str
    connected_ns: int = 0
    first_byte_ns: int = 0
    late_ms: float = 0.0
    """How much later than planned an open-loop request was sent: the client's own fault."""
    ttft_ms: float = 0.0
    first_text_ms: float = 0.0
    e2e_ms: float = 0.0
    tpot_ms: float = 0.0
    arrivals: tuple[tuple[int, int], ...] = ()
    """(nanoseconds, new tokens) of every line that brought tokens."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    token_ids: tuple[int, ...] = ()
    text: str = ""
    timing: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadResult:
    """All records of a load, and the busiest client process's share of one core."""

    records: list[RequestRecord]
    client_busy: float


Progress = Callable[[int], None]
"""Called with the number of requests that ended since the last call."""


class LoadGenerator:
    """A pool of client processes; use as a context manager, `run` any number of loads one after another."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._workers: list[tuple[Any, Pipe]] = []

    def __enter__(self) -> LoadGenerator:
        context = multiprocessing.get_context("spawn")
        for _ in range(self.processes):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_client_process, args=(theirs,), daemon=True)
            worker.start()
            theirs.close()
            self._workers.append((worker, ours))
        return self

    def __exit__(self, *_: object) -> None:
        for worker, pipe in self._workers:
            pipe.close()
            worker.join(timeout=5)
            if worker.is_alive():
                worker.kill()
        self._workers.clear()

    def run(self, load: Load, on_progress: Progress = lambda _: None) -> LoadResult:
        """Run one load to its end. Failed requests are records with a problem; they do not end the run."""
        parts = _split(load, self.processes)
        pipes = [pipe for _, pipe in self._workers[: len(parts)]]
        for pipe, part in zip(pipes, parts, strict=True):
            pipe.send(part)
        for pipe in pipes:
            pipe.recv()
        start_ns = now_ns() + 20_000_000
        for pipe in pipes:
            pipe.send(start_ns)
        records: list[RequestRecord] = []
        busy: list[float] = []
        running = list(pipes)
        while running:
            for pipe in [pipe for pipe in wait(running) if isinstance(pipe, Pipe)]:
                message = pipe.recv()
                if isinstance(message, int):
                    on_progress(message)
                else:
                    records.extend(message[0])
                    busy.append(message[1])
                    running.remove(pipe)
        return LoadResult(sorted(records, key=lambda record: record.started_ns), max(busy))


def _split(load: Load, processes: int) -> list[Load]:
    """Shares for the client processes; never more processes than concurrent sessions."""
    count = min(processes, load.concurrency or len(load.sessions))
    return [
        replace(
            load,
            sessions=load.sessions[part::count],
            concurrency=len(range(part, load.concurrency, count)),
            arrivals=load.arrivals[part::count],
        )
        for part in range(count)
    ]


def _client_process(pipe: Pipe) -> None:
    try:
        import uvloop

        uvloop.install()
    except ImportError:
        pass
    try:
        while True:
            load = pipe.recv()
            pipe.send("ready")
            start_ns = pipe.recv()
            pipe.send(asyncio.run(_run_part(load, start_ns, pipe.send)))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        os._exit(0)


async def _run_part(load: Load, start_ns: int, report: Progress) -> tuple[list[RequestRecord], float]:
    """This process's share of a load: its records, and the CPU time it used per second."""
    part = _Part(load, start_ns, report)
    # Collections would stop every stream for milliseconds.
    gc.collect()
    gc.disable()
    await asyncio.sleep(max(0.0, (start_ns - now_ns()) / 1e9))
    cpu, wall = time.process_time(), time.monotonic()
    if load.arrivals:
        await asyncio.gather(*(part.at_time(index) for index in range(len(load.sessions))))
    else:
        await asyncio.gather(*(part.one_after_another() for _ in range(load.concurrency)))
    busy = (time.process_time() - cpu) / max(time.monotonic() - wall, 1e-9)
    gc.enable()
    return part.records(), busy


@dataclass
class _Asked:
    exchange: Exchange
    tokens: int
    late_ms: float
    answer: Answer | None = None
    problem: str = ""


class _Part:
    """One client process's share while it runs; streams are kept raw and read when all is over."""

    def __init__(self, load: Load, start_ns: int, report: Progress) -> None:
        self._load = load
        self._start_ns = start_ns
        self._report = report
        self._wire = WIRES[load.target.wire]
        self._next = 0
        self._asked: list[_Asked] = []
        self._idle: list[Connection] = []
        self._broken = False

    async def one_after_another(self) -> None:
        connection = Connection(self._load.target)
        while self._next < len(self._load.sessions) and not self._broken:
            session = self._load.sessions[self._next]
            self._next += 1
            await self._run_session(connection, session, late_ms=0.0)
        connection.close()

    async def at_time(self, index: int) -> None:
        due_ns = self._start_ns + int(self._load.arrivals[index] * 1e9)
        await asyncio.sleep(max(0.0, (due_ns - now_ns()) / 1e9))
        if self._broken:
            return
        late_ms = (now_ns() - due_ns) / 1e6
        connection = self._idle.pop() if self._idle else Connection(self._load.target)
        await self._run_session(connection, self._load.sessions[index], late_ms)
        self._idle.append(connection)

    async def _run_session(self, connection: Connection, session: Session, late_ms: float) -> None:
        context = ""
        for number, turn in enumerate(session.turns):
            if self._load.fresh_connections:
                connection.close()
            body = self._wire.body(context + turn.text, turn.max_new_tokens) | self._load.extra
            exchange = await connection.ask("POST", self._wire.path, body, self._load.request_timeout)
            asked = _Asked(exchange, turn.max_new_tokens, late_ms if number == 0 else 0.0)
            self._asked.append(asked)
            self._report(1)
            # One failure refuses the whole run, so a dead or hanging server is not asked a thousand times more.
            self._broken = self._broken or bool(exchange.error) or exchange.status != 200
            if self._broken:
                return
            if number + 1 < len(session.turns):
                # The next turn needs this answer's text, so it cannot wait until the run is over.
                self._read(asked)
                if asked.problem:
                    return
                assert asked.answer is not None
                context += turn.text + asked.answer.text

    def _read(self, asked: _Asked) -> None:
        asked.answer, asked.problem = answer_of(asked.exchange, self._wire, asked.tokens)

    def records(self) -> list[RequestRecord]:
        for asked in self._asked:
            if asked.answer is None:
                self._read(asked)
        return [_record(asked) for asked in self._asked]


def _record(asked: _Asked) -> RequestRecord:
    exchange, answer = asked.exchange, asked.answer
    assert answer is not None
    if asked.problem:
        return RequestRecord(exchange.started_ns, exchange.finished_ns, asked.problem, late_ms=asked.late_ms)
    start = exchange.started_ns
    return RequestRecord(
        started_ns=start,
        finished_ns=exchange.finished_ns,
        problem="",
        connected_ns=exchange.connected_ns,
        first_byte_ns=exchange.first_byte_ns,
        late_ms=asked.late_ms,
        ttft_ms=(answer.arrivals[0][0] - start) / 1e6,
        first_text_ms=(answer.first_text_ns - start) / 1e6,
        e2e_ms=(exchange.finished_ns - start) / 1e6,
        tpot_ms=time_per_output_token(answer.arrivals),
        arrivals=tuple(answer.arrivals),
        prompt_tokens=answer.prompt_tokens,
        output_tokens=answer.completion_tokens,
        token_ids=tuple(answer.token_ids),
        text=answer.text,
        timing=answer.timing,
    )
