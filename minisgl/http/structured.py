"""Structured output: the fields in which clients of OpenAI, sglang and vLLM say what an answer must match."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import orjson

from minisgl.grammars import choice_grammar
from minisgl.http.errors import ApiError
from minisgl.http.schemas import NULL, OBJECT, STRING, STRINGS, Field, field
from minisgl.messages import JsonObject
from minisgl.sampling_params import Grammar

_SCHEMA = "a JSON schema"
_REGEX = "a regular expression that the whole answer must match"
_EBNF = "a grammar in EBNF, as xgrammar reads it; its first rule is `root`"
_CHOICE = "texts of which the answer must be one"
_TAGS = "xgrammar's structural tag: text in which tagged parts follow a schema"

SGLANG_FIELDS: dict[str, Field] = {
    "json_schema": field(STRING, OBJECT, default=None, description=_SCHEMA),
    "regex": field(STRING, default=None, description=_REGEX, minLength=1),
    "ebnf": field(STRING, default=None, description=_EBNF, minLength=1),
    "structural_tag": field(STRING, OBJECT, default=None, description=_TAGS),
}
OPENAI_FIELDS: dict[str, Field] = {
    "response_format": field(
        OBJECT,
        default=None,
        description="`type` is text, json_object, json_schema (with `json_schema`) or structural_tag",
    ),
    **SGLANG_FIELDS,
    "guided_json": field(STRING, OBJECT, default=None, description=_SCHEMA),
    "guided_regex": field(STRING, default=None, description=_REGEX, minLength=1),
    "guided_choice": field(STRINGS, default=None, description=_CHOICE, minItems=1),
    "guided_grammar": field(STRING, default=None, description=_EBNF, minLength=1),
    "structured_outputs": field(
        OBJECT, default=None, description="vLLM's: one of json, regex, choice, grammar, json_object, structural_tag"
    ),
}
OWN_FIELD = field(
    OBJECT,
    NULL,
    default=None,
    description="what the answer must match: an object with one of `json_object` (true), `json_schema`, `regex`, "
    "`ebnf`, `choice` (a list of texts), `structural_tag`",
    minProperties=1,
    maxProperties=1,
    additionalProperties=False,
    properties={
        "json_object": {"const": True},
        "json_schema": {"type": ["object", "string"], "description": _SCHEMA},
        "regex": {"type": "string", "description": _REGEX},
        "ebnf": {"type": "string", "description": _EBNF},
        "choice": {"type": "array", "items": {"type": "string"}, "description": _CHOICE},
        "structural_tag": {"type": ["object", "string"], "description": _TAGS},
    },
)


def read_grammar(values: Mapping[str, Any]) -> tuple[str, Grammar] | tuple[None, None]:
    """The one grammar among the fields of OPENAI_FIELDS that are set, and the field it is in; raises ApiError."""
    found: dict[str, Grammar] = {}
    for name, value in values.items():
        if name in OPENAI_FIELDS and value is not None:
            grammar = _READERS[name](name, value)
            if grammar is not None:
                found[name] = grammar
    if len(found) > 1:
        both = f"an answer can match one grammar only, and this request has several: {', '.join(found)}"
        raise ApiError(400, "invalid_value", both, param=list(found)[1])
    return next(iter(found.items()), (None, None))


def read_own_grammar(value: JsonObject | None) -> Grammar | None:
    """What the field `grammar` of this project's own API says; raises ApiError."""
    if value is None:
        return None
    return _one_of("grammar", value, _OWN_KINDS)


# ---- one reader a kind; `place` is what the client calls the value --------------------------------------------------


def _refusal(place: str, sentence: str) -> ApiError:
    return ApiError(400, "invalid_value", f"{place} {sentence}", param=place.partition(".")[0])


def _json_object(place: str, value: Any) -> Grammar:
    if value is not True:
        raise _refusal(place, "must be true, or be left out")
    return Grammar("json_object", "")


def _json_schema(place: str, value: Any) -> Grammar:
    if type(value) is str:
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise _refusal(place, f"is not JSON: {error}") from None
    if type(value) not in (dict, bool):
        raise _refusal(place, "must be a JSON schema, which is an object")
    return Grammar("json_schema", _source(place, value))


def _source(place: str, value: Any) -> str:
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError as error:
        raise _refusal(place, f"cannot be used: {error}") from None


def _regex(place: str, value: Any) -> Grammar:
    return Grammar("regex", _text(place, value))


def _ebnf(place: str, value: Any) -> Grammar:
    return Grammar("ebnf", _text(place, value))


