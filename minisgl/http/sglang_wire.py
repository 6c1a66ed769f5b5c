"""sglang's answers: JSON objects, and server-sent events of which each repeats the whole text so far."""

from __future__ import annotations

import time
from array import array
from collections.abc import Mapping, MutableSequence
from json.encoder import encode_basestring_ascii as json_string

from minisgl.http.answers import EventStream, Renderer, Stream
from minisgl.http.errors import ApiError, to_json
from minisgl.http.logprobs import each_token, text_of
from minisgl.messages import FinishReason, JsonObject, Logprobs
from minisgl.timeline import now

_CHANGING = ("completion_tokens", "dp_rank")
"""What `meta_info` says anew in each event before the last; a request may be dispatched after its first text."""
_MAX_PIECES = 256
"""Texts that wait for a client that does not read: as single objects, tokens take ten times the room."""


class CumulativeLogprobs:
    """What the events of one answer say of log probabilities; as the texts, all of it is kept as JSON.

    A token is `[log probability, token id, text or null]`, and its likeliest rivals are a list of these. Where sglang
    has null for the first of the prompt's tokens asked for, this has its value; only the very first one has none.

    Args:
        rivals: give the likeliest tokens at each place too.
        name_tokens: give the texts of the tokens.
    """

    def __init__(self, rivals: bool, name_tokens: bool) -> None:
        self._rivals = rivals
        self._name_tokens = name_tokens
        self._input: list[str] = []
        self._input_top: list[str] = []
        self._output: list[str] = []
        self._output_top: list[str] = []

    def take(self, stream: Stream) -> None:
        """Add what has come since the last call."""
        self._add(stream.take_prompt_logprobs(), self._input, self._input_top)
        self._add(stream.take_logprobs(), self._output, self._output_top)

    def members(self) -> str:
        """Members of `meta_info`, each with a comma before it."""
        shown = (
            f',"input_token_logprobs":[{",".join(self._input)}],"output_token_logprobs":[{",".join(self._output)}]'
            f',"output_token_logprobs_length":{len(self._output)}'
        )
        if not self._rivals:
            return shown
        return (
            f'{shown},"input_top_logprobs":[{",".join(self._input_top)}]'
            f',"output_top_logprobs":[{",".join(self._output_top)}]'
        )

    def _add(self, parts: list[Logprobs], tokens: list[str], tops: list[str]) -> None:
        for token in each_token(parts):
            tokens.append(self._triple(token.value, token.token_id, token.piece))
            if self._rivals:
                top = ",".join(self._triple(rival.value, rival.token_id, rival.piece) for rival in token.top)
                tops.append("null" if token.value is None else f"[{top}]")

    def _triple(self, value: float | None, token_id: int, piece: bytes) -> str:
        name = json_string(text_of(piece)) if self._name_tokens else "null"
        return f"[{'null' if value is None else value},{token_id},{name}]"


