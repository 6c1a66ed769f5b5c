"""Chat templates against transformers, and templates that misbehave."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from jinja2 import TemplateError
from model_templates import ADD, DEEPSEEK_R1, HERMES, PREFILLED_THINKING, QWEN3, QWEN25, ROUND_TRIP, WEATHER
from sample_tokenizers import CHATML, LLAMA_CHAT, byte_level
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from minisgl.tokenizer_proc.chat_template import ChatTemplate, ChatTemplateError, UnknownVariable
from minisgl.tokenizer_proc.time_limit import time_limit

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief. <b>&amp;</b>"},
    {"role": "user", "content": "Hello, 你好 😀\n"},
    {"role": "assistant", "content": "Hi", "tool_calls": [{"name": "f", "arguments": {"ä": [1, None]}}]},
    {"role": "user", "content": ""},
]
TEMPLATES = {
    "chatml": CHATML,
    "llama": LLAMA_CHAT,
    "block whitespace": (
        "{% for m in messages %}\n    {% if loop.first %}\n  first\n    {% endif %}\n"
        "{{ m.content | trim }}\n{% endfor %}"
    ),
    "loop controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }};{% endfor %}",
    "tojson": "{{ messages | tojson }}|{{ messages[2].tool_calls | tojson(indent=2) }}",
    "namespace": (
        "{% set ns = namespace(n=0, found=false) %}{% for m in messages %}"
        "{% set ns.n = ns.n + m.content | length %}{% endfor %}{{ ns.n }} {{ ns.found }}"
    ),
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "year": "{{ strftime_now('%Y') }}",
    "undefined": "[{{ tools }}] [{{ nothing }}] {{ documents is none }} {{ add_generation_prompt }}",
    "dict": "{% set d = dict(a=1) %}{{ d.a }}{% for key, value in messages[0].items() %}{{ key }}{% endfor %}",
    "macro": "{% macro say(m) %}<{{ m.role }}>{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
    "parts": (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}({{ part.text }}){% endfor %}{% endif %}{% endfor %}"
    ),
}


def reference(template: str, messages: list[dict[str, Any]]) -> str:
    rendered, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=True, **TOKENS)
    text: str = rendered[0]
    return text


@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers_does(name: str) -> None:
    assert ChatTemplate(TEMPLATES[name], TOKENS).render(CHAT) == reference(TEMPLATES[name], CHAT)


def test_null_fields_are_missing_fields() -> None:
    template = ChatTemplate("{{ messages[0].name is defined }}", TOKENS)
    assert template.render([{"role": "user", "content": "x", "name": None}]) == "False"


def test_text_parts_become_a_string_for_templates_that_need_one() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]
    joined = [{"role": "user", "content": "one\ntwo"}]
    template = ChatTemplate(CHATML, TOKENS)
    assert template.render(parts) == template.render(joined)
    assert (
        ChatTemplate(TEMPLATES["parts"], TOKENS).render(parts) == "(one)(two)" == reference(TEMPLATES["parts"], parts)
    )


def test_parts_that_are_not_text_are_refused() -> None:
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    with pytest.raises(ChatTemplateError, match="takes text only"):
        ChatTemplate(CHATML, TOKENS).render(image)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].nothing.more }}", "has no attribute 'nothing'"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "underscore"),
        ("{{ namespace(__class__=1) }}", "underscore"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "[Rr]ange"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_a_failing_template_is_a_clear_error(source: str, sentence: str) -> None:
    with pytest.raises(ChatTemplateError, match=sentence):
        ChatTemplate(source, TOKENS).render(CHAT)


def test_a_template_that_is_not_jinja_is_refused_at_once() -> None:
    with pytest.raises(ChatTemplateError):
        ChatTemplate("{% for %}", TOKENS)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
)
def test_an_endless_template_is_stopped(source: str) -> None:
    template = ChatTemplate(source, TOKENS)
    started = time.monotonic()
    with pytest.raises(ChatTemplateError, match=r"took more than 0\.2 s"), time_limit(0.2):
        template.render(CHAT)
    assert time.monotonic() - started < 10


def test_the_time_limit_is_gone_afterwards() -> None:
    with time_limit(0.05):
        pass
    time.sleep(0.1)


def test_rendering_does_not_change_the_messages() -> None:
    before = json.dumps(CHAT)
    ChatTemplate(CHATML, TOKENS).render(CHAT)
    assert json.dumps(CHAT) == before


# ---- real templates, and what a request can say beside its messages --------------------------------------------------

USER = {"role": "user", "content": "What is 1+2?"}
REAL = {"qwen2.5": QWEN25, "qwen3": QWEN3, "hermes": HERMES, "r1": DEEPSEEK_R1, "thinking": PREFILLED_THINKING}
OPEN_CHATS: dict[str, list[dict[str, Any]]] = {
    "plain": [USER, {"role": "assistant", "content": "It is"}],
    "trailing space": [USER, {"role": "assistant", "content": "It is \n"}],
    "thinking": [USER, {"role": "assistant", "content": "<think>\nHm, 1"}],
    "thought": [USER, {"role": "assistant", "content": "<think>\nHm\n</think>\n\nIt"}],
    "said before": [{"role": "assistant", "content": "It is"}, USER, {"role": "assistant", "content": "It is"}],
    "user": [{"role": "user", "content": "Complete my"}],
    "parts": [USER, {"role": "assistant", "content": [{"type": "text", "text": "It is"}]}],
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=byte_level(), **TOKENS)


def both(
    tokenizer: PreTrainedTokenizerFast, template: str, messages: list[dict[str, Any]], **variables: Any
) -> tuple[str, str]:
    """What we make of a chat, and what transformers does; "refused" where either refuses."""
    own = ChatTemplate(template, TOKENS)
    try:
        ours = own.render(messages, variables)
    except ChatTemplateError:
        ours = "refused"
    arguments = {"add_generation_prompt": not variables.get("continue_final_message", False), **variables}
    try:
        theirs = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **arguments)
    except (ValueError, TypeError, TemplateError):
        theirs = "refused"
    return ours, theirs


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize(
    "messages",
    [CHAT[:2], ROUND_TRIP, [*ROUND_TRIP, {"role": "assistant", "content": "Grey, and 3."}, USER]],
    ids=["chat", "calls", "after calls"],
)
@pytest.mark.parametrize("variables", [{}, {"tools": [WEATHER, ADD]}, {"add_generation_prompt": False}], ids=str)
def test_calls_and_tools_render_as_transformers_renders_them(
    tokenizer: PreTrainedTokenizerFast, name: str, messages: list[dict[str, Any]], variables: dict[str, Any]
) -> None:
    if "tools" in variables and name in ("r1", "thinking"):
        with pytest.raises(UnknownVariable, match="no variable 'tools'"):
            ChatTemplate(REAL[name], TOKENS).render(messages, variables)
        return
    ours, theirs = both(tokenizer, REAL[name], messages, **variables)
    assert ours == theirs
    if name not in ("r1", "thinking"):
        assert ("get_weather" in ours) == ("tools" in variables or len(messages) > 2)


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("chat", OPEN_CHATS)
def test_a_continued_message_renders_as_transformers_renders_it(
    tokenizer: PreTrainedTokenizerFast, name: str, chat: str
) -> None:
    messages = OPEN_CHATS[chat]
    if chat == "parts":
        # Content that the template cannot take as a list is a string for it, as in every chat.
        messages = [USER, {"role": "assistant", "content": "It is"}]
    ours, theirs = both(tokenizer, REAL[name], messages, continue_final_message=True)
    assert ours == theirs
    if ours != "refused":
        assert ours.rstrip().endswith(messages[-1]["content"].rstrip().removeprefix("<think>\nHm\n</think>\n\n"))
        assert ChatTemplate(REAL[name], TOKENS).render(OPEN_CHATS[chat], {"continue_final_message": True}) == ours


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("name", ["qwen3", "thinking"])
def test_thinking_can_be_switched(tokenizer: PreTrainedTokenizerFast, name: str, thinking: bool) -> None:
    ours, theirs = both(tokenizer, REAL[name], [USER], enable_thinking=thinking)
    assert ours == theirs
    assert ours.endswith("<think>\n\n</think>\n\n") == (not thinking)


def test_reasoning_is_known_to_templates_by_every_name(tokenizer: PreTrainedTokenizerFast) -> None:
    template = "{% for m in messages %}[{{ m.thinking }}|{{ m.reasoning_content }}]{% endfor %}"
    messages = [{"role": "assistant", "content": "x", "reasoning_content": "why"}, USER]
    ours, theirs = both(tokenizer, template, messages)
    assert ours == theirs == "[why|why][|]"


def test_a_template_of_its_own_for_tools() -> None:
    template = ChatTemplate.of({"default": "plain {{ x }}", "tool_use": "{{ tools[0].function.name }}{{ y }}"}, TOKENS)
    assert template.render([USER], {"x": 1}) == "plain 1"
    assert template.render([USER], {"tools": [ADD], "y": 2}) == "add2"
    with pytest.raises(UnknownVariable, match="'x'; it reads tools, y"):
        template.render([USER], {"tools": [ADD], "x": 2})


@pytest.mark.parametrize("name", ["messages", "bos_token", "eos_token", "range", "raise_exception", "nothing", "ns"])
def test_only_variables_that_the_template_reads_can_be_set(name: str) -> None:
    template = ChatTemplate("{% set ns = 1 %}{{ bos_token }}{{ messages }}{{ range(2) }}{{ raise_exception }}", TOKENS)
    with pytest.raises(UnknownVariable, match=f"no variable '{name}'; it reads none"):
        template.render([USER], {name: "mine"})


def test_a_message_without_text_cannot_be_continued() -> None:
    for messages in (ROUND_TRIP[:3], [USER, {"role": "assistant", "content": []}]):
        with pytest.raises(ChatTemplateError, match="text in it"):
            ChatTemplate(TEMPLATES["parts"], TOKENS).render(messages, {"continue_final_message": True})
    with pytest.raises(ChatTemplateError, match="does not show the last message"):
        ChatTemplate("{{ messages[0].content }}", TOKENS).render(
            [USER, {"role": "assistant", "content": "It"}], {"continue_final_message": True}
        )
