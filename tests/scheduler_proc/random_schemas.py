"""Random JSON Schemas of the kinds that clients send, small enough for short answers."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]

_NAMES = ("a", "name", "x y", 'quote"d', "back\\slash", "größe", "名前", "line\nbreak", "$ref", "type")
_PATTERNS = (r"^[a-z]{1,5}$", r"^\d{3}-\d{2}$", r"^(red|green|blue)?$", r"^[A-Z].[^x]$", r"^\w+\s\w+$")
_FORMATS = ("date", "time", "uuid", "ipv4", "email")
_VALUES = (0, -7, 1.5, True, None, "", "häß\\lich\n", "😀", [1, "two"], {"k": [None]})


def random_schema(rng: random.Random) -> Schema:
    """A whole schema, sometimes with definitions that refer to each other."""
    schema = _node(rng, 3)
    if rng.random() < 0.3:
        item = _node(rng, 1)
        tree = {"type": "object", "properties": {"v": item, "kids": {"type": "array", "maxItems": 1}}}
        tree["properties"]["kids"]["items"] = {"$ref": "#/$defs/tree"}  # type: ignore[index]
        schema = {
            "type": "object",
            "properties": {"one": schema, "tree": {"$ref": "#/$defs/tree", "description": "recursive"}},
            "required": ["one"],
            "$defs": {"tree": tree},
        }
    return schema


def _node(rng: random.Random, depth: int) -> Schema:
    kinds = [_string, _integer, _number, _constant, _plain]
    if depth:
        kinds += [_object, _object, _array, _any_of]
    node = rng.choice(kinds)(rng, depth - 1)
    if rng.random() < 0.2:
        node = {**node, "title": "T", "description": "d", "default": None, "examples": [1]}
    return node


def _plain(rng: random.Random, depth: int) -> Schema:
    return {"type": rng.choice(["boolean", "null", ["boolean", "null"], ["integer", "null"]])}


def _constant(rng: random.Random, depth: int) -> Schema:
    if rng.random() < 0.3:
        return {"const": rng.choice(_VALUES)}
    node: Schema = {"enum": rng.sample(_VALUES, rng.randint(1, 4))}
    if rng.random() < 0.3:
        node = {"enum": ["one", 2, "three"], "type": "string"}
    return node


def _string(rng: random.Random, depth: int) -> Schema:
    node: Schema = {"type": "string"}
    choice = rng.random()
    if choice < 0.2:
        node["pattern"] = rng.choice(_PATTERNS)
    elif choice < 0.35:
        node["format"] = rng.choice(_FORMATS)
    else:
        node["maxLength"] = rng.randint(1, 12)
        if rng.random() < 0.5:
            node["minLength"] = rng.randint(0, node["maxLength"])
    if rng.random() < 0.1:
        del node["type"]
    return node


def _integer(rng: random.Random, depth: int) -> Schema:
    low = rng.randint(-1000, 1000)
    node: Schema = {"type": "integer"}
    node[rng.choice(("minimum", "exclusiveMinimum"))] = low
    node[rng.choice(("maximum", "exclusiveMaximum"))] = low + rng.choice((3, 50, 10**6))
    if rng.random() < 0.2:
        node = {"type": "integer", "multipleOf": rng.choice((2, 3, 5, 7)), "minimum": 0, "maximum": 1000}
    return node


def _number(rng: random.Random, depth: int) -> Schema:
    low = round(rng.uniform(-100, 100), rng.randint(0, 3))
    return {"type": "number", "minimum": low, rng.choice(("maximum", "exclusiveMaximum")): low + rng.choice((1, 1000))}


def _array(rng: random.Random, depth: int) -> Schema:
    node: Schema = {"type": "array", "maxItems": rng.randint(1, 3)}
    if rng.random() < 0.5:
        node["minItems"] = rng.randint(0, node["maxItems"])
    if rng.random() < 0.3:
        node = {"type": "array", "prefixItems": [_node(rng, depth), _node(rng, depth)], "items": False}
        if rng.random() < 0.5:
            node.update(minItems=2, maxItems=2)
    else:
        node["items"] = _node(rng, depth)
    return node


def _any_of(rng: random.Random, depth: int) -> Schema:
    if rng.random() < 0.2:
        return {"allOf": [_node(rng, depth)]}
    if rng.random() < 0.2:
        return {"oneOf": [_tagged(rng, "cat", depth), _tagged(rng, "dog", depth)]}
    return {"anyOf": [_node(rng, depth) for _ in range(rng.randint(1, 3))]}


def _tagged(rng: random.Random, kind: str, depth: int) -> Schema:
    properties = {"kind": {"const": kind}, "of": _node(rng, depth)}
    return {"type": "object", "properties": properties, "required": ["kind"], "additionalProperties": False}


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(_NAMES, rng.randint(1, 4))
    node: Schema = {"type": "object", "properties": {name: _node(rng, depth) for name in names}}
    if rng.random() < 0.8:
        node["required"] = rng.sample(names, rng.randint(0, len(names)))
    choice = rng.random()
    if choice < 0.4:
        node["additionalProperties"] = False
    elif choice < 0.5:
        node.update(additionalProperties=_plain(rng, 0), maxProperties=len(names) + 1)
    elif choice < 0.6:
        node["patternProperties"] = {"^Z[0-9]$": _plain(rng, 0)}
        node["maxProperties"] = len(names) + 1
    elif choice < 0.7:
        node = {"type": "object", "additionalProperties": _plain(rng, 0), "minProperties": 1, "maxProperties": 2}
        node["propertyNames"] = {"pattern": "^[a-z]{1,3}$"}
    if rng.random() < 0.1 and "properties" in node:
        del node["type"]
    return node
