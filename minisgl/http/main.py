"""The main loop of an http worker: uvicorn on the supervisor's socket, and the ring's messages beside it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from email.utils import formatdate
from typing import TYPE_CHECKING

import uvicorn
import uvloop

from minisgl.config import ConfigError, WorkerSpec
from minisgl.http.acceptor import Acceptor
from minisgl.http.accounting import Accounts
from minisgl.http.app import Service, create_app
from minisgl.http.errors import ApiError
from minisgl.http.health import HealthView
from minisgl.http.neighbours import Neighbours
from minisgl.http.protocol import BoundedHttpProtocol
from minisgl.http.questions import Questions
from minisgl.http.streaming import Streams
from minisgl.messages import (
    AbortNamed,
    CacheFlushed,
    DeltaBatch,
    Dispatched,
    Drain,
    Health,
    Message,
    RequestError,
    Shutdown,
    TextAnswer,
    WorkerDown,
    WorkerUp,
)
from minisgl.worker import IDLE_MS, Worker

if TYPE_CHECKING:
    from minisgl.http.tracing import RequestTracer

TICK_SECONDS = 0.5
IDLE_SECONDS = IDLE_MS / 1e3


def main(worker: Worker) -> None:
    worker.open_inbox(DeltaBatch, RequestError, Dispatched, TextAnswer, CacheFlushed, AbortNamed, Health, Drain)
    uvloop.run(HttpProcess(worker).run())


class HttpProcess:
    """Everything one http worker is made of."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._accounts = Accounts()
        self._tracer = _tracer(worker.spec)
        self._streams = Streams(worker.spec, self._tracer)
        self._questions = Questions(worker.spec)
        self._neighbours = Neighbours(worker.spec)
        self._health = HealthView(worker.health_reports)
        self._crash: Exception | None = None
        self._service = Service(
            worker.spec, self._streams, self._questions, self._neighbours, self._accounts, self._health
        )
        config = uvicorn.Config(
            create_app(self._service),
            http=BoundedHttpProtocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=65,
            timeout_graceful_shutdown=1,
        )
        self._server = _Server(config, self._listening, self._tick, on_rest=worker.idle, on_stir=self._stir)

    async def run(self) -> None:
        """Serve until Shutdown; raises what went wrong in the dispatcher, if anything did."""
        if self._worker.listen_socket is None:
            raise RuntimeError("an http worker needs the listening socket of its supervisor")
        loop = asyncio.get_running_loop()
        self._worker.inbox.attach(loop, self._on_messages)
        # The first heartbeat already says how many requests there are: none.
        self._tick()
        try:
            await self._server.serve(sockets=[self._worker.listen_socket])
        finally:
            self._worker.inbox.detach(loop)
            self._streams.shut()
            self._questions.close()
            self._neighbours.close()
            if self._tracer is not None:
                self._tracer.close()
        if self._crash is not None:
            raise self._crash

    def _listening(self) -> None:
        self._worker.ready()

    def _tick(self) -> bool:
        """Whether there is no reason to come round again before something happens."""
        self._worker.tick()
        self._streams.drop_stalled()
        self._streams.figures.tick()
        may_rest = self._health.may_rest()
        self._streams.elsewhere = self._health.streams_of_others(self._worker.spec.name)
        before = dict(self._worker.stats)
        self._worker.stats.update(self._accounts.snapshot(), **self._streams.snapshot())
        if self._worker.spec.config.http_workers > 1:
            self._worker.stats["figures"] = self._streams.figures.snapshot()
        return may_rest and self._worker.stats == before

    def _stir(self) -> None:
        self._worker.tick()
        self._health.awake()

    def _on_messages(self, messages: list[Message]) -> None:
        self._server.stir()
        try:
            for message in messages:
                self._handle(message)
            self._streams.flush()
        except Exception as error:
            # Rows may have been lost half way: end every stream with an error rather than with a hole in its text.
            self._crash = error
            self._stop("failing", ApiError(500, "internal_error", "the http process failed; send the request again"))

    def _handle(self, message: Message) -> None:
        if isinstance(message, DeltaBatch):
            self._streams.take_deltas(message)
        elif isinstance(message, RequestError):
            if not self._questions.take_error(message):
                self._streams.take_error(message)
        elif isinstance(message, Dispatched):
            self._streams.take_dispatched(message)
        elif isinstance(message, WorkerUp):
            for part in (self._streams, self._questions, self._neighbours):
                part.worker_up(message)
        elif isinstance(message, WorkerDown):
            for part in (self._streams, self._questions, self._neighbours):
                part.worker_down(message)
        elif isinstance(message, TextAnswer):
            self._questions.take_answer(message)
        elif isinstance(message, CacheFlushed):
            self._questions.take_flushed(message)
        elif isinstance(message, AbortNamed):
            self._streams.abort_named(message.name or None)
        elif isinstance(message, Health):
            self._health.take(message)
            self._streams.elsewhere = self._health.streams_of_others(self._worker.spec.name)
        elif isinstance(message, Drain):
            self._streams.draining = "draining"
            # A second signal may follow, and whoever sent it is told whether requests were cut.
            self._tick()
            self._worker.beat()
        elif isinstance(message, Shutdown):
            stopped = "the server was stopped before it could finish this request"
            self._stop("shutting down", ApiError(503, "shutting_down", stopped, retry_after=1))

    def _stop(self, state: str, error: ApiError) -> None:
        self._streams.draining = state
        self._streams.fail_all(error)
        self._questions.fail_all(error)
        for upload in self._service.uploads:
            upload.abort_connection()
        self._server.stop()


