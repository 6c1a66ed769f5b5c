"""sglang's answers: JSON objects, and server-sent events of which each repeats the whole text so far."""

from __future__ import annotations

import time
from collections.abc import Collection
from json.encoder import encode_basestring_ascii as json_string

from minisgl.http.answers import EventStream, Renderer, Stream
from minisgl.http.errors import ApiError, to_json
from minisgl.messages import FinishReason, JsonObject
from minisgl.timeline import now

_CHANGING = ("completion_tokens", "dp_rank")
"""What `meta_info` says anew in each event before the last; a request may be dispatched after its first text."""


class SglangWire:
    """One response; all of its texts and ids are kept as JSON, so that an event costs no rendering of old text.

    Args:
        is_list: the answers are list items, and their events say which one they belong to.
        prefill_only: indexes of the answers of which nothing is shown.
    """

    media_type = "text/event-stream"

    def __init__(self, answers: int, is_list: bool, prefill_only: Collection[int] = ()) -> None:
        self._texts = [""] * answers
        self._token_ids = [""] * answers
        self._meta_heads = [""] * answers
        self._is_list = is_list
        self._prefill_only = prefill_only

    def delta(self, stream: Stream, text: str, token_ids: list[int]) -> str:
        index = stream.index
        if index in self._prefill_only:
            return ""
        self._texts[index] += json_string(text)[1:-1]
        if token_ids:
            ids = ",".join(map(str, token_ids))
            self._token_ids[index] = f"{self._token_ids[index]},{ids}" if self._token_ids[index] else ids
        if not self._meta_heads[index]:
            known = {name: value for name, value in self._meta(stream).items() if name not in _CHANGING}
            self._meta_heads[index] = to_json(known)[:-1]
        rank = stream.replica[0] if stream.replica else "null"
        changing = f',"completion_tokens":{stream.completion_tokens},"dp_rank":{rank}}}'
        return self._frame(index, self._meta_heads[index] + changing)

    def done(self, stream: Stream) -> str:
        return self._frame(stream.index, to_json({**self._meta(stream), **_last_meta(stream)}))

    def end(self, streams: list[Stream]) -> str:
        return "data: [DONE]\n\n"

    def worded(self, error: ApiError) -> ApiError:
        return error

    def error(self, error: ApiError) -> str:
        return f"data: {to_json(error.body())}\n\ndata: [DONE]\n\n"

    def whole(self, streams: list[Stream], texts: list[str], token_ids: list[list[int]]) -> str:
        answers = []
        for stream, text, ids in zip(streams, texts, token_ids, strict=True):
            if stream.index in self._prefill_only:
                text, ids = "", []
            meta = {**self._meta(stream), **_last_meta(stream)}
            answers.append({"text": text, "output_ids": ids, "meta_info": meta})
        return to_json(answers if self._is_list else answers[0])

    def _frame(self, index: int, meta: str) -> str:
        place = f',"index":{index}' if self._is_list else ""
        text, ids = self._texts[index], self._token_ids[index]
        return f'data: {{"text":"{text}","output_ids":[{ids}],"meta_info":{meta}{place}}}\n\n'

    def _meta(self, stream: Stream) -> JsonObject:
        tokens = 0 if stream.index in self._prefill_only else stream.completion_tokens
        return {
            "id": stream.name,
            "finish_reason": _finish_reason(stream, tokens),
            "prompt_tokens": stream.prompt_tokens,
            "weight_version": "default",
            "completion_tokens": tokens,
            "cached_tokens": stream.cached_tokens,
            "dp_rank": stream.replica[0] if stream.replica else None,
        }


def _finish_reason(stream: Stream, tokens: int) -> JsonObject | None:
    if stream.finish is FinishReason.STOP:
        return {"type": "stop", "matched": stream.matched}
    if stream.finish is FinishReason.LENGTH:
        return {"type": "length", "length": tokens}
    if stream.finish is FinishReason.ABORT:
        return {"type": "abort", "message": "the request was aborted", "status_code": None, "err_type": None}
    return None


def _last_meta(stream: Stream) -> JsonObject:
    """What only the last event of an answer says; `timing` is this server's own."""
    return {
        "e2e_latency": (now() - stream.call.received_ns) / 1e9,
        "response_sent_to_client_ts": time.time(),
        "timing": stream.timing(),
    }


class CumulativeStream(EventStream):
    """An event stream for a wire that repeats the text: one event per stream and flush, however much has arrived.

    For a client that does not read nothing is rendered, so what is held for it does not grow with each token.
    """

    def __init__(self, renderer: Renderer, answers: int) -> None:
        super().__init__(renderer, answers)
        self._news: dict[Stream, tuple[list[str], list[int]]] = {}

    def delta(self, stream: Stream, text: str, token_ids: list[int]) -> None:
        texts, ids = self._news.setdefault(stream, ([], []))
        texts.append(text)
        ids += token_ids

    def flush(self, stream: Stream) -> None:
        if stream in self._news and not stream.writer.parked_since_ns:
            texts, ids = self._news.pop(stream)
            super().delta(stream, "".join(texts), ids)
        super().flush(stream)

    def done(self, stream: Stream) -> None:
        if stream in self._news:
            # The last event says it all; what this would have sent is part of that.
            texts, ids = self._news.pop(stream)
            self._renderer.delta(stream, "".join(texts), ids)
        super().done(stream)

    def restart(self, stream: Stream) -> None:
        self._news.pop(stream, None)
