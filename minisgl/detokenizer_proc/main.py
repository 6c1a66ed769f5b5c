"""The detokenizer process: the loop, and what happens to the rows of one round."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from minisgl import timeline
from minisgl.channels import Peers
from minisgl.config import WorkerSpec
from minisgl.detokenizer_proc.incremental import TokenTexts
from minisgl.detokenizer_proc.shown_logprobs import ShownLogprobs
from minisgl.detokenizer_proc.stream import Delta, StreamDecoder
from minisgl.messages import (
    NO_TOKEN,
    AbortRequest,
    CacheFlushed,
    DeltaBatch,
    FinishReason,
    JsonObject,
    Logprobs,
    Message,
    Opening,
    RequestError,
    Shutdown,
    StreamOpen,
    TokenBatch,
    WorkerDown,
    WorkerUp,
    http_worker_of,
)
from minisgl.tokenizer_proc.tokenizer_files import load_tokenizer
from minisgl.worker import Worker

logger = logging.getLogger(__name__)


def main(worker: Worker) -> None:
    """Load the tokenizer, then serve until Shutdown."""
    inbox = worker.open_inbox(TokenBatch, RequestError, CacheFlushed)
    worker.progress("loading the tokenizer")
    spec = worker.spec
    service = DetokenizerService(spec, TokenTexts(load_tokenizer(spec.model.directory, spec.config.trust_remote_code)))
    worker.ready()
    while True:
        worker.wait()
        for message in inbox.drain():
            if type(message) is Shutdown:
                service.send_deltas()
                service.close()
                return
            service.handle(message)
        service.send_deltas()
        worker.stats.update(service.stats())


@dataclass(slots=True)
class Stream:
    """A request whose tokens are arriving.

    Attributes:
        opening: goes with its first row to http; None once sent.
        arrived: tokens of this round, not yet decoded.
        finish: how the scheduler has ended it in this round.
        cut: a stop string or an error ended it here; the scheduler has been told and its rows are ignored.
        tokens: how many tokens have arrived in all (kept when narrating).
        logprobs: what has arrived of them; None until something has.
    """

    rid: int
    http_index: int
    replica: int
    epoch: int
    decoder: StreamDecoder
    opening: StreamOpen | None
    arrived: list[int] = field(default_factory=list)
    finish: FinishReason = FinishReason.NONE
    cut: bool = False
    tokens: int = 0
    logprobs: ShownLogprobs | None = None


class DetokenizerService:
    """The streams of all running requests.

    Messages are first only sorted into their streams (`handle`); then each stream with news is decoded once, and each
    http worker gets one message (`send_deltas`). So the further behind this process is, the less each token costs.
    """

    def __init__(self, spec: WorkerSpec, texts: TokenTexts) -> None:
        self._texts = texts
        self._narrate = spec.config.narrate
        self._http = Peers("http", spec.config.http_workers)
        self._schedulers = Peers("scheduler", spec.replicas)
        self._live_epochs = [0] * spec.replicas
        """Per replica the first epoch that is not known to be dead."""
        self._streams: dict[int, Stream] = {}
        self._news: dict[int, Stream] = {}
        self._steps_ns: list[int] = []
        """When the steps of this round were launched and retired."""
        self._counters: Counter[str] = Counter()

    def stats(self) -> JsonObject:
        return {**self._counters, "streams": len(self._streams)}

    def handle(self, message: Message) -> None:
        """React to one message from the inbox; rows wait for `send_deltas`."""
        if type(message) is TokenBatch:
            self._take_rows(message)
        elif type(message) is RequestError:
            self._forward_error(message)
        elif type(message) is CacheFlushed:
            self._forward_answer(message)
        elif type(message) is WorkerUp:
            self._http.up(message)
            replica = self._schedulers.up(message)
            if replica is not None:
                self._live_epochs[replica] = max(self._live_epochs[replica], message.epoch)
        elif type(message) is WorkerDown:
            self._http.down(message.worker, message.epoch)
            self._schedulers.down(message.worker, message.epoch)
            replica = self._schedulers.index_of(message.worker)
            if replica is not None:
                self._forget_replica(replica, message.epoch)

    def send_deltas(self) -> None:
        """Decode what arrived since the last call and send each http worker its part."""
        steps_ns, self._steps_ns = self._steps_ns, []
        if not self._news:
            return
        news, self._news = self._news, {}
        batches: defaultdict[int, DeltaBatch] = defaultdict(DeltaBatch)
        for stream in news.values():
            if self._narrate:
                self._tell(stream)
            try:
                delta = stream.decoder.advance(stream.arrived, stream.finish)
                logprobs = []
                if stream.logprobs is not None and (delta.text or delta.finish):
                    logprobs = stream.logprobs.show(len(delta.token_ids), self._texts)
            except BaseException as error:  # a panic of the native library is no Exception
                self._fail(stream, error)
                continue
            stream.arrived.clear()
            if delta.finish:
                self._end(stream)
            elif not delta.text:
                continue
            _append_row(batches[stream.http_index], stream, delta, logprobs)
        sent_ns = timeline.now()
        for http_index, batch in batches.items():
            batch.steps_ns = steps_ns
            for opening in batch.openings:
                opening.stamps.append(sent_ns)
            self._http.send(http_index, batch)

    def close(self) -> None:
        self._http.close()
        self._schedulers.close()

    # ---- rows in ----

    def _take_rows(self, batch: TokenBatch) -> None:
        arrived_ns = timeline.now()
        if batch.replica not in range(len(self._live_epochs)) or batch.epoch < self._live_epochs[batch.replica]:
            self._counters["stale_rows"] += len(batch.rids)
            return
        self._steps_ns += (batch.launched_ns, batch.retired_ns)
        for opened in batch.opened:
            self._open(opened, batch, arrived_ns)
        for rid, token_id, finish in zip(batch.rids, batch.token_ids, batch.finishes, strict=True):
            stream = self._streams.get(rid)
            if stream is None or stream.finish:
                self._counters["unknown_rows"] += 1
            elif stream.cut:
                if finish:
                    del self._streams[rid]
            else:
                if token_id != NO_TOKEN:
                    stream.arrived.append(token_id)
                stream.finish = finish
                self._news[rid] = stream
        for part in batch.logprobs:
            stream = self._streams.get(batch.rids[part.row])
            if stream is not None:
                stream.logprobs = stream.logprobs or ShownLogprobs()
                stream.logprobs.add(part)

    def _open(self, opened: StreamOpen, batch: TokenBatch, arrived_ns: int) -> None:
        http_index, _ = http_worker_of(opened.rid)
        if http_index not in range(len(self._http.names)):
            return
        opened.stamps.append(arrived_ns)
        decoder = StreamDecoder(
            self._texts, opened.stop, opened.skip_special_tokens, opened.no_stop_trim, opened.min_new_tokens
        )
        self._streams[opened.rid] = Stream(opened.rid, http_index, batch.replica, batch.epoch, decoder, opened)

    def _forward_error(self, error: RequestError) -> None:
        # The request's rows that came before the error must leave before it.
        self.send_deltas()
        stream = self._streams.pop(error.rid, None)
        http_index, _ = http_worker_of(error.rid)
        if (stream is None or not stream.cut) and http_index in range(len(self._http.names)):
            self._http.send(http_index, error)

    def _forward_answer(self, answer: CacheFlushed) -> None:
        http_index, _ = http_worker_of(answer.rid)
        if http_index in range(len(self._http.names)):
            self._http.send(http_index, answer)

    def _forget_replica(self, replica: int, epoch: int) -> None:
        """Drop the streams of a dead scheduler; http knows which requests these are and what to do with them."""
        self.send_deltas()
        self._live_epochs[replica] = max(self._live_epochs[replica], epoch + 1)
        dead = [stream.rid for stream in self._streams.values() if stream.replica == replica and stream.epoch <= epoch]
        for rid in dead:
            del self._streams[rid]

    # ---- a stream's end ----

    def _end(self, stream: Stream) -> None:
        if stream.finish:
            del self._streams[stream.rid]
        else:
            self._cut(stream)

    def _cut(self, stream: Stream) -> None:
        """End a request that the scheduler still runs; its terminal row removes the stream."""
        stream.cut = True
        self._schedulers.send(stream.replica, AbortRequest(stream.rid))

    def _fail(self, stream: Stream, error: BaseException) -> None:
        """End one request with an error; nobody else notices."""
        logger.error("request %d: detokenizing failed", stream.rid, exc_info=error)
        self._counters["errors"] += 1
        self._end(stream)
        answer = RequestError(stream.rid, 500, "detokenizer_error", f"the answer could not be decoded: {error}")
        self._http.send(stream.http_index, answer)

    def _tell(self, stream: Stream) -> None:
        for token_id in stream.arrived:
            stream.tokens += 1
            logger.info(
                "request %d: decode step %d: token id %d -> %s",
                stream.rid,
                stream.tokens,
                token_id,
                self._texts.describe(token_id),
            )


def _append_row(batch: DeltaBatch, stream: Stream, delta: Delta, logprobs: list[Logprobs]) -> None:
    row = len(batch.rids)
    if stream.opening is not None:
        opened, stream.opening = stream.opening, None
        batch.openings.append(Opening(row, opened.prompt_tokens, opened.cached_tokens, opened.stamps))
    if delta.matched is not None:
        batch.matched[row] = delta.matched
    for part in logprobs:
        part.row = row
        batch.logprobs.append(part)
    batch.rids.append(stream.rid)
    batch.texts.append(delta.text)
    batch.token_counts.append(len(delta.token_ids))
    batch.token_ids.extend(delta.token_ids)
    batch.finishes.append(delta.finish)
