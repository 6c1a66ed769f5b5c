"""One request's grammar at work: which tokens may come next, and what that may cost. No torch, no xgrammar import."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any

import numpy as np
import numpy.typing as npt

from minisgl.scheduler_proc.adjustments import Refusal, withdraw

logger = logging.getLogger(__name__)

FREE_SECONDS = 0.03
SECONDS_PER_TOKEN = 0.001
"""CPU time that a request's grammar may take in the scheduler's loop: that much at once, and that much per token.

A usual grammar takes 0.01 to 0.1 ms a token. Ambiguous ones (`(a|aa|[a-z]+)*`) take longer with every token.
"""
COUNTED_SECONDS = 0.4 * FREE_SECONDS
"""Of one call at most: a virtual machine that loses its core has the time away counted as its own, and no grammar is to
blame for a single such moment."""


class GrammarRefused(Exception):
    """A grammar was not compiled; `refusal` is for the client."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


class GrammarMask:
    """The TokenMask of a request whose grammar may still be compiled.

    Args:
        compiled: an xgrammar.CompiledGrammar, or a GrammarRefused, now or later.
        stop_ids: token ids that end the answer.
        eos_ids: the model's; one may end an answer that can only end, whether or not it is in stop_ids (ignore_eos).
    """

    def __init__(self, compiled: Future[Any], stop_ids: frozenset[int], eos_ids: frozenset[int]) -> None:
        self.problem: Refusal | None = None
        self._compiled = compiled
        self._stop_ids = sorted(stop_ids | eos_ids)
        self._withheld = sorted(eos_ids - stop_ids)
        self._state: GrammarState | None = None

    @property
    def ready(self) -> bool:
        """Whether the request need not wait any longer: tokens can be masked, or there is a `problem`."""
        if self._state is None and self.problem is None and self._compiled.done():
            self._take(self._compiled)
        return self._state is not None or self.problem is not None

    @property
    def ended(self) -> bool:
        return self._state is not None and self._state.ended

    def fill(self, row: npt.NDArray[np.int32]) -> None:
        assert self._state is not None
        self._state.fill(row)

    def accept(self, token_id: int) -> None:
        assert self._state is not None
        self._state.accept(token_id)
        self.problem = self._state.problem

    def _take(self, compiled: Future[Any]) -> None:
        error = compiled.exception()
        if isinstance(error, GrammarRefused):
            self.problem = error.refusal
        elif error is not None:
            logger.error("a grammar could not be compiled", exc_info=error)
            self.problem = Refusal(500, "grammar_compiler_failed", f"the grammar compiler failed: {error}")
        else:
            # Imported by the thread that read the grammar.
            from xgrammar import GrammarMatcher

            matcher = GrammarMatcher(compiled.result(), override_stop_tokens=self._stop_ids or None)
            self._state = GrammarState(matcher, self._withheld)


class GrammarState:
    """How far one answer has come in its grammar.

    Args:
        matcher: an xgrammar.GrammarMatcher whose stop tokens are the request's stop ids and the model's EOS ids.
        withheld: stop ids that may come only when nothing else may.

    Attributes:
        ended: the last token completed the answer.
        problem: why there can be no further token.
    """

    def __init__(self, matcher: Any, withheld: Iterable[int] = ()) -> None:
        self.ended = False
        self.problem: Refusal | None = None
        self._matcher = matcher
        self._withheld = tuple(withheld)
        self._allowance = FREE_SECONDS
        self._at_end = False

    def fill(self, row: npt.NDArray[np.int32]) -> None:
        """Write every word of `row`, as adjustments.TokenMask says."""
        started = time.thread_time()
        if not self._matcher.fill_next_token_bitmask(row):
            row.fill(-1)
        if self._withheld:
            withdraw(row, self._withheld)
        if not row.any():
            self._note_dead_end()
            row.fill(-1)
        self._allowance -= min(time.thread_time() - started, COUNTED_SECONDS)

    def accept(self, token_id: int) -> None:
        """The answer's next token."""
        if self.problem or self.ended:
            return
        if self._at_end:
            self.ended = True
            return
        started = time.thread_time()
        accepted = self._matcher.accept_token(token_id)
        self.ended = self._matcher.is_terminated()
        self._allowance += SECONDS_PER_TOKEN - min(time.thread_time() - started, COUNTED_SECONDS)
        if not accepted:
            self.problem = Refusal(500, "grammar_violated", f"the model chose token {token_id} against the grammar")
        elif self._allowance < 0:
            self.problem = Refusal(
                400, "invalid_grammar", "the grammar takes too much time for each token: make it less ambiguous"
            )

    def _note_dead_end(self) -> None:
        # Without any stop id a complete answer looks like this; whatever token comes then only ends it.
        self._at_end = bool(self._matcher.is_completed())
        if not self._at_end:
            self.problem = Refusal(
                400, "invalid_grammar", "the grammar has come to a place where no token of this model can follow"
            )
