"""Every message that crosses a process border: the whole wire protocol of minisgl.

A message is one ZeroMQ frame holding one msgpack array `[type, version, *fields]`. `encode` and `decode` are the only
way in and out. The set is closed: an unknown type, another version, a wrong field count or a field of the wrong kind
raises MalformedMessage, which the receiver counts and drops. No pickle, no extension types.

    http --GenerateRequest, AbortRequest--> tokenizer --TokenizedRequest, AbortRequest--> scheduler
    scheduler --TokenBatch, RequestError--> detokenizer --DeltaBatch, RequestError--> http
    tokenizer --Dispatched, RequestError--> http           detokenizer --AbortRequest (stop string)--> scheduler
    http --TokenizeRequest, DetokenizeRequest--> tokenizer --TextAnswer--> http
    http --FlushCache--> tokenizer --FlushCache--> every scheduler --CacheFlushed--> detokenizer --CacheFlushed--> http
    http --AbortNamed--> every other http
    worker --Hello, Progress, Ready, Failed--> supervisor
    supervisor --WorkerUp, WorkerDown, Health, Drain, Shutdown--> worker
    worker --Heartbeat--> supervisor --Health--> http  (without waking anybody: pulse.py)

Columns of integers travel as packed little-endian int32 or int64 bytes. Times are CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

import enum
import time
from dataclasses import astuple, dataclass, field, fields
from operator import attrgetter
from typing import Any, ClassVar, TypeAlias

import msgpack

from minisgl.sampling_params import Grammar, SamplingParams
from minisgl.wire_fields import JsonObject as JsonObject
from minisgl.wire_fields import MalformedMessage as MalformedMessage
from minisgl.wire_fields import (
    check_blobs,
    check_bool,
    check_float,
    check_int,
    check_ints,
    check_list,
    check_object,
    check_optional,
    check_same_length,
    check_str,
    check_strs,
    pack_float32,
    pack_int32,
    pack_int64,
    unpack_float32,
    unpack_int32,
    unpack_int64,
)

PROTOCOL_VERSION = 2
MAX_FRAME_BYTES = 64 * 2**20
"""Frames above this are refused by the receiving socket."""


class FinishReason(enum.IntEnum):
    """How a request ended; NONE while it runs. Errors end with a RequestError instead."""

    NONE = 0
    STOP = 1
    LENGTH = 2
    ABORT = 3


_FINISH_REASONS = tuple(FinishReason)


def _finish_column(data: Any) -> list[FinishReason]:
    if type(data) is not bytes or (data and max(data) >= len(_FINISH_REASONS)):
        raise MalformedMessage("expected a column of finish reasons")
    return list(map(_FINISH_REASONS.__getitem__, data))


_sampling_fields = attrgetter(*(spec.name for spec in fields(SamplingParams)))


def _pack_sampling(params: SamplingParams) -> list[Any]:
    return list(_sampling_fields(params))


def _unpack_sampling(value: Any) -> SamplingParams:
    fields = check_list(value)
    if len(fields) != 19:
        raise MalformedMessage(f"sampling params have 19 fields, got {len(fields)}")
    return SamplingParams(
        max_new_tokens=check_optional(check_int, fields[0]),
        temperature=check_float(fields[1]),
        top_k=check_int(fields[2]),
        top_p=check_float(fields[3]),
        min_p=check_float(fields[4]),
        seed=check_optional(check_int, fields[5]),
        min_new_tokens=check_int(fields[6]),
        ignore_eos=check_bool(fields[7]),
        stop=tuple(check_strs(fields[8])),
        stop_token_ids=tuple(check_ints(fields[9])),
        skip_special_tokens=check_bool(fields[10]),
        no_stop_trim=check_bool(fields[11]),
        frequency_penalty=check_float(fields[12]),
        presence_penalty=check_float(fields[13]),
        repetition_penalty=check_float(fields[14]),
        logit_bias=tuple(_bias(pair) for pair in check_list(fields[15])),
        grammar=check_optional(_grammar, fields[16]),
        logprobs=check_optional(check_int, fields[17]),
        prompt_logprobs_from=check_optional(check_int, fields[18]),
    )


def _bias(value: Any) -> tuple[int, float]:
    pair = check_list(value)
    if len(pair) != 2:
        raise MalformedMessage("logit_bias holds pairs of token id and bias")
    return check_int(pair[0]), check_float(pair[1])


def _grammar(value: Any) -> Grammar:
    pair = check_strs(value)
    if len(pair) != 2:
        raise MalformedMessage("a grammar is a kind and a source")
    return Grammar(*pair)


# ---- request ids ----------------------------------------------------------------------------------------------------

_EPOCH_BITS, _COUNTER_BITS = 16, 40
_EPOCH_MASK, _COUNTER_MASK = 0xFFFF, 0xFF_FFFF_FFFF


def make_request_id(http_worker: int, epoch: int, counter: int) -> int:
    """A request id that is unique over all http workers (at most 128) and their restarts, and says where to answer."""
    return (
        http_worker << (_EPOCH_BITS + _COUNTER_BITS) | (epoch & _EPOCH_MASK) << _COUNTER_BITS | counter & _COUNTER_MASK
    )


def http_worker_of(rid: int) -> tuple[int, int]:
    """The (index, epoch) of the http worker that made this request id."""
    return rid >> (_EPOCH_BITS + _COUNTER_BITS), (rid >> _COUNTER_BITS) & _EPOCH_MASK


# ---- data messages, in ring order -----------------------------------------------------------------------------------


@dataclass(slots=True)
class GenerateRequest:
    """http -> tokenizer: a validated request. `prompt` is text, token ids, or a list of chat messages.

    `template` are variables for the chat template beside the messages: tools, continue_final_message, ...
    """

    rid: int
    prompt: str | list[int] | list[JsonObject]
    sampling: SamplingParams
    stamps: list[int]
    """Readings of timeline.STAMPS so far; so in every message below."""
    template: JsonObject = field(default_factory=dict)
    TYPE: ClassVar[int] = 1

    def pack(self) -> list[Any]:
        return [self.rid, _pack_prompt(self.prompt), _pack_sampling(self.sampling), self.stamps, self.template]

    @classmethod
    def unpack(cls, rid: Any, prompt: Any, sampling: Any, stamps: Any, template: Any) -> GenerateRequest:
        return cls(
            check_int(rid),
            _unpack_prompt(prompt),
            _unpack_sampling(sampling),
            check_ints(stamps),
            check_object(template),
        )


def _pack_prompt(prompt: str | list[int] | list[JsonObject]) -> Any:
    if isinstance(prompt, list) and (not prompt or isinstance(prompt[0], int)):
        return pack_int32(prompt)  # type: ignore[arg-type]
    return prompt


def _unpack_prompt(prompt: Any) -> str | list[int] | list[JsonObject]:
    if type(prompt) is bytes:
        return unpack_int32(prompt)
    if type(prompt) is not list:
        return check_str(prompt)
    if not prompt:
        raise MalformedMessage("a chat needs at least one message")
    return [check_object(message) for message in prompt]


@dataclass(slots=True)
class AbortRequest:
    """Travels the pipes of the request it ends. The scheduler answers with a terminal row (FinishReason.ABORT)."""

    rid: int
    TYPE: ClassVar[int] = 2

    def pack(self) -> list[Any]:
        return [self.rid]

    @classmethod
    def unpack(cls, rid: Any) -> AbortRequest:
        return cls(check_int(rid))


@dataclass(slots=True)
class TokenizedRequest:
    """tokenizer -> scheduler: a request as token ids; its length is already checked against the context length."""

    rid: int
    input_ids: list[int]
    sampling: SamplingParams
    stamps: list[int]
    TYPE: ClassVar[int] = 3

    def pack(self) -> list[Any]:
        return [self.rid, pack_int32(self.input_ids), _pack_sampling(self.sampling), self.stamps]

    @classmethod
    def unpack(cls, rid: Any, input_ids: Any, sampling: Any, stamps: Any) -> TokenizedRequest:
        return cls(check_int(rid), unpack_int32(input_ids), _unpack_sampling(sampling), check_ints(stamps))


@dataclass(slots=True)
class StreamOpen:
    """Part of TokenBatch: what the detokenizer must know of a request, sent with (before) its first row."""

    rid: int
    prompt_tokens: int
    cached_tokens: int
    stop: list[str]
    skip_special_tokens: bool
    no_stop_trim: bool
    stamps: list[int]
    min_new_tokens: int = 0

    def pack(self) -> list[Any]:
        return list(astuple(self))

    @classmethod
    def unpack(cls, fields: Any) -> StreamOpen:
        values = check_list(fields)
        if len(values) != 8:
            raise MalformedMessage(f"StreamOpen has 8 fields, got {len(values)}")
        return cls(
            check_int(values[0]),
            check_int(values[1]),
            check_int(values[2]),
            check_strs(values[3]),
            check_bool(values[4]),
            check_bool(values[5]),
            check_ints(values[6]),
            check_int(values[7]),
        )


@dataclass(slots=True)
class Logprobs:
    """Part of TokenBatch and DeltaBatch: log probabilities (natural, of the model's own distribution) for one row.

    Either of generated tokens - in a TokenBatch the row's one token, in a DeltaBatch all tokens of the row - or of
    prompt tokens (`of_prompt`; all of them go with the request's first row, and the very first token's value is NaN).

    Attributes:
        row: index of the batch's row.
        values: one per token id.
        top_ids, top_values: the likeliest tokens at each place, the same number (maybe none) for each token id.
        pieces: the bytes of each of token_ids, then of each of top_ids; empty until the detokenizer fills them in.
    """

    row: int
    of_prompt: bool
    token_ids: list[int]
    values: list[float]
    top_ids: list[int] = field(default_factory=list)
    top_values: list[float] = field(default_factory=list)
    pieces: list[bytes] = field(default_factory=list)

    def pack(self) -> list[Any]:
        return [
            self.row,
            self.of_prompt,
            pack_int32(self.token_ids),
            pack_float32(self.values),
            pack_int32(self.top_ids),
            pack_float32(self.top_values),
            self.pieces,
        ]

    @classmethod
    def unpack(cls, fields: Any) -> Logprobs:
        values = check_list(fields)
        if len(values) != 7:
            raise MalformedMessage(f"Logprobs has 7 fields, got {len(values)}")
        part = cls(
            check_int(values[0]),
            check_bool(values[1]),
            unpack_int32(values[2]),
            unpack_float32(values[3]),
            unpack_int32(values[4]),
            unpack_float32(values[5]),
            check_blobs(values[6]),
        )
        check_same_length(part.token_ids, part.values)
        check_same_length(part.top_ids, part.top_values)
        if part.top_ids and (not part.token_ids or len(part.top_ids) % len(part.token_ids)):
            raise MalformedMessage("the likeliest tokens are not the same number for each token")
        if part.pieces and len(part.pieces) != len(part.token_ids) + len(part.top_ids):
            raise MalformedMessage("there is not one piece for each token")
        return part


def _unpack_logprobs(value: Any, rows: int) -> list[Logprobs]:
    parts = [Logprobs.unpack(part) for part in check_list(value)]
    if not all(0 <= part.row < rows for part in parts):
        raise MalformedMessage("a row index is out of range")
    return parts


NO_TOKEN = -1
"""The token id of a row that only ends its request."""


@dataclass(slots=True)
class TokenBatch:
    """scheduler -> detokenizer: the rows of one step as columns; a request may own several rows, in order.

    A row with FinishReason.STOP carries the EOS or stop token that ended the request.
    """

    replica: int
    epoch: int
    step: int
    launched_ns: int
    retired_ns: int
    opened: list[StreamOpen] = field(default_factory=list)
    rids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finishes: list[FinishReason] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    TYPE: ClassVar[int] = 4

    def pack(self) -> list[Any]:
        return [
            self.replica,
            self.epoch,
            self.step,
            self.launched_ns,
            self.retired_ns,
            [stream.pack() for stream in self.opened],
            pack_int64(self.rids),
            pack_int32(self.token_ids),
            bytes(self.finishes),
            [part.pack() for part in self.logprobs],
        ]

    @classmethod
    def unpack(
        cls,
        replica: Any,
        epoch: Any,
        step: Any,
        launched_ns: Any,
        retired_ns: Any,
        opened: Any,
        rids: Any,
        token_ids: Any,
        finishes: Any,
        logprobs: Any,
    ) -> TokenBatch:
        batch = cls(
            check_int(replica),
            check_int(epoch),
            check_int(step),
            check_int(launched_ns),
            check_int(retired_ns),
            [StreamOpen.unpack(stream) for stream in check_list(opened)],
            unpack_int64(rids),
            unpack_int32(token_ids),
            _finish_column(finishes),
        )
        check_same_length(batch.rids, batch.token_ids, batch.finishes)
        batch.logprobs = _unpack_logprobs(logprobs, len(batch.rids))
        return batch


@dataclass(slots=True)
class Opening:
    """Part of DeltaBatch: goes with a request's first row."""

    row: int
    prompt_tokens: int
    cached_tokens: int
    stamps: list[int]

    def pack(self) -> list[Any]:
        return [self.row, self.prompt_tokens, self.cached_tokens, self.stamps]

    @classmethod
    def unpack(cls, fields: Any) -> Opening:
        values = check_list(fields)
        if len(values) != 4:
            raise MalformedMessage(f"Opening has 4 fields, got {len(values)}")
        return cls(check_int(values[0]), check_int(values[1]), check_int(values[2]), check_ints(values[3]))


@dataclass(slots=True)
class DeltaBatch:
    """detokenizer -> http: text deltas as columns, at most one row a request.

    Row i owns token_counts[i] of the concatenated token_ids (the tokens whose text it brings; EOS included).
    `matched` maps the rows with FinishReason.STOP to the token id or stop string that matched. `steps_ns` holds
    launched_ns and retired_ns of every step whose tokens are here.
    """

    rids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    token_counts: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finishes: list[FinishReason] = field(default_factory=list)
    openings: list[Opening] = field(default_factory=list)
    matched: dict[int, int | str] = field(default_factory=dict)
    steps_ns: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    TYPE: ClassVar[int] = 5

    def pack(self) -> list[Any]:
        return [
            pack_int64(self.rids),
            self.texts,
            pack_int32(self.token_counts),
            pack_int32(self.token_ids),
            bytes(self.finishes),
            [opening.pack() for opening in self.openings],
            [[row, match] for row, match in self.matched.items()],
            pack_int64(self.steps_ns),
            [part.pack() for part in self.logprobs],
        ]

    @classmethod
    def unpack(
        cls,
        rids: Any,
        texts: Any,
        token_counts: Any,
        token_ids: Any,
        finishes: Any,
        openings: Any,
        matched: Any,
        steps_ns: Any,
        logprobs: Any,
    ) -> DeltaBatch:
        batch = cls(
            unpack_int64(rids),
            check_strs(texts),
            unpack_int32(token_counts),
            unpack_int32(token_ids),
            _finish_column(finishes),
            [Opening.unpack(opening) for opening in check_list(openings)],
            steps_ns=unpack_int64(steps_ns),
        )
        rows = len(batch.rids)
        batch.logprobs = _unpack_logprobs(logprobs, rows)
        check_same_length(batch.rids, batch.texts, batch.token_counts, batch.finishes)
        if min(batch.token_counts, default=0) < 0 or sum(batch.token_counts) != len(batch.token_ids):
            raise MalformedMessage("token counts do not add up to the token ids")
        for pair in check_list(matched):
            if len(check_list(pair)) != 2:
                raise MalformedMessage("matched holds pairs of row and match")
            row, match = pair
            batch.matched[check_int(row)] = match if type(match) is str else check_int(match)
        named_rows = [*batch.matched, *(opening.row for opening in batch.openings)]
        if not all(0 <= row < rows for row in named_rows):
            raise MalformedMessage("a row index is out of range")
        return batch


@dataclass(slots=True)
class RequestError:
    """Any stage -> onwards to http: the request ends with this error; `status` is the HTTP status it deserves."""

    rid: int
    status: int
    code: str
    message: str
    TYPE: ClassVar[int] = 6

    def pack(self) -> list[Any]:
        return [self.rid, self.status, self.code, self.message]

    @classmethod
    def unpack(cls, rid: Any, status: Any, code: Any, message: Any) -> RequestError:
        return cls(check_int(rid), check_int(status), check_str(code), check_str(message))


@dataclass(slots=True)
class Dispatched:
    """tokenizer -> http: these requests now belong to one replica, so http knows what its death would cost."""

    replica: int
    epoch: int
    rids: list[int]
    TYPE: ClassVar[int] = 7

    def pack(self) -> list[Any]:
        return [self.replica, self.epoch, pack_int64(self.rids)]

    @classmethod
    def unpack(cls, replica: Any, epoch: Any, rids: Any) -> Dispatched:
        return cls(check_int(replica), check_int(epoch), unpack_int64(rids))


@dataclass(slots=True)
class TokenizeRequest:
    """http -> tokenizer: the token ids of a text or chat, please. Answered by TextAnswer or RequestError."""

    rid: int
    prompt: str | list[JsonObject]
    template: JsonObject
    add_special_tokens: bool
    TYPE: ClassVar[int] = 8

    def pack(self) -> list[Any]:
        return [self.rid, self.prompt, self.template, self.add_special_tokens]

    @classmethod
    def unpack(cls, rid: Any, prompt: Any, template: Any, add_special_tokens: Any) -> TokenizeRequest:
        text = [check_object(message) for message in prompt] if type(prompt) is list else check_str(prompt)
        return cls(check_int(rid), text, check_object(template), check_bool(add_special_tokens))


@dataclass(slots=True)
class DetokenizeRequest:
    """http -> tokenizer: the text of token ids, please. Answered by TextAnswer or RequestError."""

    rid: int
    token_ids: list[int]
    skip_special_tokens: bool
    TYPE: ClassVar[int] = 9

    def pack(self) -> list[Any]:
        return [self.rid, pack_int32(self.token_ids), self.skip_special_tokens]

    @classmethod
    def unpack(cls, rid: Any, token_ids: Any, skip_special_tokens: Any) -> DetokenizeRequest:
        return cls(check_int(rid), unpack_int32(token_ids), check_bool(skip_special_tokens))


@dataclass(slots=True)
class TextAnswer:
    """tokenizer -> http: a text and its token ids, whichever of the two was asked for."""

    rid: int
    text: str
    token_ids: list[int]
    TYPE: ClassVar[int] = 10

    def pack(self) -> list[Any]:
        return [self.rid, self.text, pack_int32(self.token_ids)]

    @classmethod
    def unpack(cls, rid: Any, text: Any, token_ids: Any) -> TextAnswer:
        return cls(check_int(rid), check_str(text), unpack_int32(token_ids))


@dataclass(slots=True)
class FlushCache:
    """http -> tokenizer -> every scheduler: forget all cached prefixes. Each scheduler answers with CacheFlushed."""

    rid: int
    TYPE: ClassVar[int] = 11

    def pack(self) -> list[Any]:
        return [self.rid]

    @classmethod
    def unpack(cls, rid: Any) -> FlushCache:
        return cls(check_int(rid))


@dataclass(slots=True)
class CacheFlushed:
    """scheduler -> detokenizer -> http: the prefix cache is empty; or, with `done` unset, requests still use it."""

    rid: int
    replica: int
    done: bool
    TYPE: ClassVar[int] = 12

    def pack(self) -> list[Any]:
        return [self.rid, self.replica, self.done]

    @classmethod
    def unpack(cls, rid: Any, replica: Any, done: Any) -> CacheFlushed:
        return cls(check_int(rid), check_int(replica), check_bool(done))


@dataclass(slots=True)
class AbortNamed:
    """http -> every other http: end the requests that clients know by this name; "" means all."""

    name: str
    TYPE: ClassVar[int] = 13

    def pack(self) -> list[Any]:
        return [self.name]

    @classmethod
    def unpack(cls, name: Any) -> AbortNamed:
        return cls(check_str(name))


# ---- control messages -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Hello:
    """worker -> supervisor: started; `address` is its inbox, already bound."""

    worker: str
    epoch: int
    pid: int
    address: str
    TYPE: ClassVar[int] = 20

    def pack(self) -> list[Any]:
        return [self.worker, self.epoch, self.pid, self.address]

    @classmethod
    def unpack(cls, worker: Any, epoch: Any, pid: Any, address: Any) -> Hello:
        return cls(check_str(worker), check_int(epoch), check_int(pid), check_str(address))


@dataclass(slots=True)
class Progress:
    """worker -> supervisor: how far a stage of its start is (`done` of `total` units; total 0 = unknown)."""

    worker: str
    epoch: int
    stage: str
    done: int
    total: int
    TYPE: ClassVar[int] = 21

    def pack(self) -> list[Any]:
        return [self.worker, self.epoch, self.stage, self.done, self.total]

    @classmethod
    def unpack(cls, worker: Any, epoch: Any, stage: Any, done: Any, total: Any) -> Progress:
        return cls(check_str(worker), check_int(epoch), check_str(stage), check_int(done), check_int(total))


@dataclass(slots=True)
class Ready:
    """worker -> supervisor: warmed up and reading its inbox. `info` says what it found (device, KV tokens, ...)."""

    worker: str
    epoch: int
    info: JsonObject
    TYPE: ClassVar[int] = 22

    def pack(self) -> list[Any]:
        return [self.worker, self.epoch, self.info]

    @classmethod
    def unpack(cls, worker: Any, epoch: Any, info: Any) -> Ready:
        return cls(check_str(worker), check_int(epoch), check_object(info))


@dataclass(slots=True)
class Heartbeat:
    """worker -> supervisor, several times a second: alive, and how long ago its main loop last came round.

    `sent_ns` is when, for a receiver that looks now and then. A loop that waits for messages has an age of 0; when it
    does so for longer, the worker `rests`: its next heartbeat comes when something has arrived, or much later. `stats`
    are gauges and counters of that worker (requests in flight, KV pages free, frames dropped, ...).
    """

    worker: str
    epoch: int
    sent_ns: int
    loop_age_us: int
    rests: bool
    stats: JsonObject
    TYPE: ClassVar[int] = 23

    def pack(self) -> list[Any]:
        return [self.worker, self.epoch, self.sent_ns, self.loop_age_us, self.rests, self.stats]

    @classmethod
    def unpack(cls, worker: Any, epoch: Any, sent_ns: Any, loop_age_us: Any, rests: Any, stats: Any) -> Heartbeat:
        times = check_int(sent_ns), check_int(loop_age_us)
        return cls(check_str(worker), check_int(epoch), *times, check_bool(rests), check_object(stats))


@dataclass(slots=True)
class Failed:
    """worker -> supervisor, its last words: why it is about to exit. `cause` is one line, `details` the traceback."""

    worker: str
    epoch: int
    cause: str
    details: str
    TYPE: ClassVar[int] = 24

    def pack(self) -> list[Any]:
        return [self.worker, self.epoch, self.cause, self.details]

    @classmethod
    def unpack(cls, worker: Any, epoch: Any, cause: Any, details: Any) -> Failed:
        return cls(check_str(worker), check_int(epoch), check_str(cause), check_str(details))


@dataclass(slots=True)
class WorkerUp:
    """supervisor -> every worker: `worker` is ready; send to it at `address` from now on."""

    worker: str
    epoch: int
    address: str
    TYPE: ClassVar[int] = 25

    def pack(self) -> list[Any]:
        return [self.worker, self.epoch, self.address]

    @classmethod
    def unpack(cls, worker: Any, epoch: Any, address: Any) -> WorkerUp:
        return cls(check_str(worker), check_int(epoch), check_str(address))


@dataclass(slots=True)
class WorkerDown:
    """supervisor -> every worker: this epoch of `worker` is dead, and what it held is lost."""

    worker: str
    epoch: int
    cause: str
    TYPE: ClassVar[int] = 26

    def pack(self) -> list[Any]:
        return [self.worker, self.epoch, self.cause]

    @classmethod
    def unpack(cls, worker: Any, epoch: Any, cause: Any) -> WorkerDown:
        return cls(check_str(worker), check_int(epoch), check_str(cause))


@dataclass(slots=True)
class Health:
    """supervisor -> http, at any news, and in between by way of pulse.py: what is wrong, and all workers.

    `problems` are one sentence each; without any the server is healthy. `workers` maps a worker's name to {"state",
    "epoch", "pid", "restarts", "heartbeat_age_ms", "loop_age_ms", "info", "stats"}; `info` is what it said with Ready.
    `sent_ns` is when, as the two ways keep no order between them.
    """

    problems: list[str]
    workers: JsonObject
    sent_ns: int = field(default_factory=time.monotonic_ns)
    TYPE: ClassVar[int] = 27

    def pack(self) -> list[Any]:
        return [self.problems, self.workers, self.sent_ns]

    @classmethod
    def unpack(cls, problems: Any, workers: Any, sent_ns: Any) -> Health:
        return cls(check_strs(problems), check_object(workers), check_int(sent_ns))


@dataclass(slots=True)
class Drain:
    """supervisor -> http: take no new requests, finish those in flight."""

    TYPE: ClassVar[int] = 28

    def pack(self) -> list[Any]:
        return []

    @classmethod
    def unpack(cls) -> Drain:
        return cls()


@dataclass(slots=True)
class Shutdown:
    """supervisor -> every worker: end requests in flight with an error, then exit 0."""

    TYPE: ClassVar[int] = 29

    def pack(self) -> list[Any]:
        return []

    @classmethod
    def unpack(cls) -> Shutdown:
        return cls()


Message: TypeAlias = (
    GenerateRequest
    | AbortRequest
    | TokenizedRequest
    | TokenBatch
    | DeltaBatch
    | RequestError
    | Dispatched
    | TokenizeRequest
    | DetokenizeRequest
    | TextAnswer
    | FlushCache
    | CacheFlushed
    | AbortNamed
    | Hello
    | Progress
    | Ready
    | Heartbeat
    | Failed
    | WorkerUp
    | WorkerDown
    | Health
    | Drain
    | Shutdown
)

MESSAGE_TYPES: dict[int, type[Message]] = {
    cls.TYPE: cls
    for cls in (
        GenerateRequest,
        AbortRequest,
        TokenizedRequest,
        TokenBatch,
        DeltaBatch,
        RequestError,
        Dispatched,
        TokenizeRequest,
        DetokenizeRequest,
        TextAnswer,
        FlushCache,
        CacheFlushed,
        AbortNamed,
        Hello,
        Progress,
        Ready,
        Heartbeat,
        Failed,
        WorkerUp,
        WorkerDown,
        Health,
        Drain,
        Shutdown,
    )
}


def encode(message: Message) -> bytes:
    """One frame for one message."""
    frame: bytes = msgpack.packb([message.TYPE, PROTOCOL_VERSION, *message.pack()])
    return frame


def decode(frame: bytes | memoryview) -> Message:
    """The message in a frame; raises MalformedMessage for anything that is not one, whatever the bytes."""
    try:
        values = msgpack.unpackb(frame, strict_map_key=True, ext_hook=_refuse_extension)
    except (ValueError, RecursionError, UnicodeDecodeError) as error:
        raise MalformedMessage(f"not msgpack: {error}") from None
    if type(values) is not list or len(values) < 2:
        raise MalformedMessage("expected an array of type, version and fields")
    message_type = MESSAGE_TYPES.get(values[0]) if type(values[0]) is int else None
    if message_type is None:
        raise MalformedMessage("unknown message type")
    if values[1] != PROTOCOL_VERSION:
        raise MalformedMessage(f"protocol version {values[1]!r}, this process speaks {PROTOCOL_VERSION}")
    try:
        return message_type.unpack(*values[2:])
    except TypeError:
        raise MalformedMessage(f"wrong number of fields for {message_type.__name__}") from None


def _refuse_extension(code: int, data: bytes) -> Any:
    raise MalformedMessage(f"extension type {code} is not part of the protocol")
