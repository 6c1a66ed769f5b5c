"""One generation on its way to one client: what is known of it, and how its events become a response.

The ring sends three kinds of events: text deltas, done, error. A Sink decides when they are written - `EventStream` as
they come, `WholeAnswer` in one piece at the end - and a Renderer what they look like on its API's wire. A response may
carry several answers (several prompts, or several samples of one): they share its call, writer and sink.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from minisgl.http.accounting import Call
from minisgl.http.errors import ApiError, to_json
from minisgl.http.recovery import Flight
from minisgl.http.writer import ResponseWriter
from minisgl.messages import FinishReason, JsonObject, Logprobs
from minisgl.sampling_params import SamplingParams
from minisgl.timeline import STAMPS, hops_us, now, server_timing_header, total_us

Prompt: TypeAlias = "str | list[int] | list[JsonObject]"


@dataclass(eq=False, slots=True, kw_only=True)
class Stream(Flight):
    """A generation request in flight.

    Attributes:
        name: the request id that its client knows.
        index: its place among the answers of its response.
        template, grammar_field, reads_only: see generation.Ask.
        siblings: all streams of its response, itself included, by index; empty once the response is over.
        stamps: readings of timeline.STAMPS so far, `written` being the last.
        first_ns, first_tokens: when the first row arrived, and how many tokens it brought.
        last_ns: when the latest row arrived.
        steps_ns: when each step that brought it tokens was launched and retired, in turn; kept for clients that ask.
        finish: set by the terminal row; NONE while running and after an error.
        matched: the token id or stop string that ended the text, if one did.
        logprobs: of generated tokens, not yet shown; only for clients that ask.
        prompt_logprobs: of the prompt's tokens, likewise.
        error: what ended it instead of a terminal row.
    """

    call: Call
    writer: ResponseWriter
    sink: Sink
    prompt: Prompt
    sampling: SamplingParams
    name: str
    index: int = 0
    template: JsonObject | None = None
    grammar_field: str | None = None
    reads_only: bool = False
    siblings: list[Stream] = field(default_factory=list)
    stamps: list[int] = field(default_factory=list)
    steps_ns: list[int] | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    first_ns: int = 0
    first_tokens: int = 0
    last_ns: int = 0
    finish: FinishReason = FinishReason.NONE
    matched: int | str | None = None
    logprobs: list[Logprobs] = field(default_factory=list)
    prompt_logprobs: list[Logprobs] = field(default_factory=list)
    error: ApiError | None = None

    def restart(self) -> None:
        """Forget what an unseen run of this request has brought."""
        self.replica = None
        self.prompt_tokens = self.cached_tokens = self.completion_tokens = 0
        self.first_ns = self.first_tokens = self.last_ns = 0
        if self.steps_ns:
            self.steps_ns.clear()
        self.logprobs.clear()
        self.prompt_logprobs.clear()
        self.sink.restart(self)

    def take_logprobs(self) -> list[Logprobs]:
        """Those that have come since the last call."""
        parts, self.logprobs = self.logprobs, []
        return parts

    def take_prompt_logprobs(self) -> list[Logprobs]:
        """Those that have come since the last call."""
        parts, self.prompt_logprobs = self.prompt_logprobs, []
        return parts

    def usage(self) -> JsonObject:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "cached_tokens": self.cached_tokens,
        }

    def timing(self) -> JsonObject:
        """The way to the first byte, hop by hop, and the rates of this request.

        `stamps_ns` are the CLOCK_MONOTONIC readings between the hops, for clients on the same host.
        `tokens_per_second` counts from the arrival of the request, `decode_tokens_per_second` from its first text; the
        latter is null when all the text arrived at once.
        """
        seconds = (now() - self.call.received_ns) / 1e9
        decode_seconds = (self.last_ns - self.first_ns) / 1e9
        decode_rate = (self.completion_tokens - self.first_tokens) / decode_seconds if decode_seconds else None
        return {
            "hops_us": hops_us(self.stamps),
            "stamps_ns": self.stamps,
            **({} if self.steps_ns is None else {"steps_ns": self.steps_ns}),
            "ttfb_us": total_us(self.stamps),
            "total_ms": round(seconds * 1e3, 3),
            "tokens_per_second": round(self.completion_tokens / seconds, 2),
            "decode_tokens_per_second": decode_rate and round(decode_rate, 2),
        }


class Renderer(Protocol):
    """One response on the wire of its API. All text is ASCII, so that it can be counted and sent without another look.

    Of a stream it may be told `delta` and `done`, but not the same text twice.
    """

    media_type: str

    def delta(self, stream: Stream, text: str, token_ids: list[int]) -> str:
        """A piece of one answer and the tokens that it took; "" when this wire shows nothing of it."""

    def done(self, stream: Stream) -> str:
        """The end of one streamed answer."""

    def end(self, streams: list[Stream]) -> str:
        """The end of the response, after all of its answers."""

    def worded(self, error: ApiError) -> ApiError:
        """A refusal as this API's clients know it."""

    def error(self, error: ApiError) -> str:
        """The end of a streamed response that cannot go on."""

    def whole(self, streams: list[Stream], texts: list[str], token_ids: list[list[int]]) -> str:
        """The complete response, as JSON; one text and one list of ids a stream."""


