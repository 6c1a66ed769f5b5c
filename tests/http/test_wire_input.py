"""Bodies of the compatible APIs made by hypothesis: each is refused with a sentence or crosses the ring whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisgl.chat_formats import ChatFormats
from minisgl.config import ModelSpec
from minisgl.http import compat_docs, sglang
from minisgl.http.errors import ApiError
from minisgl.http.generation import Caller, Generation
from minisgl.http.openai import read_chat, read_completion
from minisgl.http.openai_fields import CHAT_FIELDS, CHAT_HARMLESS, COMPLETION_FIELDS, COMPLETION_HARMLESS
from minisgl.messages import GenerateRequest, decode, encode
from minisgl.timeline import now

FORMATS = ChatFormats("hermes", "", "qwen3", opens_thinking=True, extras=["documents", "reasoning_effort"])
MODEL = ModelSpec("models/demo", "demo", "demo", 2048, 1000, (2,), "Qwen2ForCausalLM", chat_formats=FORMATS)
CALLER = Caller(MODEL, "an-id", wants_sse=False)

SCALAR = st.none() | st.booleans() | st.integers(-3, 130) | st.integers() | st.floats() | st.text(max_size=9)
JSON = st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))
TEXT = st.text(st.characters(codec="utf-8"), max_size=9)
PART = st.fixed_dictionaries({"type": st.just("text"), "text": TEXT}) | JSON
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool", "x"]), "content": TEXT | st.lists(PART) | JSON},
    optional={"name": TEXT | JSON, "tool_calls": JSON, "refusal": JSON},
)
PROMPT = TEXT | st.lists(TEXT, max_size=3) | st.lists(st.integers(-1, 1001), max_size=3) | JSON
SAMPLING = st.dictionaries(st.sampled_from([*sglang.SAMPLING, *sglang.SAMPLING_HARMLESS, "x"]), SCALAR, max_size=4)


def bodies(required: dict[str, Any], *tables: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Bodies with what an API requires and a few of its other fields, all of doubtful values."""
    names = sorted({name for table in tables for name in table} - set(required))
    others = st.dictionaries(st.sampled_from([*names, "bogus"]), JSON, max_size=4)
    return st.builds(lambda one, two: {**one, **two}, st.fixed_dictionaries(required), others)


FUNCTION = st.fixed_dictionaries(
    {"name": st.sampled_from(["f", "g"]) | JSON},
    optional={"parameters": st.just({"type": "object"}) | JSON, "strict": JSON, "description": JSON},
)
TOOL = st.fixed_dictionaries({"type": st.just("function"), "function": FUNCTION | JSON}) | JSON
CHOICE = st.sampled_from(["auto", "none", "required", None, {"type": "function", "function": {"name": "f"}}]) | JSON

READERS: list[tuple[Callable[[Any, Caller], Generation], st.SearchStrategy[dict[str, Any]]]] = [
    (read_chat, bodies({"messages": st.lists(MESSAGE, max_size=3)}, CHAT_FIELDS, CHAT_HARMLESS)),
    (
        read_chat,
        bodies({"messages": st.lists(MESSAGE, max_size=2), "tools": st.lists(TOOL) | JSON, "tool_choice": CHOICE}),
    ),
    (read_completion, bodies({"prompt": PROMPT}, COMPLETION_FIELDS, COMPLETION_HARMLESS)),
    (
        sglang.read,
        bodies({"text": PROMPT, "sampling_params": SAMPLING | st.lists(SAMPLING)}, sglang.FIELDS, sglang.HARMLESS),
    ),
]


@pytest.mark.parametrize(("read", "body"), READERS, ids=["chat", "tools", "completions", "sglang"])
def test_a_body_is_refused_or_crosses_the_ring(
    read: Callable[[Any, Caller], Generation], body: st.SearchStrategy[dict[str, Any]]
) -> None:
    outcomes = set()

    @settings(max_examples=100)
    @given(body)
    def check(body: dict[str, Any]) -> None:
        try:
            generation = read(body, CALLER)
        except ApiError as error:
            assert error.status in (400, 404)
            assert error.message
            outcomes.add("refused")
            return
        outcomes.add("taken")
        for ask in generation.asks:
            request = GenerateRequest(1, ask.prompt, ask.sampling, [now()], ask.template or {})
            assert decode(encode(request)) == request

    check()
    assert outcomes == {"refused", "taken"}


def test_the_documents_name_every_field_that_is_known() -> None:
    def properties(docs: dict[str, Any]) -> set[str]:
        schema = docs["openapi_extra"]["requestBody"]["content"]["application/json"]["schema"]
        return set(schema.get("anyOf", [schema])[-1]["properties"])

    assert properties(compat_docs.CHAT) == {*CHAT_FIELDS, *CHAT_HARMLESS}
    assert properties(compat_docs.COMPLETIONS) == {*COMPLETION_FIELDS, *COMPLETION_HARMLESS}
    assert properties(compat_docs.GENERATE) == {*sglang.FIELDS, *sglang.HARMLESS}
