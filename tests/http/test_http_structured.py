"""Grammars, template variables and usage options: what each API's fields become on the ring."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from http_rig import Rig, running
from wire_client import frames, post, refused

from minisgl.grammars import choice_grammar
from minisgl.messages import GenerateRequest, RequestError
from minisgl.sampling_params import MAX_GRAMMAR_BYTES, Grammar

CHAT, TEXT, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"
HELLO = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"enum": [1, "ü"]}}}
SOURCE = '{"type":"object","properties":{"b":{"type":"string"},"a":{"enum":[1,"ü"]}}}'
TAGS = {"type": "structural_tag", "format": {"type": "const_string", "value": "x"}}


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with running() as rig:
        yield rig


def request_of(rig: Rig, path: str, body: Any) -> GenerateRequest:
    connection, (request,) = post(rig, path, body)
    rig.answer(request, "x")
    response = connection.getresponse()
    assert response.status == 200
    response.read()
    return request


SCHEMA_FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
OPENAI_GRAMMARS = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "text"}, "structured_outputs": {"json": None, "disable_fallback": False}}, None),
    ({"response_format": {"type": "json_object", "json_schema": None}}, Grammar("json_object", "")),
    ({"response_format": SCHEMA_FORMAT}, Grammar("json_schema", SOURCE)),
    ({"response_format": TAGS}, Grammar("structural_tag", json.dumps(TAGS, separators=(",", ":")))),
    ({"regex": "a+b"}, Grammar("regex", "a+b")),
    ({"ebnf": 'root ::= "a"'}, Grammar("ebnf", 'root ::= "a"')),
    ({"json_schema": SOURCE}, Grammar("json_schema", SOURCE)),
    ({"guided_json": SCHEMA}, Grammar("json_schema", SOURCE)),
    ({"guided_json": SOURCE}, Grammar("json_schema", SOURCE)),
    ({"guided_regex": "[0-9]"}, Grammar("regex", "[0-9]")),
    ({"guided_choice": ["yes", 'no"\n']}, choice_grammar(["yes", 'no"\n'])),
    ({"guided_grammar": 'root ::= "a"'}, Grammar("ebnf", 'root ::= "a"')),
    ({"structured_outputs": {"json": SCHEMA}}, Grammar("json_schema", SOURCE)),
    ({"structured_outputs": {"regex": "a"}}, Grammar("regex", "a")),
    ({"structured_outputs": {"choice": ["a", "b"]}}, choice_grammar(["a", "b"])),
    ({"structured_outputs": {"grammar": 'root ::= "a"'}}, Grammar("ebnf", 'root ::= "a"')),
    ({"structured_outputs": {"json_object": True}}, Grammar("json_object", "")),
    (
        {"structured_outputs": {"structural_tag": json.dumps(TAGS)}},
        Grammar("structural_tag", json.dumps(TAGS, separators=(",", ":"))),
    ),
]


@pytest.mark.parametrize(("fields", "grammar"), OPENAI_GRAMMARS)
@pytest.mark.parametrize(("path", "prompt"), [(CHAT, {"messages": HELLO}), (TEXT, {"prompt": "x"})])
def test_openais_fields(rig: Rig, path: str, prompt: Any, fields: Any, grammar: Grammar | None) -> None:
    assert request_of(rig, path, {**prompt, **fields}).sampling.grammar == grammar


@pytest.mark.parametrize(
    ("field", "value", "grammar"),
    [
        ("json_schema", SOURCE, Grammar("json_schema", SOURCE)),
        ("regex", "a+", Grammar("regex", "a+")),
        ("ebnf", 'root ::= "a"', Grammar("ebnf", 'root ::= "a"')),
        (
            "structural_tag",
            json.dumps(
                {
                    "type": "structural_tag",
                    "structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}],
                    "triggers": ["<f"],
                }
            ),
            Grammar(
                "structural_tag",
                '{"type":"structural_tag","format":{"type":"triggered_tags","triggers":["<f"],"tags":[{"type":"tag",'
                f'"begin":"<f>","content":{{"type":"json_schema","json_schema":{SOURCE}}},"end":"</f>"}}]}}}}',
            ),
        ),
    ],
)
def test_sglangs_fields(rig: Rig, field: str, value: Any, grammar: Grammar) -> None:
    request = request_of(rig, GENERATE, {"text": "x", "sampling_params": {field: value}})
    assert request.sampling.grammar == grammar


@pytest.mark.parametrize(
    ("value", "grammar"),
    [
        (None, None),
        ({"json_object": True}, Grammar("json_object", "")),
        ({"json_schema": SCHEMA}, Grammar("json_schema", SOURCE)),
        ({"regex": "a"}, Grammar("regex", "a")),
        ({"ebnf": 'root ::= "a"'}, Grammar("ebnf", 'root ::= "a"')),
        ({"choice": ["a"]}, choice_grammar(["a"])),
        ({"structural_tag": TAGS}, Grammar("structural_tag", json.dumps(TAGS, separators=(",", ":")))),
    ],
)
def test_the_own_field(rig: Rig, value: Any, grammar: Grammar | None) -> None:
    assert request_of(rig, GENERATE, {"prompt": "x", "grammar": value}).sampling.grammar == grammar


LONG = "a" * (MAX_GRAMMAR_BYTES + 1)
WRONG = [
    (CHAT, {"response_format": {}}, "response_format", "type"),
    (CHAT, {"response_format": {"type": "yaml"}}, "response_format", "json_schema"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "response_format", "schema"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, "response_format", "schema"),
    (CHAT, {"response_format": {**SCHEMA_FORMAT, "more": 1}}, "response_format", "'more'"),
    (CHAT, {"response_format": {"type": "structural_tag", "triggers": [1]}}, "response_format", "structures"),
    (CHAT, {"response_format": "json"}, "response_format", "object"),
    (CHAT, {"regex": ""}, "regex", "empty"),
    (CHAT, {"regex": LONG}, "regex", "at most"),
    (CHAT, {"guided_json": "{"}, "guided_json", "not JSON"),
    (CHAT, {"guided_json": "[]"}, "guided_json", "JSON schema"),
    (CHAT, {"guided_json": '{"not":' * 300 + "{}" + "}" * 300}, "guided_json", "Recursion limit"),
    (CHAT, {"guided_choice": []}, "guided_choice", "texts"),
    (CHAT, {"guided_choice": ["a", ""]}, "guided_choice", "texts"),
    (CHAT, {"regex": "a", "response_format": {"type": "json_object"}}, "response_format", "one grammar"),
    (CHAT, {"guided_regex": "a", "structured_outputs": {"regex": "a"}}, "structured_outputs", "one grammar"),
    (CHAT, {"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs", "exactly one"),
    (CHAT, {"structured_outputs": {"regex": "a", "disable_fallback": True}}, "structured_outputs", "exactly one"),
    (CHAT, {"structured_outputs": {"yaml": "a"}}, "structured_outputs", "exactly one"),
    (CHAT, {"structured_outputs": {"json": 5}}, "structured_outputs", "structured_outputs.json"),
    (GENERATE, {"text": "x", "sampling_params": {"regex": "a", "ebnf": "b"}}, "ebnf", "one grammar"),
    (GENERATE, {"text": "x", "sampling_params": {"regex": LONG}}, "regex", "at most"),
    (GENERATE, {"text": "x", "sampling_params": {"json_schema": "{"}}, "json_schema", "not JSON"),
    (GENERATE, {"prompt": "x", "grammar": {}}, "grammar", "exactly one"),
    (GENERATE, {"prompt": "x", "grammar": {"regex": "a", "ebnf": "b"}}, "grammar", "exactly one"),
    (GENERATE, {"prompt": "x", "grammar": {"yaml": "a"}}, "grammar", "exactly one"),
    (GENERATE, {"prompt": "x", "grammar": {"json_object": False}}, "grammar", "true"),
    (GENERATE, {"prompt": "x", "grammar": "a"}, "grammar", "object"),
    (CHAT, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "'messages'"),
    (CHAT, {"continue_final_message": True}, "continue_final_message", "assistant"),
    (
        CHAT,
        {"continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
        "one of them",
    ),
    (CHAT, {"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options", "not supported"),
    (CHAT, {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options", "true or false"),
]


@pytest.mark.parametrize(("path", "body", "param", "words"), WRONG)
def test_wrong_fields_are_refused(rig: Rig, path: str, body: Any, param: str, words: str) -> None:
    status, error = refused(rig, path, {"messages": HELLO, **body} if path == CHAT else body)
    assert (status, error["param"]) == (400, param), error
    assert words in error["message"], error


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": HELLO, "response_format": SCHEMA_FORMAT}, "response_format"),
        (TEXT, {"prompt": "x", "guided_regex": "("}, "guided_regex"),
        (GENERATE, {"text": "x", "sampling_params": {"ebnf": "?"}}, "ebnf"),
        (GENERATE, {"prompt": "x", "grammar": {"regex": "("}}, "grammar"),
    ],
)
def test_a_grammar_refused_by_the_ring_is_named_by_its_field(
    rig: Rig, path: str, body: Any, param: str, stream: bool
) -> None:
    connection, (request,) = post(rig, path, {**body, "stream": stream})
    rig.ring.send(RequestError(request.rid, 400, "invalid_grammar", "it does not compile"))
    response = connection.getresponse()
    error = json.loads(response.read())["error"]
    assert (response.status, error["code"], error["param"]) == (400, "invalid_grammar", param)


def test_template_variables(rig: Rig) -> None:
    assert request_of(rig, CHAT, {"messages": HELLO}).template == {}
    assert request_of(rig, CHAT, {"messages": HELLO, "add_generation_prompt": True}).template == {}
    body = {"messages": HELLO, "add_generation_prompt": False, "chat_template_kwargs": {"enable_thinking": False}}
    assert request_of(rig, CHAT, body).template == {"enable_thinking": False, "add_generation_prompt": False}
    messages = [*HELLO, {"role": "assistant", "content": "Well"}]
    request = request_of(rig, CHAT, {"messages": messages, "continue_final_message": True})
    assert request.template == {"continue_final_message": True, "add_generation_prompt": False}


def test_a_replayed_chat_keeps_its_template_variables() -> None:
    with running() as rig:
        body = {"messages": HELLO, "chat_template_kwargs": {"x": 1}}
        connection, (request,) = post(rig, CHAT, body)
        rig.dispatched(request)
        rig.down("scheduler-0")
        again = rig.from_http(GenerateRequest)
        assert again.template == request.template == {"x": 1}
        rig.answer(again, "x")
        assert connection.getresponse().status == 200


def test_a_developer_is_a_system(rig: Rig) -> None:
    messages = [{"role": "developer", "content": "Be brief."}, *HELLO]
    assert request_of(rig, CHAT, {"messages": messages}).prompt == [{"role": "system", "content": "Be brief."}, *HELLO]


@pytest.mark.parametrize("include_usage", [True, False])
def test_usage_in_every_chunk(rig: Rig, include_usage: bool) -> None:
    options = {"continuous_usage_stats": True, "include_usage": include_usage}
    connection, (request,) = post(rig, CHAT, {"messages": HELLO, "stream": True, "stream_options": options})
    rig.delta(request, "a", [1], opens=True)
    rig.settle()
    rig.answer(request, "b")
    chunks = frames(connection.getresponse())
    if include_usage:
        assert chunks.pop()["choices"] == []
    counts = [(chunk["usage"]["prompt_tokens"], chunk["usage"]["completion_tokens"]) for chunk in chunks]
    assert counts == [(7, 1), (7, 1), (7, 2), (7, 2)]
