"""Schemas as xgrammar can enforce them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from minisgl.scheduler_proc.json_schema import UnsupportedSchema, enforceable, enforceable_structural_tag


def rewritten(schema: Any) -> Any:
    return json.loads(enforceable(json.dumps(schema)))


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (True, True),
        ({}, {}),
        ({"type": "object"}, {"type": "object", "additionalProperties": True}),
        ({"type": "array"}, {"type": "array", "items": True}),
        (
            {"properties": {"a": {"minimum": 1}}, "required": ["a"]},
            {
                "properties": {"a": {"minimum": 1, "type": "number"}},
                "required": ["a"],
                "type": "object",
                "additionalProperties": False,
            },
        ),
        (
            {"type": "object", "properties": {}, "required": ["z"], "additionalProperties": {"type": "null"}},
            {
                "type": "object",
                "properties": {"z": {"type": "null"}},
                "required": ["z"],
                "additionalProperties": {"type": "null"},
            },
        ),
        ({"enum": [1, "a", 2.0, 2.5, True], "type": ["integer", "null"]}, {"enum": [1, 2.0]}),
        ({"const": "a", "type": "string", "title": "t"}, {"const": "a", "title": "t"}),
        (
            {"type": "object", "properties": {"a": {}}, "unevaluatedProperties": {"minLength": 1}},
            {
                "type": "object",
                "properties": {"a": {}},
                "additionalProperties": {"minLength": 1, "type": "string"},
            },
        ),
        ({"uniqueItems": False, "items": {}}, {"items": {}, "type": "array"}),
        ({"x-order": 3, "nullable": True}, {"x-order": 3, "nullable": True}),
    ],
)
def test_a_schema_says_what_is_meant(schema: Any, expected: Any) -> None:
    assert rewritten(schema) == expected


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ([1], "# must be an object or a boolean"),
        ({"not": {}}, "#: not cannot be enforced"),
        ({"if": {}, "then": {}}, "#: if, then cannot be enforced"),
        ({"items": {"uniqueItems": True}}, "#/items: uniqueItems cannot be enforced"),
        ({"anyOf": [{"type": "array", "contains": {}}]}, "#/anyOf/0: contains"),
        ({"$defs": {"d": {"dependentRequired": {}}}}, "#/$defs/d: dependentRequired"),
        ({"anyOf": [{}], "minimum": 3}, "#: minimum beside anyOf cannot be enforced"),
        ({"anyOf": [{}], "type": "string"}, "#: type beside anyOf"),
        ({"$ref": "#", "required": ["a"]}, "#: required beside $ref"),
        ({"allOf": [{}, {}]}, "merge them"),
        ({"oneOf": []}, "oneOf must be a list of schemas"),
        ({"enum": 3}, "enum must be an array"),
        ({"enum": ["a"], "type": "integer"}, "no value of enum has the type"),
        ({"minimum": 1, "minLength": 1}, "add a type"),
        ({"type": []}, "must not be an empty list"),
        ({"$ref": "https://example.com/schema.json"}, "inside this one"),
        ({"$ref": "#/$defs/no"}, "inside this one"),
        ({"$ref": "#/x", "x": {"type": "string"}}, "inside this one"),
        ({"properties": {"a": {}}, "additionalProperties": False, "required": ["b"]}, "'b' must be listed"),
        ({"properties": {"ab": {}}, "patternProperties": {"^a": {}}}, "write it once"),
        ({"patternProperties": {"(": {}}, "properties": {"a": {}}}, "no regular expression"),
        ({"properties": {"a": {}}, "propertyNames": {"maxLength": 1}}, "propertyNames beside"),
        ({"type": "object", "minProperties": 2}, "minProperties above 1"),
        ({"properties": [1]}, "#/properties must be an object"),
        ({"prefixItems": {}}, "prefixItems must be a list"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(schema: Any, reason: str) -> None:
    with pytest.raises(UnsupportedSchema) as refusal:
        rewritten(schema)
    assert reason in str(refusal.value)


@pytest.mark.parametrize("source", ["", "{", '{"minimum": NaN}', "[1,]"])
def test_what_is_not_json_is_refused(source: str) -> None:
    with pytest.raises(UnsupportedSchema, match="not valid JSON"):
        enforceable(source)


def test_schemas_inside_structural_tags_are_rewritten_too() -> None:
    tag = {"type": "tag", "begin": "<t>", "content": {"type": "json_schema", "json_schema": {"minLength": 1}}}
    source = json.dumps({"type": "structural_tag", "format": {"type": "sequence", "elements": [tag]}})
    content = json.loads(enforceable_structural_tag(source))["format"]["elements"][0]["content"]
    assert content["json_schema"] == {"minLength": 1, "type": "string"}
    old = json.dumps({"structures": [{"begin": "<t>", "schema": {"not": {}}, "end": "</t>"}], "triggers": ["<t"]})
    with pytest.raises(UnsupportedSchema, match="not cannot be enforced"):
        enforceable_structural_tag(old)
