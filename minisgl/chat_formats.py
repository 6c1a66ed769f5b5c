"""How a model writes tool calls and reasoning, told from its chat template when the server starts.

Nothing is imported for a model that does neither.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

logger = logging.getLogger(__name__)

TOOL_CALL_PARSERS = {"qwen": "hermes", "qwen25": "hermes", "hermes": "hermes"}
"""The formats of tool calls that can be read, under every name of sglang's for them."""
_ALWAYS_REASON = ("deepseek-r1", "qwen3-thinking")
REASONING_PARSERS = ("qwen3", *_ALWAYS_REASON)
"""They differ in where answers begin: within reasoning with the last two, by the chat template with the first."""
EXTRAS = ("reasoning_effort", "documents")
"""Template variables that requests have a field of their own for."""
PROBE_SECONDS = 2.0

_READS_TOOLS = re.compile(r"\{[{%](?:(?![%}]\}).)*?\btools\b", re.DOTALL)
_OTHER_CALLS = ("<function=", "<arg_key>", "<parameter")
"""Marks of formats that share the tag `<tool_call>` and have no JSON in it."""
_SWITCHES = ("enable_thinking", "thinking")


@dataclass(frozen=True)
class ChatFormats:
    """What is known of a model's answers to chats.

    Attributes:
        tool_call_parser: "hermes", or None when tools cannot be served.
        no_tools: why they cannot.
        reasoning_parser: one of REASONING_PARSERS, or None for a model that does not reason.
        opens_thinking: the prompt ends with `<think>`, so that answers begin within reasoning.
        thinking_switches: by template variable, whether it does when that is false and when it is true.
        extras: those of EXTRAS that the template reads.
    """

    tool_call_parser: str | None = None
    no_tools: str = "this model has no chat template"
    reasoning_parser: str | None = None
    opens_thinking: bool = False
    thinking_switches: dict[str, list[bool]] = field(default_factory=dict)
    extras: list[str] = field(default_factory=list)

    def begins_inside(self, variables: Mapping[str, Any]) -> bool:
        """Whether an answer to a chat with these template variables begins within reasoning."""
        for name, (if_false, if_true) in self.thinking_switches.items():
            if name in variables:
                return if_true if variables[name] else if_false
        return self.opens_thinking


def find_chat_formats(
    templates: Mapping[str, str], named_tokens: Mapping[str, str], tool_call_parser: str, reasoning_parser: str
) -> ChatFormats:
    """What a model's chat templates say of its answers.

    Args:
        templates: by name; see model_files.read_chat_templates.
        tool_call_parser, reasoning_parser: what the user says of the formats; "auto" for nothing, "none" to switch off.
    """
    source = templates.get("default")
    if source is None:
        return ChatFormats()
    own, no_tools = _tool_call_format(templates.get("tool_use", source))
    if own is not None or _READS_TOOLS.search(templates.get("tool_use", source)):
        own = TOOL_CALL_PARSERS.get(tool_call_parser, own)
    elif tool_call_parser in TOOL_CALL_PARSERS:
        logger.warning("--tool-call-parser %s has no effect: %s", tool_call_parser, no_tools)
    if tool_call_parser == "none":
        own, no_tools = None, "the server was started with --tool-call-parser none"
    found = ChatFormats(own, "" if own else no_tools, extras=[name for name in EXTRAS if name in source])
    reasons = "<think>" in source or "</think>" in source
    if reasoning_parser == "none" or (reasoning_parser == "auto" and not reasons):
        return found
    opens, switches = _probe(source, named_tokens) if reasons else (False, {})
    if reasoning_parser == "auto":
        reasoning_parser = "deepseek-r1" if opens and not switches else "qwen3"
    elif reasoning_parser in _ALWAYS_REASON:
        opens, switches = True, {name: [if_false, True] for name, (if_false, _) in switches.items()}
    return replace(found, reasoning_parser=reasoning_parser, opens_thinking=opens, thinking_switches=switches)


def _tool_call_format(source: str) -> tuple[str | None, str]:
    """The parser of the calls that this template asks for; or None, and why."""
    if not _READS_TOOLS.search(source):
        return None, "this model's chat template does not show tools to the model"
    if "<tool_call>" in source and not any(mark in source for mark in _OTHER_CALLS):
        return "hermes", ""
    return None, (
        "this model's chat template asks for tool calls in a format that this server does not read "
        "(it reads that of Qwen 2.5, Qwen 3 and Hermes)"
    )


def _probe(source: str, named_tokens: Mapping[str, str]) -> tuple[bool, dict[str, list[bool]]]:
    """Whether prompts end with `<think>`: by default, and for each value of the switches that the template reads."""
    # Jinja takes a while to load, so only models that reason pay for it.
    from minisgl.tokenizer_proc.chat_template import ChatTemplate, ChatTemplateError
    from minisgl.tokenizer_proc.time_limit import TimeLimitExceeded, time_limit

    def opens(**variables: bool) -> bool:
        return template.render([{"role": "user", "content": "Hello"}], variables).rstrip().endswith("<think>")

    # Time is limited by a signal, which only the main thread can take; only a program that embeds Engine has others.
    in_main_thread = threading.current_thread() is threading.main_thread()
    try:
        with time_limit(PROBE_SECONDS if in_main_thread else None):
            template = ChatTemplate(source, named_tokens)
            switches = [name for name in _SWITCHES if name in template.variables]
            return opens(), {name: [opens(**{name: False}), opens(**{name: True})] for name in switches}
    except (ChatTemplateError, TimeLimitExceeded):
        # A template that cannot take this chat may take others; the tokenizer process will report its trouble.
        return False, {}