class SglangWire:
    """One response; all of its texts and ids are kept as JSON, so that an event costs no rendering of old text.

    Args:
        is_list: the answers are list items, and their events say which one they belong to.
        logprobs: those of the answers that are to have them, by index.
    """

    media_type = "text/event-stream"

    def __init__(self, answers: int, is_list: bool, logprobs: Mapping[int, CumulativeLogprobs]) -> None:
        self._texts = [""] * answers
        self._token_ids = [""] * answers
        self._meta_heads = [""] * answers
        self._is_list = is_list
        self._logprobs = logprobs

    def delta(self, stream: Stream, text: str, token_ids: list[int]) -> str:
        index = stream.index
        self._add(stream, text, token_ids)
        if not self._meta_heads[index]:
            known = {name: value for name, value in self._meta(stream).items() if name not in _CHANGING}
            self._meta_heads[index] = to_json(known)[:-1]
        rank = stream.replica[0] if stream.replica else "null"
        changing = f',"completion_tokens":{stream.completion_tokens},"dp_rank":{rank}'
        return self._frame(index, self._meta_heads[index] + changing)

    def done(self, stream: Stream) -> str:
        self._add(stream, "", [])
        return self._frame(stream.index, self._last_meta(stream))

    def end(self, streams: list[Stream]) -> str:
        return "data: [DONE]\n\n"

    def worded(self, error: ApiError) -> ApiError:
        return error

    def error(self, error: ApiError) -> str:
        return f"data: {to_json(error.body())}\n\ndata: [DONE]\n\n"

    def whole(self, streams: list[Stream], texts: list[str], token_ids: list[list[int]]) -> str:
        answers = []
        for stream, text, ids in zip(streams, texts, token_ids, strict=True):
            self._add(stream, text, ids)
            answers.append(self._object(stream.index, self._last_meta(stream)))
        return f"[{','.join(answers)}]" if self._is_list else answers[0]

    def _add(self, stream: Stream, text: str, token_ids: list[int]) -> None:
        index = stream.index
        self._texts[index] += json_string(text)[1:-1]
        if token_ids:
            ids = ",".join(map(str, token_ids))
            self._token_ids[index] = f"{self._token_ids[index]},{ids}" if self._token_ids[index] else ids
        if index in self._logprobs:
            self._logprobs[index].take(stream)

    def _frame(self, index: int, meta: str) -> str:
        place = f',"index":{index}' if self._is_list else ""
        return f"data: {self._object(index, meta, place)}\n\n"

    def _object(self, index: int, meta: str, place: str = "") -> str:
        """Args: meta: the `meta_info` without its closing brace; place: a last member, with a comma before it."""
        logprobs = self._logprobs[index].members() if index in self._logprobs else ""
        text, ids = self._texts[index], self._token_ids[index]
        return f'{{"text":"{text}","output_ids":[{ids}],"meta_info":{meta}{logprobs}}}{place}}}'

    def _meta(self, stream: Stream) -> JsonObject:
        return {
            "id": stream.name,
            "finish_reason": _finish_reason(stream),
            "prompt_tokens": stream.prompt_tokens,
            "weight_version": "default",
            "completion_tokens": stream.completion_tokens,
            "cached_tokens": stream.cached_tokens,
            "dp_rank": stream.replica[0] if stream.replica else None,
        }

    def _last_meta(self, stream: Stream) -> str:
        """What the last event of an answer says, without the closing brace; `timing` is this server's own."""
        last = {
            "e2e_latency": (now() - stream.call.received_ns) / 1e9,
            "response_sent_to_client_ts": time.time(),
            "timing": stream.timing(),
        }
        return to_json({**self._meta(stream), **last})[:-1]


def _finish_reason(stream: Stream) -> JsonObject | None:
    if stream.finish is FinishReason.STOP:
        return {"type": "stop", "matched": stream.matched}
    if stream.finish is FinishReason.LENGTH:
        return {"type": "length", "length": stream.completion_tokens}
    if stream.finish is FinishReason.ABORT:
        return {"type": "abort", "message": "the request was aborted", "status_code": None, "err_type": None}
    return None


class CumulativeStream(EventStream):
    """An event stream for a wire that repeats the text: one event per stream and flush, however much has arrived.

    For a client that does not read nothing is rendered, so what is held for it does not grow with each token.
    """

    def __init__(self, renderer: Renderer, answers: int) -> None:
        super().__init__(renderer, answers)
        self._news: dict[Stream, tuple[list[str], MutableSequence[int]]] = {}

    def delta(self, stream: Stream, text: str, token_ids: list[int]) -> None:
        texts, ids = self._news.setdefault(stream, ([], []))
        texts.append(text)
        ids.extend(token_ids)
        if len(texts) > _MAX_PIECES:
            self._news[stream] = ["".join(texts)], array("i", ids)

    def flush(self, stream: Stream) -> None:
        if stream in self._news and not stream.writer.parked_since_ns:
            texts, ids = self._news.pop(stream)
            super().delta(stream, "".join(texts), list(ids))
        super().flush(stream)

    def done(self, stream: Stream) -> None:
        if stream in self._news:
            # The last event says it all; what this would have sent is part of that.
            texts, ids = self._news.pop(stream)
            self._renderer.delta(stream, "".join(texts), list(ids))
        super().done(stream)

    def restart(self, stream: Stream) -> None:
        self._news.pop(stream, None)
