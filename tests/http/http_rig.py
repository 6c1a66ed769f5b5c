"""A real http worker process whose peers are played by the test: real pipes, real sockets, scripted answers."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import multiprocessing
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from worker_process import ONE_OF_EACH

from minisgl.channels import Inbox, Outbox, ipc_address
from minisgl.chat_formats import ChatFormats
from minisgl.config import ModelSpec, ServerConfig, WorkerSpec
from minisgl.messages import (
    AbortRequest,
    DeltaBatch,
    DetokenizeRequest,
    Dispatched,
    Failed,
    FinishReason,
    FlushCache,
    GenerateRequest,
    Health,
    Hello,
    Message,
    Opening,
    Progress,
    Ready,
    Shutdown,
    TokenizeRequest,
    WorkerDown,
    WorkerUp,
)
from minisgl.pulse import Pulse
from minisgl.timeline import now
from minisgl.worker import run_worker

# As the launcher's processes start, but from one that has imported everything already: two thirds of a start.
multiprocessing.set_forkserver_preload(["minisgl.http.main"])
M = TypeVar("M", bound=Message)
VOCAB_SIZE = 1000
WAIT_SECONDS = 30.0


class Rig:
    """One http worker; the test is its supervisor, tokenizers, schedulers and detokenizers.

    Args:
        start_method: "spawn" where the test looks at what a process imports or prints.
        config: settings of the server.
    """

    def __init__(
        self,
        sampling_defaults: dict[str, Any] | None = None,
        chat_formats: ChatFormats | None = None,
        start_method: str = "forkserver",
        **config: Any,
    ) -> None:
        self.run_dir = tempfile.TemporaryDirectory(prefix="http-rig-")
        self.config = ServerConfig(**{"port": 0, **ONE_OF_EACH, **config})
        control = ipc_address(self.run_dir.name, "supervisor", 1)
        self.supervisor = Inbox(control, {Hello, Progress, Ready, Failed})
        self.epochs = {"scheduler-0": 1, "scheduler-1": 1}
        self._markers = itertools.count()
        self.tokenizers: list[Inbox] = []
        listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = listener.getsockname()[1]
        spec = WorkerSpec(
            name="http-0",
            kind="http",
            index=0,
            epoch=3,
            inbox_address=ipc_address(self.run_dir.name, "http-0", 3),
            control_address=control,
            replicas=2,
            config=self.config,
            model=ModelSpec(
                "models/demo",
                "demo",
                "demo",
                2048,
                VOCAB_SIZE,
                (2, 3),
                "Qwen2ForCausalLM",
                sampling_defaults=sampling_defaults or {},
                chat_formats=chat_formats or ChatFormats(),
            ),
        )
        context: Any = multiprocessing.get_context(start_method)
        self.pulse = Pulse()
        life_line, self._life = context.Pipe(duplex=False)
        self.process = context.Process(
            target=run_worker, args=(spec.pack(), life_line, self.pulse.worker_end, listener)
        )
        self.process.start()
        listener.close()
        self.ring = Outbox(self.from_worker(Hello).address)
        self.from_worker(Ready)
        for index in range(self.config.tokenizer_workers):
            self.start_tokenizer(index)
        for index in range(self.config.detokenizer_workers):
            self.up(f"detokenizer-{index}")
        self.up("scheduler-0")
        self.up("scheduler-1")

    # ---- the supervisor's side ---------------------------------------------------------------------------------------

    def from_worker(self, kind: type[M], wanted: Callable[[M], bool] = lambda message: True) -> M:
        """The next message of this kind that is `wanted`; others are skipped."""
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            if self.supervisor.wait(100) and isinstance(message := self.supervisor.receive(), kind) and wanted(message):
                return message
        raise AssertionError(f"no {kind.__name__} from the http worker")

    def stats(self, **expected: int) -> dict[str, Any]:
        """The worker's stats, as soon as they show these values."""
        last: dict[str, Any] = {}

        self.pulse.take()
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            for heartbeat in self.pulse.take():
                last = heartbeat.stats
                if last and all(last.get(name) == value for name, value in expected.items()):
                    return last
            time.sleep(0.02)
        raise AssertionError(f"stats stay at {last}, expected {expected}")

    def up(self, worker: str, address: str = "") -> None:
        self.epochs.setdefault(worker, 1)
        self.ring.send(WorkerUp(worker, self.epochs[worker], address))
        self.settle()

    def down(self, worker: str) -> None:
        """The present life of a worker dies; the next `up` announces the next one."""
        self.ring.send(WorkerDown(worker, self.epochs[worker], "killed by the test"))
        self.epochs[worker] += 1
        self.settle()

    def settle(self) -> None:
        """Return when the worker has handled everything sent to it so far."""
        marker = f"marker {next(self._markers)}"
        self.ring.send(Health([marker], {}))
        deadline = time.monotonic() + WAIT_SECONDS
        while marker not in self.get("/health")[1]["problems"]:
            assert time.monotonic() < deadline, "the http worker does not take its messages"

    def start_tokenizer(self, index: int = 0) -> Inbox:
        name = f"tokenizer-{index}"
        epoch = self.epochs.setdefault(name, 1)
        accepts = {GenerateRequest, AbortRequest, TokenizeRequest, DetokenizeRequest, FlushCache}
        inbox = Inbox(ipc_address(self.run_dir.name, name, epoch), accepts)
        self.tokenizers[index : index + 1] = [inbox]
        self.up(name, inbox.address)
        return inbox

    def healthy(self) -> None:
        self.ring.send(Health([], {"scheduler-0": {"state": "up", "epoch": 1}}))

    def stop(self) -> int | None:
        """Shut the worker down as the supervisor does; its exit code."""
        if self.process.is_alive():
            self.ring.send(Shutdown())
        self.process.join(WAIT_SECONDS)
        exit_code = self.process.exitcode
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        for closing in (self.ring, self.supervisor, *self.tokenizers):
            closing.close()
        self._life.close()
        self.run_dir.cleanup()
        return exit_code

    # ---- the ring's side ---------------------------------------------------------------------------------------------

    def from_http(self, kind: type[M], tokenizer: int = 0, timeout: float = WAIT_SECONDS) -> M:
        """The next message to a tokenizer, which must be of this kind."""
        inbox = self.tokenizers[tokenizer]
        assert inbox.wait(int(timeout * 1000)), f"no {kind.__name__} from the http worker"
        message = inbox.receive()
        assert isinstance(message, kind), message
        return message

    def nothing_from_http(self, seconds: float = 0.2, tokenizer: int = 0) -> None:
        assert not self.tokenizers[tokenizer].wait(int(seconds * 1000)), self.tokenizers[tokenizer].receive()

    def dispatched(self, request: GenerateRequest, replica: int = 0, epoch: int | None = None) -> None:
        self.ring.send(Dispatched(replica, epoch or self.epochs[f"scheduler-{replica}"], [request.rid]))

    def delta(
        self,
        request: GenerateRequest,
        text: str,
        token_ids: list[int] | None = None,
        finish: FinishReason = FinishReason.NONE,
        opens: bool = False,
        matched: int | str | None = None,
    ) -> None:
        token_ids = [len(text) % VOCAB_SIZE] if token_ids is None else token_ids
        openings = [Opening(0, prompt_tokens=7, cached_tokens=2, stamps=ring_stamps(request))] if opens else []
        matches = {} if matched is None else {0: matched}
        self.ring.send(DeltaBatch([request.rid], [text], [len(token_ids)], token_ids, [finish], openings, matches))

    def answer(self, request: GenerateRequest, *texts: str) -> None:
        """A whole answer, one batch a text, one token each."""
        for index, text in enumerate(texts):
            finish = FinishReason.LENGTH if index == len(texts) - 1 else FinishReason.NONE
            self.delta(request, text, [index], finish, opens=index == 0)

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """While it lasts, every request is answered with its own prompt by a thread that owns tokenizer 0."""
        ring, inbox, over = Outbox(self.ring.address), self.tokenizers[0], threading.Event()

        def serve() -> None:
            while not over.is_set():
                inbox.wait(20)
                for message in inbox.drain():
                    if isinstance(message, AbortRequest):
                        finish, text, openings = FinishReason.ABORT, "", []
                    else:
                        finish, text = FinishReason.STOP, str(message.prompt)
                        openings = [Opening(0, 1, 0, ring_stamps(message))]
                        ring.send(Dispatched(0, self.epochs["scheduler-0"], [message.rid]))
                    ring.send(DeltaBatch([message.rid], [text], [1], [2], [finish], openings, {}))

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            ring.close()

    # ---- the client's side -------------------------------------------------------------------------------------------

    def post(self, body: Any, path: str = "/generate", **headers: str) -> http.client.HTTPConnection:
        """Send a POST and do not wait; call `getresponse()` on what is returned."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_SECONDS)
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, raw, {"Content-Type": "application/json", **headers})
        return connection

    def get(self, path: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_SECONDS)
        connection.request("GET", path)
        response = connection.getresponse()
        raw = response.read()
        connection.close()
        return response.status, json.loads(raw) if response.headers.get_content_type() == "application/json" else raw

    def ask(self, body: Any) -> tuple[http.client.HTTPConnection, GenerateRequest]:
        """Post a valid request and take it from the tokenizer's pipe."""
        connection = self.post(body)
        request = self.from_http(GenerateRequest)
        return connection, request

    def error(self, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
        """The status and the `error` object that answer this body."""
        connection = self.post(body, **headers)
        response = connection.getresponse()
        answer = json.loads(response.read())
        connection.close()
        return response.status, answer["error"]

    def raw_connection(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_SECONDS)


def ring_stamps(request: GenerateRequest) -> list[int]:
    """The stamps of a request after tokenizer, scheduler and detokenizer."""
    return [*request.stamps, *(now() for _ in range(7))]


def lines(response: http.client.HTTPResponse) -> list[Any]:
    """The rest of a stream of JSON lines."""
    return [json.loads(line) for line in response.read().splitlines()]


@contextlib.contextmanager
def running(**config: Any) -> Iterator[Rig]:
    rig = Rig(**config)
    try:
        yield rig
    finally:
        rig.stop()
