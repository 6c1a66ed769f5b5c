"""What /openapi.json says about the routes of OpenAI's and sglang's APIs; api_docs.py has the server's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minisgl.http import admin, api_docs, sglang, text_tools
from minisgl.http.openai_fields import CHAT_FIELDS, CHAT_HARMLESS, COMPLETION_FIELDS, COMPLETION_HARMLESS
from minisgl.http.schemas import Field, object_schema
from minisgl.messages import JsonObject

_ANY_OBJECT: JsonObject = {"type": "object"}
_ANY_STRING: JsonObject = {"type": "string"}
_FAILURES = {status: response for status, response in api_docs.GENERATE["responses"].items() if status != 200}


def _response(schema: JsonObject, description: str, media_type: str = "application/json") -> JsonObject:
    return {"description": description, "content": {media_type: {"schema": schema}}}


def _body(schema: JsonObject, example: JsonObject) -> JsonObject:
    content = {"application/json": {"schema": schema, "example": example}}
    return {"requestBody": {"required": True, "content": content}}


def _schema(fields: Mapping[str, Field], harmless: Mapping[str, Sequence[Any]], **keywords: Any) -> JsonObject:
    """The schema of a body with these fields; of those that cannot be served, the values that ask for nothing."""
    schema = object_schema(fields, **keywords)
    for name, values in harmless.items():
        schema["properties"][name] = {"enum": [None, *values], "description": "not supported: only these values"}
    return schema


def _generate() -> dict[str, Any]:
    """POST /generate takes this server's own bodies and sglang's."""
    own = api_docs.GENERATE
    content = own["openapi_extra"]["requestBody"]["content"]["application/json"]
    params = _schema(sglang.SAMPLING, sglang.SAMPLING_HARMLESS)
    fields = _schema(sglang.FIELDS, sglang.HARMLESS, description="sglang's API: exactly one of `text` and `input_ids`")
    fields["properties"]["sampling_params"]["anyOf"] = [params, {"type": "array", "items": params}, {"type": "null"}]
    answers = own["responses"][200]
    whole = answers["content"]["application/json"]["schema"]
    either = {**answers["content"], "application/json": {"schema": {"anyOf": [whole, _ANY_OBJECT, {"type": "array"}]}}}
    return {
        **own,
        "openapi_extra": _body({"anyOf": [content["schema"], fields]}, content["example"]),
        "responses": {**own["responses"], 200: {**answers, "content": either}},
    }


GENERATE = _generate()


def _generation(summary: str, body: JsonObject) -> dict[str, Any]:
    answer = {
        "description": "the answer",
        "content": {"application/json": {"schema": _ANY_OBJECT}, "text/event-stream": {"schema": _ANY_STRING}},
    }
    unknown_model = _FAILURES[400] | {"description": "another model is asked for"}
    return {
        "summary": summary,
        "openapi_extra": body,
        "responses": {200: answer, 404: unknown_model, **_FAILURES},
    }


CHAT = _generation(
    "Answer a chat (OpenAI's API)",
    _body(
        _schema(CHAT_FIELDS, CHAT_HARMLESS, required=["messages"]),
        {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 32},
    ),
)
COMPLETIONS = _generation(
    "Continue a text (OpenAI's API)",
    _body(
        _schema(COMPLETION_FIELDS, COMPLETION_HARMLESS, required=["prompt"]),
        {"prompt": "Once upon a time", "max_tokens": 32},
    ),
)
MODELS: dict[str, Any] = {
    "summary": "The served model (OpenAI's API)",
    "responses": {200: _response(_ANY_OBJECT, "a list of one")},
}
MODEL: dict[str, Any] = {
    "summary": "One model (OpenAI's API)",
    "responses": {200: _response(_ANY_OBJECT, "the model"), 404: _FAILURES[400] | {"description": "not served here"}},
}
SERVER_INFO: dict[str, Any] = {
    "summary": "The server's settings and the state of its schedulers",
    "responses": {200: _response(_ANY_OBJECT, "the settings")},
}
_NO_ANSWER = {503: _FAILURES[503] | {"description": "a worker died, or gave no answer in time; try again"}}
FLUSH_CACHE: dict[str, Any] = {
    "summary": "Forget cached prompts",
    "openapi_extra": {
        "parameters": [
            {
                "name": "timeout",
                "in": "query",
                "description": "seconds to wait for running requests to end",
                "schema": {"type": "number", "minimum": 0, "maximum": admin.MAX_WAIT_SECONDS, "default": 0},
            }
        ]
    },
    "responses": {
        200: _response(_ANY_STRING, "there is none any more", "text/plain"),
        400: {
            "description": "requests are running or waiting, so nothing was forgotten; or the timeout is wrong",
            "content": {"text/plain": {"schema": _ANY_STRING}, **_FAILURES[400]["content"]},
        },
        **_NO_ANSWER,
    },
}
_INTEGERS: JsonObject = {"type": "array", "items": {"type": "integer"}}


def _one_or_several(schema: JsonObject) -> JsonObject:
    return {"anyOf": [schema, {"type": "array", "items": schema}]}


def _either(one: str, other: str) -> list[JsonObject]:
    return [
        {"required": [name], "properties": {name: {"not": {"type": "null"}}, without: {"type": "null"}}}
        for name, without in ((one, other), (other, one))
    ]


def _answer(**properties: JsonObject) -> JsonObject:
    return {"type": "object", "properties": properties, "required": list(properties)}


TOKENIZE: dict[str, Any] = {
    "summary": "The token ids of a text or chat (sglang's and vLLM's API)",
    "openapi_extra": _body(
        _schema(
            text_tools.TOKENIZE_FIELDS,
            text_tools.TOKENIZE_HARMLESS,
            description="exactly one of `prompt` and `messages`",
            oneOf=_either("prompt", "messages"),
        ),
        {"prompt": "Once upon a time"},
    ),
    "responses": {
        200: _response(
            _answer(
                tokens=_one_or_several(_INTEGERS),
                count=_one_or_several({"type": "integer"}),
                max_model_len={"type": "integer"},
                token_strs={"type": "null"},
            ),
            "the token ids; a list of several prompts is answered by lists",
        ),
        404: _FAILURES[400] | {"description": "another model is asked for"},
        **_FAILURES,
    },
}
DETOKENIZE: dict[str, Any] = {
    "summary": "The text of token ids (sglang's and vLLM's API)",
    "openapi_extra": _body(
        _schema(text_tools.DETOKENIZE_FIELDS, {}, required=["tokens"]),
        {"tokens": [1, 2, 3]},
    ),
    "responses": {
        200: _response(
            _answer(text=_one_or_several(_ANY_STRING), prompt=_one_or_several(_ANY_STRING)),
            "the text, under sglang's name for it and under vLLM's",
        ),
        404: _FAILURES[400] | {"description": "another model is asked for"},
        **_FAILURES,
    },
}
ABORT: dict[str, Any] = {
    "summary": "End running requests",
    "description": "The clients of these requests get what has been generated so far, with finish reason `abort`.",
    "openapi_extra": _body(
        {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "rid": {"type": ["string", "null"], "description": "the request's `rid` or X-Request-Id"},
                "abort_all": {"type": "boolean", "default": False},
            },
            "anyOf": [
                {"required": ["rid"], "properties": {"rid": {"type": "string", "minLength": 1}}},
                {"required": ["abort_all"], "properties": {"abort_all": {"const": True}}},
            ],
        },
        {"rid": "my-request"},
    ),
    "responses": {200: {"description": "they are being aborted, if they were running"}, **_FAILURES},
}
