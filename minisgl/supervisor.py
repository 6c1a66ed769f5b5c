"""The supervisor: starts the workers, introduces them to each other, watches them, restarts the dead, drains, stops.

It runs in the launcher's process, on one asyncio loop, and never imports torch. Workers report over the control
channel (Hello, Progress, Ready, Failed); the launcher reports deaths and hands over heartbeats. What follows is sent
to the workers at once: WorkerUp and WorkerDown to all, Health to the http workers. A Health without news is left for
them to find.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from minisgl.channels import Inbox, Outbox
from minisgl.config import ModelSpec, ServerConfig, WorkerSpec
from minisgl.launcher import Exit, Launcher, LaunchFailed
from minisgl.messages import (
    Drain,
    Failed,
    Health,
    Hello,
    Message,
    Progress,
    Ready,
    Shutdown,
    WorkerDown,
    WorkerUp,
)
from minisgl.worker import REST_SECONDS
from minisgl.worker_record import DEATH_WINDOW_SECONDS, MAX_DEATHS, Limits, State, WorkerRecord

logger = logging.getLogger(__name__)

_REPORTS = (Hello, Progress, Ready, Failed)

TICK_SECONDS = 0.25
OWN_GAP_SECONDS = 0.25
"""When the loop itself came round this late, the supervisor was not watching in between."""
LAST_WORDS_SECONDS = 0.2
"""How long after an exit its Failed message may still arrive."""
SHUTDOWN_SECONDS = 5.0
"""What workers get to leave by themselves before they are killed; those with cut requests need it to tell clients."""

ReportProgress = Callable[[str, str, int, int], None]
"""Called with a worker's name, the stage of its start, and how many of how many units are done (total 0: unknown)."""


