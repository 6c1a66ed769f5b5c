"""Connections that arrive together are taken together, and a full descriptor table is waited out."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
from pathlib import Path

import pytest
import uvloop

from minisgl.http import acceptor
from minisgl.http.acceptor import Acceptor

CLIENTS = 100


class _Greeter(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.write(b"hello")  # type: ignore[attr-defined]


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listening:
        yield listening


def test_all_waiting_connections_are_taken_within_a_few_turns_of_the_loop(listener):
    async def count_turns() -> int:
        loop, turns, made = asyncio.get_running_loop(), 0, asyncio.Event()
        protocols: list[asyncio.Protocol] = []

        def make() -> asyncio.Protocol:
            protocols.append(_Greeter())
            if len(protocols) == CLIENTS:
                made.set()
            return protocols[-1]

        def turn() -> None:
            nonlocal turns
            turns += 1
            loop.call_soon(turn)

        taking = Acceptor(listener, make)
        turn()
        await asyncio.wait_for(made.wait(), 10)
        taking.close()
        return turns

    with contextlib.ExitStack() as stack:
        for _ in range(CLIENTS):
            stack.enter_context(socket.create_connection(listener.getsockname()))
        assert uvloop.run(count_turns()) < CLIENTS // 5


def test_a_taken_connection_works_delays_no_small_write_and_keeps_little_unsent(listener):
    async def greet() -> tuple[bytes, list[int]]:
        options: list[int] = []

        class Probe(_Greeter):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                peer = transport.get_extra_info("socket")
                for name in (socket.TCP_NODELAY, socket.TCP_NOTSENT_LOWAT):
                    options.append(peer.getsockopt(socket.IPPROTO_TCP, name))
                super().connection_made(transport)

        taking = Acceptor(listener, Probe)
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        text = await asyncio.wait_for(reader.readexactly(5), 5)
        writer.close()
        taking.close()
        return text, options

    text, (nodelay, most_unsent) = uvloop.run(greet())
    assert text == b"hello"
    assert nodelay
    assert most_unsent == acceptor._MAX_UNSENT_BYTES


def test_without_descriptors_connections_wait_until_there_are_some(listener, monkeypatch, caplog):
    monkeypatch.setattr(acceptor, "_PAUSE_SECONDS", 0.05)

    async def starve() -> bytes:
        client = socket.create_connection(listener.getsockname())
        client.setblocking(False)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
        spare = []
        taking = Acceptor(listener, _Greeter)
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 2, limits[1]))
        try:
            with contextlib.suppress(OSError):
                while True:
                    spare.append(os.dup(0))
            while not caplog.records:
                await asyncio.sleep(0.01)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for descriptor in spare:
                os.close(descriptor)
        text = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(client, 5), 5)
        client.close()
        taking.close()
        return text

    assert uvloop.run(starve()) == b"hello"
    assert "have to wait" in caplog.text
