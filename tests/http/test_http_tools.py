"""Tools and reasoning in chats: what goes to the ring, what the answers look like, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from http_rig import Rig, ring_stamps, running
from model_templates import ADD, PREFILLED_THINKING, QWEN3, QWEN25, ROUND_TRIP, WEATHER
from wire_client import frames, post, refused, whole

from minisgl.chat_formats import ChatFormats, find_chat_formats
from minisgl.messages import DeltaBatch, FinishReason, GenerateRequest, Logprobs, Opening
from minisgl.sampling_params import Grammar

xgrammar = pytest.importorskip("xgrammar")

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
TOOLS = [WEATHER, ADD]
ADD_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
WEATHER_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
JSON_TYPE = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "properties": {}}}}


def formats(template: str) -> ChatFormats:
    return find_chat_formats({"default": template}, {}, "auto", "auto")


@pytest.fixture(scope="module")
def qwen25() -> Iterator[Rig]:
    with running(chat_formats=formats(QWEN25)) as rig:
        yield rig


@pytest.fixture(scope="module")
def qwen3() -> Iterator[Rig]:
    with running(chat_formats=formats(QWEN3)) as rig:
        yield rig


@pytest.fixture(scope="module")
def thinking() -> Iterator[Rig]:
    with running(chat_formats=formats(PREFILLED_THINKING)) as rig:
        yield rig


def body(**fields: Any) -> dict[str, Any]:
    return {"messages": HELLO, "tools": TOOLS, **fields}


def streamed(
    rig: Rig, body: dict[str, Any], pieces: Sequence[str], finish: FinishReason = FinishReason.STOP
) -> list[Any]:
    """The choices of the chunks that answer a body when the ring brings these pieces."""
    connection, (request,) = post(rig, CHAT, {**body, "stream": True})
    for index, piece in enumerate(pieces):
        rig.delta(request, piece, [index], opens=index == 0)
    rig.delta(request, "", [2], finish, opens=not pieces, matched=2 if finish is FinishReason.STOP else None)
    return [chunk["choices"][0] for chunk in frames(connection.getresponse())]


def sent(rig: Rig, body: dict[str, Any]) -> GenerateRequest:
    """What a body sends round the ring."""
    connection, (request,) = post(rig, CHAT, body)
    rig.answer(request, "x")
    assert connection.getresponse().status == 200
    return request


def accepts(grammar: Grammar | None, text: str) -> bool:
    """Whether xgrammar takes a text for a complete answer."""
    assert grammar is not None
    assert grammar.kind == "structural_tag"
    vocabulary = [bytes([byte]) for byte in range(256)] + [b"</s>"]
    compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo(vocabulary, stop_token_ids=[256]))
    matcher = xgrammar.GrammarMatcher(
        compiler.compile_grammar(xgrammar.Grammar.from_structural_tag(json.loads(grammar.source)))
    )
    return bool(matcher.accept_string(text) and matcher.accept_token(256))


# ---- calls ----------------------------------------------------------------------------------------------------------


def test_calls_of_a_whole_answer(qwen25: Rig) -> None:
    texts = [[f"Let me see.\n{ADD_CALL}", f"\n{WEATHER_CALL}\n"], ["No ", "call"]]
    connection, requests = post(qwen25, CHAT, body(n=2), answers=2)
    for request, (first, last) in zip(requests, texts, strict=True):
        qwen25.delta(request, first, [1], opens=True)
        qwen25.delta(request, last, [2], FinishReason.STOP, matched=2)
    answer = json.loads(connection.getresponse().read())
    called, plain = answer["choices"]
    assert (called["finish_reason"], plain["finish_reason"]) == ("tool_calls", "stop")
    assert plain["message"] == {"role": "assistant", "content": "No call"}
    message = called["message"]
    assert message["content"] == "Let me see."
    assert all(re.fullmatch(r"call_[0-9a-f]{24}", call.pop("id")) for call in message["tool_calls"])
    assert message["tool_calls"] == [
        {"type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}},
        {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Köln"}'}},
    ]
    assert answer["usage"]["completion_tokens"] == 4


def test_a_call_alone_has_no_content(qwen25: Rig) -> None:
    message = whole(qwen25, CHAT, body(), [[ADD_CALL]])["choices"][0]["message"]
    assert message["content"] is None
    assert len(message["tool_calls"]) == 1


def test_calls_stream_as_openai_streams_them(qwen25: Rig) -> None:
    text = f"So:\n{ADD_CALL}\n{WEATHER_CALL}"
    choices = streamed(qwen25, body(), [text[start : start + 5] for start in range(0, len(text), 5)])
    deltas = [choice["delta"] for choice in choices]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["tool_calls"]
    assert "".join(delta.get("content", "") for delta in deltas) == "So:"
    calls: list[Any] = [part for delta in deltas for part in delta.get("tool_calls", [])]
    opening = [call for call in calls if "id" in call]
    assert [(call["index"], call["type"], call["function"]) for call in opening] == [
        (0, "function", {"name": "add", "arguments": ""}),
        (1, "function", {"name": "get_weather", "arguments": ""}),
    ]
    assert len({call["id"] for call in opening}) == 2
    fragments = [call for call in calls if "id" not in call]
    assert all(set(call) == {"index", "function"} and set(call["function"]) == {"arguments"} for call in fragments)
    joined = ["".join(c["function"]["arguments"] for c in fragments if c["index"] == index) for index in (0, 1)]
    assert joined == ['{"a": 1, "b": 2}', '{"city": "Köln"}']
    assert len(fragments) >= 6


def test_what_is_no_call_is_content(qwen25: Rig) -> None:
    text = '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'
    choices = streamed(qwen25, body(), [text[:9], text[9:]])
    assert "".join(choice["delta"].get("content", "") for choice in choices) == text
    assert choices[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [True, False])
def test_a_call_that_is_cut_short_ends_with_length(qwen25: Rig, stream: bool) -> None:
    text = '<tool_call>{"name": "add", "arguments": {"a": 1'
    if stream:
        choices = streamed(qwen25, body(), [text], FinishReason.LENGTH)
        calls = [part["function"] for choice in choices for part in choice["delta"].get("tool_calls", [])]
        assert "".join(call["arguments"] for call in calls) == '{"a": 1'
        assert choices[-1]["finish_reason"] == "length"
    else:
        (choice,) = whole(qwen25, CHAT, body(), [[text]])["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, "length")
        assert "tool_calls" not in choice["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_at_most_one_call_stops_at_its_end(qwen25: Rig, stream: bool) -> None:
    connection, (request,) = post(qwen25, CHAT, body(parallel_tool_calls=False, stop="END", stream=stream))
    assert request.sampling.stop == ("END", "</tool_call>")
    # The detokenizer cuts the stop string off.
    qwen25.delta(request, ADD_CALL.removesuffix("</tool_call>"), [1], opens=True)
    qwen25.delta(request, "", [2], FinishReason.STOP, matched="</tool_call>")
    response = connection.getresponse()
    choice = frames(response)[-1]["choices"][0] if stream else json.loads(response.read())["choices"][0]
    assert (choice["finish_reason"], choice["matched_stop"], choice["stop_reason"]) == ("tool_calls", None, None)
    if not stream:
        assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"a": 1, "b": 2}'


def test_an_answer_that_begins_anew_is_parsed_anew() -> None:
    with running(chat_formats=formats(QWEN25)) as rig:
        connection, (request,) = post(rig, CHAT, body(stream=True))
        rig.dispatched(request)
        rig.delta(request, "<tool_call>", opens=True)
        rig.settle()
        rig.down("scheduler-0")
        again = rig.from_http(GenerateRequest)
        assert again.template == request.template
        rig.answer(again, "Hello")
        choices = [chunk["choices"][0] for chunk in frames(connection.getresponse())]
        assert "".join(choice["delta"].get("content", "") for choice in choices) == "Hello"


@pytest.mark.parametrize("stream", [True, False])
def test_every_token_brings_its_logprob_once(qwen25: Rig, stream: bool) -> None:
    pieces = ["So", ": <tool", "_call>", *re.findall(r"\s*\S+", ADD_CALL.removeprefix("<tool_call>")), "\n"]
    connection, (request,) = post(qwen25, CHAT, body(stream=stream, logprobs=True))
    for index, piece in enumerate(pieces):
        finish = FinishReason.STOP if index == len(pieces) - 1 else FinishReason.NONE
        openings = [Opening(0, 7, 2, ring_stamps(request))] if index == 0 else []
        logprobs = [Logprobs(0, False, [index], [-0.5], pieces=[piece.encode()])]
        qwen25.ring.send(
            DeltaBatch([request.rid], [piece], [1], [index], [finish], openings, {0: 2} if finish else {}, [], logprobs)
        )
    response = connection.getresponse()
    chunks = frames(response) if stream else [json.loads(response.read())]
    choices = [chunk["choices"][0] for chunk in chunks]
    tokens = [token for choice in choices for token in (choice["logprobs"] or {}).get("content", [])]
    assert [token["token"] for token in tokens] == pieces
    assert choices[-1]["finish_reason"] == "tool_calls"


# ---- what goes to the ring ------------------------------------------------------------------------------------------


def test_tools_and_earlier_calls_go_to_the_template(qwen25: Rig) -> None:
    messages = json.loads(json.dumps(ROUND_TRIP))
    for call in messages[2]["tool_calls"]:
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    messages[2] |= {"refusal": None, "reasoning_content": None, "audio": None}
    request = sent(qwen25, body(messages=messages))
    assert request.template == {"tools": TOOLS}
    assert request.sampling.grammar is None
    assert request.prompt == [{key: value for key, value in m.items() if value is not None} for m in ROUND_TRIP]


@pytest.mark.parametrize("choice", ["none", None])
def test_no_tools_without_a_choice_of_them(qwen25: Rig, choice: str | None) -> None:
    fields = {"tool_choice": "none"} if choice else {"tools": [], "parallel_tool_calls": False}
    request = sent(qwen25, body(**fields))
    assert (request.template, request.sampling.grammar, request.sampling.stop) == ({}, None, ())
    answer = whole(qwen25, CHAT, body(**fields), [[ADD_CALL]])
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": ADD_CALL}


def test_required_calls_are_held_to_a_grammar(qwen25: Rig) -> None:
    grammar = sent(qwen25, body(tool_choice="required")).sampling.grammar
    assert accepts(grammar, ADD_CALL)
    assert accepts(grammar, f"{WEATHER_CALL}\n{ADD_CALL}")
    assert not any(accepts(grammar, text) for text in ("", "Hi", f"Hi\n{ADD_CALL}", ADD_CALL.replace("2", '"2"')))
    assert accepts(sent(qwen25, body(tools=tool(), tool_choice="required")).sampling.grammar, call_of_f("{}"))
    assert not accepts(sent(qwen25, body(tools=tool(), tool_choice="required")).sampling.grammar, call_of_f('{"a": 1}'))
    grammar = sent(qwen25, body(tool_choice="required", parallel_tool_calls=False)).sampling.grammar
    assert accepts(grammar, WEATHER_CALL)
    assert not accepts(grammar, f"{WEATHER_CALL}\n{ADD_CALL}")


def test_a_named_call_is_the_only_one(qwen25: Rig) -> None:
    named = {"type": "function", "function": {"name": "add"}}
    request = sent(qwen25, body(tool_choice=named))
    assert request.template == {"tools": TOOLS}
    assert accepts(request.sampling.grammar, ADD_CALL)
    assert not accepts(request.sampling.grammar, WEATHER_CALL)
    message = whole(qwen25, CHAT, body(tool_choice=named), [[ADD_CALL + WEATHER_CALL]])["choices"][0]["message"]
    assert len(message["tool_calls"]) == 1


def test_strict_functions_hold_calls_to_their_schema_and_leave_text_free(qwen25: Rig) -> None:
    strict = {"type": "function", "function": {**ADD["function"], "strict": True}}
    grammar = sent(qwen25, body(tools=[strict, WEATHER])).sampling.grammar
    assert accepts(grammar, f"So: {ADD_CALL} and {WEATHER_CALL}")
    assert accepts(grammar, WEATHER_CALL.replace("city", "any"))
    assert not accepts(grammar, ADD_CALL.replace("2", '"2"'))


def test_an_answer_in_json_or_a_call(qwen25: Rig) -> None:
    grammar = sent(qwen25, body(response_format=JSON_TYPE)).sampling.grammar
    assert accepts(grammar, "{}")
    assert accepts(grammar, ADD_CALL)
    assert not accepts(grammar, "Hello")


# ---- reasoning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [["<think>\nHm.\n</think>\n\nHello"], list("<think>\nHm.\n</think>\n\nHello")])
def test_reasoning_streams_as_such(qwen3: Rig, pieces: list[str]) -> None:
    choices = streamed(qwen3, {"messages": HELLO}, pieces)
    deltas = [choice["delta"] for choice in choices]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert all(set(delta) <= {"content"} or set(delta) == {"reasoning_content"} for delta in deltas[1:])
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm."
    assert "".join(delta.get("content", "") for delta in deltas) == "Hello"


def test_reasoning_of_whole_answers(qwen3: Rig, thinking: Rig) -> None:
    def message(rig: Rig, text: str, **fields: Any) -> Any:
        return whole(rig, CHAT, {"messages": HELLO, **fields}, [[text]])["choices"][0]["message"]

    reasoned = {"role": "assistant", "content": "Hello", "reasoning_content": "Hm."}
    text = "<think>\nHm.\n</think>\n\nHello"
    assert message(qwen3, text) == reasoned
    assert message(qwen3, text, separate_reasoning=False) == {"role": "assistant", "content": text}
    assert message(qwen3, "Hello") == {**reasoned, "reasoning_content": None}
    assert message(thinking, "Hm.\n</think>\n\nHello") == reasoned
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    assert message(thinking, "Hello", **off)["content"] == "Hello"
    both = message(qwen3, f"<think>Hm.</think>\n{ADD_CALL}", tools=TOOLS)
    assert (both["reasoning_content"], both["content"], len(both["tool_calls"])) == ("Hm.", None, 1)


def test_a_continued_answer_goes_on_where_it_is(qwen3: Rig) -> None:
    def message(said: str) -> Any:
        messages = [*HELLO, {"role": "assistant", "content": said}]
        fields = {"messages": messages, "continue_final_message": True}
        return whole(qwen3, CHAT, fields, [["well.</think>\nHello"]])["choices"][0]["message"]

    assert message("<think>\nVery ")["reasoning_content"] == "well."
    assert message("<think>x</think>Very ")["content"] == "well.</think>\nHello"


def test_thinking_comes_before_a_grammar(qwen3: Rig, thinking: Rig) -> None:
    def grammar(rig: Rig, **fields: Any) -> Grammar | None:
        return sent(rig, {"messages": HELLO, "response_format": JSON_TYPE, **fields}).sampling.grammar

    for rig, thought in ((qwen3, "<think>\nHm\n</think>\n\n"), (thinking, "Hm\n</think>\n\n")):
        assert accepts(grammar(rig), thought + "{}")
        assert not accepts(grammar(rig), thought + "Hello")
        off = grammar(rig, chat_template_kwargs={"enable_thinking": False})
        assert off == Grammar("json_schema", json.dumps(JSON_TYPE["json_schema"]["schema"], separators=(",", ":")))
    assert accepts(grammar(qwen3), "{}")
    assert not accepts(grammar(thinking), "{}")
    for kind in ({"regex": "[ab]"}, {"ebnf": 'root ::= "a" | "b"'}, {"guided_choice": ["a", "b"]}):
        own = sent(thinking, {"messages": HELLO, **kind}).sampling.grammar
        assert accepts(own, "Hm</think>a")
        assert not accepts(own, "Hm</think>c")
    assert accepts(sent(qwen3, body(tool_choice="required")).sampling.grammar, f"<think>Hm</think>\n\n{ADD_CALL}")


# ---- refusals -------------------------------------------------------------------------------------------------------


def tool(**function: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", **function}}]


def nested(depth: int) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": nested(depth - 2)}} if depth > 1 else {}


def call_of_f(arguments: str) -> str:
    return f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>'


def called(**call: Any) -> list[dict[str, Any]]:
    function = {"name": "f", "arguments": "{}"}
    return [{"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function, **call}]}]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": {}}, "tools", "a list"),
        ({"tools": [1]}, "tools", r"tools\[0\] must be"),
        ({"tools": [{"type": "retrieval", "function": {}}]}, "tools", r"tools\[0\] must be"),
        ({"tools": [{**WEATHER, "x": 1}]}, "tools", "unknown field 'x'"),
        ({"tools": tool(name="")}, "tools", r"function\.name"),
        ({"tools": tool(name=7)}, "tools", r"function\.name"),
        ({"tools": tool(description=7)}, "tools", "description"),
        ({"tools": tool(parameters=[])}, "tools", "schema of an object"),
        ({"tools": tool(parameters={"type": "string"})}, "tools", "schema of an object"),
        ({"tools": tool(strict="yes")}, "tools", "strict"),
        ({"tools": tool(bogus=1)}, "tools", "unknown field 'bogus'"),
        ({"tools": [ADD, ADD]}, "tools", "'add' is there twice"),
        ({"tool_choice": "any"}, "tool_choice", "must be 'none'"),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "must be 'none'"),
        ({"tool_choice": {"type": "function", "function": {"name": []}}}, "tool_choice", "must be 'none'"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "not among the tools"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tool_choice": "required", "regex": "a"}, "tool_choice", "another grammar"),
        ({"tools": tool(parameters=nested(300)), "tool_choice": "required"}, "tools", "Recursion limit"),
        (
            {"tools": tool(parameters={"title": "x" * 300_000, "anyOf": []}), "tool_choice": "required"},
            "tools",
            "bytes",
        ),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls", "true or false"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "does not read"),
        ({"documents": [{"text": "x"}]}, "documents", "does not read"),
        ({"messages": [{"role": "user", "tool_calls": [{}], "content": "x"}]}, "messages", "are the assistant's"),
        ({"messages": called(function={"name": "f", "arguments": "{"})}, "messages", "text of a JSON object"),
        ({"messages": called(function={"name": "f", "arguments": "[1]"})}, "messages", "text of a JSON object"),
        ({"messages": called(function={"arguments": "{}"})}, "messages", r"function\.name"),
        ({"messages": called(bogus=1)}, "messages", "unknown field 'bogus'"),
        ({"messages": called(type="x")}, "messages", r"tool_calls\[0\] must be"),
        ({"messages": [{"role": "assistant", "tool_calls": {}}]}, "messages", "a list of calls"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages", r"\.content must be"),
    ],
)
def test_wrong_fields_are_refused_by_name(qwen25: Rig, fields: dict[str, Any], param: str, words: str) -> None:
    status, error = refused(qwen25, CHAT, body(**fields))
    assert (status, error["param"]) == (400, param)
    assert re.search(words, error["message"]), error["message"]


def test_models_whose_template_shows_no_tools_refuse_them(thinking: Rig) -> None:
    status, error = refused(thinking, CHAT, body())
    assert (status, error["code"], error["param"]) == (400, "unsupported_field", "tools")
    assert "does not show tools to the model" in error["message"]
    assert sent(thinking, body(tool_choice="none")).template == {}
