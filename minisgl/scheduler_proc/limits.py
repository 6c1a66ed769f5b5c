"""What bounds a replica's scheduler, and which requests can therefore never run."""

from __future__ import annotations

from dataclasses import dataclass

from minisgl.messages import TokenizedRequest
from minisgl.sampling_params import InvalidSamplingParams, SamplingParams
from minisgl.scheduler_proc.adjustments import Refusal

MAX_PROMPT_LOGPROBS = 2**20
"""Log probabilities of one prompt at most: they travel in one message."""


@dataclass(frozen=True)
class SchedulerLimits:
    """What bounds the scheduler.

    Attributes:
        context_length: longest prompt plus answer, in tokens.
        max_running: requests that hold KV pages at once.
        step_tokens: tokens computed per step at most, as far as decode rows leave room for prompts.
        eos_ids: token ids that end an answer.
        vocab_size: token ids are below this.
        fine_chunk: where requests decode, a prompt of more than twice as many tokens is cut into chunks that have so
            many tokens together with the decode rows; None cuts no finer than step_tokens.
    """

    context_length: int
    max_running: int
    step_tokens: int
    eos_ids: frozenset[int]
    vocab_size: int
    fine_chunk: int | None = None

    def stop_ids(self, sampling: SamplingParams) -> frozenset[int]:
        """The token ids that end a request's answer."""
        own = frozenset(token_id for token_id in sampling.stop_token_ids if token_id < self.vocab_size)
        return own if sampling.ignore_eos else own | self.eos_ids

    def problem_with(self, message: TokenizedRequest, kv_tokens: int) -> Refusal | None:
        """Why a request can never run, with room for so many tokens' keys and values; None when it can."""
        problem = self._wrong_with(message, kv_tokens)
        return None if problem is None else Refusal(400, *problem)

    def _wrong_with(self, message: TokenizedRequest, kv_tokens: int) -> tuple[str, str] | None:
        """The code and sentence of such a refusal."""
        prompt_len, asked = len(message.input_ids), message.sampling.max_new_tokens
        if not prompt_len:
            return "invalid_request", "the prompt is empty; send at least one token"
        lowest, highest, vocab_size = min(message.input_ids), max(message.input_ids), self.vocab_size
        if lowest < 0 or highest >= vocab_size:
            wrong = lowest if lowest < 0 else highest
            return "invalid_request", f"token id {wrong} is not in the vocabulary (0 to {vocab_size - 1})"
        try:
            message.sampling.validate()
        except InvalidSamplingParams as error:
            return "invalid_request", str(error)
        foreign = next((token_id for token_id, _ in message.sampling.logit_bias if token_id >= vocab_size), None)
        if foreign is not None:
            return "invalid_request", f"logit_bias names token id {foreign}, which is not in the vocabulary"
        start, most = message.sampling.prompt_logprobs_from, message.sampling.logprobs or 0
        if start is not None and (prompt_len - start) * (1 + most) > MAX_PROMPT_LOGPROBS:
            return (
                "invalid_request",
                f"log probabilities of {prompt_len - start} prompt tokens, each with {most} likeliest ones, are more "
                f"than the {MAX_PROMPT_LOGPROBS} that one answer can bring; ask for fewer, or from a later token on",
            )
        wanted = prompt_len + (asked or 1)
        if wanted <= min(self.context_length, kv_tokens):
            return None
        answer = f"max_new_tokens ({asked})" if asked else "one new token"
        if wanted > self.context_length:
            return (
                "context_length_exceeded",
                f"the prompt ({prompt_len} tokens) plus {answer} is {wanted} tokens, more than the context length "
                f"of {self.context_length}; shorten the prompt or ask for fewer new tokens",
            )
        return (
            "kv_capacity_exceeded",
            f"the prompt ({prompt_len} tokens) plus {answer} is {wanted} tokens, more than the KV cache of "
            f"{kv_tokens} tokens can hold; ask for fewer tokens or start the server with more KV memory "
            f"(--max-total-tokens or --mem-fraction-static)",
        )
