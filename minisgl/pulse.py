"""Signs of life: how heartbeats get from a worker to the supervisor without waking anybody.

A message over ZeroMQ wakes an I/O thread on either side and then the receiver. Several times a second from every
worker, that would be most of what an idle server costs. Heartbeats therefore wait in a pair of datagram sockets until
the supervisor's next round; they stay messages of the protocol.
"""

from __future__ import annotations

import contextlib
import socket

from minisgl.messages import Heartbeat, MalformedMessage, decode, encode

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
        self.worker_end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)

    def take(self) -> list[Heartbeat]:
        """The heartbeats since the last call. Never blocks."""
        heartbeats: list[Heartbeat] = []
        # The worker's death may be an error here; it is told elsewhere.
        with contextlib.suppress(OSError):
            while frame := self._socket.recv(_BUFFER_BYTES):
                with contextlib.suppress(MalformedMessage):
                    message = decode(frame)
                    if isinstance(message, Heartbeat):
                        heartbeats.append(message)
        return heartbeats

    def close(self) -> None:
        self._socket.close()


def beat(worker_end: socket.socket, heartbeat: Heartbeat) -> None:
    """Leave a heartbeat for the supervisor. Without room for it, it is dropped: enough of them wait already."""
    with contextlib.suppress(OSError):
        worker_end.send(encode(heartbeat))
