"""OpenAI's answers: chat.completion and text_completion objects, whole or in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii as json_string
from typing import Any

from minisgl.http.answers import Stream
from minisgl.http.errors import ApiError, to_json
from minisgl.messages import JsonObject
from minisgl.timeline import total_us

_LAST_FRAME = "data: [DONE]\n\n"


@dataclass(frozen=True)
class Reply:
    """What is known of a response before its first token.

    Attributes:
        created: seconds since 1970.
        choices: answers per prompt.
        include_usage: the client asked for a last chunk with the token counts.
    """

    id: str
    model: str
    created: int
    choices: int
    include_usage: bool
    eos_token_ids: tuple[int, ...]
    context_length: int


class _Wire:
    """What both kinds have in common. A chunk is put together from parts that are rendered once per response.

    Args:
        greetings: per answer, what its first chunk brings before any text; "" for none.
        piece: the JSON of a piece of text within a choice, up to the text itself and after it.
        last: the JSON of the piece that ends a choice.
    """

    media_type = "text/event-stream"

    def __init__(
        self, reply: Reply, kinds: tuple[str, str], greetings: Sequence[str], piece: tuple[str, str], last: str
    ) -> None:
        self._reply = reply
        self._whole_kind, chunk_kind = kinds
        self._chunk_head = "data: " + to_json(self._facts(chunk_kind))[:-1]
        # OpenAI's chunks have a null usage when the last one is to have a real one.
        self._tail = ("]" + (',"usage":null' if reply.include_usage else "")) + "}\n\n"
        self._choice_heads = [f'{self._chunk_head},"choices":[{{"index":{index},' for index in range(len(greetings))]
        unfinished = ',"logprobs":null,"finish_reason":null}' + self._tail
        self._greetings = [
            head + greeting + unfinished if greeting else ""
            for head, greeting in zip(self._choice_heads, greetings, strict=True)
        ]
        self._text_heads = [head + piece[0] for head in self._choice_heads]
        self._text_tail = piece[1] + unfinished
        self._last = last

    def delta(self, stream: Stream, text: str, token_ids: list[int]) -> str:
        if not text:
            return ""
        index = stream.index
        frame = self._text_heads[index] + json_string(text) + self._text_tail
        if self._greetings[index]:
            frame, self._greetings[index] = self._greetings[index] + frame, ""
        return frame

    def done(self, stream: Stream) -> str:
        ending = to_json(self._ending(stream))[1:]
        return f"{self._greetings[stream.index]}{self._choice_heads[stream.index]}{self._last},{ending}{self._tail}"

    def end(self, streams: list[Stream]) -> str:
        if not self._reply.include_usage:
            return _LAST_FRAME
        return f'{self._chunk_head},"choices":[],{to_json(self._costs(streams))[1:]}\n\n{_LAST_FRAME}'

    def worded(self, error: ApiError) -> ApiError:
        """Clients know a prompt that is too long by OpenAI's code, some by the first words of its message."""
        if error.code != "prompt_too_long":
            return error
        limit = f"This model's maximum context length is {self._reply.context_length} tokens: "
        message = limit + error.message.replace("max_new_tokens", "max_tokens")
        return ApiError(error.status, "context_length_exceeded", message)

    def error(self, error: ApiError) -> str:
        return f"data: {to_json(error.body())}\n\n{_LAST_FRAME}"

    def whole(self, streams: list[Stream], texts: list[str], token_ids: list[list[int]]) -> str:
        choices = [
            {"index": stream.index, **self._answer(stream, text), **self._ending(stream)}
            for stream, text in zip(streams, texts, strict=True)
        ]
        return to_json({**self._facts(self._whole_kind), "choices": choices, **self._costs(streams)})

    def _answer(self, stream: Stream, text: str) -> JsonObject:
        raise NotImplementedError

    def _facts(self, kind: str) -> JsonObject:
        reply = self._reply
        return {"id": reply.id, "object": kind, "created": reply.created, "model": reply.model}

    def _ending(self, stream: Stream) -> JsonObject:
        """`matched_stop` is sglang's, `stop_reason` vLLM's, which does not name end-of-sequence tokens."""
        by_eos = stream.matched in self._reply.eos_token_ids and stream.matched not in stream.sampling.stop_token_ids
        return {
            "logprobs": None,
            "finish_reason": stream.finish.name.lower(),
            "matched_stop": stream.matched,
            "stop_reason": None if by_eos else stream.matched,
        }

    def _costs(self, streams: list[Stream]) -> JsonObject:
        """The usage, and vLLM's metrics of an only answer. A prompt counts once, however many answers it got."""
        firsts = streams[:: self._reply.choices]
        prompt = sum(stream.prompt_tokens for stream in firsts)
        completion = sum(stream.completion_tokens for stream in streams)
        usage: JsonObject = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(stream.cached_tokens for stream in firsts)},
        }
        return {"usage": usage, **({"metrics": _metrics(streams[0])} if len(streams) == 1 else {})}


class ChatWire(_Wire):
    """POST /v1/chat/completions."""

    def __init__(self, reply: Reply) -> None:
        greetings = ['"delta":{"role":"assistant","content":""}'] * reply.choices
        kinds = ("chat.completion", "chat.completion.chunk")
        super().__init__(reply, kinds, greetings, ('"delta":{"content":', "}"), '"delta":{}')

    def _answer(self, stream: Stream, text: str) -> JsonObject:
        return {"message": {"role": "assistant", "content": text}}


class CompletionWire(_Wire):
    """POST /v1/completions.

    Args:
        echoes: per answer, the prompt that it begins with, or "".
    """

    def __init__(self, reply: Reply, echoes: list[str]) -> None:
        greetings = [f'"text":{json_string(echo)}' if echo else "" for echo in echoes]
        super().__init__(reply, ("text_completion", "text_completion"), greetings, ('"text":', ""), '"text":""')
        self._echoes = echoes

    def _answer(self, stream: Stream, text: str) -> JsonObject:
        return {"text": self._echoes[stream.index] + text}


def _metrics(stream: Stream) -> JsonObject:
    """Times in milliseconds under vLLM's names, which its benchmark shows; null for what never happened."""
    timing = stream.timing()
    hops: dict[str, float] = timing["hops_us"]
    generation = (stream.last_ns - stream.first_ns) / 1e6
    gaps = stream.completion_tokens - stream.first_tokens
    values: dict[str, Any] = {
        "time_to_first_token_ms": total_us(stream.stamps[:-1]) / 1e3,
        # A request that was aborted in the queue has not been through it.
        "queue_time_ms": hops["queue"] / 1e3 if "queue" in hops else None,
        "generation_time_ms": generation,
        "mean_itl_ms": generation / gaps if gaps else None,
        "tokens_per_second": timing["tokens_per_second"],
    }
    return {name: value and round(value, 3) for name, value in values.items()}
