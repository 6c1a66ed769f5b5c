"""Chat messages to prompt text by the model's own Jinja template, rendered as transformers renders it.

The template is a program that came with the model, so it runs in Jinja's sandbox: no access to Python's internals, no
change to its arguments, ranges of at most 100 000. The caller bounds the time (time_limit.py).
"""

from __future__ import annotations

import json
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from minisgl.messages import JsonObject


class ChatTemplateError(ValueError):
    """The template is not valid, or it refuses these messages; the message is the template's own."""


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: the Jinja text.
        named_tokens: variables such as bos_token that the template may use.
    """

    def __init__(self, source: str, named_tokens: dict[str, str]) -> None:
        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise ChatTemplateError(str(error)) from error
        self._named_tokens = named_tokens

    def render(self, messages: list[JsonObject]) -> str:
        """The prompt that asks for the assistant's next message; raises ChatTemplateError."""
        # Clients send `"content": null`; templates expect a missing key.
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        if any(isinstance(message.get("content"), list) for message in messages) and not self._takes_parts:
            messages = [_with_plain_content(message) for message in messages]
        return self._render(messages)

    def _render(self, messages: list[JsonObject]) -> str:
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._named_tokens
            )
        except Exception as error:  # a template can raise anything that Python can
            raise ChatTemplateError(str(error) or type(error).__name__) from error

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether content given as a list of parts comes out as its text, not as the list's repr or an error."""
        probe = "text of a part"
        try:
            shown = self._render([{"role": "user", "content": [{"type": "text", "text": probe}]}])
        except ChatTemplateError:
            return False
        return probe in shown and f"'{probe}'" not in shown


def _with_plain_content(message: JsonObject) -> JsonObject:
    """The message with a content list of text parts joined into one string, one part a line."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ChatTemplateError(
                'this model takes text only: every content part must be {"type": "text", "text": ...}'
            )
        texts.append(part["text"])
    return {**message, "content": "\n".join(texts)}


# ---- the environment that templates are written for ------------------------------------------------------------------


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_PublicNamespace, dict=_make_dict
    )
    return environment


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's own text for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - jinja declares it as an instance variable

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _PublicNamespace(Namespace):
    """`namespace()` without underscored names, which would reach Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # `self` is no parameter name here, because templates may use it as an attribute.
        self, *rest = args
        Namespace.__init__(self)
        for name, value in dict(*rest, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace attribute must not start with an underscore: {name}")
        Namespace.__setitem__(self, name, value)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
