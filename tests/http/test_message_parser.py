"""Generated texts into content, reasoning and tool calls: whole, in any pieces, well-formed or not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minisgl.http.message_parser import Kind, Message, MessageParser, Part, assemble

TOOLS = frozenset({"get_weather", "add"})
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "x"}}\n</tool_call>'
ADD = ("add", '{"a": 1, "b": "x"}')


def parser(inside: bool = False, tools: frozenset[str] | None = TOOLS, **settings: Any) -> MessageParser:
    return MessageParser(reasons=True, inside=inside, functions=tools, **settings)


def parts_of(parser: MessageParser, pieces: list[str]) -> list[Part]:
    """All parts, with those texts joined that only the cutting of the pieces has kept apart."""
    parts = [part for piece in pieces for part in parser.feed(piece)] + parser.finish()
    joined: list[Part] = []
    for part in parts:
        if joined and part.kind not in (Kind.CALL, Kind.CALL_BROKEN) and joined[-1][::2] == part[::2]:
            joined[-1] = part._replace(text=joined[-1].text + part.text)
        else:
            joined.append(part)
    return joined


def message(text: str, **settings: Any) -> Message:
    return assemble(parts_of(parser(**settings), [text]))


# ---- reasoning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "inside", "reasoning", "content"),
    [
        ("Hello", False, "", "Hello"),
        ("<think>\nHm.\n\nYes.\n</think>\n\nHello\n", False, "Hm.\n\nYes.", "Hello\n"),
        ("\n<think>Hm.</think>Hello", False, "Hm.", "Hello"),
        ("<think>\n\n</think>\n\nHello", False, "", "Hello"),
        ("Hm.\n</think>\n\nHello", True, "Hm.", "Hello"),
        ("\n<think>\nHm.</think>Hello", True, "Hm.", "Hello"),
        # Cut short: all of it is reasoning, down to the last newline.
        ("<think>\nHm.\n", False, "Hm.\n", ""),
        ("Hm.</thin", True, "Hm.</thin", ""),
        # Not where reasoning stands, so it is text.
        ("Hi <think>x</think> y", False, "", "Hi <think>x</think> y"),
        ("a</think>b", False, "", "a</think>b"),
        ("<think>a</think>b</think>c", False, "a", "b</think>c"),
        ("<thin", False, "", "<thin"),
        ("\n\nHello", False, "", "\n\nHello"),
        ("", True, "", ""),
    ],
)
def test_reasoning_is_what_stands_before_its_end_tag(text: str, inside: bool, reasoning: str, content: str) -> None:
    assert message(text, inside=inside) == Message(content, reasoning, [])


def test_without_reasoning_the_tags_are_text() -> None:
    plain = MessageParser(reasons=False, inside=False, functions=TOOLS)
    assert assemble(parts_of(plain, ["<think>a</think>b"])).content == "<think>a</think>b"


# ---- calls ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (CALL, "", [ADD]),
        (f"Let me see.\n\n{CALL}", "Let me see.", [ADD]),
        (f"{CALL}\n{CALL}\nDone.", "Done.", [ADD, ADD]),
        ('<tool_call>{"name":"add","arguments":{}}</tool_call>', "", [("add", "{}")]),
        ('<tool_call>{"name": "add", "parameters": {"a": 1}}</tool_call>', "", [("add", '{"a": 1}')]),
        ('<tool_call>{"arguments": {"ä": [1]}, "name": "add"}</tool_call>', "", [("add", '{"ä": [1]}')]),
        ('<tool_call>{"name": "add"}</tool_call>', "", [("add", "{}")]),
        ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("add", '{"a": 1}')]),
        (
            '<tool_call>[{"name": "add"}, {"name": "get_weather"}]</tool_call>',
            "",
            [("add", "{}"), ("get_weather", "{}")],
        ),
        ('<tool_call>{"name": "add", "arguments": {"a": 1}, "id": 7}</tool_call>!', "!", [("add", '{"a": 1}')]),
        # What stands inside of strings ends nothing.
        (
            '<tool_call>{"name": "add", "arguments": {"a": "}\\"</tool_call>{"}}</tool_call>',
            "",
            [("add", '{"a": "}\\"</tool_call>{"}')],
        ),
        # Slips that leave no doubt.
        ('<tool_call>{"name": "add", "arguments": {"a": 1}\n</tool_call>', "", [("add", '{"a": 1}')]),
        ('<tool_call>{"name": "add", "arguments": {"a": 1}}}\n</tool_call>', "", [("add", '{"a": 1}')]),
        ('<tool_call>{"name": "add", "arguments": {"a": 1}}', "", [("add", '{"a": 1}')]),
        ('<tool_call>{"name": "add"}', "", [("add", "{}")]),
    ],
)
def test_calls_are_found(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert message(text) == Message(content, "", calls)
    assert all(isinstance(json.loads(arguments), dict) for _, arguments in calls)


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "a <tool_call> b </tool_call>\n",
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
        '<tool_call>{"name": ["add"]}</tool_call>',
        '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
        '<tool_call>[{"name": "add"}, 1]</tool_call>',
        '\n<tool_call>\n{"name": "add", "arguments": {"a": 1\n</tool_call>\n',
        '<tool_call>{"name": "add", "arguments": {a: 1}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {"a": [1}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {"a": "cut',
        "<tool_call>{'name': 'add'}</tool_call>",
        "text </tool_call>",
        '<tool_call>{"name": "add</tool_call>", "arguments": {}}',
    ],
)
def test_what_is_no_call_stays_as_it_is(text: str) -> None:
    assert message(text) == Message(text, "", [])


def test_text_after_a_call_that_is_no_end_of_it_is_content() -> None:
    text = '<tool_call>{"name": "add", "arguments": {}} oops </tool_call>'
    assert message(text) == Message("} oops </tool_call>", "", [("add", "{}")])


def test_a_call_after_one_that_is_none() -> None:
    assert message(f"<tool_call> oh\n{CALL}") == Message("<tool_call> oh", "", [ADD])


def test_only_the_first_call() -> None:
    assert message(f"a\n{CALL}\n{CALL}\nb", only_call=True) == Message("a", "", [ADD])
    two = '<tool_call>[{"name": "add"}, {"name": "add"}]</tool_call>'
    assert message(two, only_call=True) == Message("", "", [("add", "{}")])


def test_without_tools_calls_are_text() -> None:
    assert message(CALL, tools=None) == Message(CALL, "", [])


def test_a_call_ends_reasoning_that_was_not_ended_and_a_mention_of_the_tag_does_not() -> None:
    assert message(f"<think>\nI write <tool_call> now.\n{CALL}") == Message("", "I write <tool_call> now.", [ADD])


# ---- streams --------------------------------------------------------------------------------------------------------


def test_arguments_stream_as_they_come_and_half_a_tag_never_shows() -> None:
    stream = parser()
    text = '<think>\nHm\n</think>\n\nNow:\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n'
    seen = [part for character in text for part in stream.feed(character)] + stream.finish()
    kinds = [part.kind for part in seen]
    assert kinds == [Kind.REASONING] * 2 + [Kind.CONTENT] * 4 + [Kind.CALL] + [Kind.ARGUMENTS] * 8 + [Kind.CALL_DONE]
    assert "".join(part.text for part in seen if part.kind is Kind.CONTENT) == "Now:"
    assert all(part.call == (0 if part.kind.name.startswith(("CALL", "ARG")) else -1) for part in seen)


def test_text_is_held_back_no_longer_than_it_may_become_a_tag() -> None:
    stream = parser()
    assert stream.feed("a <tool") == [Part(Kind.CONTENT, "a ")]
    assert stream.feed("box>\n") == [Part(Kind.CONTENT, "<toolbox>")]
    assert stream.feed("b") == [Part(Kind.CONTENT, "\nb")]
    assert stream.feed("<tool_call>") == []
    assert stream.feed(" or") == [Part(Kind.CONTENT, "<tool_call>"), Part(Kind.CONTENT, " or")]


FRAGMENTS = st.sampled_from(
    [
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        '{"name": "add", "arguments": {',
        '{"name": "get_weather", "arguments": {"city": "Köln \\" }"}',
        '{"arguments": {}, "name": "add"}',
        '{"name": "other", "arguments": {}}',
        CALL,
        '"a": [1, {}]',
        ', "id": 3}',
        "}",
        "{",
        "]",
        '"',
        "\\",
        "\n",
        " ",
        "<",
        "</t",
        "tool_call>",
        "Hello",
        "世",
    ]
)
TEXTS = st.lists(FRAGMENTS | st.text(max_size=3), max_size=14).map("".join)


@st.composite
def cut_texts(draw: st.DrawFn) -> tuple[str, list[str]]:
    text = draw(TEXTS)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=10)))
    return text, [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@settings(max_examples=300)
@given(cut_texts(), st.booleans(), st.booleans(), st.sampled_from([TOOLS, None]), st.booleans())
@example(("\n<tool_call>\n", ["\n", "<tool_call>\n"]), False, False, TOOLS, False)
def test_any_cutting_of_any_text_gives_the_same_parts_and_loses_nothing(
    cut: tuple[str, list[str]], reasons: bool, inside: bool, tools: frozenset[str] | None, only_call: bool
) -> None:
    text, pieces = cut
    inside = inside and reasons

    def parse(pieces: list[str]) -> list[Part]:
        return parts_of(MessageParser(reasons, inside, tools, only_call), pieces)

    whole = parse([text])
    assert parse(pieces) == whole
    assert parse(list(text)) == whole
    found = assemble(whole)
    assert all(isinstance(json.loads(arguments), dict) for _, arguments in found.calls)
    if not found.calls:
        assert without_tags(found.reasoning + found.content) == without_tags(text)
    elif not only_call:
        # What is shown stands in the text in this order; arguments may have been put into another form.
        place = 0
        for part in whole:
            if part.kind in (Kind.CONTENT, Kind.REASONING):
                place = text.index(part.text, place) + len(part.text)


def without_tags(text: str) -> str:
    return text.replace("<think>", "").replace("</think>", "").replace("\n", "")