def _text(place: str, value: Any) -> str:
    if type(value) is not str or not value:
        raise _refusal(place, "must be a string that is not empty")
    return value


def _choice(place: str, value: Any) -> Grammar:
    if type(value) is not list or not value or not all(type(text) is str and text for text in value):
        raise _refusal(place, "must be a list of texts, none of them empty")
    return choice_grammar(value)


def _structural_tag(place: str, value: Any) -> Grammar:
    if type(value) is str:
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise _refusal(place, f"is not JSON: {error}") from None
    if type(value) is not dict:
        raise _refusal(place, "must be an object such as xgrammar's StructuralTag")
    if "structures" in value or "triggers" in value:
        value = _from_sglangs_tags(place, value)
    return Grammar("structural_tag", _source(place, {"type": "structural_tag", **value}))


def _from_sglangs_tags(place: str, value: JsonObject) -> JsonObject:
    """sglang's older form: a list of begin, schema and end, and the triggers at which one of them must begin."""
    structures, triggers = value.get("structures"), value.get("triggers")
    wanted = "must have 'structures', a list of objects with begin, schema and end, and 'triggers', a list of texts"
    if type(structures) is not list or not STRINGS.accepts(triggers):
        raise _refusal(place, wanted)
    tags = []
    for structure in structures:
        if type(structure) is not dict or set(structure) != {"begin", "schema", "end"}:
            raise _refusal(place, wanted)
        schema = orjson.loads(_json_schema(place, structure["schema"]).source)
        content = {"type": "json_schema", "json_schema": schema}
        tags.append({"type": "tag", "begin": structure["begin"], "content": content, "end": structure["end"]})
    return {"format": {"type": "triggered_tags", "triggers": triggers, "tags": tags}}


def _response_format(place: str, value: JsonObject) -> Grammar | None:
    value = {name: one for name, one in value.items() if one is not None}
    kind = value.get("type")
    takes = {"json_schema": {"type", "json_schema"}, "structural_tag": {"type", "format", "structures", "triggers"}}
    if kind not in ("text", "json_object", "json_schema", "structural_tag"):
        raise _refusal(place, "needs a 'type': text, json_object, json_schema or structural_tag")
    if unknown := value.keys() - takes.get(kind, {"type"}):
        raise _refusal(place, f"has an unknown field {min(unknown)[:64]!r}")
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar("json_object", "")
    if kind == "structural_tag":
        return _structural_tag(place, value)
    named = value.get("json_schema")
    if type(named) is not dict or type(named.get("schema")) is not dict:
        raise _refusal(place, 'of type json_schema needs {"json_schema": {"name": ..., "schema": {...}}}')
    if unknown := named.keys() - {"name", "description", "schema", "strict"}:
        raise _refusal(place, f"has an unknown field {min(unknown)[:64]!r} in its json_schema")
    return _json_schema(f"{place}.json_schema.schema", named["schema"])


def _structured_outputs(place: str, value: JsonObject) -> Grammar | None:
    # The options of vLLM's backends ask for nothing when they are false.
    asked = {name: one for name, one in value.items() if one not in (None, False)}
    return _one_of(place, asked, _STRUCTURED_KINDS) if asked else None


def _one_of(place: str, value: JsonObject, kinds: Mapping[str, Callable[[str, Any], Grammar]]) -> Grammar:
    if len(value) != 1 or (name := next(iter(value))) not in kinds:
        raise _refusal(place, f"must have exactly one of {', '.join(kinds)}")
    return kinds[name](f"{place}.{name}", value[name])


_OWN_KINDS: dict[str, Callable[[str, Any], Grammar]] = {
    "json_object": _json_object,
    "json_schema": _json_schema,
    "regex": _regex,
    "ebnf": _ebnf,
    "choice": _choice,
    "structural_tag": _structural_tag,
}
_STRUCTURED_KINDS: dict[str, Callable[[str, Any], Grammar]] = {
    "json": _json_schema,
    "regex": _regex,
    "choice": _choice,
    "grammar": _ebnf,
    "json_object": _json_object,
    "structural_tag": _structural_tag,
}
_READERS: dict[str, Callable[[str, Any], Grammar | None]] = {
    "response_format": _response_format,
    "json_schema": _json_schema,
    "regex": _regex,
    "ebnf": _ebnf,
    "structural_tag": _structural_tag,
    "guided_json": _json_schema,
    "guided_regex": _regex,
    "guided_choice": _choice,
    "guided_grammar": _ebnf,
    "structured_outputs": _structured_outputs,
}
