"""One keep-alive HTTP/1.1 connection that stamps every piece of an answer as it arrives and parses nothing meanwhile.

The stamps are CLOCK_MONOTONIC nanoseconds, the clock of minisgl's own stamps. Reading the stream (wires.py) happens
after the measurement, so that one stream's parsing cannot delay another one's stamps.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httptools
import orjson

from benchlib.target import Target
from benchlib.wires import Answer, Line, Wire, problem_of

now_ns = time.monotonic_ns


@dataclass
class Exchange:
    """One request and its answer as raw stamped pieces.

    Attributes:
        started_ns: before anything was done for the request, connecting included.
        connected_ns: equal to started_ns on a connection that was open already.
        sent_ns: when the request had been handed to the socket.
        pieces: (nanoseconds, bytes) of the body as the transport delivered it.
        error: why the exchange broke off, empty when the response is complete.
    """

    started_ns: int = 0
    connected_ns: int = 0
    sent_ns: int = 0
    first_byte_ns: int = 0
    finished_ns: int = 0
    status: int = 0
    pieces: list[Line] = field(default_factory=list)
    error: str = ""

    def lines(self) -> Iterator[Line]:
        """The body's lines, each with the stamp of the piece that completed it."""
        held = b""
        at = 0
        for at, piece in self.pieces:
            *complete, held = (held + piece).split(b"\n")
            for line in complete:
                yield at, line.rstrip(b"\r")
        if held:
            yield at, held

    def body(self) -> bytes:
        return b"".join(piece for _, piece in self.pieces)


_IDLE_LIMIT_NS = 2 * 10**9
"""A connection idle for longer is opened anew: servers close idle ones, and a request may meet the closing."""


class Connection:
    """A connection to one server; `ask` may be awaited again and again, one request at a time."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._socket: _Socket | None = None
        self._last_ns = 0

    async def ask(self, method: str, path: str, body: dict[str, Any] | None, timeout: float) -> Exchange:
        """Send one request and wait for its whole answer; failures are in the result's `error`, never raised."""
        payload = b"" if body is None else orjson.dumps(body)
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: {self._target.host}:{self._target.port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
        )
        if now_ns() - self._last_ns > _IDLE_LIMIT_NS:
            self.close()
        exchange = Exchange(started_ns=now_ns())
        try:
            await asyncio.wait_for(self._converse(exchange, head.encode() + payload), timeout)
        except (TimeoutError, asyncio.TimeoutError):
            exchange.error = f"no complete answer within {timeout:g} s"
        except OSError as error:
            exchange.error = f"{type(error).__name__}: {error}"
        exchange.finished_ns = self._last_ns = exchange.finished_ns or now_ns()
        if exchange.error:
            self.close()
        return exchange

    async def _converse(self, exchange: Exchange, request: bytes) -> None:
        exchange.connected_ns = exchange.started_ns
        if self._socket is None or not self._socket.usable:
            loop = asyncio.get_running_loop()
            _, self._socket = await loop.create_connection(_Socket, self._target.host, self._target.port)
            exchange.connected_ns = now_ns()
        await self._socket.converse(exchange, request)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.abort()
            self._socket = None


class _Socket(asyncio.Protocol):
    """One TCP connection: stamps what arrives and finds the end of each response."""

    def __init__(self) -> None:
        self.usable = False
        self._transport: asyncio.Transport
        self._parser: httptools.HttpResponseParser
        self._exchange = Exchange()
        self._complete: asyncio.Future[None] | None = None
        self._arrived_ns = 0

    async def converse(self, exchange: Exchange, request: bytes) -> None:
        self._exchange = exchange
        self._parser = httptools.HttpResponseParser(self)
        self._complete = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        exchange.sent_ns = now_ns()
        await self._complete

    def abort(self) -> None:
        self.usable = False
        self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self.usable = True

    def data_received(self, data: bytes) -> None:
        self._arrived_ns = now_ns()
        self._exchange.first_byte_ns = self._exchange.first_byte_ns or self._arrived_ns
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"malformed HTTP: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        self.usable = False
        cause = f"{type(error).__name__}: {error}" if error else "closed by the server"
        self._end(f"connection lost before the answer was complete ({cause})")

    # httptools callbacks

    def on_body(self, body: bytes) -> None:
        self._exchange.pieces.append((self._arrived_ns, body))

    def on_message_complete(self) -> None:
        self._exchange.status = self._parser.get_status_code()
        self._exchange.finished_ns = self._arrived_ns
        if not self._parser.should_keep_alive():
            self.abort()
        self._end("")

    def _end(self, error: str) -> None:
        if self._complete is not None and not self._complete.done():
            self._exchange.error = error
            self._complete.set_result(None)


def answer_of(exchange: Exchange, wire: Wire, asked_tokens: int) -> tuple[Answer, str]:
    """The answer in an exchange, and why it must not count as a measurement (empty when it may)."""
    if exchange.error:
        return Answer(), exchange.error
    if exchange.status != 200:
        return Answer(), f"HTTP {exchange.status}: {exchange.body()[:200].decode('utf-8', 'replace')}"
    answer = wire.read(exchange.lines())
    problem = problem_of(answer, asked_tokens)
    if not problem and answer.arrivals[0][0] <= exchange.started_ns:
        problem = "time to first token is 0"
    return answer, problem