def _tracer(spec: WorkerSpec) -> RequestTracer | None:
    """With --otlp-endpoint, what makes spans of the requests."""
    if spec.config.otlp_endpoint is None:
        return None
    try:
        from minisgl.http.tracing import RequestTracer
    except ImportError as error:
        raise ConfigError(f"--otlp-endpoint needs OpenTelemetry ({error}): pip install 'minisgl[otel]'") from None
    return RequestTracer(spec.config.otlp_endpoint, spec)


class _Server(uvicorn.Server):
    """uvicorn with our Acceptor, without its signal handlers (the launcher has them).

    It calls `on_listening` once, and `on_tick` each TICK_SECONDS while it serves. When that has returned True and
    nobody is connected it rests: it calls `on_rest`, ticks again once it is stirred, and calls `on_stir` first.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        on_listening: Callable[[], None],
        on_tick: Callable[[], bool],
        on_rest: Callable[[], None],
        on_stir: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._on_listening = on_listening
        self._on_tick = on_tick
        self._on_rest = on_rest
        self._on_stir = on_stir
        self._rests = False
        self._acceptors: list[Acceptor] = []
        self._next_round = asyncio.Event()

    def stop(self) -> None:
        """End `serve`."""
        self.should_exit = True
        self._next_round.set()

    def stir(self) -> None:
        """Somebody has connected, or a message has come."""
        if self._rests:
            self._rests = False
            self._on_stir()
            # The first answer may be on its way before the next round.
            date = formatdate(usegmt=True).encode()
            self.server_state.default_headers = [(b"date", date), *self.config.encoded_headers]
            self._next_round.set()

    async def main_loop(self) -> None:
        loop = asyncio.get_running_loop()
        # As uvicorn does: look whether to end, and bring the Date header up to date, which it does at each tenth call.
        while not await self.on_tick(0):
            self._rests = self._on_tick() and not self.server_state.connections
            if self._rests:
                self._on_rest()
            self._next_round.clear()
            timer = loop.call_later(IDLE_SECONDS if self._rests else TICK_SECONDS, self._next_round.set)
            await self._next_round.wait()
            timer.cancel()
            self.stir()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        self._acceptors = [Acceptor(sock, self._make_protocol) for sock in sockets or []]
        self._on_listening()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for acceptor in self._acceptors:
            acceptor.close()
        await super().shutdown(sockets=sockets)

    def _make_protocol(self) -> BoundedHttpProtocol:
        return BoundedHttpProtocol(self.config, self.server_state, self.lifespan.state, self.stir)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
