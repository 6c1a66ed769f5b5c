"""JSON request bodies: a table says what is accepted, and both the checks and the OpenAPI schema come from it.

Types are checked here; ranges are checked by SamplingParams.validate, which all APIs share.
"""

from __future__ import annotations

import difflib
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from minisgl.http.errors import ApiError
from minisgl.messages import JsonObject

_BIG_BODY_BYTES = 2**16


@dataclass(frozen=True)
class Kind:
    """A type that a field may have."""

    phrase: str
    schema: JsonObject
    accepts: Callable[[Any], bool]


NULL = Kind("null", {"type": "null"}, lambda value: value is None)
BOOLEAN = Kind("true or false", {"type": "boolean"}, lambda value: type(value) is bool)
INTEGER = Kind("an integer", {"type": "integer"}, lambda value: type(value) is int)
NUMBER = Kind("a number", {"type": "number"}, lambda value: type(value) in (int, float))
STRING = Kind("a string", {"type": "string"}, lambda value: type(value) is str)
STRINGS = Kind(
    "a list of strings",
    {"type": "array", "items": {"type": "string"}},
    lambda value: type(value) is list and all(type(item) is str for item in value),
)
TOKEN_IDS = Kind(
    "a list of token ids",
    {"type": "array", "items": {"type": "integer", "minimum": 0}},
    lambda value: type(value) is list and all(type(item) is int for item in value),
)
LIST = Kind("a list", {"type": "array"}, lambda value: type(value) is list)
TOKEN_ID_LISTS = Kind(
    "a list of lists of token ids",
    {"type": "array", "items": TOKEN_IDS.schema},
    lambda value: type(value) is list and all(map(TOKEN_IDS.accepts, value)),
)
OBJECT = Kind("an object", {"type": "object"}, lambda value: type(value) is dict)


@dataclass(frozen=True)
class Field:
    """A field of a request body.

    Attributes:
        kinds: the types it may have.
        default: its value when the body leaves it out.
        limits: JSON schema keywords for the OpenAPI document, such as minimum; enforced by whoever reads the value.
    """

    kinds: tuple[Kind, ...]
    default: Any
    description: str
    limits: JsonObject

    def check(self, place: str, value: Any, param: str) -> None:
        if not any(kind.accepts(value) for kind in self.kinds):
            expected = " or ".join(kind.phrase for kind in self.kinds)
            takes_lists = any(kind.schema["type"] == "array" for kind in self.kinds)
            got = "a list of something else" if takes_lists and type(value) is list else _shown(value)
            raise ApiError(400, "invalid_value", f"{place} must be {expected}, got {got}", param=param)

    def schema(self) -> JsonObject:
        kinds = [kind.schema for kind in self.kinds]
        schema: JsonObject = {"description": self.description, "default": self.default, **self.limits}
        return {**kinds[0], **schema} if len(kinds) == 1 else {"anyOf": kinds, **schema}


def field(*kinds: Kind, default: Any, description: str, **limits: Any) -> Field:
    return Field(kinds, default, description, limits)


def object_schema(fields: Mapping[str, Field], **keywords: Any) -> JsonObject:
    """The JSON schema of a body with these fields and no others."""
    properties = {name: spec.schema() for name, spec in fields.items()}
    return {"type": "object", "additionalProperties": False, "properties": properties, **keywords}


def parse_object(raw: bytes) -> JsonObject:
    """The JSON object in a request body. NaN, lone surrogates and nesting beyond 1024 levels are not JSON here."""
    if not raw.strip():
        raise ApiError(400, "empty_body", 'the request has no body; send a JSON object such as {"prompt": "Hello"}')
    try:
        body = _loads(raw)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, "invalid_json", f"the body must be valid JSON: {error}") from None
    if not isinstance(body, dict):
        example = '{"prompt": "Hello"}'
        raise ApiError(400, "not_an_object", f"the body must be a JSON object such as {example}, got {_shown(body)}")
    return body


