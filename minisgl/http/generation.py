"""What every API makes of a request body: the requests that go to the ring, and the sink that writes their answers."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from minisgl.config import ModelSpec
from minisgl.http.answers import EventStream, Prompt, Renderer, Sink, WholeAnswer
from minisgl.http.errors import ApiError
from minisgl.http.schemas import check_token_ids
from minisgl.messages import JsonObject
from minisgl.sampling_params import InvalidSamplingParams, SamplingParams


@dataclass(frozen=True)
class Caller:
    """What a request brings beside its body, and which model it meets.

    Attributes:
        request_id: the client's X-Request-Id, or one drawn here.
        wants_sse: it accepts text/event-stream.
    """

    model: ModelSpec
    request_id: str
    wants_sse: bool


class Ask(NamedTuple):
    """One request to the ring.

    Attributes:
        name: the id that the client knows it by.
        keep_steps: collect when the steps of the model began and ended.
        template: variables for the chat template, beside the messages.
        grammar_field: what the client calls the field that holds the grammar.
        reads_only: the prompt is all that matters; the one token that the ring generates is not shown.
    """

    name: str
    prompt: Prompt
    sampling: SamplingParams
    keep_steps: bool = False
    template: JsonObject | None = None
    grammar_field: str | None = None
    reads_only: bool = False


MAX_COPIED_BYTES = 64 * 2**20
"""Several answers to one prompt send it round the ring as often; all together may not be larger."""


@dataclass(frozen=True)
class Generation:
    """A validated request: one ask for each answer of its response, in the order of their indexes."""

    asks: list[Ask]
    sink: Sink

    def check_size(self, body_bytes: int) -> None:
        """Raise ApiError when the answers ask for too many copies of a large prompt."""
        copies = len(self.asks) // len({id(ask.prompt) for ask in self.asks})
        if copies * body_bytes > MAX_COPIED_BYTES:
            too_large = f"{copies} answers to a prompt of this size are too much for one request; ask for fewer"
            raise ApiError(400, "too_many_answers", too_large, param="n")


def make_sink(renderer: Renderer, stream: bool, answers: int = 1) -> Sink:
    return EventStream(renderer, answers) if stream else WholeAnswer(renderer, answers)


def check_sampling(values: JsonObject, model: ModelSpec, names: Mapping[str, str] | None = None) -> SamplingParams:
    """The sampling parameters of a request, with a seed drawn if it has none; raises ApiError.

    Args:
        values: keyword arguments of SamplingParams; `stop` may be a string, `logit_bias` is an object as clients send
            it, and these and `stop_token_ids` may be null.
        names: what the client calls those fields that its API names differently.
    """
    stop = values.get("stop")
    forms = {
        "stop": (stop,) if isinstance(stop, str) else tuple(stop or ()),
        "stop_token_ids": tuple(values.get("stop_token_ids") or ()),
        "logit_bias": _logit_bias(values.get("logit_bias") or {}),
    }
    params = SamplingParams(**{**values, **forms})
    try:
        params.validate()
    except InvalidSamplingParams as error:
        words = [(names or {}).get(word.strip("(),"), word) for word in str(error).split()]
        fields = {*values, *(names or {}).values()}
        param = next((word for word in words if word in fields), None)
        raise ApiError(400, "invalid_value", " ".join(words), param=param) from None
    check_token_ids("stop_token_ids", params.stop_token_ids, model.vocab_size)
    check_token_ids("logit_bias", [token_id for token_id, _ in params.logit_bias], model.vocab_size)
    # A request may have to be generated again after a worker died; with a seed of its own it comes out the same.
    return params if params.seed is not None else replace(params, seed=random.getrandbits(63))


def to_read_only(values: JsonObject, limit: str) -> tuple[JsonObject, bool]:
    """What goes to the ring for a request whose limit of new tokens (the field's name) may be 0, and whether it is.

    The first token comes with the prompt's own computation anyway; it is generated and not shown.
    """
    if values[limit] != 0:
        return values, False
    return {**values, limit: 1, "ignore_eos": True, "stop": None, "stop_token_ids": None}, True


def _logit_bias(biases: JsonObject) -> tuple[tuple[int, float], ...]:
    """The biases by token id; JSON has them by the id's digits."""
    for digits, bias in biases.items():
        is_id = digits.isascii() and digits.isdecimal() and len(digits) <= 10
        if not is_id or type(bias) not in (int, float):
            takes = 'logit_bias must map token ids to numbers, such as {"50256": -100}'
            raise ApiError(400, "invalid_value", takes, param="logit_bias")
    return tuple((int(digits), float(bias)) for digits, bias in biases.items())


def samples(params: SamplingParams, count: int) -> list[SamplingParams]:
    """`count` requests that differ in their seeds alone; the first is the request itself."""
    seed = params.seed or 0
    return [params, *(replace(params, seed=_wrap(seed + step)) for step in range(1, count))]


def _wrap(seed: int) -> int:
    """Into 64 signed bits."""
    return (seed + 2**63) % 2**64 - 2**63
