"""Takes a generated text apart: what the model thinks, what it says, and which tools it calls.

The formats are those of Qwen, Hermes and DeepSeek-R1: reasoning stands before the answer, up to `</think>`, and a call
is `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`. The newlines beside these tags belong to them, as they do
in the chat templates that write them. Whatever is no such tag and no such call stays as it is. How the text was cut
into pieces shows in the parts only where their own texts are cut.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson

THINK, THINK_END = "<think>", "</think>"
CALL, CALL_END = "<tool_call>", "</tool_call>"
ARGUMENTS_KEYS = ("arguments", "parameters")

_TAGS = {
    (False, False): (),
    (False, True): (CALL,),
    (True, False): (THINK_END,),
    (True, True): (THINK_END, CALL),
}
"""What may end a text: by whether it is reasoning, and whether calls are looked for."""

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
"""A call up to its arguments, in the order in which models are taught to write it."""
_IN_STRING = re.compile(r'["\\]')
_OUT_OF_STRING = re.compile(r'["{}\[\]]|[^\s\w.+\-,:"{}\[\]]')
"""What matters of JSON outside of strings: brackets, quotes, and what cannot be there."""
_CLOSING = "} \t\r\n"
_HEAD_CHARACTERS = 1024
"""Calls that take longer to come to their arguments are only looked at when they are complete."""


class Kind(enum.Enum):
    """What a part brings; its `text` is that, but for CALL the function's name."""

    CONTENT = enum.auto()
    REASONING = enum.auto()
    CALL = enum.auto()
    ARGUMENTS = enum.auto()
    CALL_DONE = enum.auto()
    CALL_BROKEN = enum.auto()
    """The call that was begun is none: its arguments are no JSON object. `text` is all that it took from the answer."""


class Part(NamedTuple):
    """A piece of a message. `call` counts the calls from 0."""

    kind: Kind
    text: str = ""
    call: int = -1


class _State(enum.Enum):
    START = enum.auto()
    PROSE = enum.auto()
    HEAD = enum.auto()
    ARGUMENTS = enum.auto()
    TAIL = enum.auto()
    OVER = enum.auto()


