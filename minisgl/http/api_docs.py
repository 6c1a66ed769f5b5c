"""What /openapi.json and /docs say about the routes; request schemas come from the tables that check the requests."""

from __future__ import annotations

from typing import Any

from minisgl.http import native
from minisgl.http.schemas import object_schema
from minisgl.messages import JsonObject
from minisgl.timeline import HOPS

DESCRIPTION = (
    "A small, fast LLM server. Every error has the body "
    '`{"error": {"message", "type", "code", "param"}}`; send `X-Request-Id` to find a request in the server\'s log.'
)


def _object(properties: JsonObject, description: str = "", optional: tuple[str, ...] = ()) -> JsonObject:
    required = [name for name in properties if name not in optional]
    schema: JsonObject = {"type": "object", "properties": properties, "required": required}
    return {**schema, "description": description} if description else schema


_INTEGER: JsonObject = {"type": "integer"}
_NUMBER: JsonObject = {"type": "number"}
_STRING: JsonObject = {"type": "string"}

_ERROR = _object(
    {
        "error": _object(
            {
                "message": {**_STRING, "description": "what is wrong and what to do"},
                "type": _STRING,
                "code": {**_STRING, "description": "a stable word for programs"},
                "param": {"type": ["string", "null"], "description": "the field at fault"},
            },
        )
    }
)
_USAGE = _object(
    dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens"), _INTEGER),
    "completion_tokens counts every generated token, the one that ended the text included",
)
_TIMING = _object(
    {
        "hops_us": _object(
            dict.fromkeys(HOPS, _NUMBER),
            "microseconds of each hop from the request's arrival to the first byte of the answer; they sum to ttfb_us. "
            "Without streaming, `write` includes the generation of all tokens after the first.",
        ),
        "stamps_ns": {
            "type": "array",
            "items": _INTEGER,
            "description": "the server's CLOCK_MONOTONIC readings between the hops, for clients on the same host",
        },
        "steps_ns": {
            "type": "array",
            "items": _INTEGER,
            "description": "with return_steps: when each step was launched and retired, in turn, on the same clock",
        },
        "ttfb_us": _NUMBER,
        "total_ms": _NUMBER,
        "tokens_per_second": {**_NUMBER, "description": "answer tokens per second since the request arrived"},
        "decode_tokens_per_second": {
            "type": ["number", "null"],
            "description": "answer tokens per second since the first text; null when all came at once",
        },
    },
    optional=("steps_ns",),
)
_TOKEN: JsonObject = {
    "id": _INTEGER,
    "text": {**_STRING, "description": "the token's own text; parts of a character show as U+FFFD"},
    "logprob": {
        "type": ["number", "null"],
        "description": "natural logarithm of the model's own probability, before any sampling parameter; -9999 stands "
        "for minus infinity; null for the first token of a prompt, which nothing predicts",
    },
}
_LOGPROBS: JsonObject = {
    "type": "array",
    "items": _object({**_TOKEN, "top": {"type": "array", "items": _object(_TOKEN)}}),
    "description": "with logprobs: of each token, the one that ended the text included",
}
_ENDING: JsonObject = {
    "finish_reason": {"type": "string", "enum": ["stop", "length", "abort"]},
    "matched": {"type": ["string", "integer"], "description": "the stop string or token id that ended the text"},
    "prompt_logprobs": {**_LOGPROBS, "description": "with prompt_logprobs_from: of the prompt's tokens"},
    "usage": _USAGE,
    "timing": _TIMING,
}
_OPTIONAL = ("matched", "prompt_logprobs")
_TOKEN_IDS = {"type": "array", "items": _INTEGER, "description": "streams name them with return_token_ids alone"}
_LINE = {
    "oneOf": [
        _object(
            {"text_delta": _STRING, "token_ids": _TOKEN_IDS, "logprobs": _LOGPROBS},
            "a piece of the answer",
            optional=("token_ids", "logprobs"),
        ),
        _object({"event": {"const": "done"}, **_ENDING}, "the end", optional=_OPTIONAL),
        _object({"event": {"const": "error"}, "code": _STRING, "message": _STRING}, "the end, after a failure"),
    ]
}
_WHOLE = _object(
    {"text": _STRING, "token_ids": _TOKEN_IDS, "logprobs": _LOGPROBS, **_ENDING},
    "with stream=false",
    optional=("logprobs", *_OPTIONAL),
)


def _responses(**descriptions: str) -> dict[int | str, dict[str, Any]]:
    """Error responses; keywords are `_400="..."`."""
    content = {"application/json": {"schema": _ERROR}}
    return {int(name[1:]): {"description": text, "content": content} for name, text in descriptions.items()}


GENERATE: dict[str, Any] = {
    "summary": "Generate text",
    "description": "Continues a prompt or answers a chat. Streams JSON lines, or server-sent events when the request "
    "accepts text/event-stream; the header Server-Timing has the hops up to the first token.",
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": object_schema(
                        native.FIELDS,
                        description="exactly one of `prompt` and `messages`",
                        oneOf=[
                            {"required": [one], "properties": {one: {"not": {"type": "null"}}, other: {"type": "null"}}}
                            for one, other in (("prompt", "messages"), ("messages", "prompt"))
                        ],
                    ),
                    "example": {"prompt": "Once upon a time", "max_new_tokens": 32, "temperature": 0.7},
                }
            },
        }
    },
    "responses": {
        200: {
            "description": "the answer",
            "content": {
                "application/x-ndjson": {"schema": _LINE},
                "text/event-stream": {"schema": _STRING},
                "application/json": {"schema": _WHOLE},
            },
        },
        **_responses(
            _400="the request is wrong; the message says what to change",
            _413="the body is too large",
            _415="the body is compressed",
            _500="the request failed",
            _503="the server is full, draining, or lost a worker; Retry-After says when to try again",
        ),
    },
}

_HEALTH_BODY = _object(
    {
        "status": {"type": "string", "enum": ["ok", "unhealthy"]},
        "problems": {"type": "array", "items": _STRING},
        "workers": {"type": "object", "additionalProperties": {"type": "object"}},
    }
)
HEALTH: dict[str, Any] = {
    "summary": "Can this server serve?",
    "description": "Answers from memory within milliseconds, with the state of every worker process.",
    "responses": {
        200: {"description": "yes", "content": {"application/json": {"schema": _HEALTH_BODY}}},
        503: {"description": "no; `problems` says why", "content": {"application/json": {"schema": _HEALTH_BODY}}},
    },
}
UNAUTHORIZED = _responses(_401="the API key is missing or wrong")
METRICS: dict[str, Any] = {
    "summary": "Counters, gauges and histograms for Prometheus",
    "responses": {200: {"description": "text format 0.0.4", "content": {"text/plain": {"schema": _STRING}}}},
}
MODEL_INFO: dict[str, Any] = {
    "summary": "Which model is served",
    "responses": {200: {"description": "the model", "content": {"application/json": {"schema": {"type": "object"}}}}},
}
