"""Writing one HTTP response without ever waiting for its client.

The dispatcher writes for all clients, so it must not await any of them. uvicorn's `send` finishes at its first step
unless that client's socket is full; stepping its coroutine by hand therefore costs no task and no wake-up. When it does
stop, this client alone is parked: its text collects here until the socket drains, up to a limit. Pieces in the middle
of a stream, of which there is one a token, do without the coroutine as well (Ingress.write_chunk).
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from typing import Any

from starlette.types import Message

from minisgl.http.protocol import Ingress
from minisgl.timeline import now

logger = logging.getLogger(__name__)

MAX_PENDING_CHARS = 2**20
"""Text held for a client that does not read; past it the connection is dropped."""
_MAX_PIECES = 256
"""Pieces it may consist of: as single strings, the tokens of a stream take several times their length."""


class ResponseWriter:
    """One response: `start`, then `write` any number of times, then `end`; `flush` hands over what has collected.

    Attributes:
        ingress: how the request came in.
        complete: the last byte was handed to the socket.
        dropped: why the connection was dropped from this side, or "".
        parked_since_ns: since when the client's socket has been full; 0 while it is not.
        chunks: number of body chunks sent.
    """

    def __init__(self, ingress: Ingress, narrate: bool = False) -> None:
        self.complete = False
        self.dropped = ""
        self.parked_since_ns = 0
        self.chunks = 0
        self.ingress = ingress
        self._narrate = narrate
        self._head: Message | None = None
        self._pending: list[str] = []
        self._pending_chars = 0
        self._sending_chars = 0
        self._ending = False
        self._last_body_sent = False

    def start(self, status: int, media_type: str, headers: dict[str, str]) -> None:
        fields = {"content-type": media_type, **headers}
        encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields.items()]
        self._head = {"type": "http.response.start", "status": status, "headers": encoded + self.ingress.headers}

    def write(self, text: str) -> None:
        """Add ASCII text to the body; it leaves at the next flush."""
        self._pending.append(text)
        self._pending_chars += len(text)
        if self.parked_since_ns:
            if len(self._pending) > _MAX_PIECES:
                self._pending = ["".join(self._pending)]
            if self._pending_chars > MAX_PENDING_CHARS:
                self.drop(f"client did not read {self._pending_chars} bytes")
        elif self._pending_chars > MAX_PENDING_CHARS:
            self.flush()

    def end(self) -> None:
        self._ending = True

    def respond(self, status: int, body: str, headers: dict[str, str]) -> None:
        """The whole response at once, as JSON."""
        self.start(status, "application/json", {**headers, "content-length": str(len(body))})
        self.write(body)
        self.end()

    def flush(self) -> None:
        """Send what has collected, in one ASGI send; does nothing while the client is parked."""
        if self.parked_since_ns or self.complete:
            return
        if self._head is not None:
            head, self._head = self._head, None
            if not self._send(head):
                return
        if self._pending or self._ending:
            text = "".join(self._pending)
            self._pending.clear()
            self._pending_chars = 0
            self.chunks += 1
            if self._narrate:
                logger.info("%s sends chunk %d: %r", self.ingress.request_id, self.chunks, text)
            if text and not self._ending and self.ingress.write_chunk(text):
                return
            self._last_body_sent = self._ending
            self._sending_chars = len(text)
            body = {"type": "http.response.body", "body": text.encode("ascii"), "more_body": not self._ending}
            if self._send(body):
                self.complete = self._last_body_sent

    def held_bytes(self) -> int:
        """What this process keeps for a client that is parked, up to its socket's own buffer."""
        return 0 if self.dropped else self._pending_chars + self._sending_chars + self.ingress.unsent_bytes()

    def drop(self, reason: str) -> None:
        """Give this client up: what collected is discarded, and the server reports its disconnect."""
        if not self.dropped:
            self.dropped = reason
            self._pending.clear()
            self.ingress.abort_connection()

    def _send(self, message: Message) -> bool:
        return self._step(self.ingress.send(message).__await__())

    def _step(self, sending: Generator[Any, Any, Any]) -> bool:
        """Run the server's send until it finishes (True) or waits for the client's socket (False)."""
        try:
            socket_drained = next(sending)
        except StopIteration:
            self.parked_since_ns = 0
            return True
        except Exception:
            logger.exception("%s cannot be written to", self.ingress.request_id)
            self.parked_since_ns = 0
            self.drop("server refused the write")
            return True
        self.parked_since_ns = self.parked_since_ns or now()
        socket_drained.add_done_callback(lambda _: self._resume(sending))
        return False

    def _resume(self, sending: Generator[Any, Any, Any]) -> None:
        if self._step(sending):
            self.complete = self._last_body_sent
            self.flush()
