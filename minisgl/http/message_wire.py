"""Chat answers that are more than text, on OpenAI's wire: reasoning_content and tool_calls beside content."""

from __future__ import annotations

import uuid
from collections.abc import Iterable

from minisgl.http.answers import Stream
from minisgl.http.errors import to_json
from minisgl.http.message_parser import CALL_END, Kind, MessageParser, Part, assemble
from minisgl.http.openai_wire import ChatWire, Reply
from minisgl.http.tools import AnswerFormat
from minisgl.messages import FinishReason, JsonObject


class MessageWire(ChatWire):
    """POST /v1/chat/completions with tools, or of a model that reasons."""

    def __init__(self, reply: Reply, answers: AnswerFormat) -> None:
        super().__init__(reply)
        self._answers = answers
        self._parsers: dict[int, tuple[int, MessageParser]] = {}
        self._callers: set[int] = set()
        """Answers with a complete call in them."""

    def delta(self, stream: Stream, text: str, token_ids: list[int]) -> str:
        return self._frames(stream, self._parser(stream).feed(text))

    def done(self, stream: Stream) -> str:
        parser = self._parser(stream)
        return self._frames(stream, [*parser.feed(self._trimmed(stream)), *parser.finish()]) + super().done(stream)

    def _parser(self, stream: Stream) -> MessageParser:
        # An answer that nobody has seen may begin anew, which gives it another ring id.
        rid, parser = self._parsers.get(stream.index, (-1, None))
        if parser is None or rid != stream.rid:
            parser = self._answers.parser()
            self._parsers[stream.index] = (stream.rid, parser)
        return parser

    def _trimmed(self, stream: Stream) -> str:
        """What this server's own stop string has taken off the text."""
        return CALL_END if self._stopped_at_call(stream) and not stream.sampling.no_stop_trim else ""

    def _stopped_at_call(self, stream: Stream) -> bool:
        return self._answers.stops_at_call and stream.matched == CALL_END

    def _frames(self, stream: Stream, parts: Iterable[Part]) -> str:
        deltas = [delta for part in parts if (delta := self._delta(stream, part)) is not None]
        if not deltas:
            return ""
        frames = [self._greet(stream)] if stream.index in self._ungreeted else []
        head = self._choice_heads[stream.index]
        for delta in deltas:
            # The first of them brings the log probabilities of all tokens up to here.
            tail = self._unfinished(stream, self._logprobs(stream, "") if stream.logprobs else None)
            frames.append(f'{head}"delta":{to_json(delta)}{tail}')
        return "".join(frames)

    def _delta(self, stream: Stream, part: Part) -> JsonObject | None:
        if part.kind is Kind.CONTENT:
            return {"content": part.text}
        if part.kind is Kind.REASONING:
            return {"reasoning_content": part.text}
        if part.kind is Kind.CALL:
            return {"tool_calls": [{"index": part.call, **_call(part.text, "")}]}
        if part.kind is Kind.ARGUMENTS:
            return {"tool_calls": [{"index": part.call, "function": {"arguments": part.text}}]}
        if part.kind is Kind.CALL_DONE:
            self._callers.add(stream.index)
        return None

    def _answer(self, stream: Stream, text: str) -> JsonObject:
        parser = self._answers.parser()
        found = assemble([*parser.feed(text + self._trimmed(stream)), *parser.finish()])
        message: JsonObject = {"role": "assistant", "content": found.content}
        if self._answers.reasons:
            message["reasoning_content"] = found.reasoning or None
        if found.calls:
            self._callers.add(stream.index)
            message["content"] = found.content or None
            message["tool_calls"] = [_call(name, arguments) for name, arguments in found.calls]
        return {**super()._answer(stream, text), "message": message}

    def _ending(self, stream: Stream, logprobs: JsonObject | None) -> JsonObject:
        ending = super()._ending(stream, logprobs)
        if self._stopped_at_call(stream):
            ending |= {"matched_stop": None, "stop_reason": None}
        if stream.index in self._callers and stream.finish is FinishReason.STOP:
            ending["finish_reason"] = "tool_calls"
        return ending


def _call(name: str, arguments: str) -> JsonObject:
    call_id = f"call_{uuid.uuid4().hex[:24]}"
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