class Sink(Protocol):
    """Takes the events of the streams of one response to its writer."""

    def delta(self, stream: Stream, text: str, token_ids: list[int]) -> None: ...

    def done(self, stream: Stream) -> None: ...

    def fail(self, stream: Stream, error: ApiError) -> None: ...

    def flush(self, stream: Stream) -> None:
        """Hand over what has collected; called once per stream and wake-up of the dispatcher."""

    def restart(self, stream: Stream) -> None:
        """Drop what an unseen run has brought."""


class EventStream:
    """Writes the events as they come. The status is sent with the first of them, so a refusal gets its own status."""

    def __init__(self, renderer: Renderer, answers: int = 1) -> None:
        self._renderer = renderer
        self._opened = False
        self._running = answers

    def delta(self, stream: Stream, text: str, token_ids: list[int]) -> None:
        piece = self._renderer.delta(stream, text, token_ids)
        if not piece:
            return
        if not stream.shown:
            self._show(stream)
        stream.writer.write(piece)

    def done(self, stream: Stream) -> None:
        if not stream.shown:
            self._show(stream)
        # The done event reports when the first byte was written, so that one must go first.
        self.flush(stream)
        stream.writer.write(self._renderer.done(stream))
        self._running -= 1
        if not self._running:
            stream.writer.write(self._renderer.end(stream.siblings))
            stream.writer.end()

    def flush(self, stream: Stream) -> None:
        stream.writer.flush()
        if stream.shown and len(stream.stamps) < len(STAMPS):
            stream.stamps.append(now())

    def restart(self, stream: Stream) -> None:
        pass

    def fail(self, stream: Stream, error: ApiError) -> None:
        if self._opened:
            stream.writer.write(self._renderer.error(error))
            stream.writer.end()
        else:
            refuse(stream.writer, self._renderer.worded(error))

    def _show(self, stream: Stream) -> None:
        stream.shown = True
        # It will not be sent again, so there is no need to keep it.
        stream.prompt, stream.template = "", None
        if self._opened:
            return
        self._opened = True
        headers = {
            "cache-control": "no-cache",
            "x-accel-buffering": "no",
            "server-timing": server_timing_header(stream.stamps),
        }
        stream.writer.start(200, self._renderer.media_type, headers)


class WholeAnswer:
    """Keeps the events until the answer is complete, so that until then it can still be replayed.

    The hop `write` of its timing therefore spans the generation of everything after the first token.
    """

    def __init__(self, renderer: Renderer, answers: int = 1) -> None:
        self._renderer = renderer
        self._running = answers
        self._texts: list[list[str]] = [[] for _ in range(answers)]
        self._token_ids: list[list[int]] = [[] for _ in range(answers)]

    def delta(self, stream: Stream, text: str, token_ids: list[int]) -> None:
        self._texts[stream.index].append(text)
        self._token_ids[stream.index] += token_ids

    def done(self, stream: Stream) -> None:
        stream.stamps.append(now())
        self._running -= 1
        if not self._running:
            body = self._renderer.whole(stream.siblings, ["".join(texts) for texts in self._texts], self._token_ids)
            stream.writer.respond(200, body, {"server-timing": server_timing_header(stream.stamps)})

    def flush(self, stream: Stream) -> None:
        stream.writer.flush()

    def restart(self, stream: Stream) -> None:
        self._texts[stream.index].clear()
        self._token_ids[stream.index].clear()

    def fail(self, stream: Stream, error: ApiError) -> None:
        refuse(stream.writer, self._renderer.worded(error))


def refuse(writer: ResponseWriter, error: ApiError) -> None:
    writer.respond(error.status, to_json(error.body()), error.headers())
