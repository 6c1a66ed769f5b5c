"""The tokenizer process: the loop, and what happens to one request."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from minisgl import timeline
from minisgl.channels import Peers
from minisgl.config import WorkerSpec
from minisgl.messages import (
    AbortRequest,
    DetokenizeRequest,
    FlushCache,
    GenerateRequest,
    JsonObject,
    Message,
    RequestError,
    Shutdown,
    TextAnswer,
    TokenizedRequest,
    TokenizeRequest,
    WorkerDown,
    WorkerUp,
    http_worker_of,
)
from minisgl.tokenizer_proc.dispatcher import Dispatcher
from minisgl.tokenizer_proc.encode import PromptEncoder, PromptRefused, PromptText
from minisgl.tokenizer_proc.known_words import LONGEST_TEXT
from minisgl.tokenizer_proc.router import make_router
from minisgl.tokenizer_proc.slow_lane import SlowLane
from minisgl.worker import IDLE_MS, Worker

logger = logging.getLogger(__name__)

T = TypeVar("T")
LONG_PROMPT_CHARS = LONGEST_TEXT
"""Texts above this (some 5 ms of work) go to the slow lane."""
SLOW_LANE_POLL_MS = 1
TEMPLATE_SECONDS = 2.0
"""How long the chat template may take for one request."""


def main(worker: Worker) -> None:
    """Load the tokenizer, then serve until Shutdown."""
    inbox = worker.open_inbox(GenerateRequest, AbortRequest, TokenizeRequest, DetokenizeRequest, FlushCache)
    worker.progress("loading the tokenizer")
    # Texts are tokenized one by one, so the library's thread pool would only stand idle.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    model, trust_remote_code = worker.spec.model, worker.spec.config.trust_remote_code
    encoder = PromptEncoder.from_directory(
        model.directory, model.context_length, model.vocab_size, trust_remote_code, TEMPLATE_SECONDS
    )
    encoder.warm_up()
    service = TokenizerService(worker.spec, encoder)
    worker.ready({"chat_template": encoder.chat_template is not None})
    while True:
        worker.wait(service.patience_ms)
        for message in inbox.drain():
            if type(message) is Shutdown:
                service.close()
                return
            service.handle(message)
            worker.tick()
        service.finish_round()
        worker.stats.update(service.stats())


class TokenizerService:
    """Turns requests into token ids and has them dispatched; whatever goes wrong with one ends that one alone."""

    def __init__(self, spec: WorkerSpec, encoder: PromptEncoder) -> None:
        self._encoder = encoder
        self._narrate = spec.config.narrate
        self._http = Peers("http", spec.config.http_workers)
        self._dispatcher = Dispatcher(spec.replicas, make_router(spec.config.load_balance_method, first=spec.index))
        self._slow_lane = SlowLane()
        self._gone_http_lives: set[tuple[int, int]] = set()
        self._counters: Counter[str] = Counter()

    @property
    def patience_ms(self) -> int:
        """How long the loop may sleep when nothing arrives."""
        return SLOW_LANE_POLL_MS if self._slow_lane.requests else IDLE_MS

    def stats(self) -> JsonObject:
        return {
            **self._counters,
            "held": len(self._dispatcher.held),
            "in_slow_lane": len(self._slow_lane.requests),
        }

    def handle(self, message: Message) -> None:
        """React to one message from the inbox."""
        if type(message) is GenerateRequest:
            self._take(message)
        elif type(message) is AbortRequest:
            self._abort(message)
        elif isinstance(message, (TokenizeRequest, DetokenizeRequest)):
            self._answer(message)
        elif type(message) is FlushCache:
            self._dispatcher.flush_caches(message)
        elif type(message) is WorkerUp:
            self._http.up(message)
            self._dispatcher.up(message)
        elif type(message) is WorkerDown:
            self._dispatcher.down(message)
            http_index = self._http.down(message.worker, message.epoch)
            if http_index is not None:
                self._forget_requests_of(http_index, message.epoch)

    def finish_round(self) -> None:
        """Pass on what the slow lane has done, and tell http which replica got which request."""
        for rid, deliver, result in self._slow_lane.finished():
            if isinstance(result, BaseException):
                self._answer_error(rid, result)
            else:
                deliver(result)
        for http_index, announcement in self._dispatcher.take_announcements():
            self._http.send(http_index, announcement)

    def close(self) -> None:
        """End what no replica has yet with an error."""
        errors = [
            RequestError(rid, 503, "shutting_down", "the server is shutting down")
            for rid in (*self._dispatcher.held, *self._slow_lane.requests)
        ]
        for index in range(len(self._http.names)):
            self._http.deliver(index, [error for error in errors if http_worker_of(error.rid)[0] == index])
        self._http.close()
        self._dispatcher.close()

    def _take(self, request: GenerateRequest) -> None:
        request.stamps.append(timeline.now())
        if not self._is_answerable(request.rid):
            return
        self._counters["requests"] += 1
        try:
            prompt = self._encoder.render(request.prompt, request.template)
            if not isinstance(prompt, PromptText):
                self._dispatch(request, prompt)
            else:
                tokenize = partial(self._encoder.tokenize, prompt)
                self._work(request.rid, len(prompt.text), tokenize, partial(self._dispatch, request))
        except BaseException as error:  # a panic of the native library is no Exception
            self._answer_error(request.rid, error)

    def _answer(self, request: TokenizeRequest | DetokenizeRequest) -> None:
        """Tell http the token ids of a text, or the text of token ids."""
        rid = request.rid
        if not self._is_answerable(rid):
            return
        try:
            if isinstance(request, DetokenizeRequest):
                token_ids = request.token_ids
                detokenize = partial(self._encoder.detokenize, token_ids, request.skip_special_tokens)
                self._work(rid, len(token_ids), detokenize, lambda text: self._send_text(rid, text, token_ids))
                return
            prompt = self._encoder.render(request.prompt, request.template)
            if not isinstance(prompt, PromptText):
                raise PromptRefused("empty_prompt", "a chat needs at least one message")
            text = prompt.text
            tokenize = partial(self._encoder.tokenize, PromptText(text, request.add_special_tokens))
            self._work(rid, len(text), tokenize, lambda token_ids: self._send_text(rid, text, token_ids))
        except BaseException as error:  # a panic of the native library is no Exception
            self._answer_error(rid, error)

    def _work(self, rid: int, size: int, work: Callable[[], T], deliver: Callable[[T], None]) -> None:
        """Do it now, or in the slow lane if it is a lot."""
        if size > LONG_PROMPT_CHARS:
            self._slow_lane.submit(rid, work, deliver)
        else:
            deliver(work())

    def _is_answerable(self, rid: int) -> bool:
        http_life = http_worker_of(rid)
        if http_life[0] in range(len(self._http.names)) and http_life not in self._gone_http_lives:
            return True
        self._counters["unanswerable"] += 1
        return False

    def _dispatch(self, request: GenerateRequest, input_ids: list[int]) -> None:
        try:
            self._encoder.check(input_ids, request.sampling.max_new_tokens)
        except PromptRefused as refusal:
            self._answer_error(request.rid, refusal)
            return
        if self._narrate:
            elapsed_ms = (time.monotonic_ns() - request.stamps[-1]) / 1e6
            logger.info("request %d: tokenized to %d ids in %.2f ms", request.rid, len(input_ids), elapsed_ms)
        self._dispatcher.dispatch(TokenizedRequest(request.rid, input_ids, request.sampling, request.stamps))

    def _abort(self, message: AbortRequest) -> None:
        """End a request that is still here; an abort of any other follows it to the replicas."""
        if self._slow_lane.cancel(message.rid) or self._dispatcher.withdraw(message.rid):
            self._send_error(RequestError(message.rid, 499, "aborted", "the request was aborted before it started"))
        else:
            self._dispatcher.abort(message)

    def _forget_requests_of(self, http_index: int, epoch: int) -> None:
        """Drop the requests of a dead http process; the schedulers do the same with those they have."""
        self._gone_http_lives.add((http_index, epoch))
        for rid in (*self._dispatcher.held, *self._slow_lane.requests):
            if http_worker_of(rid) == (http_index, epoch):
                self._dispatcher.withdraw(rid)
                self._slow_lane.cancel(rid)

    def _answer_error(self, rid: int, error: BaseException) -> None:
        if isinstance(error, PromptRefused):
            self._counters["refused"] += 1
            self._send_error(RequestError(rid, 400, error.code, str(error)))
        else:
            self._counters["errors"] += 1
            logger.error("request %d: tokenizing failed", rid, exc_info=error)
            self._send_error(RequestError(rid, 500, "tokenizer_error", f"the prompt could not be tokenized: {error}"))

    def _send_text(self, rid: int, text: str, token_ids: list[int]) -> None:
        self._http.send(http_worker_of(rid)[0], TextAnswer(rid, text, token_ids))

    def _send_error(self, error: RequestError) -> None:
        self._http.send(http_worker_of(error.rid)[0], error)
