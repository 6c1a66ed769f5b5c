"""How each server is asked for a greedy answer of fixed length, and how its stream is read.

Every wire turns a stream of stamped lines into one Answer. Tokens are counted by what the server reports (token ids or
its running count), never by chunks: servers merge tokens into chunks under load, and a text streamer holds words back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

Line = tuple[int, bytes]
"""Nanoseconds at which the line had arrived, and the line without its end."""


@dataclass
class Answer:
    """What one stream said.

    Attributes:
        arrivals: (nanoseconds, new tokens) of every line that brought tokens.
        token_ids: the generated ids, where the server reports them.
        first_text_ns: when the first text that is not empty arrived, 0 when none did.
        prompt_tokens, completion_tokens: the server's own usage figures, -1 when it gave none.
        finish_reason: `length`, `stop`, ...; empty when the stream had no end event.
        timing: the server's own account of the request, where it gives one.
        error: why the stream is no valid answer, empty when it is.
    """

    arrivals: list[tuple[int, int]] = field(default_factory=list)
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    first_text_ns: int = 0
    prompt_tokens: int = -1
    completion_tokens: int = -1
    finish_reason: str = ""
    timing: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    @property
    def streamed_tokens(self) -> int:
        return sum(tokens for _, tokens in self.arrivals)


class Wire(Protocol):
    """One server's request and stream format."""

    path: str

    def body(self, prompt: str, max_new_tokens: int) -> dict[str, Any]:
        """The JSON body that asks for exactly `max_new_tokens` greedy tokens, streamed."""

    def read(self, lines: Iterable[Line]) -> Answer:
        """The answer in a complete stream; never raises for what a server may send."""


class NativeWire:
    """minisgl's JSON lines, which the Hugging Face baseline speaks too: each delta line names its token ids."""

    path = "/generate"

    def body(self, prompt: str, max_new_tokens: int) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "stream": True,
            "max_new_tokens": max_new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }

    def read(self, lines: Iterable[Line]) -> Answer:
        answer = Answer()
        texts: list[str] = []
        for at, line in lines:
            event = _json_object(line)
            if event is None:
                answer.error = f"not a JSON object: {_excerpt(line)}"
                break
            if event.get("event") == "error":
                answer.error = f"error event: {event.get('message', event)}"
                break
            if event.get("event") == "done":
                usage = event.get("usage") or {}
                answer.finish_reason = str(event.get("finish_reason") or "")
                answer.prompt_tokens = usage.get("prompt_tokens", -1)
                answer.completion_tokens = usage.get("completion_tokens", -1)
                answer.timing = event.get("timing") or {}
            ids = event.get("token_ids") or []
            if ids:
                answer.arrivals.append((at, len(ids)))
                answer.token_ids.extend(ids)
            text = event.get("text_delta") or ""
            if text:
                texts.append(text)
                answer.first_text_ns = answer.first_text_ns or at
        answer.text = "".join(texts)
        return answer


class SglangWire:
    """sglang's server-sent events: cumulative text, ids and completion_tokens in each, then `[DONE]`."""

    path = "/generate"

    # A quote inside a JSON string is escaped, so this byte pattern can only be the key itself.
    _COUNT = re.compile(rb'"completion_tokens":\s*(\d+)')
    _EMPTY_TEXT = re.compile(rb'"text":\s*""')

    def body(self, prompt: str, max_new_tokens: int) -> dict[str, Any]:
        return {
            "text": prompt,
            "sampling_params": {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True},
            "stream": True,
        }

    def read(self, lines: Iterable[Line]) -> Answer:
        answer = Answer()
        seen = 0
        last = b""
        done = False
        for at, line in lines:
            if not line.startswith(b"data:"):
                if line:
                    answer.error = f"not a server-sent event: {_excerpt(line)}"
                    break
                continue
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                done = True
                break
            count = self._COUNT.search(data)
            if count is None:
                answer.error = f"event without completion_tokens: {_excerpt(data)}"
                break
            # Cumulative events repeat the whole answer: only their count is read here, the last one is parsed.
            last = data
            tokens = int(count[1])
            if tokens > seen:
                answer.arrivals.append((at, tokens - seen))
                seen = tokens
            if not answer.first_text_ns and not self._EMPTY_TEXT.search(data):
                answer.first_text_ns = at
        final = _json_object(last) if last else None
        if final is None:
            answer.error = answer.error or "no event was sent"
            return answer
        meta = final.get("meta_info") or {}
        answer.text = final.get("text") or ""
        answer.prompt_tokens = meta.get("prompt_tokens", -1)
        answer.completion_tokens = meta.get("completion_tokens", -1)
        ids = list(final.get("output_ids") or [])
        # A server started with incremental streaming names only the last ids here.
        answer.token_ids = ids if len(ids) == answer.completion_tokens else []
        answer.timing = meta
        finish = meta.get("finish_reason") or {}
        if done:
            answer.finish_reason = str(finish.get("type") or "")
        if finish.get("type") == "abort":
            answer.error = f"aborted by the server: {finish.get('message', finish)}"
        return answer


WIRES: dict[str, Wire] = {"minisgl": NativeWire(), "hf": NativeWire(), "sglang": SglangWire()}


def problem_of(answer: Answer, asked_tokens: int) -> str:
    """Why this answer must not count as a measurement, in one sentence; empty when it may."""
    if answer.error:
        return answer.error
    if not answer.finish_reason:
        return f"the stream ended without its end event after {answer.streamed_tokens} tokens"
    if not answer.arrivals:
        return "the answer has no tokens"
    if not answer.text:
        return "the answer has no text"
    if answer.completion_tokens != answer.streamed_tokens:
        return f"{answer.streamed_tokens} tokens were streamed but usage says {answer.completion_tokens}"
    if answer.completion_tokens != asked_tokens:
        return f"asked for exactly {asked_tokens} tokens, got {answer.completion_tokens} ({answer.finish_reason})"
    return ""


def _json_object(line: bytes) -> dict[str, Any] | None:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def _excerpt(data: bytes) -> str:
    return repr(data[:120].decode("utf-8", "replace"))
