"""Chat messages to prompt text by the model's own Jinja template, rendered as transformers renders it.

The template is a program that came with the model, so it runs in Jinja's sandbox: no access to Python's internals, no
change to its arguments, ranges of at most 100 000. The caller bounds the time (time_limit.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

from jinja2 import TemplateError, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from minisgl.messages import JsonObject
from minisgl.model_files import NAMED_TOKENS

_RESERVED_VARIABLES = {"messages", "add_generation_prompt", "continue_final_message", *NAMED_TOKENS}
_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")
_END_MARK = "HERE_ENDS_WHAT_IS_CONTINUED "


class ChatTemplateError(ValueError):
    """The template is not valid, or it refuses these messages; the message is the template's own."""


class UnknownVariable(ChatTemplateError):
    """A request sets a variable that the template does not read."""


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: the Jinja text.
        named_tokens: variables such as bos_token that the template may use.
        with_tools: the template to use instead when a request has tools; None for the same one.

    Attributes:
        variables: names that a request may give values to, because the template reads them.
    """

    def __init__(self, source: str, named_tokens: Mapping[str, str], with_tools: ChatTemplate | None = None) -> None:
        environment = _environment()
        try:
            tree = environment.parse(source)
            read = meta.find_undeclared_variables(tree)
            self._template = environment.from_string(tree)
        except (TemplateError, RecursionError) as error:
            raise ChatTemplateError(str(error)) from error
        self.variables = frozenset(read - environment.globals.keys() - _RESERVED_VARIABLES)
        self._named_tokens = named_tokens
        self._with_tools = with_tools

    @classmethod
    def of(cls, sources: Mapping[str, str], named_tokens: Mapping[str, str]) -> ChatTemplate:
        """The template of a model with these texts: `default`, and maybe `tool_use`."""
        tool_use = sources.get("tool_use")
        with_tools = None if tool_use is None else cls(tool_use, named_tokens)
        return cls(sources["default"], named_tokens, with_tools)

    def render(self, messages: list[JsonObject], variables: Mapping[str, Any] | None = None) -> str:
        """The prompt that asks for the assistant's next message; raises ChatTemplateError.

        Args:
            variables: what the request says beside its messages. `continue_final_message` (false): the prompt ends
                within the last message, for the model to continue it. `add_generation_prompt` (true, unless the last
                message is continued): it ends with the beginning of a new message. The others, `tools` and `documents`
                among them, must be variables that the template reads.
        """
        given = {name: value for name, value in (variables or {}).items() if value is not None}
        if self._with_tools is not None and "tools" in given:
            return self._with_tools.render(messages, given)
        continues = given.pop("continue_final_message", False) is True
        add_generation_prompt = given.pop("add_generation_prompt", not continues)
        if unknown := sorted(given.keys() - self.variables) if given else []:
            reads = f"it reads {', '.join(sorted(self.variables))}" if self.variables else "it reads none"
            raise UnknownVariable(f"this model's chat template has no variable {unknown[0]!r}; {reads}")
        # Clients send `"content": null`; templates expect a missing key.
        messages = [_with_thinking(_without_nulls(message)) for message in messages]
        if any(isinstance(message.get("content"), list) for message in messages) and not self._takes_parts:
            messages = [_with_plain_content(message) for message in messages]
        if continues:
            return self._render_open(messages, given)
        return self._render(messages, {**given, "add_generation_prompt": add_generation_prompt})

    def _render(self, messages: list[JsonObject], variables: Mapping[str, Any]) -> str:
        names = {"tools": None, "documents": None, "add_generation_prompt": True, **self._named_tokens, **variables}
        try:
            return self._template.render(names, messages=messages)
        except Exception as error:  # a template can raise anything that Python can
            raise ChatTemplateError(str(error) or type(error).__name__) from error

    def _render_open(self, messages: list[JsonObject], variables: Mapping[str, Any]) -> str:
        """The chat up to the end of its last message's text, found by a mark that is put there.

        Equal to transformers' apply_chat_template(continue_final_message=True).
        """
        content = messages[-1].get("content")
        if isinstance(content, list):
            last_text = max((index for index, part in enumerate(content) if "text" in part), default=None)
            text = None if last_text is None else content[last_text]["text"]
            marked: Any = [
                {**part, "text": part["text"] + _END_MARK} if index == last_text else part
                for index, part in enumerate(content)
            ]
        else:
            text, marked = content, None if content is None else content + _END_MARK
        if text is None:
            raise ChatTemplateError("continue_final_message needs a last message with text in it")
        final = {**messages[-1], "content": marked}
        rendered = self._render([*messages[:-1], final], {**variables, "add_generation_prompt": False})
        end = rendered.rfind(_END_MARK.strip())
        if end < 0 or text.strip() not in rendered:
            raise ChatTemplateError(
                "continue_final_message cannot be served: the template does not show the last message as it is"
            )
        # The mark ends with a space; if that is gone, the template trims messages, and so must be what stands before.
        return rendered[:end] if rendered.startswith(_END_MARK, end) else rendered[:end].rstrip()

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether content given as a list of parts comes out as its text, not as the list's repr or an error."""
        probe = "text of a part"
        try:
            shown = self._render([{"role": "user", "content": [{"type": "text", "text": probe}]}], {})
        except ChatTemplateError:
            return False
        return probe in shown and f"'{probe}'" not in shown


def _without_nulls(message: JsonObject) -> JsonObject:
    return {key: value for key, value in message.items() if value is not None}


def _with_thinking(message: JsonObject) -> JsonObject:
    """Reasoning under both names that templates know it by, as transformers hands it over."""
    reasoning = next((message[name] for name in _REASONING_NAMES if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


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
