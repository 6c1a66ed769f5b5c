"""What a chat request says of tools and reasoning: checked here, and turned into what its answers must look like.

A call that is required is not hoped for: the answer is held to a grammar of the calls that are allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import orjson

from minisgl.chat_formats import EXTRAS, ChatFormats
from minisgl.http.errors import ApiError
from minisgl.http.message_parser import CALL, CALL_END, THINK, THINK_END, MessageParser
from minisgl.http.schemas import BOOLEAN, LIST, OBJECT, STRING, Field, field
from minisgl.messages import JsonObject
from minisgl.sampling_params import MAX_STOP_STRINGS, Grammar, InvalidSamplingParams, SamplingParams

FIELDS: dict[str, Field] = {
    "tools": field(
        LIST,
        default=None,
        description="functions that the model may call, for models whose chat template shows them",
        items={"type": "object", "required": ["type", "function"]},
    ),
    "tool_choice": field(
        STRING,
        OBJECT,
        default=None,
        description='none, auto (the default), required, or {"type": "function", "function": {"name": ...}}',
    ),
    "parallel_tool_calls": field(BOOLEAN, default=True, description="false: at most one call in an answer"),
    "separate_reasoning": field(
        BOOLEAN, default=True, description="give the model's reasoning in reasoning_content; false leaves it in content"
    ),
    "reasoning_effort": field(STRING, default=None, description="for models whose chat template reads it"),
    "documents": field(LIST, default=None, description="for models whose chat template reads them"),
}

_MAX_NAME = 256
_SAYS_NOTHING = {"type", "properties", "required", "title", "description", "$schema"}
"""What a schema may have and still allow nothing in an object, when it has no properties."""
_CHOICES = '\'none\', \'auto\', \'required\' or {"type": "function", "function": {"name": ...}}'


@dataclass(frozen=True)
class AnswerFormat:
    """How the answers to a chat are read.

    Attributes:
        reasons: they may begin with reasoning.
        inside: they begin within reasoning.
        functions: names that may be called; None when calls are not looked for.
        only_call: the first call ends an answer.
        stops_at_call: the end of a call is a stop string, and not because the client wants that.
        template: variables that the chat template gets for them.
        grammar_field: what the client calls the field that their grammar comes from, if it comes from here.
    """

    reasons: bool
    inside: bool
    functions: frozenset[str] | None
    only_call: bool
    stops_at_call: bool
    template: JsonObject
    grammar_field: str | None

    @property
    def is_plain(self) -> bool:
        """Whether answers are just text."""
        return not self.reasons and self.functions is None

    def parser(self) -> MessageParser:
        return MessageParser(self.reasons, self.inside, self.functions, self.only_call)


@dataclass(frozen=True)
class _Tools:
    shown: list[JsonObject]
    choice: str
    """auto, required, or the name of the only function that may be called (`named`)."""
    named: bool
    parallel: bool

    @property
    def callable(self) -> list[JsonObject]:
        """The functions that may be called."""
        functions = [tool["function"] for tool in self.shown]
        return [function for function in functions if function["name"] == self.choice] if self.named else functions


def read_answer_format(
    values: Mapping[str, Any],
    messages: list[JsonObject],
    template: JsonObject,
    sampling: SamplingParams,
    formats: ChatFormats,
) -> tuple[SamplingParams, AnswerFormat]:
    """Check the fields of FIELDS; returns the sampling that they make of the client's, and how answers are read.

    Args:
        values: the fields of the request.
        messages: as the chat template gets them.
        template: its other variables.

    Raises:
        ApiError: a field is wrong, or asks for what this model cannot do.
    """
    more: JsonObject = {name: values[name] for name in EXTRAS if values[name]}
    if unread := [name for name in more if name not in formats.extras]:
        sentence = f"this model's chat template does not read {unread[0]}; leave it out"
        raise _refusal(unread[0], sentence, "unsupported_field")
    tools = _read_tools(values, formats)
    reasons, inside = _reasoning(messages, template, formats)
    grammar, stop = sampling.grammar, sampling.stop
    if tools is not None:
        more["tools"] = tools.shown
        grammar = _with_calls(tools, grammar)
        if grammar is None and not tools.parallel and CALL_END not in stop and len(stop) < MAX_STOP_STRINGS:
            stop = (*stop, CALL_END)
    grammar_field = None if grammar is sampling.grammar else "tools"
    if grammar is not None and reasons:
        grammar = _after_reasoning(grammar, inside)
    separate = values["separate_reasoning"] is not False
    answers = AnswerFormat(
        reasons=reasons and separate,
        inside=inside and separate,
        functions=None if tools is None else frozenset(function["name"] for function in tools.callable),
        only_call=tools is not None and not tools.parallel,
        stops_at_call=stop is not sampling.stop,
        template=more,
        grammar_field=grammar_field,
    )
    sampling = replace(sampling, grammar=grammar, stop=stop)
    try:
        sampling.validate()
    except InvalidSamplingParams as error:
        raise _refusal("tools", f"the grammar that the tools make is too much: {error}") from None
    return sampling, answers


def _reasoning(messages: list[JsonObject], template: JsonObject, formats: ChatFormats) -> tuple[bool, bool]:
    """Whether answers may begin with reasoning, and whether they begin within it."""
    if formats.reasoning_parser is None:
        return False, False
    if template.get("continue_final_message"):
        said = messages[-1]["content"]
        text = said if isinstance(said, str) else "".join(part["text"] for part in said)
        inside = text.rfind(THINK) > text.rfind(THINK_END)
        return inside, inside
    if template.get("add_generation_prompt") is False:
        return True, False
    inside = formats.begins_inside(template)
    switched_off = any(template.get(name) is False for name in ("enable_thinking", "thinking"))
    return inside or not switched_off, inside


# ---- tools ----------------------------------------------------------------------------------------------------------


def _read_tools(values: Mapping[str, Any], formats: ChatFormats) -> _Tools | None:
    """The tools that are to be shown to the model; None for none."""
    shown = [_tool(f"tools[{index}]", tool) for index, tool in enumerate(values["tools"] or [])]
    names = [tool["function"]["name"] for tool in shown]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise _refusal("tools", f"tools must have different names, and {twice!r} is there twice")
    choice, named = _choice(values["tool_choice"], names)
    if not shown or choice == "none":
        if choice not in ("none", "auto"):
            raise _refusal("tool_choice", "tool_choice asks for a call, and there are no tools; send them in 'tools'")
        return None
    if formats.tool_call_parser is None:
        sentence = f"tools cannot be served: {formats.no_tools}; leave them out, or send tool_choice 'none'"
        raise _refusal("tools", sentence, "unsupported_field")
    return _Tools(shown, choice, named, values["parallel_tool_calls"] is not False)


def _choice(value: Any, names: list[str]) -> tuple[str, bool]:
    """The choice or the name of a function, and whether it is the latter."""
    if value is None:
        return "auto", False
    if isinstance(value, str):
        if value not in ("none", "auto", "required"):
            raise _refusal("tool_choice", f"tool_choice must be {_CHOICES}")
        return value, False
    function = value.get("function")
    if set(value) != {"type", "function"} or value["type"] != "function" or type(function) is not dict:
        raise _refusal("tool_choice", f"tool_choice must be {_CHOICES}")
    name = function.get("name")
    if set(function) != {"name"} or type(name) is not str:
        raise _refusal("tool_choice", f"tool_choice must be {_CHOICES}")
    if name not in names:
        raise _refusal("tool_choice", f"tool_choice names {name[:_MAX_NAME]!r}, which is not among the tools")
    return name, True


def _tool(place: str, tool: Any) -> JsonObject:
    if type(tool) is not dict or tool.get("type") != "function" or type(tool.get("function")) is not dict:
        raise _refusal("tools", f'{place} must be {{"type": "function", "function": {{"name": ...}}}}')
    _check_keys(place, tool, ("type", "function"))
    function = tool["function"]
    place = f"{place}.function"
    _check_keys(place, function, ("name", "description", "parameters", "strict"))
    name, parameters = function.get("name"), function.get("parameters")
    if type(name) is not str or not 1 <= len(name) <= _MAX_NAME:
        raise _refusal("tools", f"{place}.name must be a string of 1 to {_MAX_NAME} characters")
    if not isinstance(function.get("description"), str | None):
        raise _refusal("tools", f"{place}.description must be a string")
    if not isinstance(parameters, dict | None) or (parameters and parameters.get("type", "object") != "object"):
        raise _refusal("tools", f"{place}.parameters must be the JSON schema of an object")
    if not isinstance(function.get("strict"), bool | None):
        raise _refusal("tools", f"{place}.strict must be true or false")
    return tool


def _check_keys(place: str, value: JsonObject, known: tuple[str, ...]) -> None:
    if unknown := [name for name in value if name not in known]:
        raise _refusal(place.partition("[")[0], f"{place} has an unknown field {unknown[0][:64]!r}", "unknown_field")


def _refusal(param: str, sentence: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, code, sentence, param=param)


# ---- earlier calls --------------------------------------------------------------------------------------------------


def read_earlier_calls(place: str, calls: Any) -> list[JsonObject]:
    """The tool_calls of an assistant's message as templates take them: their arguments as objects; raises ApiError."""
    if type(calls) is not list:
        raise _refusal("messages", f"{place} must be a list of calls")
    return [_earlier_call(f"{place}[{index}]", call) for index, call in enumerate(calls)]