class MessageParser:
    """Parses one answer.

    Args:
        reasons: the model may begin with reasoning.
        inside: the prompt ended within reasoning, so that is how the answer begins.
        functions: names that may be called; None when calls are not looked for.
        only_call: end the message with its first call.
    """

    def __init__(
        self, reasons: bool, inside: bool, functions: frozenset[str] | None = None, only_call: bool = False
    ) -> None:
        self.prose = Kind.REASONING if inside else Kind.CONTENT
        """What plain text is now."""
        self._functions = functions
        self._only_call = only_call
        self._state = _State.START if reasons else _State.PROSE
        self._held = ""
        self._after_tag = inside
        self._calls = 0
        self._source: list[str] = []
        """What the present call has taken: its tag with the newlines before it, its head, its arguments in pieces."""
        self._arguments = _ObjectScanner()

    def feed(self, text: str) -> list[Part]:
        """The next piece of the answer; what may yet become a tag is held back."""
        self._held += text
        parts: list[Part] = []
        while self._held and self._advance(parts):
            pass
        return parts

    def finish(self) -> list[Part]:
        """The end of the answer: what is held back is decided."""
        parts: list[Part] = []
        while self._held or self._state in (_State.HEAD, _State.ARGUMENTS, _State.TAIL):
            self._advance(parts, at_end=True)
        return parts

    def _advance(self, parts: list[Part], at_end: bool = False) -> bool:
        """One step; False when more text is needed for it. At the end each step takes something off what is held."""
        if self._state is _State.START:
            return self._take_start(at_end)
        if self._state is _State.PROSE:
            return self._take_prose(parts, at_end)
        if self._state is _State.HEAD:
            return self._take_head(parts, at_end)
        if self._state is _State.ARGUMENTS:
            return self._take_arguments(parts, at_end)
        if self._state is _State.TAIL:
            return self._take_tail(parts, at_end)
        self._held = ""
        return False

    def _take_start(self, at_end: bool) -> bool:
        """A message begins with `<think>`, or it does not."""
        begin = self._held.lstrip("\n")
        if begin.startswith(THINK):
            self._held, self.prose, self._after_tag = begin[len(THINK) :], Kind.REASONING, True
        elif THINK.startswith(begin) and not at_end:
            return False
        self._state = _State.PROSE
        return True

    def _take_prose(self, parts: list[Part], at_end: bool) -> bool:
        if self._after_tag:
            self._held = self._held.lstrip("\n")
            if not self._held:
                return False
            self._after_tag = False
        tags = _TAGS[self.prose is Kind.REASONING, self._functions is not None]
        found = _first(self._held, tags)
        if found is None:
            end = len(self._held) if at_end or not tags else _may_become(self._held, tags)
            self._emit(parts, self._held[:end])
            self._held = self._held[end:]
            return False
        place, tag = found
        text = self._held[:place].rstrip("\n")
        self._emit(parts, text)
        self._source = [self._held[len(text) : place + len(tag)]]
        self._held = self._held[place + len(tag) :]
        if tag == THINK_END:
            self.prose, self._after_tag = Kind.CONTENT, True
        else:
            self._state = _State.HEAD
        return True

    def _take_head(self, parts: list[Part], at_end: bool) -> bool:
        """After `<tool_call>`: is this a call of a known function?"""
        begin = self._held.lstrip()
        end = self._held.find(CALL_END)
        if (match := _HEAD.match(self._held, 0, _HEAD_CHARACTERS)) and (end < 0 or match.end() <= end):
            name = _string(match[1])
            if name in self._known:
                self._open(parts, name)
                self._take_source(match.end())
                self._arguments = _ObjectScanner()
                self._state = _State.ARGUMENTS
                return True
        elif begin[:1] in ("", "{", "[") and end < 0 and not at_end:
            return False
        elif calls := _whole_calls(self._held[: end if end >= 0 else None], self._known):
            for name, arguments in calls[: 1 if self._only_call else None]:
                self._open(parts, name)
                parts += Part(Kind.ARGUMENTS, arguments, self._calls - 1), Part(Kind.CALL_DONE, call=self._calls - 1)
            self._close(end + len(CALL_END) if end >= 0 else len(self._held))
            return True
        # It is none, so the tag is text, and what follows is looked at again.
        self._state = _State.PROSE
        self._emit(parts, "".join(self._source))
        return True

    def _take_arguments(self, parts: list[Part], at_end: bool) -> bool:
        end = self._arguments.scan(self._held)
        if end:
            parts.append(Part(Kind.ARGUMENTS, self._take_source(end), self._calls - 1))
        if self._arguments.complete and _is_object("".join(self._source[2:])):
            parts.append(Part(Kind.CALL_DONE, call=self._calls - 1))
            self._state = _State.TAIL
        elif self._arguments.complete or self._arguments.broken or at_end:
            parts.append(Part(Kind.CALL_BROKEN, "".join(self._source), self._calls - 1))
            self._state = _State.PROSE
        return bool(self._held)

    def _take_tail(self, parts: list[Part], at_end: bool) -> bool:
        """After the arguments: `}</tool_call>`. Brackets too many or too few do not spoil the call."""
        rest = self._held.lstrip(_CLOSING)
        end = self._held.find(CALL_END)
        if rest.startswith(CALL_END) or (end >= 0 and _is_object("".join(self._source[1:]) + self._held[:end])):
            self._close(end + len(CALL_END))
        elif at_end and CALL_END.startswith(rest):
            self._close(len(self._held))
        elif not at_end and end < 0 and (self._held.lstrip().startswith(",") or CALL_END.startswith(rest)):
            return False
        else:
            self._close(0)
            self._after_tag = False
        return True

    @property
    def _known(self) -> frozenset[str]:
        return self._functions or frozenset()

    def _emit(self, parts: list[Part], text: str) -> None:
        if text:
            parts.append(Part(self.prose, text))

    def _open(self, parts: list[Part], name: str) -> None:
        # A model that calls has stopped thinking, even if it forgets to say so.
        self.prose = Kind.CONTENT
        parts.append(Part(Kind.CALL, name, self._calls))
        self._calls += 1

    def _take_source(self, end: int) -> str:
        source, self._held = self._held[:end], self._held[end:]
        self._source.append(source)
        return source

    def _close(self, end: int) -> None:
        self._held = self._held[end:]
        self._after_tag = True
        self._state = _State.OVER if self._only_call else _State.PROSE


