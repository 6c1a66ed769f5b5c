"""Complete responses that their clients do not read: kept for a while, then given up, however the connection ends."""

from __future__ import annotations

import asyncio
import socket

import pytest
import uvicorn
import uvloop
from uvicorn.server import ServerState

from minisgl.http import protocol
from minisgl.http.protocol import BoundedHttpProtocol

BODY = b"x" * 2**24


async def answer(scope: object, receive: object, send: object) -> None:
    """An application that answers everything with more than the kernel takes."""
    headers = [(b"content-length", str(len(BODY)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})  # type: ignore[operator]
    await send({"type": "http.response.body", "body": BODY})  # type: ignore[operator]


@pytest.mark.parametrize("connection", ["keep-alive", "close"])
@pytest.mark.parametrize("reads", [True, False])
def test_who_reads_gets_all_and_who_does_not_is_given_up(
    monkeypatch: pytest.MonkeyPatch, connection: str, reads: bool
) -> None:
    monkeypatch.setattr(protocol, "STALL_SECONDS", 0.2)

    async def scenario() -> int:
        config = uvicorn.Config(answer, http=BoundedHttpProtocol, lifespan="off", log_config=None)  # type: ignore[arg-type]
        config.load()
        state, loop = ServerState(), asyncio.get_running_loop()
        server = await loop.create_server(lambda: BoundedHttpProtocol(config, state, {}, lambda: None), "127.0.0.1", 0)
        with socket.create_connection(server.sockets[0].getsockname()) as client:
            client.setblocking(False)
            await loop.sock_sendall(client, f"GET / HTTP/1.1\r\nHost: x\r\nConnection: {connection}\r\n\r\n".encode())
            received = 0
            if not reads:
                while not state.total_requests or state.connections:
                    await asyncio.sleep(0.01)
            try:
                # Slowly enough that the server looks in the middle of it.
                while received < len(BODY) and (part := await loop.sock_recv(client, 2**19)):
                    received += len(part)
                    await asyncio.sleep(0.02)
            except ConnectionResetError:
                pass
        server.close()
        return received

    received = uvloop.run(asyncio.wait_for(scenario(), 20))
    assert received >= len(BODY) if reads else received < len(BODY)
