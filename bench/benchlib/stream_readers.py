"""Many HTTP clients in one process of their own: they send a request each, and say when all have had their next chunk.

A chunk of a response is told from its end: what every wire here sends closes with a line feed, and HTTP puts CR LF
behind it.
"""

from __future__ import annotations

import multiprocessing
import selectors
import socket
from multiprocessing.connection import Connection

CHUNK_END = b"\n\r\n"
RESPONSE_END = b"\r\n0\r\n\r\n"
TIMEOUT_SECONDS = 30.0
_READ_BYTES = 2**16


class StreamReaders:
    """`count` clients of one server, one connection each, in a process of their own.

    Args:
        request: what each of them sends, as bytes of HTTP.
    """

    def __init__(self, port: int, request: bytes, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_read, args=(theirs, port, request, count), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def wait_step(self) -> None:
        """Until every client has one more chunk; raises TimeoutError."""
        if not self._pipe.poll(TIMEOUT_SECONDS):
            raise TimeoutError(f"a client was not sent its next chunk within {TIMEOUT_SECONDS:.0f} s")
        self._pipe.recv_bytes()

    def wait_end(self) -> int:
        """Until every response is complete; the bytes that all clients were sent."""
        if not self._pipe.poll(TIMEOUT_SECONDS):
            raise TimeoutError(f"a response did not end within {TIMEOUT_SECONDS:.0f} s")
        while (message := self._pipe.recv_bytes()) == b"":
            pass
        self._process.join()
        return int(message)


def _read(pipe: Connection, port: int, request: bytes, count: int) -> None:
    selector = selectors.DefaultSelector()
    for _ in range(count):
        client = socket.create_connection(("127.0.0.1", port))
        client.sendall(request)
        client.setblocking(False)
        selector.register(client, selectors.EVENT_READ, _Client())
    bytes_read, ended, behind = 0, 0, [count]
    while ended < count:
        for key, _ in selector.select():
            data = key.fileobj.recv(_READ_BYTES)
            state: _Client = key.data
            bytes_read += len(data)
            for step in state.take(data):
                if step == len(behind):
                    behind.append(count)
                behind[step] -= 1
                if behind[step] == 0:
                    pipe.send_bytes(b"")
            if not data or state.complete:
                selector.unregister(key.fileobj)
                key.fileobj.close()
                ended += 1
    pipe.send_bytes(str(bytes_read).encode())


class _Client:
    """What one client has read."""

    def __init__(self) -> None:
        self.complete = False
        self._chunks = -1
        """The head of the response ends as a chunk does."""
        self._rest = b""

    def take(self, data: bytes) -> range:
        """The numbers of the chunks that this data completes."""
        text = self._rest + data
        self.complete = text.endswith(RESPONSE_END)
        # The end of a response looks like one more chunk's.
        found = text.count(CHUNK_END) - self._rest.count(CHUNK_END) - self.complete
        self._rest = text[1 - len(RESPONSE_END) :]
        first, self._chunks = self._chunks, self._chunks + found
        return range(max(first, 0), self._chunks)
