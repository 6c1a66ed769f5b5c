"""The scheduler process: takes requests from its inbox, runs steps, sends each step's tokens to the detokenizers."""

from __future__ import annotations

import gc
import logging
import time

from minisgl.channels import Peers
from minisgl.messages import (
    AbortRequest,
    Message,
    RequestError,
    Shutdown,
    TokenBatch,
    TokenizedRequest,
    WorkerDown,
    WorkerUp,
    http_worker_of,
    make_request_id,
)
from minisgl.scheduler_proc.core import ReplicaCore
from minisgl.worker import MAX_IDLE_MS, Worker

logger = logging.getLogger(__name__)

STATS_SECONDS = 0.1
"""How often a busy loop writes its statistics."""
REPORT_SECONDS = 5.0
"""How often a busy loop logs a line about itself, when narrating or debugging."""


def main(worker: Worker) -> None:
    """Load the model, then serve until Shutdown."""
    worker.open_inbox(TokenizedRequest, AbortRequest)
    core = load(worker)
    worker.ready(core.info())
    serve(worker, core)


def load(worker: Worker) -> ReplicaCore:
    """Make the engine ready to run and put a core around it."""
    worker.progress("importing torch")
    # Imported here because it takes seconds: the supervisor has had our Hello by now.
    from minisgl.scheduler_proc.engine import StepEngine

    spec = worker.spec
    engine = StepEngine.load(spec.config, spec.model, spec.index, worker.progress)
    worker.progress("warming up")
    engine.warm_up()
    core = ReplicaCore(engine, spec.config, spec.model, spec.index, spec.epoch)
    # What is loaded by now stays for good, so the collector need never look at it again.
    gc.collect()
    gc.freeze()
    if spec.config.narrate:
        info = core.info()
        logger.info("model %s (%s), %s on %s", spec.model.name, spec.model.architecture, info["dtype"], info["device"])
        logger.info("EOS ids %s, KV cache of %d tokens", list(spec.model.eos_token_ids), info["kv_tokens"])
    return core


def serve(worker: Worker, core: ReplicaCore) -> None:
    """Run steps while there are requests and sleep on the inbox while there are none, until Shutdown.

    An engine failure ends every request with an error before it is raised on.
    """
    outlet = TokenOutlet(Peers("detokenizer", worker.spec.config.detokenizer_workers))
    statistics = Statistics(worker, core)
    try:
        while True:
            worker.tick()
            if not core.busy:
                statistics.write()
                worker.inbox.wait(MAX_IDLE_MS)
            for message in worker.inbox.drain():
                if type(message) is Shutdown:
                    outlet.send_last_words(core.fail_all(503, "shutting_down", "the server is shutting down"))
                    return
                handle(message, core, outlet)
            batch = core.step()
            if batch is not None:
                outlet.send_batch(batch)
            statistics.keep_fresh()
    except Exception as error:
        cause = f"the engine failed: {type(error).__name__}: {error}"
        outlet.send_last_words(core.fail_all(500, "engine_failure", cause))
        raise
    finally:
        outlet.peers.close()


def handle(message: Message, core: ReplicaCore, outlet: TokenOutlet) -> None:
    """React to one message from the inbox."""
    if type(message) is TokenizedRequest:
        refusal = core.submit(message)
        if refusal is not None:
            outlet.send_error(refusal)
    elif type(message) is AbortRequest:
        core.abort(message.rid)
    elif type(message) is WorkerUp:
        outlet.peers.up(message)
    elif type(message) is WorkerDown:
        outlet.peers.down(message.worker, message.epoch)
        for rid in [rid for rid in core.scheduler.rids() if came_from(rid, message)]:
            core.abort(rid)


def came_from(rid: int, dead: WorkerDown) -> bool:
    """Whether the dead worker is the http process that made this request id, so that nobody waits for its answer."""
    index, epoch = http_worker_of(rid)
    same_life = make_request_id(index, dead.epoch, 0) == make_request_id(index, epoch, 0)
    return same_life and dead.worker == f"http-{index}"


class TokenOutlet:
    """Sends each request's rows and errors to the detokenizer that serves it."""

    def __init__(self, peers: Peers) -> None:
        self.peers = peers
        self._count = len(peers.names)

    def send_batch(self, batch: TokenBatch) -> None:
        if self._count == 1:
            self.peers.send(0, batch)
            return
        for index, part in enumerate(split_batch(batch, self._count)):
            if part.rids:
                self.peers.send(index, part)

    def send_error(self, error: RequestError) -> None:
        self.peers.send(error.rid % self._count, error)

    def send_last_words(self, errors: list[RequestError]) -> None:
        """Send the errors and wait until they have left."""
        for index in range(self._count):
            self.peers.deliver(index, [error for error in errors if error.rid % self._count == index])


def split_batch(batch: TokenBatch, count: int) -> list[TokenBatch]:
    """One batch for each of `count` detokenizers, with the requests that are its (rid % count)."""
    parts = [
        TokenBatch(batch.replica, batch.epoch, batch.step, batch.launched_ns, batch.retired_ns) for _ in range(count)
    ]
    for stream in batch.opened:
        parts[stream.rid % count].opened.append(stream)
    for rid, token_id, finish in zip(batch.rids, batch.token_ids, batch.finishes, strict=True):
        part = parts[rid % count]
        part.rids.append(rid)
        part.token_ids.append(token_id)
        part.finishes.append(finish)
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
        seconds = now - self._reported
        if seconds >= REPORT_SECONDS:
            self._report(seconds)
            self._reported = now

    def _report(self, seconds: float) -> None:
        stats = self._worker.stats
        tokens = stats["tokens_generated"] - self._reported_tokens
        self._reported_tokens += tokens
        if not tokens:
            return
        logger.log(
            self._level,
            "running %d, waiting %d, KV pages %d of %d used, %.0f tokens/s, last step %.2f ms, preemptions %d",
            stats["running"],
            stats["waiting"],
            stats["kv_pages_total"] - stats["kv_pages_free"],
            stats["kv_pages_total"],
            tokens / seconds,
            stats["step_ms"],
            stats["preemptions"],
        )
