"""JSON Schemas as xgrammar can enforce them: what it would silently ignore is rewritten, or refused by name.

xgrammar reads one kind of rule at each place of a schema ($ref, const, enum, anyOf, oneOf, allOf, type - the first it
finds) and skips what stands beside it. `enforceable` makes every answer that xgrammar then allows valid against
the schema it was given; where it has to choose, the answers allowed are fewer, never more.
"""

from __future__ import annotations

import json
import re
from typing import Any

Node = dict[str, Any]

_OBJECT = {
    *("properties", "required", "additionalProperties", "patternProperties", "propertyNames"),
    *("minProperties", "maxProperties", "unevaluatedProperties"),
}
_ARRAY = {"items", "prefixItems", "minItems", "maxItems", "unevaluatedItems"}
_STRING = {"minLength", "maxLength", "pattern", "format"}
_NUMBER = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
_TYPED = {"object": _OBJECT, "array": _ARRAY, "string": _STRING, "number": _NUMBER}
_RULES = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")
_REFUSED = {
    *("not", "if", "then", "else", "contains", "uniqueItems", "additionalItems"),
    *("dependentRequired", "dependentSchemas", "dependencies", "$dynamicRef", "$recursiveRef"),
}
_PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}


class UnsupportedSchema(ValueError):
    """The schema cannot be enforced; the message says what and where."""


def enforceable(source: str) -> str:
    """A JSON Schema as text, rewritten for xgrammar.

    Objects that list properties and say nothing of others may have no others, as in strict mode elsewhere; a schema
    without a type gets the one that its keywords are for.

    Raises:
        UnsupportedSchema: it is no JSON Schema, or has keywords that cannot be enforced.
    """
    try:
        schema = json.loads(source, parse_constant=_refuse_constant)
    except ValueError as error:
        raise UnsupportedSchema(f"not valid JSON: {error}") from None
    return json.dumps(_Rewriter().rewrite(schema), ensure_ascii=False)


def enforceable_structural_tag(source: str) -> str:
    """A structural tag as text, with every JSON Schema in it rewritten; raises UnsupportedSchema."""
    try:
        tag = json.loads(source, parse_constant=_refuse_constant)
    except ValueError as error:
        raise UnsupportedSchema(f"not valid JSON: {error}") from None
    _rewrite_inside(tag)
    return json.dumps(tag, ensure_ascii=False)


def _rewrite_inside(part: Any) -> None:
    if isinstance(part, list):
        for item in part:
            _rewrite_inside(item)
    elif isinstance(part, dict):
        # "schema" is how the older form of structural tags spells it.
        for key in ("json_schema", "schema"):
            if isinstance(part.get(key), (dict, bool)):
                part[key] = _Rewriter().rewrite(part[key])
        for key, value in part.items():
            if key not in ("json_schema", "schema"):
                _rewrite_inside(value)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


