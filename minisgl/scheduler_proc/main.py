"""The scheduler process: takes requests from its inbox, runs steps, sends each step's tokens to the detokenizers."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import replace

from minisgl.channels import Peers
from minisgl.config import WorkerSpec
from minisgl.messages import (
    AbortRequest,
    CacheFlushed,
    FlushCache,
    Message,
    Shutdown,
    TokenBatch,
    TokenizedRequest,
    WorkerDown,
    WorkerUp,
    http_worker_of,
    make_request_id,
)
from minisgl.scheduler_proc import kernel_compilers
from minisgl.scheduler_proc.core import ReplicaCore
from minisgl.worker import IDLE_MS, Worker

logger = logging.getLogger(__name__)

STATS_SECONDS = 0.1
"""How often a busy loop writes its statistics."""
QUIET_MS = 20
"""How long nothing must have arrived before the idle engine prepares something."""
REPORT_SECONDS = 5.0
"""How often a busy loop logs a line about itself, when narrating or debugging."""


def main(worker: Worker) -> None:
    """Load the model, then serve until Shutdown."""
    worker.open_inbox(TokenizedRequest, AbortRequest, FlushCache)
    core = load(worker)
    worker.ready(core.info())
    serve(worker, core)


def load(worker: Worker) -> ReplicaCore:
    """Make the engine ready to run and put a core around it."""
    worker.progress("importing torch")
    # OpenMP reads this when torch is loaded. Threads that spin while they wait for each other make a CPU step up to ten
    # times slower as soon as another process wants a core; sleeping costs 3 % when none does.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Imported here because it takes seconds: the supervisor has had our Hello by now.
    spec = worker.spec
    with kernel_compilers.started(spec.config, spec.model) as compilers:
        from minisgl.scheduler_proc.engine import StepEngine

        engine = StepEngine.load(spec.config, spec.model, spec.index, worker.progress, compilers)
    worker.progress("warming up")
    engine.warm_up()
    core = ReplicaCore(engine, spec.config, spec.model, spec.index, spec.epoch, own_process=True)
    if spec.config.narrate:
        info = core.info()
        logger.info("model %s (%s), %s on %s", spec.model.name, spec.model.architecture, info["dtype"], info["device"])
        logger.info("EOS ids %s, KV cache of %d tokens", list(spec.model.eos_token_ids), info["kv_tokens"])
    return core


def serve(worker: Worker, core: ReplicaCore) -> None:
    """Run steps while there are requests and sleep on the inbox while there are none, until Shutdown.

    An engine failure ends every request with an error before it is raised on.
    """
    service = SchedulerService(worker.spec, core)
    statistics = Statistics(worker, core)
    may_prepare = True
    try:
        while True:
            worker.tick()
            if not core.busy:
                statistics.write()
                # Between the requests of a busy client nothing is begun that the next one would have to wait for.
                if not worker.wait(QUIET_MS if may_prepare else IDLE_MS) and may_prepare:
                    may_prepare = core.engine.prepare_next(core.scheduler.pages.taken_once)
            else:
                may_prepare = True
            for message in worker.inbox.drain():
                if type(message) is Shutdown:
                    service.end_all(503, "shutting_down", "the server is shutting down")
                    return
                service.handle(message)
            service.step()
            statistics.keep_fresh()
    except Exception as error:
        service.end_all(500, "engine_failure", f"the engine failed: {type(error).__name__}: {error}")
        raise
    finally:
        service.close()


class SchedulerService:
    """Brings messages to the core, and what comes out of it to the detokenizer of each request."""

    def __init__(self, spec: WorkerSpec, core: ReplicaCore) -> None:
        self._core = core
        self._replica = spec.index
        self._count = spec.config.detokenizer_workers
        self._detokenizers = Peers("detokenizer", self._count)
        self._gone_http_lives: set[tuple[int, int]] = set()

    def handle(self, message: Message) -> None:
        """React to one message from the inbox."""
        if type(message) is TokenizedRequest:
            # A request can still be on its way here when its http process is known to be dead.
            if http_worker_of(message.rid) not in self._gone_http_lives:
                self._submit(message)
        elif type(message) is AbortRequest:
            self._core.abort(message.rid)
        elif type(message) is FlushCache:
            answer = CacheFlushed(message.rid, self._replica, self._core.scheduler.flush_cache())
            self._detokenizers.send(message.rid % self._count, answer)
        elif type(message) is WorkerUp:
            self._detokenizers.up(message)
        elif type(message) is WorkerDown:
            self._detokenizers.down(message.worker, message.epoch)
            self._end_requests_of(message)

    def step(self) -> None:
        """Run one step, if there is something to run, and send its tokens."""
        batch = self._core.step()
        for refusal in self._core.take_refused():
            self._detokenizers.send(refusal.rid % self._count, refusal)
        if batch is None:
            return
        if self._count == 1:
            self._detokenizers.send(0, batch)
            return
        for index, part in enumerate(split_batch(batch, self._count)):
            if part.rids:
                self._detokenizers.send(index, part)

    def end_all(self, status: int, code: str, message: str) -> None:
        """End every request with an error, and wait until the errors have left: the process is about to exit."""
        errors = self._core.fail_all(status, code, message)
        for index in range(self._count):
            self._detokenizers.deliver(index, [error for error in errors if error.rid % self._count == index])

    def close(self) -> None:
        self._core.close()
        self._detokenizers.close()

    def _submit(self, message: TokenizedRequest) -> None:
        refusal = self._core.submit(message)
        if refusal is not None:
            self._detokenizers.send(refusal.rid % self._count, refusal)

    def _end_requests_of(self, dead: WorkerDown) -> None:
        """Abort what a dead http process has asked for: nobody waits for the answers."""
        kind, _, index = dead.worker.partition("-")
        if kind != "http" or not index.isdecimal():
            return
        life = http_worker_of(make_request_id(int(index), dead.epoch, 0))
        self._gone_http_lives.add(life)
        for rid in [rid for rid in self._core.scheduler.rids() if http_worker_of(rid) == life]:
            self._core.abort(rid)


def split_batch(batch: TokenBatch, count: int) -> list[TokenBatch]:
    """One batch for each of `count` detokenizers, with the requests that are its (rid % count)."""
    parts = [
        TokenBatch(batch.replica, batch.epoch, batch.step, batch.launched_ns, batch.retired_ns) for _ in range(count)
    ]
    for stream in batch.opened:
        parts[stream.rid % count].opened.append(stream)
    rows: list[int] = []
    for rid, token_id, finish in zip(batch.rids, batch.token_ids, batch.finishes, strict=True):
        part = parts[rid % count]
        rows.append(len(part.rids))
        part.rids.append(rid)
        part.token_ids.append(token_id)
        part.finishes.append(finish)
    for found in batch.logprobs:
        parts[batch.rids[found.row] % count].logprobs.append(replace(found, row=rows[found.row]))
    return parts


class Statistics:
    """Keeps worker.stats fresh, and logs a line now and then while requests run."""

    def __init__(self, worker: Worker, core: ReplicaCore) -> None:
        self._worker = worker
        self._core = core
        self._level = logging.INFO if worker.spec.config.narrate else logging.DEBUG
        self._written = self._reported = time.monotonic()
        self._reported_tokens = 0

    def write(self) -> None:
        self._worker.stats.update(self._core.stats())
        self._written = time.monotonic()

    def keep_fresh(self) -> None:
        """Called after every step; cheap unless something is due."""
        now = time.monotonic()
        if now < self._written + STATS_SECONDS:
            return
        self.write()
        if self._core.busy:
            if now < self._reported + REPORT_SECONDS:
                return
            self._report(now - self._reported)
        self._reported, self._reported_tokens = now, self._worker.stats["tokens_generated"]

    def _report(self, seconds: float) -> None:
        stats = self._worker.stats
        logger.log(
            self._level,
            "running %d, waiting %d, KV pages %d of %d used, %.0f tokens/s, last step %.2f ms, preemptions %d",
            stats["running"],
            stats["waiting"],
            stats["kv_pages_total"] - stats["kv_pages_free"],
            stats["kv_pages_total"],
            (stats["tokens_generated"] - self._reported_tokens) / seconds,
            stats["step_ms"],
            stats["preemptions"],
        )
