"""This project's own API: POST /generate, answered as JSON lines, server-sent events, or one JSON object."""

from __future__ import annotations

from json.encoder import encode_basestring_ascii as json_string

from minisgl.config import ModelSpec
from minisgl.http.answers import Prompt, Stream
from minisgl.http.errors import ApiError, to_json
from minisgl.http.generation import Ask, Caller, Generation, check_sampling, make_sink
from minisgl.http.logprobs import each_token, text_of
from minisgl.http.schemas import (
    BOOLEAN,
    INTEGER,
    LIST,
    MESSAGE_FIELDS,
    NULL,
    NUMBER,
    OBJECT,
    STRING,
    STRINGS,
    TOKEN_IDS,
    check_messages,
    check_token_ids,
    field,
    object_schema,
    read_fields,
)
from minisgl.http.structured import OWN_FIELD as GRAMMAR_FIELD
from minisgl.http.structured import read_own_grammar
from minisgl.messages import JsonObject, Logprobs
from minisgl.sampling_params import (
    MAX_LOGIT_BIASES,
    MAX_STOP_STRING_CHARS,
    MAX_STOP_STRINGS,
    MAX_TOP_LOGPROBS,
    SamplingParams,
)

_DEFAULTS = SamplingParams()

PROMPT_FIELDS = {
    "prompt": field(
        STRING, TOKEN_IDS, NULL, default=None, description="text to continue, or its token ids", minLength=1, minItems=1
    ),
    "messages": field(
        LIST,
        NULL,
        default=None,
        description="a chat, rendered with the model's chat template",
        minItems=1,
        items=object_schema(MESSAGE_FIELDS, required=list(MESSAGE_FIELDS)),
    ),
    "stream": field(
        BOOLEAN, default=True, description="send the text as it is generated; false sends one JSON object at the end"
    ),
    "return_token_ids": field(
        BOOLEAN, default=False, description="also name the token ids of each streamed piece of text"
    ),
    "return_steps": field(
        BOOLEAN, default=False, description="also say in `timing` when each step of the model began and ended"
    ),
}
SAMPLING_FIELDS = {
    "max_new_tokens": field(
        INTEGER,
        NULL,
        default=_DEFAULTS.max_new_tokens,
        description="tokens to generate at most; null means up to the context length",
        minimum=1,
    ),
    "temperature": field(
        NUMBER, default=_DEFAULTS.temperature, description="0 always takes the likeliest token", minimum=0, maximum=100
    ),
    "top_k": field(
        INTEGER, default=_DEFAULTS.top_k, description="sample among the k likeliest tokens; -1 takes all", minimum=-1
    ),
    "top_p": field(
        NUMBER,
        default=_DEFAULTS.top_p,
        description="sample among the likeliest tokens that together have this probability",
        exclusiveMinimum=0,
        maximum=1,
    ),
    "min_p": field(
        NUMBER,
        default=_DEFAULTS.min_p,
        description="drop tokens less likely than this fraction of the likeliest one",
        minimum=0,
        maximum=1,
    ),
    "seed": field(
        INTEGER,
        NULL,
        default=None,
        description="the same seed gives the same tokens; null draws one",
        format="int64",
    ),
    "min_new_tokens": field(
        INTEGER,
        default=_DEFAULTS.min_new_tokens,
        description="no end of sequence before this many tokens; at most max_new_tokens",
        minimum=0,
    ),
    "ignore_eos": field(
        BOOLEAN, default=_DEFAULTS.ignore_eos, description="do not stop at the model's end-of-sequence tokens"
    ),
    "stop": field(
        STRING,
        STRINGS,
        NULL,
        default=None,
        description="a string, or several, that end the text",
        minLength=1,
        maxLength=MAX_STOP_STRING_CHARS,
        maxItems=MAX_STOP_STRINGS,
    ),
    "stop_token_ids": field(
        TOKEN_IDS,
        NULL,
        default=None,
        description="token ids that end the text, beside the model's end-of-sequence tokens",
    ),
    "frequency_penalty": field(
        NUMBER,
        default=_DEFAULTS.frequency_penalty,
        description="lowers the logit of a token by this much for each time it was generated",
        minimum=-2,
        maximum=2,
    ),
    "presence_penalty": field(
        NUMBER,
        default=_DEFAULTS.presence_penalty,
        description="lowers the logits of all tokens that were generated",
        minimum=-2,
        maximum=2,
    ),
    "repetition_penalty": field(
        NUMBER,
        default=_DEFAULTS.repetition_penalty,
        description="makes tokens of the prompt and the answer less likely when above 1, more likely below",
        exclusiveMinimum=0,
        maximum=2,
    ),
    "logit_bias": field(
        OBJECT,
        NULL,
        default=None,
        description="what is added to the logits of tokens, by token id: from -100 to 100",
        additionalProperties={"type": "number", "minimum": -100, "maximum": 100},
        maxProperties=MAX_LOGIT_BIASES,
    ),
    "skip_special_tokens": field(
        BOOLEAN, default=_DEFAULTS.skip_special_tokens, description="leave special tokens out of the text"
    ),
    "no_stop_trim": field(
        BOOLEAN, default=_DEFAULTS.no_stop_trim, description="keep the stop string that matched in the text"
    ),
}
OWN_FIELDS = {
    "grammar": GRAMMAR_FIELD,
    "logprobs": field(
        INTEGER,
        NULL,
        default=None,
        description="also give the log probability of each token and those of this many likeliest tokens at its place",
        minimum=0,
        maximum=MAX_TOP_LOGPROBS,
    ),
    "prompt_logprobs_from": field(
        INTEGER,
        NULL,
        default=None,
        description="give those of the prompt's tokens too, from this one (counted from 0) on; they come with the end",
        minimum=0,
    ),
}
FIELDS = {**PROMPT_FIELDS, **SAMPLING_FIELDS, **OWN_FIELDS}


