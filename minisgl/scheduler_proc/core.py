"""One replica: scheduler and engine, driven step by step by whoever owns it (main.py, or minisgl.Engine)."""

from __future__ import annotations

import logging
from collections import deque
from typing import Any, Protocol

from minisgl import timeline
from minisgl.config import ModelSpec, ServerConfig
from minisgl.messages import NO_TOKEN, FinishReason, JsonObject, RequestError, StreamOpen, TokenBatch, TokenizedRequest
from minisgl.scheduler_proc.grammar import GrammarMask
from minisgl.scheduler_proc.grammar_compiler import GrammarCompiler
from minisgl.scheduler_proc.grammar_wire import CompilerSettings
from minisgl.scheduler_proc.kv_pages import KvPages
from minisgl.scheduler_proc.limits import SchedulerLimits
from minisgl.scheduler_proc.pacing import PromptPacer
from minisgl.scheduler_proc.prefix_cache import PrefixCache
from minisgl.scheduler_proc.request import Request, RowLogprobs, StepPlan
from minisgl.scheduler_proc.scheduler import Scheduler

logger = logging.getLogger(__name__)

GRAMMAR_WAIT_SECONDS = 0.005
"""How long a step without anything to compute waits for a grammar; new requests wait meanwhile."""

FINE_CHUNK = 256
"""Tokens of a step with a long prompt beside running streams on CUDA, theirs included: a small model then takes less
than three times as long for it as for theirs alone, up to some 16,000 positions."""


class StepRunner(Protocol):
    """What the core needs of an engine; engine.StepEngine is the real one."""

    page_size: int
    num_pages: int
    device_name: str
    dtype_name: str
    runs_ahead: bool
    """Whether a step may be launched before the one before it is retired."""

    def launch(self, plan: StepPlan) -> Any:
        """Start a step; does not wait for the device."""

    def retire(self, step: Any) -> list[int]:
        """Wait for a launched step; one token id per row with `sample`, in row order."""

    def logprobs(self, step: Any) -> list[RowLogprobs]:
        """What rows of a retired step asked for."""

    def prepare_next(self, pages_used: int) -> bool:
        """Use an idle moment, while no step runs, for what makes later steps faster; False when nothing is left.

        Args:
            pages_used: KV pages that have been in use so far, those with the lowest ids.
        """

    def stay_ahead(self, pages_used: int) -> None:
        """Do a little of that between two steps, before one has to wait for it."""


