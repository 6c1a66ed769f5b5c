"""OpenAI's answers: chat.completion and text_completion objects, whole or in chunks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii as json_string
from typing import Any

from minisgl.http.answers import Stream
from minisgl.http.errors import ApiError, to_json
from minisgl.http.logprobs import Candidate, TextOffsets, TokenLogprob, distinct_text_of, each_token, text_of
from minisgl.messages import JsonObject, Logprobs
from minisgl.timeline import total_us

_LAST_FRAME = "data: [DONE]\n\n"


@dataclass(frozen=True)
class Reply:
    """What is known of a response before its first token.

    Attributes:
        created: seconds since 1970.
        choices: answers per prompt.
        include_usage: the client asked for a last chunk with the token counts.
        continuous_usage: it asked for the counts so far in every chunk.
        logprobs: it asked for log probabilities.
    """

    id: str
    model: str
    created: int
    choices: int
    include_usage: bool
    eos_token_ids: tuple[int, ...]
    context_length: int
    continuous_usage: bool = False
    logprobs: bool = False


class _Wire:
    """What both kinds have in common. A chunk is put together from parts that are rendered once per response.

    Args:
        answers: how many the response has.
        kinds: what the whole response and a chunk call themselves.
        piece: the JSON of a piece of text within a choice, up to the text itself and after it.
        last: the JSON of the piece that ends a choice.
    """

    media_type = "text/event-stream"

    def __init__(self, reply: Reply, answers: int, kinds: tuple[str, str], piece: tuple[str, str], last: str) -> None:
        self._reply = reply
        self._whole_kind, chunk_kind = kinds
        self._chunk_head = "data: " + to_json(self._facts(chunk_kind))[:-1]
        self._choice_heads = [f'{self._chunk_head},"choices":[{{"index":{index},' for index in range(answers)]
        self._text_heads = [head + piece[0] for head in self._choice_heads]
        self._piece_end = piece[1]
        # OpenAI's chunks have a null usage when the last one is to have a real one.
        self._tail = ("]" + (',"usage":null' if reply.include_usage else "")) + "}\n\n"
        self._text_tail = f'{piece[1]},"logprobs":null,"finish_reason":null}}{self._tail}'
        self._is_plain = not (reply.logprobs or reply.continuous_usage)
        self._ungreeted = set(range(answers))
        self._last = last

    def delta(self, stream: Stream, text: str, token_ids: list[int]) -> str:
        if not text:
            return ""
        index = stream.index
        greeting = self._greet(stream) if index in self._ungreeted else ""
        tail = self._text_tail if self._is_plain else self._full_tail(stream, text)
        return f"{greeting}{self._text_heads[index]}{json_string(text)}{tail}"

    def done(self, stream: Stream) -> str:
        greeting = self._greet(stream) if stream.index in self._ungreeted else ""
        logprobs = self._logprobs(stream, "") if stream.logprobs else None
        ending = to_json(self._ending(stream, logprobs))[1:]
        return f"{greeting}{self._choice_heads[stream.index]}{self._last},{ending}{self._tail_of(stream)}"

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
            {"index": stream.index, **self._answer(stream, text)} for stream, text in zip(streams, texts, strict=True)
        ]
        return to_json({**self._facts(self._whole_kind), "choices": choices, **self._costs(streams)})

    def _greeting(self, stream: Stream) -> str:
        """The JSON of what an answer's first chunk brings before any text; "" for none."""
        raise NotImplementedError

    def _greeting_logprobs(self, stream: Stream) -> JsonObject | None:
        """The log probabilities of what the greeting brings."""
        return None

    def _answer(self, stream: Stream, text: str) -> JsonObject:
        """A choice of a whole response."""
        raise NotImplementedError

    def _shown_logprobs(self, parts: Iterable[Logprobs], stream: Stream, text: str) -> JsonObject:
        """The log probabilities of the tokens that brought a piece of text."""
        raise NotImplementedError

    def _logprobs(self, stream: Stream, text: str) -> JsonObject | None:
        """Those that have come and are not shown yet."""
        return self._shown_logprobs(stream.take_logprobs(), stream, text) if self._reply.logprobs else None

    def _greet(self, stream: Stream) -> str:
        self._ungreeted.remove(stream.index)
        greeting = self._greeting(stream)
        if not greeting:
            return ""
        return (
            f"{self._choice_heads[stream.index]}{greeting}{self._unfinished(stream, self._greeting_logprobs(stream))}"
        )

    def _full_tail(self, stream: Stream, text: str) -> str:
        """`_text_tail` for clients that asked for more than text."""
        return self._piece_end + self._unfinished(stream, self._logprobs(stream, text))

    def _unfinished(self, stream: Stream, logprobs: JsonObject | None) -> str:
        """The end of a chunk that does not end its choice."""
        return f',"logprobs":{to_json(logprobs)},"finish_reason":null}}{self._tail_of(stream)}'

    def _tail_of(self, stream: Stream) -> str:
        """What closes a chunk behind its choice."""
        if not self._reply.continuous_usage:
            return self._tail
        return f'],"usage":{to_json(_usage([stream], [stream]))}}}\n\n'

    def _facts(self, kind: str) -> JsonObject:
        reply = self._reply
        return {"id": reply.id, "object": kind, "created": reply.created, "model": reply.model}

    def _ending(self, stream: Stream, logprobs: JsonObject | None) -> JsonObject:
        """`matched_stop` is sglang's, `stop_reason` vLLM's, which does not name end-of-sequence tokens."""
        by_eos = stream.matched in self._reply.eos_token_ids and stream.matched not in stream.sampling.stop_token_ids
        return {
            "logprobs": logprobs,
            "finish_reason": stream.finish.name.lower(),
            "matched_stop": stream.matched,
            "stop_reason": None if by_eos else stream.matched,
        }

    def _costs(self, streams: list[Stream]) -> JsonObject:
        """The usage, and vLLM's metrics of an only answer. A prompt counts once, however many answers it got."""
        usage = _usage(streams[:: self._reply.choices], streams)
        return {"usage": usage, **({"metrics": _metrics(streams[0])} if len(streams) == 1 else {})}


