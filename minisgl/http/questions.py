"""Questions to the other processes that are not requests for text: token ids, texts, and an empty prefix cache.

Each question has a ring id and a deadline. One whose way leads through a process that dies is asked once more, since
its answer may have died there; after that, and after the deadline, whoever asked gets an error.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from minisgl.channels import Peers
from minisgl.config import WorkerSpec
from minisgl.http.errors import ApiError
from minisgl.http.recovery import WorkerLives
from minisgl.messages import (
    CacheFlushed,
    DetokenizeRequest,
    FlushCache,
    RequestError,
    TextAnswer,
    TokenizeRequest,
    WorkerDown,
    WorkerUp,
    make_request_id,
)

ANSWER_SECONDS = 30.0
MAX_OPEN = 2**16
_FIRST_ID = 2**39
"""The upper half of the ids of this process; streaming.py counts through the lower half."""


@dataclass(eq=False, slots=True)
class _Question:
    """A question that is open.

    Attributes:
        ask: makes the message for a ring id.
        missing, busy: of a flush, the replicas that have not answered, and those that could not do it.
    """

    ask: Callable[[int], TokenizeRequest | DetokenizeRequest | FlushCache]
    answer: asyncio.Future[Any]
    rid: int = 0
    asked_again: bool = False
    missing: set[int] = field(default_factory=set)
    busy: set[int] = field(default_factory=set)


class Questions:
    """The questions that this http process has put to the ring."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._tokenizers = Peers("tokenizer", spec.config.tokenizer_workers)
        self._lives = WorkerLives()
        self._replicas_up: set[int] = set()
        self._counter = itertools.count(_FIRST_ID)
        self._open: dict[int, _Question] = {}

    # ---- from the routes ---------------------------------------------------------------------------------------------

    async def text(self, ask: Callable[[int], TokenizeRequest | DetokenizeRequest]) -> TextAnswer:
        """A text and its token ids; raises ApiError.

        Args:
            ask: makes the message for a ring id.
        """
        answer: TextAnswer = await self._answer(_Question(ask, asyncio.get_running_loop().create_future()))
        return answer

    async def flush_cache(self) -> set[int]:
        """Have every replica forget its cached prefixes; those that could not because requests run or wait there.

        A replica that is down has nothing to forget.
        """
        busy: set[int] = await self._answer(_Question(FlushCache, asyncio.get_running_loop().create_future()))
        return busy

    # ---- from the ring -----------------------------------------------------------------------------------------------

    def take_answer(self, message: TextAnswer) -> None:
        question = self._open.pop(message.rid, None)
        if question is not None:
            _settle(question, message)

    def take_error(self, error: RequestError) -> bool:
        """Whether this error is about a question."""
        question = self._open.pop(error.rid, None)
        if question is not None:
            _fail(question, ApiError.from_ring(error))
        return question is not None

    def take_flushed(self, message: CacheFlushed) -> None:
        question = self._open.get(message.rid)
        if question is None:
            return
        if not message.done:
            question.busy.add(message.replica)
        self._strike(question, message.replica)

    def worker_up(self, message: WorkerUp) -> None:
        self._lives.up(message.worker, message.epoch)
        self._tokenizers.up(message)
        kind, index = _kind_and_index(message.worker)
        if kind == "scheduler" and not self._lives.is_dead(message.worker, message.epoch):
            self._replicas_up.add(index)

    def worker_down(self, message: WorkerDown) -> None:
        if not self._lives.down(message.worker, message.epoch):
            return
        self._tokenizers.down(message.worker, message.epoch)
        kind, index = _kind_and_index(message.worker)
        if kind == "scheduler":
            self._replicas_up.discard(index)
            for question in list(self._open.values()):
                self._strike(question, index)
        counts = {
            "tokenizer": self._spec.config.tokenizer_workers,
            "detokenizer": self._spec.config.detokenizer_workers,
        }
        if kind in counts:
            for question in list(self._open.values()):
                if question.rid % counts[kind] == index and (kind == "tokenizer" or question.missing):
                    self._ask_again(question, message.worker)

    def fail_all(self, error: ApiError) -> None:
        for question in self._open.values():
            _fail(question, error)
        self._open.clear()

    def close(self) -> None:
        self._tokenizers.close()

    # ---- how a question is put ---------------------------------------------------------------------------------------

    async def _answer(self, question: _Question) -> Any:
        if len(self._open) >= MAX_OPEN:
            full = f"the server already has {MAX_OPEN} questions of this kind to answer; try again in a moment"
            raise ApiError(503, "queue_full", full, retry_after=1)
        self._put(question)
        try:
            return await asyncio.wait_for(question.answer, ANSWER_SECONDS)
        except asyncio.TimeoutError:
            late = f"no answer came within {ANSWER_SECONDS:.0f} s; the server may be overloaded, try again"
            raise ApiError(503, "no_answer", late, retry_after=1) from None
        finally:
            self._open.pop(question.rid, None)

    def _put(self, question: _Question) -> None:
        rid = question.rid = make_request_id(self._spec.index, self._spec.epoch, next(self._counter))
        message = question.ask(rid)
        self._open[rid] = question
        if isinstance(message, FlushCache):
            question.missing, question.busy = set(self._replicas_up), set()
            if not question.missing:
                self._settle_flush(question)
                return
        self._tokenizers.send(rid % self._spec.config.tokenizer_workers, message)

    def _ask_again(self, question: _Question, worker: str) -> None:
        del self._open[question.rid]
        if question.asked_again:
            lost = f"{worker} died while it worked on this; send it again"
            _fail(question, ApiError(503, "worker_lost", lost, retry_after=1))
            return
        question.asked_again = True
        self._put(question)

    def _strike(self, question: _Question, replica: int) -> None:
        """This replica has answered, or has died and with it what it had cached."""
        if replica in question.missing:
            question.missing.discard(replica)
            if not question.missing:
                self._settle_flush(question)

    def _settle_flush(self, question: _Question) -> None:
        del self._open[question.rid]
        _settle(question, question.busy)


def _settle(question: _Question, answer: Any) -> None:
    # Whoever asked may have given up.
    if not question.answer.done():
        question.answer.set_result(answer)


def _fail(question: _Question, error: ApiError) -> None:
    if not question.answer.done():
        question.answer.set_exception(error)


def _kind_and_index(worker: str) -> tuple[str, int]:
    kind, _, index = worker.rpartition("-")
    return kind, int(index)