class _Rewriter:
    """One schema document."""

    def __init__(self) -> None:
        self._places: set[str] = set()
        self._refs: list[tuple[str, str]] = []

    def rewrite(self, schema: Any) -> Any:
        rewritten = self._rewrite(schema, "#")
        for place, ref in self._refs:
            if ref not in self._places:
                raise UnsupportedSchema(f"{place}: $ref must point to a schema inside this one, got {ref!r}")
        return rewritten

    def _rewrite(self, schema: Any, place: str) -> Any:
        if isinstance(schema, bool):
            self._places.add(place)
            return schema
        if not isinstance(schema, dict):
            raise UnsupportedSchema(f"{place} must be an object or a boolean")
        self._places.add(place)
        node = dict(schema)
        for name in ("$defs", "definitions"):
            if name in node:
                node[name] = self._rewrite_each(node[name], f"{place}/{name}")
        if node.get("uniqueItems") is False:
            del node["uniqueItems"]
        refused = sorted(_REFUSED & node.keys())
        if refused:
            raise UnsupportedSchema(f"{place}: {', '.join(refused)} cannot be enforced; leave it out")
        rules = [name for name in _RULES if name in node]
        if rules:
            self._rewrite_rule(node, rules, place)
        else:
            self._rewrite_typed(node, place)
        return node

    def _rewrite_each(self, schemas: Any, place: str) -> Node:
        if not isinstance(schemas, dict):
            raise UnsupportedSchema(f"{place} must be an object")
        return {name: self._rewrite(schema, f"{place}/{name}") for name, schema in schemas.items()}

    def _rewrite_rule(self, node: Node, rules: list[str], place: str) -> None:
        rule = rules[0]
        beside = rules[1:] + sorted(set().union(*_TYPED.values()) & node.keys())
        if rule in ("const", "enum"):
            if not isinstance(node.get("enum", []), list):
                raise UnsupportedSchema(f"{place}: enum must be an array")
            values = [node["const"]] if rule == "const" else node["enum"]
            values = [value for value in values if "type" not in node or _has_type(value, node["type"])]
            if not values:
                raise UnsupportedSchema(f"{place}: no value of {rule} has the type asked for")
            node.pop("type", None)
            node[rule] = values[0] if rule == "const" else values
        elif "type" in node:
            beside.append("type")
        if beside:
            raise UnsupportedSchema(f"{place}: {', '.join(beside)} beside {rule} cannot be enforced; keep one of them")
        if rule == "$ref":
            self._refs.append((place, str(node["$ref"])))
        elif rule in ("anyOf", "oneOf", "allOf"):
            branches = node[rule]
            if not isinstance(branches, list) or not branches:
                raise UnsupportedSchema(f"{place}: {rule} must be a list of schemas")
            if rule == "allOf" and len(branches) > 1:
                raise UnsupportedSchema(f"{place}: allOf of several schemas cannot be enforced; merge them into one")
            node[rule] = [self._rewrite(branch, f"{place}/{rule}/{index}") for index, branch in enumerate(branches)]

    def _rewrite_typed(self, node: Node, place: str) -> None:
        if "type" not in node:
            implied = [kind for kind, keywords in _TYPED.items() if keywords & node.keys()]
            if len(implied) > 1:
                raise UnsupportedSchema(f"{place}: add a type; the keywords are for {' and '.join(implied)}")
            if not implied:
                return
            node["type"] = implied[0]
        kinds = node["type"] if isinstance(node["type"], list) else [node["type"]]
        if not kinds:
            raise UnsupportedSchema(f"{place}: type must not be an empty list")
        if "object" in kinds:
            self._rewrite_object(node, place)
        if "array" in kinds:
            self._rewrite_array(node, place)

    def _rewrite_object(self, node: Node, place: str) -> None:
        for name in ("properties", "patternProperties"):
            if name in node:
                node[name] = self._rewrite_each(node[name], f"{place}/{name}")
        properties: Node = node.get("properties", {})
        patterns: Node = node.get("patternProperties", {})
        others = node.pop("unevaluatedProperties", not (properties or patterns))
        others = self._rewrite(node.get("additionalProperties", others), f"{place}/additionalProperties")
        node["additionalProperties"] = others
        for name in node.get("required") or []:
            if name not in properties:
                if others is False or patterns:
                    raise UnsupportedSchema(f"{place}: the required property {name!r} must be listed in properties")
                properties = node["properties"] = {**properties, name: others}
        if "propertyNames" in node:
            node["propertyNames"] = self._rewrite(node["propertyNames"], f"{place}/propertyNames")
            if properties or patterns:
                raise UnsupportedSchema(
                    f"{place}: propertyNames beside properties or patternProperties cannot be enforced"
                )
        least = node.get("minProperties", 0)
        if isinstance(least, int) and least > 1 and (others is not False or patterns):
            # The same free name could come twice, and count once.
            raise UnsupportedSchema(f"{place}: minProperties above 1 can be enforced only for listed properties")
        for name in properties:
            for pattern in patterns:
                if _matches(pattern, name, place):
                    raise UnsupportedSchema(
                        f"{place}: the property {name!r} is also in patternProperties {pattern!r}; write it once"
                    )

    def _rewrite_array(self, node: Node, place: str) -> None:
        if "prefixItems" in node:
            if not isinstance(node["prefixItems"], list):
                raise UnsupportedSchema(f"{place}: prefixItems must be a list of schemas")
            node["prefixItems"] = [
                self._rewrite(item, f"{place}/prefixItems/{index}") for index, item in enumerate(node["prefixItems"])
            ]
        others = node.pop("unevaluatedItems", True)
        node["items"] = self._rewrite(node.get("items", others), f"{place}/items")


def _has_type(value: Any, kinds: Any) -> bool:
    if isinstance(kinds, list):
        return any(_has_type(value, kind) for kind in kinds)
    if isinstance(value, bool):
        return bool(kinds == "boolean")
    if kinds == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _PYTHON_TYPES.get(str(kinds), ()))


def _matches(pattern: str, name: str, place: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error as error:
        raise UnsupportedSchema(f"{place}: patternProperties {pattern!r} is no regular expression: {error}") from None
