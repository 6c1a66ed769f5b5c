"""Signs of life: how they get from a worker to the supervisor, and back to http, without waking anybody.

A message over ZeroMQ wakes an I/O thread on either side and then the receiver. Several times a second for every
worker, that would be most of what an idle server costs. A Heartbeat therefore waits in a pair of datagram sockets until
the supervisor's next round, and a Health without news, the other way, until somebody asks http how the server is; both
stay messages of the protocol.
"""

from __future__ import annotations

import contextlib
import socket
from typing import TypeVar

from minisgl.messages import Health, Heartbeat, MalformedMessage, Message, decode, encode

_M = TypeVar("_M", Health, Heartbeat)

_BUFFER_BYTES = 1 << 20
"""Room for the largest heartbeat: that of an http worker with its histograms takes some 10 kB."""


class Pulse:
    """The supervisor's end of one worker's life.

    Attributes:
        worker_end: what that worker gets; close it here once the worker has it.
    """

    def __init__(self) -> None:
        self._socket, self.worker_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self.worker_end.setblocking(False)
        for end in (self._socket, self.worker_end):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)

    def take(self) -> list[Heartbeat]:
        """The heartbeats since the last call. Never blocks."""
        return take(self._socket, Heartbeat)

    def fileno(self) -> int:
        """Readable while heartbeats wait."""
        return self._socket.fileno()

    def leave(self, health: Health) -> None:
        """For an http worker: what it is to know when it is asked."""
        leave(self._socket, health)

    def close(self) -> None:
        self._socket.close()


def leave(end: socket.socket, message: Message) -> None:
    """Leave a message for the other end. Without room for it, it is dropped: enough of them wait already."""
    with contextlib.suppress(OSError):
        end.send(encode(message))


def take(end: socket.socket, kind: type[_M]) -> list[_M]:
    """The messages of this kind that wait; anything else is dropped. Never blocks."""
    messages: list[_M] = []
    # The other end's death may be an error here; it is told elsewhere.
    with contextlib.suppress(OSError):
        while frame := end.recv(_BUFFER_BYTES):
            with contextlib.suppress(MalformedMessage):
                message = decode(frame)
                if isinstance(message, kind):
                    messages.append(message)
    return messages
