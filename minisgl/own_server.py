"""A server that belongs to a client program: started for it, shown by it, and gone when it is gone.

`OwnServer` is the client's side. The server's side is this module's `main`: it runs the supervisor, tells the client
over stdout how far it is and its URL (one JSON object a line), logs to stderr, and drains when its stdin ends, whose
one line are the settings.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import IO

from minisgl.child_process import package_environment
from minisgl.config import ServerConfig

DRAIN_SECONDS = 10.0
STOP_SECONDS = 8.0
LAST_LINES_SECONDS = 0.5
_PIPE_BYTES = 2**16


class ServerDidNotStart(Exception):
    """The server ended before it was ready; it has said why in its log."""


class OwnServer:
    """A server process for the time of a `with` block; `url` is where it listens.

    Args:
        log: called with each batch of its log lines, from a thread.
        progress: called with (who, stage, done, total) until it is ready.

    Raises:
        ServerDidNotStart: on entering.
    """

    url: str

    def __init__(
        self,
        config: ServerConfig,
        log: Callable[[Sequence[str]], None],
        progress: Callable[[str, str, int, int], None],
    ) -> None:
        self._config = config
        self._log = log
        self._progress = progress
        self._process: subprocess.Popen[bytes]
        self._log_reader: threading.Thread
        self._stopping = False

    def __enter__(self) -> OwnServer:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "minisgl.own_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=package_environment(),
            # Ctrl-C in the terminal is the client's, to stop an answer; the server must not see it.
            start_new_session=True,
        )
        assert self._process.stdin and self._process.stdout and self._process.stderr
        # Not as an argument: every user of the host can read those, and the settings may hold an API key.
        self._process.stdin.write(json.dumps(dataclasses.asdict(self._config)).encode() + b"\n")
        self._process.stdin.flush()
        self._log_reader = threading.Thread(target=self._read_log, args=(self._process.stderr,), daemon=True)
        self._log_reader.start()
        try:
            self.url = self._wait_ready(self._process.stdout)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def _wait_ready(self, events: IO[bytes]) -> str:
        for line in events:
            event = json.loads(line)
            if "url" in event:
                return str(event["url"])
            self._progress(*event["progress"])
        # Its events end with it; let it say why first.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
            self._log_reader.join(STOP_SECONDS)
        raise ServerDidNotStart

    def _read_log(self, stream: IO[bytes]) -> None:
        held = b""
        while data := os.read(stream.fileno(), _PIPE_BYTES):
            *lines, held = (held + data).split(b"\n")
            if lines and not self._stopping:
                self._log([line.decode(errors="replace") for line in lines])

    def _hear_out(self) -> None:
        """Let the reader take what the log says by now: the last lines of an answer are written before its end is."""
        assert self._process.stderr
        deadline = time.monotonic() + LAST_LINES_SECONDS
        while time.monotonic() < deadline:
            waiting = fcntl.ioctl(self._process.stderr, termios.FIONREAD, bytes(4))
            # Once more after the last: then the reader has passed them on as well.
            time.sleep(0.01)
            if not int.from_bytes(waiting, sys.byteorder):
                return

    def _stop(self) -> None:
        """SIGTERM drains, a second one stops at once, and then there is SIGKILL. None of it is worth a log line."""
        self._hear_out()
        self._stopping = True
        try:
            for seconds in (DRAIN_SECONDS, STOP_SECONDS):
                self._process.terminate()
                try:
                    self._process.wait(seconds)
                    break
                except subprocess.TimeoutExpired:
                    continue
        finally:
            self._process.kill()
            self._process.wait()


# ---- the server's side ----------------------------------------------------------------------------------------------


class _EventView:
    """Sends the progress of the start to the client."""

    def __init__(self, send: Callable[[object], None]) -> None:
        self._send = send

    def progress(self, who: str, stage: str, done: int, total: int) -> None:
        self._send({"progress": [who, stage, done, total]})

    def close(self) -> None:
        pass


def main() -> int:
    # Imported here: every spawned worker imports this module again, as the main module of its parent.
    from minisgl.serve import run

    # Keep stdout for the events alone; whatever a library prints goes to the log.
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def send(event: object) -> None:
        events.write(json.dumps(event) + "\n")

    config = ServerConfig(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with_client, daemon=True).start()
    return run(config, view=_EventView(send), announce=lambda url, notice: send({"url": url}))


def _end_with_client() -> None:
    while os.read(0, _PIPE_BYTES):
        pass
    for seconds in (DRAIN_SECONDS, STOP_SECONDS):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(seconds)
    os._exit(1)


if __name__ == "__main__":
    raise SystemExit(main())
