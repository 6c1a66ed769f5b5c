"""How one request samples and when it stops; pure Python, shared by http, tokenizer, scheduler and detokenizer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

MAX_STOP_STRINGS = 32
MAX_STOP_STRING_CHARS = 1024
MAX_STOP_TOKEN_IDS = 1024
GREEDY_TEMPERATURE = 1e-6
"""Temperatures below this mean greedy decoding, as sglang defines it."""


MAX_LOGIT_BIASES = 1024
MAX_TOP_LOGPROBS = 128
GRAMMAR_KINDS = ("json_object", "json_schema", "regex", "ebnf", "structural_tag")
MAX_GRAMMAR_BYTES = 256 * 2**10


class Grammar(NamedTuple):
    """What the answer must match. `kind` is one of GRAMMAR_KINDS; `source` is "" for json_object.

    A structural tag's source is xgrammar's JSON for it: text in which tagged parts follow a schema.
    """

    kind: str
    source: str


class InvalidSamplingParams(ValueError):
    """A sampling field is out of its range; the message names the field and says what is allowed."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The sampling fields of one request, already in their internal form (no aliases, no nulls but where noted).

    Attributes:
        max_new_tokens: tokens to generate at most; None means "up to the context length".
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens; -1 keeps all.
        top_p: keep the smallest set of tokens whose probabilities sum to top_p.
        min_p: drop tokens less likely than min_p times the most likely one.
        seed: None lets the http process draw one; the same seed gives the same tokens whatever else runs beside it.
        min_new_tokens: EOS and stop ids cannot be sampled before this many tokens.
        ignore_eos: do not stop at the model's EOS ids (stop strings and stop_token_ids still count).
        stop: strings that end the text; the match itself is cut off unless no_stop_trim.
        stop_token_ids: token ids that end the text, beside the model's own EOS ids.
        frequency_penalty: lowers a token's logit by this much for each time it was generated.
        presence_penalty: lowers the logit of every token that was generated.
        repetition_penalty: divides positive and multiplies negative logits of all tokens of prompt and answer.
        logit_bias: pairs of token id and what is added to its logit.
        grammar: what the answer must match; None leaves it free.
        logprobs: how many of the likeliest tokens come with each token, with log probabilities; None: not even its own.
        prompt_logprobs_from: prompt position from which the prompt's tokens bring theirs too; None for none.
    """

    max_new_tokens: int | None = 128
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    min_new_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: Grammar | None = None
    logprobs: int | None = None
    prompt_logprobs_from: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE or self.top_k == 1

    def validate(self) -> None:
        """Raise InvalidSamplingParams for the first field out of range."""
        for name in ("max_new_tokens", "top_k", "min_new_tokens"):
            # They end up in 32-bit columns.
            if (getattr(self, name) or 0) >= 2**31:
                raise InvalidSamplingParams(f"{name} must be below {2**31}, got {getattr(self, name)}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise InvalidSamplingParams(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not (math.isfinite(self.temperature) and 0.0 <= self.temperature <= 100.0):
            raise InvalidSamplingParams(f"temperature must be between 0 (greedy) and 100, got {self.temperature}")
        if self.top_k != -1 and self.top_k < 1:
            raise InvalidSamplingParams(f"top_k must be -1 (all tokens) or at least 1, got {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidSamplingParams(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0.0 <= self.min_p <= 1.0:
            raise InvalidSamplingParams(f"min_p must be between 0 and 1, got {self.min_p}")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise InvalidSamplingParams(f"seed must fit in 64 bits, got {self.seed}")
        if self.min_new_tokens < 0:
            raise InvalidSamplingParams(f"min_new_tokens must not be negative, got {self.min_new_tokens}")
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise InvalidSamplingParams(
                f"min_new_tokens ({self.min_new_tokens}) must not exceed max_new_tokens ({self.max_new_tokens})"
            )
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidSamplingParams(f"stop takes at most {MAX_STOP_STRINGS} strings, got {len(self.stop)}")
        for stop in self.stop:
            if not 1 <= len(stop) <= MAX_STOP_STRING_CHARS:
                raise InvalidSamplingParams(
                    f"each stop string must have 1 to {MAX_STOP_STRING_CHARS} characters, got {len(stop)}"
                )
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidSamplingParams(
                f"stop_token_ids takes at most {MAX_STOP_TOKEN_IDS} ids, got {len(self.stop_token_ids)}"
            )
        for token_id in self.stop_token_ids:
            if not 0 <= token_id < 2**31:
                raise InvalidSamplingParams(f"stop_token_ids must be token ids, got {token_id}")
        for name in ("frequency_penalty", "presence_penalty"):
            if not -2.0 <= getattr(self, name) <= 2.0:
                raise InvalidSamplingParams(f"{name} must be between -2 and 2, got {getattr(self, name)}")
        if not 0.0 < self.repetition_penalty <= 2.0:
            raise InvalidSamplingParams(
                f"repetition_penalty must be above 0 and at most 2, got {self.repetition_penalty}"
            )
        if len(self.logit_bias) > MAX_LOGIT_BIASES:
            raise InvalidSamplingParams(f"logit_bias takes at most {MAX_LOGIT_BIASES} ids, got {len(self.logit_bias)}")
        for token_id, bias in self.logit_bias:
            if not 0 <= token_id < 2**31:
                raise InvalidSamplingParams(f"logit_bias must name token ids, got {token_id}")
            if not -100.0 <= bias <= 100.0:
                raise InvalidSamplingParams(f"logit_bias must be between -100 and 100, got {bias}")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_TOP_LOGPROBS:
            raise InvalidSamplingParams(f"logprobs must be between 0 and {MAX_TOP_LOGPROBS}, got {self.logprobs}")
        if self.prompt_logprobs_from is not None and not 0 <= self.prompt_logprobs_from < 2**31:
            raise InvalidSamplingParams(f"prompt_logprobs_from must be a position, got {self.prompt_logprobs_from}")
        if self.grammar is not None and self.grammar.kind not in GRAMMAR_KINDS:
            raise InvalidSamplingParams(f"grammar must be one of {', '.join(GRAMMAR_KINDS)}, got {self.grammar.kind}")
        if self.grammar is not None and len(self.grammar.source.encode()) > MAX_GRAMMAR_BYTES:
            raise InvalidSamplingParams(f"grammar may have at most {MAX_GRAMMAR_BYTES} bytes")
