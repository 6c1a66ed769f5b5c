"""The request table and its dispatcher: between the ring's messages and the clients' streams.

A request is in the table, under its present ring id, from `submit` until its terminal event - a row with a finish
reason, or an error. All messages that wait are taken in one go, their text collects per client, and each client touched
is then written to once. Nothing here awaits, so no client can hold up another.
"""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minisgl.channels import Peers
from minisgl.config import WorkerSpec
from minisgl.http import recovery
from minisgl.http.answers import Stream
from minisgl.http.errors import ApiError
from minisgl.http.figures import Figures
from minisgl.http.protocol import STALL_SECONDS
from minisgl.http.recovery import Fate, Verdict, WorkerLives
from minisgl.messages import (
    AbortRequest,
    DeltaBatch,
    Dispatched,
    FinishReason,
    GenerateRequest,
    JsonObject,
    Opening,
    RequestError,
    WorkerDown,
    WorkerUp,
    make_request_id,
)
from minisgl.timeline import STAMPS, now, total_us

if TYPE_CHECKING:
    from minisgl.http.tracing import RequestTracer

logger = logging.getLogger(__name__)

MAX_HELD_BYTES = 256 * 2**20
"""Held for all clients that do not read; past it those are given up that have been reading nothing the longest."""


class Streams:
    """All requests between this process and the ring.

    Attributes:
        draining: why new requests are refused ("" while they are not).
        elsewhere: requests that the other http workers have in flight.
        figures: what the requests took, for GET /metrics.
        replayed: requests sent again after a death.
        late_rows: rows and errors for ids that nobody waits for any more.
    """

    def __init__(self, spec: WorkerSpec, tracer: RequestTracer | None = None) -> None:
        self.draining = ""
        self.elsewhere = 0
        self.figures = Figures()
        self._tracer = tracer
        self.replayed = 0
        self.late_rows = 0
        self._spec = spec
        self._narrate = spec.config.narrate
        self._tokenizers = Peers("tokenizer", spec.config.tokenizer_workers)
        self._lives = WorkerLives()
        config = spec.config
        counts = {
            "tokenizer": config.tokenizer_workers,
            "detokenizer": config.detokenizer_workers,
            "scheduler": spec.replicas,
        }
        self._workers = {f"{kind}-{index}": (kind, index) for kind, count in counts.items() for index in range(count)}
        self._counter = itertools.count(1)
        self._table: dict[int, Stream] = {}
        self._dirty: dict[Stream, None] = {}
        self._open: set[Stream] = set()

    # ---- from the routes ---------------------------------------------------------------------------------------------

    def check_admission(self, count: int = 1) -> None:
        """Raise a 503 when this many requests cannot be taken now, a 400 when they never can."""
        if self.draining:
            raise ApiError(
                503, "draining", f"the server is {self.draining}; send the request again later", retry_after=1
            )
        limit = self._spec.config.max_queued_requests
        if count > limit:
            too_many = f"the request asks for {count} answers, and this server takes at most {limit} at a time"
            raise ApiError(400, "too_many_answers", too_many)
        if len(self._table) + self.elsewhere + count > limit:
            full = f"the server already has {limit} requests in flight; try again in a moment"
            raise ApiError(503, "queue_full", full, retry_after=1)

    def submit(self, streams: list[Stream]) -> Response:
        """Send the requests of one response round the ring; what is returned is written by the dispatcher."""
        for stream in streams:
            stream.siblings = streams
            self._send(stream)
        self._open.update(streams)
        return _DispatchedResponse(streams, self)

    def close(self, streams: list[Stream]) -> None:
        """The response is over, or its client is gone: abort what still runs, and account for the request."""
        self._open.difference_update(streams)
        self._abandon(streams)
        outcome, detail = _outcome_of(streams)
        if self._narrate:
            for stream in streams:
                logger.info("%s summary: %s", stream.call.request_id, _summary(stream))
        streams[0].call.end(outcome, detail)
        for stream in streams:
            self.figures.measure(stream, outcome)
            if self._tracer is not None:
                self._tracer.record(stream, outcome)
            stream.siblings = []

    def abort_named(self, name: str | None) -> None:
        """Have the requests end that clients know by this name (None: all); their clients get what there is so far."""
        for stream in self._table.values():
            if not stream.aborting and name in (None, stream.name, stream.call.request_id):
                self._abort(stream)

    # ---- from the ring -----------------------------------------------------------------------------------------------

    def take_deltas(self, batch: DeltaBatch) -> None:
        arrived = now()
        self.figures.take(batch)
        openings = {opening.row: opening for opening in batch.openings}
        if batch.logprobs:
            self._take_logprobs(batch)
        columns = zip(batch.rids, batch.texts, batch.token_counts, batch.finishes, strict=True)
        end = 0
        for row, (rid, text, token_count, finish) in enumerate(columns):
            begin, end = end, end + token_count
            stream = self._table.get(rid)
            if stream is None:
                self.late_rows += 1
                continue
            if not stream.aborting:
                if stream.reads_only:
                    text, token_count = "", 0
                if row in openings:
                    _begin(stream, openings[row], arrived, token_count)
                stream.completion_tokens += token_count
                stream.last_ns = arrived
                if stream.steps_ns is not None:
                    # A step brings one token: who begins here was in the last of them, who ends here in the first.
                    skipped = max(len(batch.steps_ns) - 2 * (end - begin), 0) if row in openings else 0
                    stream.steps_ns += batch.steps_ns[skipped : skipped + 2 * (end - begin)]
                stream.sink.delta(stream, text, batch.token_ids[begin : begin + token_count])
                self._dirty[stream] = None
            if finish:
                del self._table[rid]
                if not stream.aborting:
                    stream.finish, stream.matched = finish, batch.matched.get(row)
                    stream.sink.done(stream)

    def take_error(self, error: RequestError) -> None:
        stream = self._table.get(error.rid)
        if stream is None:
            self.late_rows += 1
        elif stream.aborting:
            del self._table[error.rid]
        else:
            refusal = ApiError.from_ring(error)
            if refusal.code == "invalid_grammar":
                refusal.param = stream.grammar_field
            elif refusal.code == "unknown_template_variable":
                refusal.param = "chat_template_kwargs"
            self._fail(stream, refusal)

    def take_dispatched(self, message: Dispatched) -> None:
        dead = self._lives.is_dead(f"scheduler-{message.replica}", message.epoch)
        for rid in message.rids:
            stream = self._table.get(rid)
            if stream is None:
                continue
            stream.replica = (message.replica, message.epoch)
            if dead:
                self._apply(recovery.scheduler_died(stream), stream, f"scheduler-{message.replica}")

    def worker_up(self, message: WorkerUp) -> None:
        self._lives.up(message.worker, message.epoch)
        self._tokenizers.up(message)

    def worker_down(self, message: WorkerDown) -> None:
        if message.worker not in self._workers or not self._lives.down(message.worker, message.epoch):
            return
        self._tokenizers.down(message.worker, message.epoch)
        kind, index = self._workers[message.worker]
        config = self._spec.config
        for stream in list(self._table.values()):
            if kind == "scheduler" and stream.replica == (index, message.epoch):
                self._apply(recovery.scheduler_died(stream), stream, message.worker)
            elif kind == "tokenizer" and stream.rid % config.tokenizer_workers == index:
                self._apply(recovery.tokenizer_died(stream), stream, message.worker)
            elif kind == "detokenizer" and stream.rid % config.detokenizer_workers == index:
                self._apply(recovery.detokenizer_died(stream), stream, message.worker)

    def fail_all(self, error: ApiError) -> None:
        for stream in list(self._table.values()):
            if stream.aborting:
                del self._table[stream.rid]
            else:
                self._fail(stream, error)
        self.flush()

    def flush(self) -> None:
        """Write to every client that the messages taken since the last flush have touched."""
        for stream in self._dirty:
            stream.sink.flush(stream)
        self._dirty.clear()

    def _take_logprobs(self, batch: DeltaBatch) -> None:
        for part in batch.logprobs:
            stream = self._table.get(batch.rids[part.row])
            if stream is None or stream.aborting:
                continue
            if part.of_prompt:
                stream.prompt_logprobs.append(part)
            elif not stream.reads_only:
                stream.logprobs.append(part)

    # ---- upkeep ------------------------------------------------------------------------------------------------------

    def drop_stalled(self) -> None:
        """Give up clients that have not read for STALL_SECONDS, and more of them while MAX_HELD_BYTES is exceeded."""
        limit = now() - STALL_SECONDS * 10**9
        parked = {stream.writer for stream in self._open if stream.writer.parked_since_ns}
        held = sum(writer.held_bytes() for writer in parked)
        for writer in sorted(parked, key=lambda writer: writer.parked_since_ns):
            if writer.parked_since_ns >= limit and held <= MAX_HELD_BYTES:
                break
            held -= writer.held_bytes()
            seconds = (now() - writer.parked_since_ns) / 1e9
            writer.drop(f"client did not read for {seconds:.1f} s")

    def snapshot(self) -> JsonObject:
        return {
            "streams": len(self._table),
            "aborting": sum(stream.aborting for stream in self._table.values()),
            "slow_clients": sum(stream.writer.parked_since_ns > 0 for stream in self._open),
            "draining": bool(self.draining),
            "replayed": self.replayed,
            "late_rows": self.late_rows,
        }

    def shut(self) -> None:
        self._tokenizers.close()

    def _send(self, stream: Stream) -> None:
        """Give the stream a ring id and send it on; messages for a tokenizer that is down wait in Peers."""
        stream.rid = make_request_id(self._spec.index, self._spec.epoch, next(self._counter))
        stream.stamps = [stream.call.received_ns, now()]
        template = stream.template or {}
        request = GenerateRequest(stream.rid, stream.prompt, stream.sampling, list(stream.stamps), template)
        self._tokenizers.send(stream.rid % self._spec.config.tokenizer_workers, request)
        self._table[stream.rid] = stream
        if self._narrate:
            logger.info("%s is request %d on the ring", stream.call.request_id, stream.rid)

    def _abort(self, stream: Stream) -> None:
        self._tokenizers.send(stream.rid % self._spec.config.tokenizer_workers, AbortRequest(stream.rid))

    def _abandon(self, streams: list[Stream]) -> None:
        """Abort those that still run; nobody waits for them any more."""
        for stream in streams:
            if stream.rid in self._table and not stream.aborting:
                stream.aborting = True
                self._abort(stream)

    def _fail(self, stream: Stream, error: ApiError) -> None:
        """End a stream, and with it its response, with an error."""
        del self._table[stream.rid]
        self._abandon(stream.siblings)
        stream.error = error
        stream.sink.fail(stream, error)
        self._dirty[stream] = None

    def _apply(self, verdict: Verdict, stream: Stream, worker: str) -> None:
        if verdict.abort:
            self._abort(stream)
        if verdict.fate is Fate.FORGET:
            del self._table[stream.rid]
        elif verdict.fate is Fate.FAIL:
            lost = f"{worker} died while it worked on this request; send it again"
            self._fail(stream, ApiError(503, "worker_lost", lost, retry_after=1))
        elif verdict.fate is Fate.REPLAY:
            del self._table[stream.rid]
            stream.restart()
            stream.replays += 1
            self.replayed += 1
            self._send(stream)
            logger.info("%s is sent again: %s died", stream.call.request_id, worker)


