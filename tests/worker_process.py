"""One real worker process whose supervisor and peers are the test: real spawn, real ZeroMQ pipes."""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import zmq

from minisgl.channels import Inbox, Outbox, ipc_address
from minisgl.config import ModelSpec, ServerConfig, WorkerSpec
from minisgl.messages import Failed, Hello, Message, Progress, Ready, Shutdown, WorkerDown, WorkerUp
from minisgl.pulse import Pulse
from minisgl.worker import run_worker

DEADLINE_SECONDS = 30.0
ONE_OF_EACH = {"http_workers": 1, "tokenizer_workers": 1, "detokenizer_workers": 1}
"""As the launcher would choose for a CPU."""


class Wiring:
    """A run directory with the inboxes of the worker's peers."""

    def __init__(self) -> None:
        # Short, because the path of a Unix socket has at most 107 bytes.
        self.directory = tempfile.mkdtemp(prefix="sgl")
        self._inboxes: list[Inbox] = []

    def inbox(self, worker: str, epoch: int, *accepts: type[Message]) -> Inbox:
        inbox = Inbox(ipc_address(self.directory, worker, epoch), accepts)
        self._inboxes.append(inbox)
        return inbox

    def spec(self, kind: str, model: ModelSpec, replicas: int = 1, **settings: Any) -> WorkerSpec:
        name = f"{kind}-0"
        return WorkerSpec(
            name,
            kind,
            0,
            1,
            ipc_address(self.directory, name, 1),
            ipc_address(self.directory, "supervisor", 1),
            replicas,
            ServerConfig(**{**ONE_OF_EACH, **settings}),
            model,
        )

    def close(self) -> None:
        for inbox in self._inboxes:
            inbox.close()
        shutil.rmtree(self.directory, ignore_errors=True)


class WorkerProcess:
    """The process of one worker; leaving the `with` block shuts it down and checks that it ends well."""

    def __init__(self, wiring: Wiring, spec: WorkerSpec) -> None:
        self.spec = spec
        self._control = wiring.inbox("supervisor", 1, Hello, Progress, Ready, Failed)
        self._pulse = Pulse()
        life_line, self._life = multiprocessing.Pipe(duplex=False)
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=run_worker, args=(spec.pack(), life_line, self._pulse.worker_end))
        self.process.start()
        life_line.close()
        self._outbox = Outbox(spec.inbox_address)
        try:
            self.ready = self._until(Ready, lambda message: True)
            self._pulse.take()
        except AssertionError:
            self.process.kill()
            raise

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.send(Shutdown())
        self.process.join(DEADLINE_SECONDS)
        exit_code = self.process.exitcode
        self.process.kill()
        self._outbox.close()
        self._life.close()
        if error is None:
            assert exit_code == 0

    def send(self, *messages: Message) -> None:
        for message in messages:
            self._outbox.send(message)

    def send_frames(self, *frames: bytes) -> None:
        """One multipart message of raw bytes."""
        socket = zmq.Context.instance().socket(zmq.PUSH)
        socket.connect(self.spec.inbox_address)
        socket.send_multipart(frames)
        socket.close(linger=1000)

    def announce(self, inbox: Inbox, worker: str, epoch: int = 1) -> None:
        self.send(WorkerUp(worker, epoch, inbox.address))

    def lose(self, worker: str, epoch: int = 1) -> None:
        self.send(WorkerDown(worker, epoch, "killed by the test"))

    def wait_stats(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first heartbeat's stats that meet the condition, of those not looked at yet."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        stats: dict[str, Any] = {}
        while time.monotonic() < deadline:
            for heartbeat in self._pulse.take():
                stats = heartbeat.stats
                if condition(stats):
                    return stats
            time.sleep(0.02)
        raise AssertionError(f"no such stats; the last were {stats}")

    def _until(self, kind: type[Any], condition: Callable[[Any], bool]) -> Any:
        deadline = time.monotonic() + DEADLINE_SECONDS
        seen: Message | None = None
        while time.monotonic() < deadline:
            self._control.wait(100)
            for message in self._control.drain():
                if isinstance(message, Failed):
                    raise AssertionError(f"the worker failed: {message.details}")
                if isinstance(message, kind):
                    seen = message
                    if condition(message):
                        return message
        raise AssertionError(f"no such {kind.__name__}; the last one was {seen}")


def take(inbox: Inbox, count: int = 1) -> list[Any]:
    """The next `count` messages; there must not be more."""
    messages = take_until(inbox, lambda messages: len(messages) >= count)
    assert len(messages) == count, f"expected {count} messages, got {messages}"
    return messages


def take_until(inbox: Inbox, enough: Callable[[list[Any]], bool]) -> list[Any]:
    """Messages as they come, until they are enough."""
    messages: list[Any] = []
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not enough(messages) and time.monotonic() < deadline:
        inbox.wait(100)
        messages += inbox.drain()
    assert enough(messages), f"not enough: {messages}"
    return messages


def demo_model_spec(directory: Path) -> ModelSpec:
    return ModelSpec(str(directory), "demo", "demo", 4096, 2560, (2,), "Qwen2ForCausalLM")