class Supervisor:
    """One server's processes, from the first start to the last exit.

    `start`, then `wait_all_ready`, then `serving`, then `wait_stopped`; `stop` ends everything from any state. The
    waits raise LaunchFailed, whose message is the root cause. Before `serving` every death is final; after it the
    dead are restarted, unless they die again and again.
    """

    def __init__(
        self,
        config: ServerConfig,
        model: ModelSpec,
        replicas: int,
        launcher: Launcher,
        report: ReportProgress,
    ) -> None:
        self._config = config
        self._model = model
        self._replicas = replicas
        self._launcher = launcher
        self._report = report
        # The scheduler takes longest to start, so it goes first.
        counts = {
            "scheduler": replicas,
            "tokenizer": config.tokenizer_workers,
            "detokenizer": config.detokenizer_workers,
            "http": config.http_workers,
        }
        self._workers = {
            record.name: record
            for kind, count in counts.items()
            for record in (WorkerRecord(kind, index, Limits.of(kind, config)) for index in range(count))
        }
        self._control_address = launcher.inbox_address("supervisor", 1)
        self._inbox: Inbox
        self._loop: asyncio.AbstractEventLoop
        self._all_ready: asyncio.Future[None]
        self._finished: asyncio.Future[int]
        self._next_tick: asyncio.Handle
        self._resting = False
        """While every worker rests and nothing is wrong, no tick comes before something stirs."""
        self._serving = False
        self._stopping = False
        self._drain_deadline: float | None = None
        self._tick_due_at = self._watched_since = time.monotonic()
        self._told: list[str] = []

    # ---- life of the server -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start all workers in parallel."""
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(self._fail_on_exception)
        self._all_ready, self._finished = self._loop.create_future(), self._loop.create_future()
        self._inbox = Inbox(self._control_address, _REPORTS)
        self._inbox.attach(self._loop, self._receive)
        for worker in self._workers.values():
            self._start_worker(worker)
        self._tick()

    async def wait_all_ready(self) -> bool:
        """Until every worker is ready; False when the user stopped the start."""
        waited: list[asyncio.Future[Any]] = [self._all_ready, self._finished]
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if self._finished.done():
            self._finished.result()
        return self._all_ready.done()

    def info_of(self, worker: str) -> dict[str, Any]:
        """What a worker said of itself when it became ready."""
        return self._workers[worker].info

    def serving(self) -> None:
        """The server is proven to work: healthy from now on, and the dead are restarted."""
        self._serving = True
        self._send_health()

    async def wait_stopped(self) -> int:
        """The exit status: 0 after a complete drain, 1 when requests were cut."""
        return await asyncio.shield(self._finished)

    def request_stop(self) -> None:
        """First call: drain. Second call: stop now. (What SIGTERM and Ctrl-C do.)"""
        if self._finished.done():
            return
        if not self._serving:
            self._finished.set_result(0)
        elif self._drain_deadline is None:
            self._drain_deadline = time.monotonic() + self._config.drain_timeout
            logger.info("draining: running requests may finish, new ones are refused; a second signal stops at once")
            self._send(self._of_kind("http"), Drain())
            self._send_health()
            self._stir()
        else:
            logger.info("stopping at once")
            for worker in self._of_kind("http"):
                worker.take_pulse(time.monotonic())
            self._finished.set_result(1 if self._in_flight() else 0)

    async def stop(self) -> None:
        """End every worker: those that serve by message, the others and the stragglers by force."""
        self._stopping = True
        self._end_rest()
        self._next_tick.cancel()
        self._send(self._workers.values(), Shutdown())
        for worker in self._workers.values():
            if worker.process is not None and not (self._serving and worker.state is State.READY):
                worker.process.kill()
        deadline = time.monotonic() + SHUTDOWN_SECONDS
        while any(worker.process is not None for worker in self._workers.values()):
            await asyncio.sleep(0.01)
            if time.monotonic() > deadline:
                for worker in self._workers.values():
                    if worker.process is not None:
                        worker.process.kill()
        self._inbox.detach(self._loop)
        self._inbox.close()

    # ---- what workers say -------------------------------------------------------------------------------------------

    def _receive(self, messages: list[Message]) -> None:
        for message in messages:
            if isinstance(message, _REPORTS):
                worker = self._workers.get(message.worker)
                # Late messages of a former life, and a dead one's last, change nothing any more.
                if worker is not None and message.epoch == worker.epoch and worker.process is not None:
                    self._hear(worker, message)

    def _hear(self, worker: WorkerRecord, message: Hello | Progress | Ready | Failed) -> None:
        worker.heard_at = time.monotonic()
        if isinstance(message, Hello):
            self._introduce(worker, message.address)
        elif isinstance(message, Progress):
            worker.stage = message.stage
            self._report(worker.name, message.stage, message.done, message.total)
        elif isinstance(message, Ready):
            self._announce(worker, message)
        else:
            worker.last_words = message

    def _introduce(self, worker: WorkerRecord, address: str) -> None:
        """A worker's inbox is bound: tell it where the others are."""
        worker.address, worker.outbox = address, Outbox(address)
        for other in self._workers.values():
            if other.state is State.READY:
                worker.outbox.send(WorkerUp(other.name, other.epoch, other.address))
        if self._drain_deadline is not None and worker.kind == "http":
            worker.outbox.send(Drain())

    def _announce(self, worker: WorkerRecord, message: Ready) -> None:
        """A worker is ready: tell the others where it is."""
        worker.state, worker.info, worker.stage = State.READY, message.info, ""
        self._report(worker.name, "ready", 1, 1)
        others = (other for other in self._workers.values() if other is not worker)
        self._send(others, WorkerUp(worker.name, worker.epoch, worker.address))
        self._send_health()
        if worker.epoch > 1:
            logger.info("%s is ready again (epoch %d)", worker.name, worker.epoch)
        if not self._all_ready.done() and all(other.state is State.READY for other in self._workers.values()):
            self._all_ready.set_result(None)

    # ---- deaths and restarts ----------------------------------------------------------------------------------------

    def _start_worker(self, worker: WorkerRecord) -> None:
        worker.epoch += 1
        address = self._launcher.inbox_address(worker.name, worker.epoch)
        spec = WorkerSpec(
            name=worker.name,
            kind=worker.kind,
            index=worker.index,
            epoch=worker.epoch,
            inbox_address=address,
            control_address=self._control_address,
            replicas=self._replicas,
            config=self._config,
            model=self._model,
        )
        worker.begin(time.monotonic(), self._launcher.start(spec, partial(self._exited, worker)), address)

    def _exited(self, worker: WorkerRecord, exit: Exit) -> None:
        self._receive(self._inbox.drain())
        if exit.signalled or worker.last_words is not None or self._stopping:
            self._bury(worker, exit)
        else:
            self._loop.call_later(LAST_WORDS_SECONDS, self._bury, worker, exit)

    def _bury(self, worker: WorkerRecord, exit: Exit) -> None:
        """Tell everyone that a worker is dead, and decide whether it is to live again."""
        state, last_words = worker.state, worker.last_words
        cause = last_words.cause if last_words else worker.hang or exit.reason
        worker.end(time.monotonic(), cause)
        if self._stopping:
            return
        if state is State.READY:
            self._send(self._workers.values(), WorkerDown(worker.name, worker.epoch, cause))
        logger.error("%s died: %s", worker.name, cause)
        details = last_words.details if last_words else ""
        if not self._serving:
            self._fail(_start_failure(worker.name, cause, exit), details)
        elif state is State.RESTARTING and last_words and not self._can_do_without(worker):
            self._fail(f"{worker.name} could not be restarted: {cause}", details)
        elif worker.recent_deaths() >= MAX_DEATHS and not self._can_do_without(worker):
            deaths = f"{MAX_DEATHS} times within {DEATH_WINDOW_SECONDS:.0f} s"
            self._fail(f"{worker.name} died {deaths}, the last time because: {cause}", details)
        else:
            if details:
                logger.error("%s", details.rstrip())
            self._send_health()
            self._restart_when_due(worker, time.monotonic())
            self._stir()

    def _can_do_without(self, worker: WorkerRecord) -> bool:
        """Whether another replica serves, which must not end because this one cannot live."""
        replicas = self._of_kind("scheduler")
        return worker in replicas and any(replica.state is State.READY for replica in replicas)

    def _restart_when_due(self, worker: WorkerRecord, now: float) -> None:
        if worker.state is State.DEAD and now >= worker.restart_at():
            self._start_worker(worker)

    def _fail(self, cause: str, details: str = "") -> None:
        if not self._finished.done():
            self._finished.set_exception(LaunchFailed(cause, details))

    def _fail_on_exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        loop.default_exception_handler(context)
        self._fail(f"the supervisor failed: {context.get('exception') or context['message']!r}")

    # ---- watching ---------------------------------------------------------------------------------------------------

    def _tick_after(self, seconds: float) -> None:
        self._tick_due_at = time.monotonic() + seconds
        self._next_tick = self._loop.call_later(seconds, self._tick)

    def _rest(self) -> None:
        self._resting = True
        self._launcher.watch(self._stir)
        self._tick_after(REST_SECONDS)

    def _end_rest(self) -> None:
        if self._resting:
            self._resting = False
            self._launcher.unwatch()

    def _stir(self) -> None:
        """Come round at once if everyone rests: something has happened."""
        if self._resting:
            self._end_rest()
            self._next_tick.cancel()
            self._next_tick = self._loop.call_soon(self._tick)

    def _tick(self) -> None:
        self._end_rest()
        now = time.monotonic()
        if now - self._tick_due_at > OWN_GAP_SECONDS:
            self._watched_since = now
        for worker in self._workers.values():
            worker.take_pulse(now)
            if worker.state is State.DEAD:
                self._restart_when_due(worker, now)
            elif worker.state is State.READY:
                verdict = worker.hang_verdict(now, self._watched_since)
                if verdict and not worker.hang and worker.process is not None:
                    logger.error("%s %s; killing it", worker.name, verdict)
                    worker.hang = verdict
                    worker.process.kill()
            elif now - worker.started_at > self._config.startup_timeout:
                self._fail_late_start(worker)
        problems = self._problems(now)
        if problems != self._told:
            self._send_health()
        else:
            self._leave_health(now, problems)
        if not problems and all(worker.may_rest(now) for worker in self._workers.values()):
            self._rest()
        else:
            self._tick_after(TICK_SECONDS)
        if self._drain_deadline is not None and not self._finished.done():
            if self._drained():
                self._finished.set_result(0)
            elif now > self._drain_deadline:
                logger.error("the drain timeout is over: %d requests are cut", self._in_flight())
                self._finished.set_result(1)

    def _fail_late_start(self, worker: WorkerRecord) -> None:
        stage = f" (it was at: {worker.stage})" if worker.stage else ""
        timeout = f"{self._config.startup_timeout:g} s"
        self._fail(f"{worker.name} was not ready after {timeout}{stage}; --startup-timeout allows more")

    def _in_flight(self) -> int:
        """Requests that the living http workers still answer."""
        return sum(worker.stats.get("in_flight", 0) for worker in self._of_kind("http") if worker.state is State.READY)

    def _drained(self) -> bool:
        """No request is left, by the word of http workers that have heard of the drain."""
        heard = all(worker.stats.get("draining") for worker in self._of_kind("http") if worker.state is State.READY)
        return heard and not self._in_flight()

    def _problems(self, now: float) -> list[str]:
        problems = [worker.problem(now, self._watched_since) for worker in self._workers.values()]
        if self._drain_deadline is not None:
            problems.append("draining: the server answers its last requests and then stops")
        elif not self._serving and not any(problems):
            problems.append("the server is warming up")
        return [problem for problem in problems if problem]

    def _send_health(self) -> None:
        now = time.monotonic()
        for worker in self._workers.values():
            worker.take_pulse(now)
        self._told = self._problems(now)
        self._send(self._of_kind("http"), self._health(now, self._told))

    def _leave_health(self, now: float, problems: list[str]) -> None:
        """Have http find that there are no problems but these. One that rests does not look; it is told of changes."""
        health = self._health(now, problems)
        changes = sum(worker.changes for worker in self._workers.values())
        for worker in self._of_kind("http"):
            if worker.process is not None and not worker.rests_until:
                worker.process.leave(health)
            elif worker.outbox is not None and worker.told_changes != changes:
                worker.outbox.send(health)
            worker.told_changes = changes

    def _health(self, now: float, problems: list[str]) -> Health:
        return Health(problems, {worker.name: worker.health(now) for worker in self._workers.values()})

    def _of_kind(self, kind: str) -> list[WorkerRecord]:
        return [worker for worker in self._workers.values() if worker.kind == kind]

    def _send(self, workers: Iterable[WorkerRecord], message: Message) -> None:
        for worker in workers:
            if worker.outbox is not None:
                worker.outbox.send(message)


def _start_failure(name: str, cause: str, exit: Exit) -> str:
    if cause != exit.reason:
        return f"{name} failed to start: {cause}"
    if cause == "killed by signal 9":
        return f"{name} was {cause} (out of memory?)"
    return f"{name} was {cause}" if exit.signalled else f"{name} {cause}"
