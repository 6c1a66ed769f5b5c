"""A small real HTTP server that speaks the native wire, for testing clients without a model."""

from __future__ import annotations

import json
import select
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class FakeServer:
    """What it answers, and what it was asked.

    Attributes:
        deltas: the answer, piece by piece.
        pause: seconds before each piece.
        error: sent instead of the done event.
        refusal: (status, body) sent instead of any answer.
        hang_up: close the connection after the deltas.
        bodies: the /generate bodies received.
        disconnected: set when a client leaves in the middle of an answer.
    """

    deltas: list[str] = field(default_factory=lambda: ["Hel", "lo, ", "世界", " 👋"])
    pause: float = 0.0
    error: str = ""
    refusal: tuple[int, Any] | None = None
    hang_up: bool = False
    bodies: list[dict[str, Any]] = field(default_factory=list)
    disconnected: threading.Event = field(default_factory=threading.Event)
    url: str = ""


@contextmanager
def running(fake: FakeServer) -> Iterator[FakeServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.fake = fake
    fake.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(200, {"served_model_name": "fake-model"} if self.path == "/get_model_info" else {})

    def do_POST(self) -> None:
        fake = self.server.fake
        fake.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if fake.refusal:
            self._answer(*fake.refusal)
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for delta in fake.deltas:
            if self._client_left(fake.pause):
                fake.disconnected.set()
                self.close_connection = True
                return
            self._send({"text_delta": delta})
        if fake.hang_up:
            self.close_connection = True
            return
        count = len(fake.deltas)
        done = {"event": "done", "finish_reason": "stop", "usage": {"prompt_tokens": 3, "completion_tokens": count}}
        self._send({"event": "error", "code": "fault", "message": fake.error} if fake.error else done)
        self.wfile.write(b"0\r\n\r\n")

    def _client_left(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self.connection], [], [], left)[0]:
                return not self.connection.recv(1)
        return False

    def _send(self, event: object) -> None:
        line = json.dumps(event).encode() + b"\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
        self.wfile.flush()

    def _answer(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
