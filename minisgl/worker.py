"""What every worker process has in common: its link to the supervisor, its signs of life, its end.

The supervisor starts `run_worker` in a fresh process. It ties the process's life to the launcher's, opens the inbox,
and hands a Worker to the `main(worker)` of the process kind. `main` returns after a Shutdown message; an exception
that leaves it is reported to the supervisor as Failed and ends the process with status 1.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection

from minisgl.channels import Inbox, Outbox, deliver
from minisgl.config import WorkerSpec
from minisgl.log import setup_logging
from minisgl.messages import (
    Failed,
    Health,
    Heartbeat,
    Hello,
    JsonObject,
    Message,
    Progress,
    Ready,
    Shutdown,
    WorkerDown,
    WorkerUp,
)
from minisgl.pulse import leave, take

HEARTBEAT_SECONDS = 0.4
REST_SECONDS = 60.0
"""How long a worker that waits for messages may go without a heartbeat."""
IDLE_MS = 60_000
"""Longest sleep of an idle main loop. Nothing needs it to come round: it is there for what nobody has thought of."""

PROCESS_KINDS = {
    "http": "minisgl.http.main",
    "tokenizer": "minisgl.tokenizer_proc.main",
    "scheduler": "minisgl.scheduler_proc.main",
    "detokenizer": "minisgl.detokenizer_proc.main",
}
_CONTROL_TYPES: tuple[type[Message], ...] = (WorkerUp, WorkerDown, Shutdown)


class Worker:
    """One worker's inbox, and its one-way line to the supervisor.

    Attributes:
        inbox: receives the message types given to `open_inbox`, and WorkerUp, WorkerDown and Shutdown.
        stats: gauges and counters that every heartbeat carries; the main loop writes them.
        listen_socket: for http, the listening socket that the supervisor bound.
    """

    def __init__(self, spec: WorkerSpec, pulse: socket.socket, listen_socket: socket.socket | None = None) -> None:
        self.spec = spec
        self.listen_socket = listen_socket
        self.stats: JsonObject = {}
        self.inbox: Inbox
        self._supervisor = Outbox(spec.control_address)
        self._pulse = pulse
        self._last_tick: int | None = time.monotonic_ns()
        """None while the main loop waits for messages."""
        self._rests = False
        """While the heart pauses, until `_stirred`."""
        self._stirred = threading.Event()

    def open_inbox(self, *accepts: type[Message]) -> Inbox:
        """Bind the inbox and say Hello. Call it first: peers may send as soon as the supervisor announces us."""
        busy_poll_seconds = (self.spec.config.busy_poll_ms or 0) / 1e3
        self.inbox = Inbox(self.spec.inbox_address, {*accepts, *_CONTROL_TYPES}, busy_poll_seconds)
        self._supervisor.send(Hello(self.spec.name, self.spec.epoch, os.getpid(), self.spec.inbox_address))
        return self.inbox

    def progress(self, stage: str, done: int = 0, total: int = 0) -> None:
        """Tell the user how far the start is: `done` of `total` units of `stage` (total 0 = unknown)."""
        self.tick()
        self._supervisor.send(Progress(self.spec.name, self.spec.epoch, stage, done, total))

    def ready(self, info: JsonObject | None = None) -> None:
        """Say that this worker is warmed up; the supervisor then announces it to the others."""
        # What is loaded by now stays for good. Looking at it again and again would stop every stream for milliseconds.
        gc.collect()
        gc.freeze()
        self.tick()
        # Whoever hears of it at once hears what the stats are as well.
        self.beat()
        self._supervisor.send(Ready(self.spec.name, self.spec.epoch, info or {}))

    def tick(self) -> None:
        """The main loop came round. Its age is how the supervisor tells a stuck loop from an idle one."""
        self._last_tick = time.monotonic_ns()
        if self._rests:
            self._rests = False
            self._stirred.set()
            # By this thread: the other one may never get to run, if what comes now does not let go of the interpreter.
            self.beat()

    def idle(self) -> None:
        """The main loop waits for messages from here to the next `tick`: it is not stuck."""
        self._last_tick = None

    def wait(self, timeout_ms: int = IDLE_MS) -> bool:
        """Wait, idle, until the inbox has something, at most `timeout_ms`."""
        self.idle()
        try:
            return self.inbox.wait(timeout_ms)
        finally:
            self.tick()

    def beat(self) -> None:
        """Leave a heartbeat for the supervisor's next round, because `stats` are news."""
        leave(self._pulse, self.heartbeat())

    def keep_beating(self) -> None:
        """The heart: a heartbeat each HEARTBEAT_SECONDS, but a rest while nothing happens. Never returns."""
        told: JsonObject | None = None
        while True:
            self._stirred.clear()
            # First of all: a main loop that stirs from here on ends the rest, even before it begins.
            self._rests = True
            heartbeat = self.heartbeat()
            self._rests = heartbeat.rests = self._rests and self._last_tick is None and heartbeat.stats == told
            told = heartbeat.stats
            leave(self._pulse, heartbeat)
            if heartbeat.rests:
                self._stirred.wait(REST_SECONDS)
            time.sleep(HEARTBEAT_SECONDS)

    def heartbeat(self) -> Heartbeat:
        stats = dict(self.stats)
        if hasattr(self, "inbox"):
            stats["frames_dropped"] = sum(self.inbox.dropped.values())
        last_tick, now = self._last_tick, time.monotonic_ns()
        loop_age_us = (now - last_tick) // 1000 if last_tick is not None else 0
        return Heartbeat(self.spec.name, self.spec.epoch, now, loop_age_us, False, stats)

    def health_reports(self) -> list[Health]:
        """For http: what the supervisor has left here since the last call, oldest first."""
        return take(self._pulse, Health)

    def failed(self, error: BaseException) -> None:
        message = " ".join(str(error).split())
        cause = f"{type(error).__name__}: {message}" if message else type(error).__name__
        details = "".join(traceback.format_exception(error))
        deliver(self.spec.control_address, Failed(self.spec.name, self.spec.epoch, cause, details))

    def close(self) -> None:
        self._supervisor.close()
        if hasattr(self, "inbox"):
            self.inbox.close()