class _ObjectScanner:
    """Finds the end of a JSON object that arrives in pieces. It balances brackets; whether it is JSON shows at the end.

    Attributes:
        complete: the object is closed.
        broken: something came that no JSON has there.
    """

    def __init__(self) -> None:
        self.complete = False
        self.broken = False
        self._closing: list[str] = []
        self._in_string = False
        self._escaped = False

    def scan(self, text: str) -> int:
        """How much of the text belongs to the object."""
        place = 0
        while place < len(text) and not self.complete and not self.broken:
            place = self._step(text, place)
        return place

    def _step(self, text: str, place: int) -> int:
        if self._escaped:
            self._escaped = False
            return place + 1
        found = (_IN_STRING if self._in_string else _OUT_OF_STRING).search(text, place)
        if found is None:
            return len(text)
        character = found[0]
        if character == '"':
            self._in_string = not self._in_string
        elif character == "\\" and self._in_string:
            self._escaped = True
        elif character in "{[":
            self._closing.append("}" if character == "{" else "]")
        elif self._closing and character == self._closing[-1]:
            self._closing.pop()
            self.complete = not self._closing
        else:
            self.broken = True
            return found.start()
        return found.end()


# ---- whole messages --------------------------------------------------------------------------------------------------


@dataclass
class Message:
    """A whole answer. A call that is broken is not a call here: its source is content, as if it had not been parsed."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    """Function names and arguments, the latter the text of a JSON object."""


def assemble(parts: Iterable[Part]) -> Message:
    """The message that these parts, the last ones from `finish`, make up."""
    texts: dict[Kind, list[str]] = {kind: [] for kind in Kind}
    calls: list[tuple[str, str]] = []
    name = ""
    for part in parts:
        if part.kind is Kind.CALL:
            name = part.text
            texts[Kind.ARGUMENTS].clear()
        elif part.kind is Kind.CALL_DONE:
            calls.append((name, "".join(texts[Kind.ARGUMENTS])))
        else:
            texts[Kind.CONTENT if part.kind is Kind.CALL_BROKEN else part.kind].append(part.text)
    return Message("".join(texts[Kind.CONTENT]), "".join(texts[Kind.REASONING]), calls)


# ---- helpers ---------------------------------------------------------------------------------------------------------


def _first(text: str, tags: tuple[str, ...]) -> tuple[int, str] | None:
    """Where the first of these tags stands, and which it is."""
    if "<" not in text:
        return None
    return min(((place, tag) for tag in tags if (place := text.find(tag)) >= 0), default=None)


def _may_become(text: str, tags: tuple[str, ...]) -> int:
    """Where the end of the text begins that a tag, and the newlines before it, may be made of."""
    # A tag begins with its only "<".
    tail = text.rfind("<")
    if tail >= 0 and any(tag.startswith(text[tail:]) for tag in tags):
        text = text[:tail]
    return len(text.rstrip("\n"))


def _string(source: str) -> str | None:
    try:
        value = json.loads(source)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def _is_object(source: str) -> bool:
    try:
        return isinstance(orjson.loads(source), dict)
    except (orjson.JSONDecodeError, UnicodeEncodeError):
        return False


def _whole_calls(source: str, functions: frozenset[str]) -> list[tuple[str, str]]:
    """The calls in a complete block whose keys stand in another order, or that holds a list; [] if it is none."""
    try:
        value = orjson.loads(source)
    except (orjson.JSONDecodeError, UnicodeEncodeError):
        return []
    calls = [_whole_call(item, functions) for item in (value if isinstance(value, list) else [value])]
    known = [call for call in calls if call is not None]
    return known if len(known) == len(calls) else []


def _whole_call(value: Any, functions: frozenset[str]) -> tuple[str, str] | None:
    if not isinstance(value, dict) or not isinstance(name := value.get("name"), str) or name not in functions:
        return None
    arguments: Any = next((value[key] for key in ARGUMENTS_KEYS if value.get(key) is not None), {})
    if isinstance(arguments, str) and _is_object(arguments):
        return name, arguments
    return (name, json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None