class ChatWire(_Wire):
    """POST /v1/chat/completions."""

    def __init__(self, reply: Reply) -> None:
        kinds = ("chat.completion", "chat.completion.chunk")
        super().__init__(reply, reply.choices, kinds, ('"delta":{"content":', "}"), '"delta":{}')

    def _greeting(self, stream: Stream) -> str:
        return '"delta":{"role":"assistant","content":""}'

    def _answer(self, stream: Stream, text: str) -> JsonObject:
        return {"message": {"role": "assistant", "content": text}, **self._ending(stream, self._logprobs(stream, text))}

    def _shown_logprobs(self, parts: Iterable[Logprobs], stream: Stream, text: str) -> JsonObject:
        content = [
            {
                **_chat_token(token.piece, token.value),
                "top_logprobs": [_chat_token(top.piece, top.value) for top in token.top],
            }
            for token in each_token(parts)
        ]
        return {"content": content, "refusal": None}


class CompletionWire(_Wire):
    """POST /v1/completions.

    Args:
        echoes: per answer the prompt that it begins with, or "" for none; None for a prompt of token ids, whose text
            comes with the prompt's log probabilities.
    """

    def __init__(self, reply: Reply, echoes: Sequence[str | None]) -> None:
        super().__init__(reply, len(echoes), ("text_completion", "text_completion"), ('"text":', ""), '"text":""')
        self._echoes = echoes
        self._offsets = [TextOffsets() for _ in echoes] if reply.logprobs else []

    def _greeting(self, stream: Stream) -> str:
        echo = self._echo(stream)
        return f'"text":{json_string(echo)}' if echo else ""

    def _greeting_logprobs(self, stream: Stream) -> JsonObject | None:
        if not self._reply.logprobs:
            return None
        return self._shown_logprobs(stream.prompt_logprobs, stream, self._echo(stream))

    def _answer(self, stream: Stream, text: str) -> JsonObject:
        echo = self._echo(stream)
        if not echo:
            return {"text": text, **self._ending(stream, self._logprobs(stream, text))}
        parts = [*stream.prompt_logprobs, *stream.take_logprobs()]
        logprobs = self._shown_logprobs(parts, stream, echo + text) if self._reply.logprobs else None
        return {"text": echo + text, **self._ending(stream, logprobs)}

    def _echo(self, stream: Stream) -> str:
        echo = self._echoes[stream.index]
        if echo is not None:
            return echo
        pieces = [token.piece for token in each_token(stream.prompt_logprobs)]
        return text_of(b"".join(pieces))

    def _shown_logprobs(self, parts: Iterable[Logprobs], stream: Stream, text: str) -> JsonObject:
        tokens = list(each_token(parts))
        return {
            "tokens": [distinct_text_of(token.piece) for token in tokens],
            "token_logprobs": [token.value for token in tokens],
            "top_logprobs": [_by_text(token) for token in tokens],
            "text_offset": self._offsets[stream.index].take(text, [token.piece for token in tokens]),
        }


def _chat_token(piece: bytes, value: float | None) -> JsonObject:
    return {"token": text_of(piece), "logprob": value, "bytes": list(piece)}


def _by_text(token: TokenLogprob) -> dict[str, float] | None:
    """The likeliest tokens and the one that came, by their texts; of those with the same text the likeliest."""
    if token.value is None:
        return None
    values: dict[str, float] = {}
    for candidate in (*token.top, Candidate(token.token_id, token.piece, token.value)):
        values.setdefault(distinct_text_of(candidate.piece), candidate.value)
    return values


def _usage(prompts: list[Stream], answers: list[Stream]) -> JsonObject:
    """Args: prompts: one answer for each prompt."""
    prompt = sum(stream.prompt_tokens for stream in prompts)
    completion = sum(stream.completion_tokens for stream in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(stream.cached_tokens for stream in prompts)},
    }


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
