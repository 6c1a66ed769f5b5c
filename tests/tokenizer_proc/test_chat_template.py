"""Chat templates against transformers, and templates that misbehave."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from sample_tokenizers import CHATML, LLAMA_CHAT
from transformers.utils.chat_template_utils import render_jinja_template

from minisgl.tokenizer_proc.chat_template import ChatTemplate, ChatTemplateError
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
    assert time.monotonic() - started < 2


def test_the_time_limit_is_gone_afterwards() -> None:
    with time_limit(0.05):
        pass
    time.sleep(0.1)


def test_rendering_does_not_change_the_messages() -> None:
    before = json.dumps(CHAT)
    ChatTemplate(CHATML, TOKENS).render(CHAT)
    assert json.dumps(CHAT) == before