def _loads(raw: bytes) -> Any:
    if len(raw) < _BIG_BODY_BYTES or not gc.isenabled():
        return orjson.loads(raw)
    # A body of a million empty lists would set off many cycle collections, and JSON has no cycles to collect.
    gc.disable()
    try:
        return orjson.loads(raw)
    finally:
        gc.enable()


def read_fields(body: JsonObject, fields: Mapping[str, Field]) -> JsonObject:
    """The value of every field, defaults filled in; refuses unknown fields and wrong types."""
    for name in body:
        if name not in fields:
            raise _unknown_field(name, list(fields))
    for name, value in body.items():
        fields[name].check(name, value, name)
    return {name: body.get(name, spec.default) for name, spec in fields.items()}


def without_unsupported(
    body: JsonObject, fields: Mapping[str, Field], harmless: Mapping[str, Sequence[Any]]
) -> JsonObject:
    """The fields that are not null, less those that exist but cannot be served; refuses those that ask for something.

    Args:
        harmless: per field that cannot be served, the values with which it asks for nothing.
    """
    for name, value in body.items():
        if name not in fields and name not in harmless:
            raise _unknown_field(name, list(fields))
        if name in harmless and value is not None and not any(_same(value, nothing) for nothing in harmless[name]):
            sentence = f"{name} is not supported yet by this server; leave it out"
            raise ApiError(400, "unsupported_field", sentence, param=name)
    return {name: value for name, value in body.items() if value is not None and name not in harmless}


def _same(value: Any, other: Any) -> bool:
    """Equality as JSON knows it: 1 is 1.0, but true is not 1."""
    return bool(value == other) and (type(value) is bool) == (type(other) is bool)


def check_messages(messages: list[Any]) -> None:
    """Refuse anything but a list of at least one {"role": text, "content": text}."""
    if not messages:
        raise ApiError(400, "invalid_value", "messages must hold at least one message", param="messages")
    for index, message in enumerate(messages):
        place = f"messages[{index}]"
        if type(message) is not dict:
            sentence = f"{place} must be an object with 'role' and 'content', got {_shown(message)}"
            raise ApiError(400, "invalid_value", sentence, param="messages")
        for name in MESSAGE_FIELDS:
            if name not in message:
                raise ApiError(400, "invalid_value", f"{place} has no '{name}'; add it", param="messages")
        for name, value in message.items():
            if name not in MESSAGE_FIELDS:
                sentence = f"{place} has an unknown field {_quoted(name)}; a message has 'role' and 'content'"
                raise ApiError(400, "unknown_field", sentence, param="messages")
            MESSAGE_FIELDS[name].check(f"{place}.{name}", value, "messages")
        if not message["role"]:
            raise ApiError(400, "invalid_value", f"{place}.role must not be empty", param="messages")


MESSAGE_FIELDS = {
    "role": field(STRING, default="user", description="who speaks: system, user or assistant", minLength=1),
    "content": field(STRING, default="", description="what was said"),
}


def check_token_ids(name: str, token_ids: Sequence[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            sentence = f"{name} must hold token ids from 0 to {vocab_size - 1}, got {token_id}"
            raise ApiError(400, "invalid_value", sentence, param=name)


def _unknown_field(name: str, known: list[str]) -> ApiError:
    similar = difflib.get_close_matches(name[:64], known, n=1)
    hint = f"did you mean '{similar[0]}'?" if similar else f"this route takes {', '.join(known)}"
    return ApiError(400, "unknown_field", f"unknown field {_quoted(name)}; {hint}", param=name[:64])


def _quoted(name: str) -> str:
    return repr(name if len(name) <= 64 else name[:64] + "...")


def _shown(value: Any) -> str:
    """A wrong value, short enough for an error message."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, str):
        return "a string"
    return "a list" if isinstance(value, list) else "an object"
