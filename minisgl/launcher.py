"""Starting worker processes: the Launcher interface, and the launcher of processes on this host.

A launcher chooses addresses, starts one life of a worker, hands over its heartbeats and leaves it health reports, tells
when it stops or is over, and can end it. All else the supervisor learns over the control channel, so a launcher for
other machines has to provide just this much.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Protocol, TypeAlias

from minisgl.channels import ipc_address
from minisgl.config import WorkerSpec
from minisgl.messages import Health, Heartbeat
from minisgl.pulse import Pulse
from minisgl.worker import run_worker

EntryPoint: TypeAlias = Callable[[bytes, Connection, socket.socket, socket.socket | None], None]
"""Called as `run_worker` is."""

_REAP_SECONDS = 0.01


class LaunchFailed(Exception):
    """The server cannot start or cannot go on; the message is the root cause, as a sentence for the user.

    `details` is what the failed process said of itself (a traceback), for above that sentence.
    """

    def __init__(self, cause: str, details: str = "") -> None:
        super().__init__(cause)
        self.details = details


@dataclass(frozen=True, slots=True)
class Exit:
    """How a worker's life ended: `reason` is like "killed by signal 9" or "exited with status 1".

    A `signalled` end left no time for a Failed message.
    """

    reason: str
    signalled: bool


class WorkerProcess(Protocol):
    """One life of a worker."""

    @property
    def pid(self) -> int: ...

    def kill(self) -> None:
        """End it at once, with everything it started; its `on_exit` follows."""

    @property
    def stopped(self) -> bool:
        """Whether it is known to be suspended (SIGSTOP): it neither works nor ends."""

    def heartbeats(self) -> list[Heartbeat]:
        """Those that have come since the last call."""

    def leave(self, health: Health) -> None:
        """Let an http worker find this when it is next asked how the server is; never blocks."""


class Launcher(Protocol):
    """Starts workers. All methods are called from the supervisor's event loop, in the main thread."""

    def inbox_address(self, process: str, epoch: int) -> str:
        """Where one life of a worker (or the supervisor, epoch 1) is to bind its inbox."""

    def start(self, spec: WorkerSpec, on_exit: Callable[[Exit], None]) -> WorkerProcess:
        """Start one life of a worker; the event loop calls `on_exit` once, when it is over."""

    def watch(self, on_sign: Callable[[], None]) -> None:
        """Call `on_sign` from the event loop whenever heartbeats wait, and when a worker is suspended."""

    def unwatch(self) -> None:
        """Stop that."""


class LocalLauncher:
    """Spawns workers as processes of this host whose lives are tied to this process.

    Args:
        run_dir: directory of this launch's sockets.
        listen_sockets: one bound socket per http worker; a restarted worker gets the same one, so that connections
            waiting in it are not lost.
        entry_point: what a worker process runs.
    """

    def __init__(
        self, run_dir: str, listen_sockets: Sequence[socket.socket], entry_point: EntryPoint = run_worker
    ) -> None:
        self._run_dir = run_dir
        self._listen_sockets = listen_sockets
        self._entry_point = entry_point
        self._context = multiprocessing.get_context("spawn")
        # Nobody ever writes: the end of file that this process's death brings is the message. Spawned processes
        # inherit only what is passed to them, so no sibling can hold the write end open.
        self._life_line, self._held_end = self._context.Pipe(duplex=False)
        self._processes: list[LocalProcess] = []

    def inbox_address(self, process: str, epoch: int) -> str:
        return ipc_address(self._run_dir, process, epoch)

    def start(self, spec: WorkerSpec, on_exit: Callable[[Exit], None]) -> LocalProcess:
        listen_socket = self._listen_sockets[spec.index] if spec.kind == "http" else None
        pulse = Pulse()
        args = (spec.pack(), self._life_line, pulse.worker_end, listen_socket)
        process = self._context.Process(target=self._entry_point, name=spec.name, args=args)
        with _signals_blocked():
            process.start()
        pulse.worker_end.close()
        self._processes = [other for other in self._processes if other.alive]
        self._processes.append(LocalProcess(process, pulse, on_exit))
        return self._processes[-1]

    def watch(self, on_sign: Callable[[], None]) -> None:
        for process in self._processes:
            process.watch(on_sign)
        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, on_sign)

    def unwatch(self) -> None:
        for process in self._processes:
            process.unwatch()
        asyncio.get_running_loop().remove_signal_handler(signal.SIGCHLD)

    def close(self) -> None:
        """Kill whatever still runs and wait for it."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        self._held_end.close()
        self._life_line.close()


class LocalProcess:
    """A spawned process, watched by the running event loop."""

    def __init__(self, process: SpawnProcess, pulse: Pulse, on_exit: Callable[[Exit], None]) -> None:
        self._process = process
        self._pulse = pulse
        self._on_exit = on_exit
        self._over = False
        assert process.pid is not None
        self.pid = process.pid
        asyncio.get_running_loop().add_reader(process.sentinel, self._ended)

    @property
    def alive(self) -> bool:
        return self._process.exitcode is None

    def kill(self) -> None:
        if not self.alive:
            return
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            # It has not become a session leader yet, so it has started nothing either.
            self._process.kill()

    @property
    def stopped(self) -> bool:
        # Without waitid (macOS) a worker that was suspended while it rested is found out when its rest is over.
        if not hasattr(os, "waitid"):
            return False
        with contextlib.suppress(ChildProcessError):
            return os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
        return False

    def heartbeats(self) -> list[Heartbeat]:
        return self._pulse.take()

    def leave(self, health: Health) -> None:
        self._pulse.leave(health)

    def watch(self, on_heartbeat: Callable[[], None]) -> None:
        if not self._over:
            asyncio.get_running_loop().add_reader(self._pulse, on_heartbeat)

    def unwatch(self) -> None:
        if not self._over:
            asyncio.get_running_loop().remove_reader(self._pulse)

    def wait(self) -> None:
        self._process.join()

    def _ended(self) -> None:
        self.unwatch()
        self._over = True
        asyncio.get_running_loop().remove_reader(self._process.sentinel)
        self.kill()
        self._reap()

    def _reap(self) -> None:
        self._process.join(timeout=0)
        code = self._process.exitcode
        if code is None:
            # The kernel is still taking it down (GPU memory can need a while); never block the loop for it.
            asyncio.get_running_loop().call_later(_REAP_SECONDS, self._reap)
            return
        self._pulse.close()
        if code < 0:
            self._on_exit(Exit(f"killed by signal {-code}", signalled=True))
        else:
            self._on_exit(Exit(f"exited with status {code}", signalled=False))


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block Ctrl-C and SIGTERM: a starting child inherits that, until it ignores them by its own doing."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