def run_worker(
    packed_spec: bytes, life_line: Connection, pulse: socket.socket, listen_socket: socket.socket | None = None
) -> None:
    """The entry point of a worker process.

    Args:
        packed_spec: WorkerSpec.pack().
        life_line: read end of a pipe whose write end only the launcher holds; its end of file is the launcher's death.
        pulse: where heartbeats go, Pulse.worker_end.
        listen_socket: for http workers.
    """
    spec = WorkerSpec.unpack(packed_spec)
    _bind_life_to(life_line, spec.name)
    # The launcher alone handles signals (and blocked these while it started us); workers are told by message, so that
    # a drain is never cut short.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    setup_logging(spec.name, spec.config.log_level)
    worker = Worker(spec, pulse, listen_socket)
    threading.Thread(target=worker.keep_beating, name="heartbeat", daemon=True).start()
    try:
        importlib.import_module(PROCESS_KINDS[spec.kind]).main(worker)
    except BaseException as error:
        worker.failed(error)
        worker.close()
        sys.stderr.flush()
        # Threads of torch or of a native library must not keep a failed worker alive.
        os._exit(1)
    worker.close()


def _bind_life_to(life_line: Connection, name: str) -> None:
    """Make sure that no death of the launcher leaves this process behind."""
    with contextlib.suppress(OSError):
        os.setsid()
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        pr_set_pdeathsig, pr_set_name = 1, 15
        libc.prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
        libc.prctl(pr_set_name, f"sgl:{name}".encode(), 0, 0, 0)
    # Covers systems without PDEATHSIG, and a launcher that died before the call above.
    threading.Thread(target=_die_with_launcher, args=(life_line,), name="life-line", daemon=True).start()


def _die_with_launcher(life_line: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        life_line.recv_bytes()
    os._exit(1)
