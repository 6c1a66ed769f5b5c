"""What a request's own history and wishes do to its next token's logits: biases, penalties, and masks. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from minisgl.sampling_params import SamplingParams


class TokenMask(Protocol):
    """Says which tokens may come next; made for one request, and told each of its tokens in order."""

    @property
    def ready(self) -> bool:
        """Whether it can say so yet, or has a problem; its request waits for that."""

    @property
    def problem(self) -> Refusal | None:
        """Why the request cannot go on."""

    @property
    def ended(self) -> bool:
        """Whether the last token has completed the answer."""

    def fill(self, row: npt.NDArray[np.int32]) -> None:
        """Write every word of `row`, int32 [ceil(vocab / 32)]: bit i % 32 of word i // 32 set means token i may come.

        At least one token of the vocabulary must be allowed.
        """

    def accept(self, token_id: int) -> None:
        """The request's next token, the one that ends it included."""


class Refusal(NamedTuple):
    """Why a request cannot go on: HTTP status, one word for programs, a sentence for people."""

    status: int
    code: str
    message: str


def withdraw(mask: npt.NDArray[np.int32], token_ids: Iterable[int]) -> None:
    """Forbid tokens in a bit mask, unless nothing else is allowed."""
    before = mask.copy()
    words = mask.view(np.uint32)
    for token_id in token_ids:
        words[token_id // 32] &= np.uint32(2**32 - 1 - (1 << token_id % 32))
    if not mask.any():
        mask[:] = before


class Adjustments:
    """One request's biases and penalties as arrays, kept up to date token by token.

    Attributes:
        bias_ids, biases: int32 and float32 [biased tokens].
        repetition_penalty: for the tokens `seen`.
        presence_penalty, frequency_penalty: for the tokens `generated`, and for each time in `counts`.
    """

    def __init__(self, sampling: SamplingParams, prompt: Sequence[int], max_new_tokens: int) -> None:
        biases = dict(sampling.logit_bias)
        self.bias_ids = np.fromiter(biases.keys(), np.int32, len(biases))
        self.biases = np.fromiter(biases.values(), np.float32, len(biases))
        self.repetition_penalty = sampling.repetition_penalty
        self.presence_penalty = sampling.presence_penalty
        self.frequency_penalty = sampling.frequency_penalty
        self._repeats = sampling.repetition_penalty != 1.0
        known = np.unique(np.array(prompt, np.int32)) if self._repeats else np.zeros(0, np.int32)
        self._seen_set = set(known.tolist())
        self._seen = np.concatenate((known, np.zeros(max_new_tokens, np.int32)))
        self._places: dict[int, int] = {}
        """Where each generated token is in the two arrays that follow."""
        self._generated = np.zeros(max_new_tokens, np.int32)
        self._counts = np.zeros(max_new_tokens, np.float32)

    def add(self, token_id: int) -> None:
        """The request has generated this token."""
        place = self._places.setdefault(token_id, len(self._places))
        self._generated[place] = token_id
        self._counts[place] += 1
        if self._repeats and token_id not in self._seen_set:
            self._seen[len(self._seen_set)] = token_id
            self._seen_set.add(token_id)

    @property
    def seen(self) -> npt.NDArray[np.int32]:
        """The distinct tokens of prompt and answer, if there is a repetition penalty."""
        return self._seen[: len(self._seen_set)]

    @property
    def generated(self) -> npt.NDArray[np.int32]:
        """The distinct tokens of the answer."""
        return self._generated[: len(self._places)]

    @property
    def counts(self) -> npt.NDArray[np.float32]:
        """How often each token in `generated` was generated."""
        return self._counts[: len(self._places)]


def has_penalties(sampling: SamplingParams) -> bool:
    """Whether the next token's logits depend on the tokens before it."""
    return (sampling.frequency_penalty, sampling.presence_penalty, sampling.repetition_penalty) != (0.0, 0.0, 1.0)