def _earlier_call(place: str, call: Any) -> JsonObject:
    function = call.get("function") if type(call) is dict else None
    if type(function) is not dict or call.get("type", "function") != "function":
        raise _refusal("messages", f'{place} must be {{"id": ..., "type": "function", "function": {{...}}}}')
    # Clients that put calls together from a stream leave the index in.
    _check_keys(place, call, ("id", "type", "function", "index"))
    _check_keys(f"{place}.function", function, ("name", "arguments"))
    if not isinstance(call.get("id"), str | None):
        raise _refusal("messages", f"{place}.id must be a string")
    if type(function.get("name")) is not str:
        raise _refusal("messages", f"{place}.function.name must be a string")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = orjson.loads(arguments) if arguments.strip() else {}
        except orjson.JSONDecodeError:
            arguments = None
    if type(arguments) is not dict:
        raise _refusal("messages", f"{place}.function.arguments must be the text of a JSON object")
    kept = {} if call.get("id") is None else {"id": call["id"]}
    return {**kept, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


# ---- grammars -------------------------------------------------------------------------------------------------------


def _with_calls(tools: _Tools, grammar: Grammar | None) -> Grammar | None:
    """What an answer must match that may or must call these tools; `grammar` is what it must match when it does not."""
    required = tools.named or tools.choice == "required"
    if grammar is not None and required:
        both = "tool_choice requires a call, so the answer cannot match another grammar as well; send one of them"
        raise _refusal("tool_choice", both)
    tags = [_call_tag(function, required) for function in tools.callable]
    if required or grammar is not None:
        calls = {
            "type": "tags_with_separator",
            "tags": tags,
            "separator": "\n",
            "at_least_one": True,
            "stop_after_first": not tools.parallel,
        }
        return _structural(calls if grammar is None else {"type": "or", "elements": [calls, _as_format(grammar)]})
    if not any(function.get("strict") for function in tools.callable):
        return None
    free = {"type": "triggered_tags", "triggers": [CALL], "tags": tags, "stop_after_first": not tools.parallel}
    return _structural(free)


def _call_tag(function: JsonObject, required: bool) -> JsonObject:
    schema = _arguments_schema(function) if required or function.get("strict") else {"type": "object"}
    return {
        "type": "tag",
        "begin": f'{CALL}\n{{"name": {orjson.dumps(function["name"]).decode()}, "arguments": ',
        "content": _json_format(schema),
        "end": f"}}\n{CALL_END}",
    }


def _arguments_schema(function: JsonObject) -> JsonObject:
    """What the arguments must match. A function that names no parameters has none."""
    schema: JsonObject = function.get("parameters") or {}
    says_nothing = schema.keys() <= _SAYS_NOTHING and not schema.get("properties")
    return {"type": "object", "properties": {}, "additionalProperties": False} if says_nothing else schema


def _after_reasoning(grammar: Grammar, inside: bool) -> Grammar:
    """The same behind reasoning: such models think first, and then keep to the grammar."""
    reasoning: JsonObject = {
        "type": "tag",
        "begin": "" if inside else THINK,
        "content": {"type": "any_text"},
        "end": THINK_END,
    }
    first = reasoning if inside else {"type": "optional", "content": reasoning}
    gap = {"type": "regex", "pattern": r"\n*"}
    return _structural({"type": "sequence", "elements": [first, gap, _as_format(grammar)]})


def _json_format(schema: Any) -> JsonObject:
    # On one line: with free whitespace a weak model may never stop writing spaces.
    return {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": 1}


def _structural(content: JsonObject) -> Grammar:
    try:
        return Grammar("structural_tag", orjson.dumps({"type": "structural_tag", "format": content}).decode())
    except orjson.JSONEncodeError as error:
        deep = f"the schema that the answer or the arguments of its calls must match cannot be used: {error}"
        raise _refusal("tools", deep) from None


def _as_format(grammar: Grammar) -> JsonObject:
    """A grammar as a part of a structural tag."""
    if grammar.kind == "json_object":
        return _json_format({"type": "object"})
    if grammar.kind == "json_schema":
        return _json_format(orjson.loads(grammar.source))
    if grammar.kind == "regex":
        return {"type": "regex", "pattern": grammar.source}
    if grammar.kind == "ebnf":
        return {"type": "grammar", "grammar": grammar.source}
    content: JsonObject = orjson.loads(grammar.source)["format"]
    return content
