"""Taking connections from a listening socket: all that wait, each time the event loop comes round.

libuv, under uvloop's own servers, takes one connection a turn of the loop (libuv pull request 3696). Under load a turn
takes milliseconds, and the last of some hundred clients that come together would wait for a second.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable

logger = logging.getLogger(__name__)

_TAKEN_AT_ONCE = 256
_PAUSE_SECONDS = 0.5
_MAX_UNSENT_BYTES = 2**17
"""Of a connection, in the kernel, where else megabytes wait for a client that does not read."""
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Acceptor:
    """Gives each connection to a listening socket a protocol of its own, until `close`; the socket stays open."""

    def __init__(self, listener: socket.socket, make_protocol: Callable[[], asyncio.Protocol]) -> None:
        self._listener = listener
        self._make_protocol = make_protocol
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        # The loop itself keeps only weak references to tasks.
        self._opening: set[asyncio.Task[None]] = set()
        listener.setblocking(False)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            # Connections take it over from the socket they came in by.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _MAX_UNSENT_BYTES)
        self._resume()

    def close(self) -> None:
        self._loop.remove_reader(self._listener)
        if self._pause is not None:
            self._pause.cancel()

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(_TAKEN_AT_ONCE):
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
                # The socket stays readable, so without a pause the loop would do nothing but try again.
                logger.error("new connections have to wait: %s", error)
                self._loop.remove_reader(self._listener)
                self._pause = self._loop.call_later(_PAUSE_SECONDS, self._resume)
                return
            task = self._loop.create_task(self._open(connection))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _open(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        await self._loop.connect_accepted_socket(self._make_protocol, connection)