class ReplicaCore:
    """Takes requests, runs steps, and gives back what goes to the detokenizer.

    Every submitted request ends in exactly one of: the RequestError that `submit`, `take_refused` or `fail_all`
    returns, or one row of a TokenBatch from `step` whose finish is not NONE.

    Args:
        own_process: whether nobody else's threads run in this process.
    """

    def __init__(
        self,
        engine: StepRunner,
        config: ServerConfig,
        model: ModelSpec,
        replica: int = 0,
        epoch: int = 1,
        own_process: bool = False,
    ) -> None:
        self.engine = engine
        self.limits = scheduler_limits(config, model, engine.device_name)
        self._grammars = GrammarCompiler(
            CompilerSettings(
                model.directory,
                config.trust_remote_code,
                model.vocab_size,
                sorted(self.limits.eos_ids),
                config.grammar_timeout,
            ),
            own_process,
        )
        cache = None if config.disable_radix_cache else PrefixCache(engine.page_size)
        self.scheduler = Scheduler(self.limits, KvPages(engine.num_pages, engine.page_size), cache)
        # A GPU needs a millisecond for any chunk, however small, so there the chunks' lengths are fixed: FINE_CHUNK.
        paced = config.chunked_prefill_size is None and engine.device_name.startswith("cpu")
        self._pacer = PromptPacer() if paced else None
        self._replica = replica
        self._epoch = epoch
        self._narrate = config.narrate
        self._ended = self._empty_batch()
        self._in_flight: deque[tuple[StepPlan, int, Any]] = deque()
        self._steps = 0
        self._tokens_generated = 0
        self._last_step_ms = 0.0

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self.scheduler.running or self.scheduler.waiting or self._ended.rids or self._in_flight)

    def submit(self, message: TokenizedRequest) -> RequestError | None:
        """Queue a request, or say why it can never run."""
        message.stamps.append(timeline.now())
        grammar = message.sampling.grammar
        if grammar is None:
            return self.scheduler.submit(message)
        stop_ids = self.limits.stop_ids(message.sampling)
        mask = GrammarMask(self._grammars.compile(grammar), stop_ids, self.limits.eos_ids)
        return self.scheduler.submit(message, mask)

    def abort(self, rid: int) -> None:
        """End a request with a row in the next batch; an unknown or ended one is ignored."""
        request = self.scheduler.abort(rid)
        if request is None:
            return
        if not request.output_len:
            self._ended.opened.append(_stream_open(request))
        self._ended.rids.append(rid)
        self._ended.token_ids.append(NO_TOKEN)
        self._ended.finishes.append(FinishReason.ABORT)

    def step(self) -> TokenBatch | None:
        """Launch the next step and retire the oldest; None without new rows. Rows of aborted requests go first.

        An engine that runs ahead has the next step launched before the last one's tokens are read, so the device need
        not wait for the host in between.

        An exception is the engine's and leaves the core unusable: call `fail_all`, and start a new one.
        """
        if self._ended.rids:
            batch, self._ended = self._ended, self._empty_batch()
            return batch
        scheduler = self.scheduler
        self.engine.stay_ahead(scheduler.pages.taken_once)
        beside_decodes = None
        if self._pacer:
            beside_decodes = self._pacer.prompt_tokens(scheduler.running, scheduler.waiting_for_each())
        plan = scheduler.plan(beside_decodes)
        if plan is not None:
            self._in_flight.append((plan, timeline.now(), self.engine.launch(plan)))
        if plan is None and not self._in_flight:
            # All there is waits for its grammar.
            self._grammars.wait(GRAMMAR_WAIT_SECONDS)
            return None
        if len(self._in_flight) <= (plan is not None and self.engine.runs_ahead):
            return None
        return self._retire(*self._in_flight.popleft())

    def _retire(self, plan: StepPlan, launched: int, step: Any) -> TokenBatch | None:
        token_ids = self.engine.retire(step)
        sampled = self.scheduler.retire(plan, token_ids, self.engine.logprobs(step))
        retired = timeline.now()
        self._steps += 1
        self._tokens_generated += len(sampled.rids)
        self._last_step_ms = (retired - launched) / 1e6
        if self._pacer:
            prompt_tokens = sum(row.length for row in plan.rows[plan.decode_rows :])
            self._pacer.observe(plan.decode_rows, prompt_tokens, (retired - launched) / 1e9)
        if self._narrate:
            self._tell_prefills(plan)
        if not sampled.rids:
            return None
        return TokenBatch(
            self._replica,
            self._epoch,
            plan.step,
            launched,
            retired,
            [_stream_open(request) for request in sampled.opened],
            sampled.rids,
            sampled.token_ids,
            sampled.finishes,
            sampled.logprobs,
        )

    def take_refused(self) -> list[RequestError]:
        """The requests that could not go on, as errors: those whose grammar turned out wrong. Call it after a step."""
        return self.scheduler.take_refused()

    def close(self) -> None:
        """End what runs beside the steps."""
        self._grammars.close()

    def fail_all(self, status: int, code: str, message: str) -> list[RequestError]:
        """The errors that end every request; the core is of no use afterwards."""
        rids = [*self.scheduler.rids(), *self._ended.rids]
        return [RequestError(rid, status, code, message) for rid in rids]

    def info(self) -> JsonObject:
        """What was decided at start."""
        pages = self.scheduler.pages
        return {
            "device": self.engine.device_name,
            "dtype": self.engine.dtype_name,
            "kv_tokens": pages.total * pages.page_size,
            "page_size": pages.page_size,
            "max_running_requests": self.limits.max_running,
            "chunked_prefill_size": self.limits.step_tokens,
            "context_length": self.limits.context_length,
        }

    def stats(self) -> JsonObject:
        """Gauges and counters of now; walks the running requests. Pages that are merely cached count as free, too."""
        scheduler = self.scheduler
        return {
            "running": scheduler.running,
            "waiting": scheduler.waiting,
            "kv_pages_free": scheduler.available_pages,
            "kv_pages_evictable": scheduler.cache.evictable_pages if scheduler.cache else 0,
            "kv_pages_total": scheduler.pages.total,
            "kv_pages_leaked": scheduler.leaked_pages(),
            "preemptions": scheduler.preemptions,
            "steps": self._steps,
            "step_ms": round(self._last_step_ms, 3),
            "tokens_generated": self._tokens_generated,
        }

    def _empty_batch(self) -> TokenBatch:
        return TokenBatch(self._replica, self._epoch, 0, 0, 0)

    def _tell_prefills(self, plan: StepPlan) -> None:
        for row in plan.rows[plan.decode_rows :]:
            logger.info(
                "request %d: prefill of tokens %d..%d (%d tokens, cached %d) took %.2f ms",
                row.request.rid,
                row.start,
                row.start + row.length - 1,
                row.length,
                row.request.cached_tokens,
                self._last_step_ms,
            )


def scheduler_limits(config: ServerConfig, model: ModelSpec, device_name: str) -> SchedulerLimits:
    """The limits that the settings, the model and the device lead to."""
    on_cuda = device_name.startswith("cuda")
    return SchedulerLimits(
        context_length=config.context_length or model.context_length,
        max_running=config.max_running_requests or (256 if on_cuda else 64),
        step_tokens=config.chunked_prefill_size or (8192 if on_cuda else 512),
        eos_ids=frozenset(token_id for token_id in model.eos_token_ids if token_id < model.vocab_size),
        vocab_size=model.vocab_size,
        fine_chunk=FINE_CHUNK if on_cuda and config.chunked_prefill_size is None else None,
    )


def _stream_open(request: Request) -> StreamOpen:
    """Introduce a request to the detokenizer; its stamps then reach up to "first_token", also when it never ran."""
    now = timeline.now()
    sampling = request.sampling
    return StreamOpen(
        request.rid,
        request.prompt_len,
        request.cached_tokens,
        list(sampling.stop),
        sampling.skip_special_tokens,
        sampling.no_stop_trim,
        [*request.stamps, request.scheduled_ns or now, now],
        sampling.min_new_tokens,
    )
