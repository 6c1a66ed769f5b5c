"""A request as the scheduler knows it, and the plan of one step: the border between scheduler.py and engine.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from minisgl.messages import NO_TOKEN, FinishReason, Logprobs
from minisgl.sampling_params import SamplingParams
from minisgl.scheduler_proc.adjustments import Adjustments, TokenMask, has_penalties
from minisgl.scheduler_proc.prefix_cache import Node


@dataclass(eq=False, slots=True)
class Request:
    """One generation in progress. The scheduler owns and changes it; the engine only reads it.

    Attributes:
        token_ids: prompt and generated tokens so far.
        max_new_tokens: resolved limit (never None, never beyond the context length).
        stop_ids: token ids that end the request: the model's EOS ids unless ignore_eos, and its own stop_token_ids.
        stamps: readings of timeline.STAMPS up to "scheduler_in".
        token_mask: says which tokens may come next; None when all may.
        scheduled_ns: when the first step of this request was planned; 0 before.
        computed: how many leading tokens have their keys and values in `pages`, counting steps in flight; 0 again
            after a preemption.
        pending: tokens that steps in flight will add to token_ids.
        cached_tokens: how many prompt tokens were found in the prefix cache at the first admission.
        pages: KV page ids in position order; position p lives in pages[p // page_size]. One list only ever grows: with
            other pages comes another list, by which the engine knows that what it has sent to the device is right.
        shared: how many leading pages belong to the prefix cache; the others are the request's own.
        cache_node: what this request has locked in the prefix cache; None when it holds no pages.
        finish: why it ended; NONE while it waits or runs.
        greedy: whether it takes the likeliest of the tokens that may come.
        takes_likeliest: greedy, and nothing but min_new_tokens changes the model's logits.
        earliest_stop: position of the first token that may be a stop token.
        adjustments: its biases and penalties; None when it has none.
        asks_logprobs: whether it wants log probabilities, of its prompt or of its answer.
        prompt_logprobs: log probabilities of the prompt so far, if they are wanted and not sent yet.
        keeps_history: whether `observe` must be told each of its tokens.
        needs_last_token: whether its next step may be launched only when the host has seen its last token, for a
            mask, or for penalties beside biases.
    """

    rid: int
    token_ids: list[int]
    prompt_len: int
    sampling: SamplingParams
    max_new_tokens: int
    stop_ids: frozenset[int]
    stamps: list[int]
    token_mask: TokenMask | None = None
    scheduled_ns: int = 0
    computed: int = 0
    pending: int = 0
    cached_tokens: int = 0
    pages: list[int] = field(default_factory=list)
    shared: int = 0
    cache_node: Node | None = None
    finish: FinishReason = FinishReason.NONE
    greedy: bool = field(init=False)
    takes_likeliest: bool = field(init=False)
    earliest_stop: int = field(init=False)
    adjustments: Adjustments | None = field(init=False, default=None)
    prompt_logprobs: Logprobs | None = field(init=False, default=None)
    asks_logprobs: bool = field(init=False)
    keeps_history: bool = field(init=False)
    needs_last_token: bool = field(init=False)

    def __post_init__(self) -> None:
        sampling = self.sampling
        self.greedy = sampling.greedy
        penalties = has_penalties(sampling)
        # With both, penalties are computed of what the host knows.
        self.needs_last_token = self.token_mask is not None or (penalties and bool(sampling.logit_bias))
        self.keeps_history = penalties or self.token_mask is not None
        if penalties or sampling.logit_bias:
            self.adjustments = Adjustments(sampling, self.token_ids, self.max_new_tokens)
        self.takes_likeliest = self.greedy and self.adjustments is None and self.token_mask is None
        self.earliest_stop = self.prompt_len + sampling.min_new_tokens

        self.asks_logprobs = (sampling.logprobs, sampling.prompt_logprobs_from) != (None, None)
        if sampling.prompt_logprobs_from is not None:
            self.prompt_logprobs = Logprobs(0, True, [], [])

    @property
    def first_scored(self) -> int:
        """The first position whose logits give a wanted log probability of a prompt token: that of the next one."""
        return max((self.sampling.prompt_logprobs_from or 0) - 1, 0)

    @property
    def next_scored(self) -> int:
        """The same, without what is known already."""
        return self.first_scored + (len(self.prompt_logprobs.token_ids) if self.prompt_logprobs else 0)

    def collect(self, position: int, part: Logprobs) -> None:
        """Take log probabilities of prompt tokens from `position` on; after a preemption some are known already."""
        mine = self.prompt_logprobs
        if mine is None:
            return
        known, most = self.next_scored + 1 - position, len(part.top_ids) // len(part.token_ids)
        mine.token_ids += part.token_ids[known:]
        mine.values += part.values[known:]
        mine.top_ids += part.top_ids[known * most :]
        mine.top_values += part.top_values[known * most :]

    def take_prompt_logprobs(self) -> Logprobs | None:
        """All log probabilities of the prompt, once; None if none are wanted. The very first token has none: NaN."""
        part, self.prompt_logprobs = self.prompt_logprobs, None
        if part is not None and self.sampling.prompt_logprobs_from == 0:
            most = len(part.top_ids) // max(len(part.token_ids), 1)
            part.token_ids.insert(0, self.token_ids[0])
            part.values.insert(0, math.nan)
            part.top_ids[:0] = [NO_TOKEN] * most
            part.top_values[:0] = [math.nan] * most
        return part

    def observe(self, token_id: int) -> None:
        """Tell what depends on the tokens so far of the newest one; only needed with `keeps_history`."""
        if self.adjustments is not None:
            self.adjustments.add(token_id)
        if self.token_mask is not None:
            self.token_mask.accept(token_id)

    @property
    def output_len(self) -> int:
        return len(self.token_ids) - self.prompt_len


@dataclass(slots=True)
class StepRow:
    """One request's part of a step: compute positions start .. start + length - 1.

    `sample` is set when the row reaches the request's last token, so that its logits give the next one.
    """

    request: Request
    start: int
    length: int
    sample: bool


@dataclass(slots=True)
class StepPlan:
    """What one step computes. The first `decode_rows` rows have length 1; prefill chunks follow."""

    step: int
    rows: list[StepRow]
    decode_rows: int


def scored_positions(row: StepRow) -> range:
    """The positions of a row whose logits give wanted log probabilities of prompt tokens, each of the next token."""
    request = row.request
    if request.prompt_logprobs is None:
        return range(0)
    return range(max(row.start, request.first_scored), min(row.start + row.length, request.prompt_len - 1))


@dataclass(slots=True)
class RowLogprobs:
    """What a step has found for one request that asked: of its prompt tokens from `position` on, or of its new token.

    The row in `part` is for the scheduler to set.
    """

    request: Request
    position: int
    part: Logprobs
