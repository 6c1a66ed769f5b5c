"""The border to uvicorn: what its httptools protocol lacks, and what ASGI does not carry.

`BoundedHttpProtocol` bounds the head of a request (httptools itself would buffer it without end) and answers malformed
HTTP in the API's error shape. `Edge`, the outermost ASGI application, gives every request an Ingress.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from minisgl.http.errors import ApiError, to_json
from minisgl.http.security import Gate
from minisgl.timeline import now

MAX_HEAD_BYTES = 64 * 2**10
"""Bytes a client may send without completing a request head or adding to its body."""
STALL_SECONDS = 120
"""A client whose socket has been full for this long is given up."""
_SCOPE_KEY = "minisgl.ingress"
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class BoundedHttpProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol with a bound on heads, trailers and chunk extensions.

    It calls `on_connected` once its connection is there.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        on_connected: Callable[[], None],
    ) -> None:
        super().__init__(config, server_state, app_state)
        self._on_connected = on_connected
        self._unproductive_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._on_connected()

    def data_received(self, data: bytes) -> None:
        self._unproductive_bytes += len(data)
        super().data_received(data)
        if self._unproductive_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            limit = f"the request head must not exceed {MAX_HEAD_BYTES} bytes"
            self._refuse(ApiError(431, "head_too_large", limit))

    def on_headers_complete(self) -> None:
        self._unproductive_bytes = 0
        self.scope["state"] |= {
            "received_ns": now(),
            "abort_connection": self.transport.abort,
            "unsent_bytes": self.transport.get_write_buffer_size,
        }
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unproductive_bytes = 0
        super().on_body(body)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._give_up_unread(before=0)

    def _give_up_unread(self, before: int) -> None:
        """Drop a client that takes nothing of a response which nobody waits for any more: it is complete."""
        unsent = self.transport.get_write_buffer_size()
        if unsent and unsent == before:
            self.transport.abort()
        elif unsent:
            self.loop.call_later(STALL_SECONDS, self._give_up_unread, unsent)

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, "malformed_http", "the bytes received are not an HTTP/1.1 request"))

    def _refuse(self, error: ApiError) -> None:
        # Bytes of another response may already be on their way; then only closing is right.
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            body = to_json(error.body())
            head = (
                f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write((head + body).encode("ascii"))
        self.transport.close()


@dataclass(eq=False, slots=True)
class Ingress:
    """How a request came in.

    Attributes:
        received_ns: when its head was complete; the first stamp of its timeline.
        request_id: the client's X-Request-Id, or one drawn here.
        send: the server's own ASGI send, unwrapped: it finishes without waiting unless the client does not read.
        abort_connection: drop the connection and whatever is still buffered for it.
        unsent_bytes: how much is buffered for the connection that its socket has not taken yet.
        headers: what every response to it must carry.
        trace_headers: `traceparent` and `tracestate`, when spans are made of requests.
        write_chunk: sends a piece of a body that is not its last, at once; False, and nothing is sent, where `send` has
            to do it: when the client does not read, or the body is not chunked.
    """

    received_ns: int
    request_id: str
    send: Send
    abort_connection: Callable[[], None]
    unsent_bytes: Callable[[], int]
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    trace_headers: dict[str, str] = field(default_factory=dict)
    write_chunk: Callable[[str], bool] = lambda text: False


def ingress_of(scope: Scope) -> Ingress:
    ingress: Ingress = scope[_SCOPE_KEY]
    return ingress


class Edge:
    """Attaches the Ingress, asks the Gate, and answers with X-Request-Id; needs BoundedHttpProtocol below it.

    Pure ASGI, and streams are sent past it, so it adds nothing to a chunk.
    """

    def __init__(self, app: ASGIApp, gate: Gate, traced: bool = False) -> None:
        self._app = app
        self._gate = gate
        self._traced = traced

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope["state"]
        request_id = _request_id(scope)
        headers = [(b"x-request-id", request_id.encode("ascii")), *self._gate.cors_headers(scope)]
        connection = (state["abort_connection"], state["unsent_bytes"])
        ingress = Ingress(state["received_ns"], request_id, send, *connection, headers)
        ingress.write_chunk = _chunk_writer(send)
        if self._traced:
            ingress.trace_headers = _trace_headers(scope)
        scope[_SCOPE_KEY] = ingress

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *headers]
            await send(message)

        answer = self._gate.answer(scope)
        await (answer or self._app)(scope, receive, send_with_id)


def _chunk_writer(send: Send) -> Callable[[str], bool]:
    """What uvicorn's `send` does with a piece of a chunked body, as a plain function of the piece.

    Per piece this saves a message, a coroutine and its end by exception: a fifth of what a streamed token costs.
    """
    cycle: RequestResponseCycle = send.__self__  # type: ignore[attr-defined]
    transport, flow = cycle.transport, cycle.flow

    def write_chunk(text: str) -> bool:
        if flow.write_paused or cycle.disconnected or not cycle.chunked_encoding:
            return False
        transport.write(f"{len(text):x}\r\n{text}\r\n".encode("ascii"))
        return True

    return write_chunk


def _trace_headers(scope: Scope) -> dict[str, str]:
    wanted = (b"traceparent", b"tracestate")
    return {str(name, "ascii"): str(value, "latin-1") for name, value in scope["headers"] if name in wanted}


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return str(value, "ascii")
    return secrets.token_hex(16)