def read(body: JsonObject, caller: Caller) -> Generation:
    """Validate a request body; raises ApiError with a sentence that says what to change."""
    values = read_fields(body, FIELDS)
    prompt = _prompt(values.pop("prompt"), values.pop("messages"), caller.model)
    stream, name_token_ids = values.pop("stream"), values.pop("return_token_ids")
    keep_steps = values.pop("return_steps")
    values["grammar"] = read_own_grammar(values["grammar"])
    sampling = check_sampling(values, caller.model)
    wire = ServerSentEvents if caller.wants_sse else JsonLines
    ask = Ask(caller.request_id, prompt, sampling, keep_steps, grammar_field="grammar")
    return Generation([ask], make_sink(wire(name_token_ids, sampling.logprobs is not None), stream))


def _prompt(prompt: str | list[int] | None, messages: list[JsonObject] | None, model: ModelSpec) -> Prompt:
    if (prompt is None) == (messages is None):
        found = "neither" if prompt is None else "both"
        raise ApiError(400, "prompt_or_messages", f"send either 'prompt' or 'messages'; this request has {found}")
    if messages is not None:
        check_messages(messages)
        return messages
    if not prompt:
        raise ApiError(400, "invalid_value", "prompt must not be empty", param="prompt")
    if isinstance(prompt, list):
        check_token_ids("prompt", prompt, model.vocab_size)
    return prompt


class JsonLines:
    """application/x-ndjson: one JSON object a line."""

    media_type = "application/x-ndjson"

    def __init__(self, name_token_ids: bool = False, logprobs: bool = False) -> None:
        self._name_token_ids = name_token_ids
        self._logprobs = logprobs
        self._is_plain = not (name_token_ids or logprobs)

    def delta(self, stream: Stream, text: str, token_ids: list[int]) -> str:
        if self._is_plain:
            return self._frame('{"text_delta":' + json_string(text) + "}") if text else ""
        if not (text or token_ids):
            return ""
        more = f',"token_ids":{token_ids}' if self._name_token_ids else ""
        if self._logprobs:
            more += f',"logprobs":{to_json(_shown(stream.take_logprobs()))}'
        return self._frame('{"text_delta":' + json_string(text) + more + "}")

    def done(self, stream: Stream) -> str:
        return self._frame(to_json({"event": "done", **_ending(stream)}))

    def end(self, streams: list[Stream]) -> str:
        return ""

    def worded(self, error: ApiError) -> ApiError:
        return error

    def error(self, error: ApiError) -> str:
        return self._frame(to_json({"event": "error", "code": error.code, "message": error.message})) + self.end([])

    def whole(self, streams: list[Stream], texts: list[str], token_ids: list[list[int]]) -> str:
        (stream,) = streams
        answer: JsonObject = {"text": texts[0], "token_ids": token_ids[0]}
        if self._logprobs:
            answer["logprobs"] = _shown(stream.take_logprobs())
        return to_json({**answer, **_ending(stream)})

    def _frame(self, json_text: str) -> str:
        return json_text + "\n"


class ServerSentEvents(JsonLines):
    """text/event-stream: the same objects as frames, closed by `data: [DONE]`."""

    media_type = "text/event-stream"

    def _frame(self, json_text: str) -> str:
        return f"data: {json_text}\n\n"

    def end(self, streams: list[Stream]) -> str:
        return "data: [DONE]\n\n"


def _ending(stream: Stream) -> JsonObject:
    matched = {} if stream.matched is None else {"matched": stream.matched}
    asked_of_prompt = stream.sampling.prompt_logprobs_from is not None
    of_prompt = {"prompt_logprobs": _shown(stream.prompt_logprobs)} if asked_of_prompt else {}
    finish_reason = stream.finish.name.lower()
    return {
        "finish_reason": finish_reason,
        **matched,
        **of_prompt,
        "usage": stream.usage(),
        "timing": stream.timing(),
    }


def _shown(parts: list[Logprobs]) -> list[JsonObject]:
    """Tokens with their log probabilities, each with the likeliest ones at its place."""
    return [
        {
            **_token(token.token_id, token.piece, token.value),
            "top": [_token(rival.token_id, rival.piece, rival.value) for rival in token.top],
        }
        for token in each_token(parts)
    ]


def _token(token_id: int, piece: bytes, value: float | None) -> JsonObject:
    return {"id": token_id, "text": text_of(piece), "logprob": value}
