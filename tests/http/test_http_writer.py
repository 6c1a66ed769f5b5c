"""ResponseWriter against a server whose socket fills up: what is sent, in which pieces, and when it gives up."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable

from starlette.types import Message

from minisgl.http.protocol import Ingress
from minisgl.http.writer import MAX_PENDING_CHARS, ResponseWriter


class Server:
    """Takes ASGI messages; while `full`, a send waits like uvicorn's does when its client does not read."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.aborted = 0
        self.broken = False
        self._room: asyncio.Future[None] | None = None
        self.unsent = 0
        ingress = Ingress(0, "id", self.send, self.abort, lambda: self.unsent, [(b"x-request-id", b"id")])
        self.writer = ResponseWriter(ingress)

    def fill(self) -> None:
        self._room = asyncio.get_running_loop().create_future()

    async def drain(self) -> None:
        assert self._room is not None
        room, self._room = self._room, None
        room.set_result(None)
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def send(self, message: Message) -> None:
        if self.broken:
            raise RuntimeError("response already completed")
        if self._room is not None:
            await self._room
        self.sent.append(message)

    def abort(self) -> None:
        self.aborted += 1

    def bodies(self) -> list[tuple[bytes, bool]]:
        return [(message["body"], message["more_body"]) for message in self.sent[1:]]


def check(scenario: Callable[[Server], Awaitable[None]]) -> None:
    async def run() -> None:
        await scenario(Server())

    asyncio.run(run())


def test_a_flush_is_one_send_and_an_empty_one_none() -> None:
    async def scenario(server: Server) -> None:
        writer = server.writer
        writer.flush()
        assert server.sent == []
        writer.start(200, "text/plain", {"a": "b"})
        for text in "abc":
            writer.write(text)
        writer.flush()
        writer.flush()
        assert server.sent[0]["status"] == 200
        assert (b"a", b"b") in server.sent[0]["headers"]
        assert (b"x-request-id", b"id") in server.sent[0]["headers"]
        assert server.bodies() == [(b"abc", True)]
        writer.write("d")
        writer.end()
        writer.flush()
        assert server.bodies()[1:] == [(b"d", False)]
        assert writer.complete
        assert writer.chunks == 2

    check(scenario)


def test_text_collects_while_parked_and_leaves_in_order() -> None:
    async def scenario(server: Server) -> None:
        writer = server.writer
        writer.start(200, "text/plain", {})
        writer.flush()
        server.fill()
        writer.write("a")
        writer.flush()
        assert writer.parked_since_ns > 0
        for text in "bcd":
            writer.write(text)
            writer.flush()
        assert server.bodies() == []
        await server.drain()
        assert server.bodies() == [(b"a", True), (b"bcd", True)]
        assert writer.parked_since_ns == 0

    check(scenario)


def test_an_end_while_parked_is_not_lost() -> None:
    async def scenario(server: Server) -> None:
        writer = server.writer
        server.fill()
        writer.respond(400, "{}", {})
        writer.flush()
        assert not writer.complete
        await server.drain()
        assert server.bodies() == [(b"{}", False)]
        assert writer.complete
        # And parked again within the last piece itself.
        second = Server()
        second.writer.start(200, "text/plain", {})
        second.writer.flush()
        second.writer.write("x")
        second.writer.end()
        second.fill()
        second.writer.flush()
        assert not second.writer.complete
        await second.drain()
        assert second.bodies() == [(b"x", False)]
        assert second.writer.complete

    check(scenario)


def test_the_allowance_holds_for_parked_and_for_bursts() -> None:
    async def scenario(server: Server) -> None:
        writer = server.writer
        writer.start(200, "text/plain", {})
        piece = "x" * (MAX_PENDING_CHARS // 4)
        for _ in range(12):
            writer.write(piece)
        # A burst within one wake-up leaves in pieces of about the allowance.
        assert len(server.bodies()) == 2
        writer.flush()
        assert sum(len(body) for body, _ in server.bodies()) == 12 * len(piece)
        server.fill()
        writer.write(piece)
        writer.flush()
        for _ in range(4):
            writer.write(piece)
        assert (writer.dropped, server.aborted) == ("", 0)
        writer.write(piece)
        assert "did not read" in writer.dropped
        writer.write(piece)
        assert server.aborted == 1

    check(scenario)


def test_what_waits_for_a_parked_client_is_counted_and_kept_in_few_pieces() -> None:
    async def scenario(server: Server) -> None:
        writer = server.writer
        writer.start(200, "text/plain", {})
        writer.flush()
        server.fill()
        writer.write("begin")
        writer.flush()
        server.unsent = 70
        for _ in range(5000):
            writer.write("token")
            writer.flush()
        assert writer.held_bytes() == 5 + 25_000 + 70
        assert sys.getsizeof(writer._pending) + sum(map(sys.getsizeof, writer._pending)) < 2 * 25_000
        server.unsent = 0
        await server.drain()
        assert server.bodies() == [(b"begin", True), (b"token" * 5000, True)]

    check(scenario)


def test_a_server_that_refuses_a_write_drops_the_client_alone() -> None:
    async def scenario(server: Server) -> None:
        server.broken = True
        server.writer.start(200, "text/plain", {})
        server.writer.flush()
        assert server.writer.dropped
        assert server.aborted == 1
        assert server.writer.parked_since_ns == 0

    check(scenario)