class _DispatchedResponse(Response):
    """Waits for the end of a response that the dispatcher writes.

    The server wakes a parked `receive` when the client goes, and after the last byte; nothing else happens here.
    """

    def __init__(self, answers: list[Stream], streams: Streams) -> None:
        super().__init__()
        self._answers = answers
        self._streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            while (await receive())["type"] != "http.disconnect":
                pass
        finally:
            self._streams.close(self._answers)


def _begin(stream: Stream, opening: Opening, arrived: int, token_count: int) -> None:
    stream.prompt_tokens = opening.prompt_tokens
    stream.cached_tokens = opening.cached_tokens
    stream.stamps = [*opening.stamps, arrived]
    stream.first_ns = arrived
    stream.first_tokens = token_count


def _outcome_of(streams: list[Stream]) -> tuple[str, str]:
    """How a closed response is counted, and what its log line says."""
    writer, counts = streams[0].writer, _counts(streams)
    error = next((stream.error for stream in streams if stream.error is not None), None)
    if writer.dropped:
        return "aborted", f"{writer.dropped} {counts}"
    if error is not None:
        return error.outcome, f"{error.status} {error.code} {counts}"
    if not writer.complete:
        return "aborted", f"client disconnected {counts}"
    finishes = {stream.finish for stream in streams}
    outcome = "aborted" if FinishReason.ABORT in finishes else "ok"
    return outcome, f"200 {'+'.join(finish.name.lower() for finish in sorted(finishes))} {counts}"


def _counts(streams: list[Stream]) -> str:
    answers = f"answers={len(streams)} " if len(streams) > 1 else ""
    prompt = sum(stream.prompt_tokens for stream in streams)
    completion = sum(stream.completion_tokens for stream in streams)
    first_bytes = [total_us(stream.stamps) / 1e3 for stream in streams if len(stream.stamps) == len(STAMPS)]
    ttfb = f"{min(first_bytes):.1f}ms" if first_bytes else "-"
    return f"{answers}prompt={prompt} completion={completion} ttfb={ttfb}"


def _summary(stream: Stream) -> str:
    timing = stream.timing()
    hops = ", ".join(f"{name} {us / 1e3:.2f}" for name, us in timing["hops_us"].items())
    return (
        f"{stream.prompt_tokens} prompt tokens ({stream.cached_tokens} cached), "
        f"{stream.completion_tokens} answer tokens in {stream.writer.chunks} chunks, "
        f"{timing['total_ms']:.1f} ms, {timing['tokens_per_second']:.1f} tokens/s; "
        f"first byte after {timing['ttfb_us'] / 1e3:.2f} ms: {hops}"
    )
