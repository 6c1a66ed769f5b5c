"""Every message that crosses a process border: the whole wire protocol of minisgl.

A message is one ZeroMQ frame holding one msgpack array `[type, version, *fields]`. `encode` and `decode` are the only
way in and out. The set is closed: an unknown type, another version, a wrong field count or a field of the wrong kind
raises MalformedMessage, which the receiver counts and drops. No pickle, no extension types.

    http --GenerateRequest, AbortRequest--> tokenizer --TokenizedRequest, AbortRequest--> scheduler
    scheduler --TokenBatch, RequestError--> detokenizer --DeltaBatch, RequestError--> http
    tokenizer --Dispatched, RequestError--> http           detokenizer --AbortRequest (stop string)--> scheduler
    worker --Hello, Progress, Ready, Heartbeat, Failed--> supervisor
    supervisor --WorkerUp, WorkerDown, Health, Drain, Shutdown--> worker

Columns of integers travel as packed little-endian int32 or int64 bytes. Times are CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

import enum
import sys
from array import array
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field, fields
from operator import attrgetter
from typing import Any, ClassVar, TypeAlias

import msgpack

from minisgl.sampling_params import SamplingParams

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 64 * 2**20
"""Frames above this are refused by the receiving socket."""

JsonObject: TypeAlias = dict[str, Any]


class MalformedMessage(ValueError):
    """The frame is not a message of this protocol version."""


class FinishReason(enum.IntEnum):
    """How a request ended; NONE while it runs. Errors end with a RequestError instead."""

    NONE = 0
    STOP = 1
    LENGTH = 2
    ABORT = 3


_FINISH_REASONS = tuple(FinishReason)


# ---- field checks ---------------------------------------------------------------------------------------------------


def _int(value: Any) -> int:
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise MalformedMessage(f"expected a 64-bit int, got {type(value).__name__}")
    return value


def _float(value: Any) -> float:
    if type(value) not in (int, float):
        raise MalformedMessage(f"expected a number, got {type(value).__name__}")
    return float(value)


def _bool(value: Any) -> bool:
    if type(value) is not bool:
        raise MalformedMessage(f"expected a bool, got {type(value).__name__}")
    return value


def _str(value: Any) -> str:
    if type(value) is not str:
        raise MalformedMessage(f"expected a string, got {type(value).__name__}")
    return value


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise MalformedMessage(f"expected a list, got {type(value).__name__}")
    return value


def _object(value: Any) -> JsonObject:
    if type(value) is not dict or not all(type(key) is str for key in value):
        raise MalformedMessage("expected an object with string keys")
    return value


def _ints(value: Any) -> list[int]:
    return [_int(item) for item in _list(value)]


def _strs(value: Any) -> list[str]:
    return [_str(item) for item in _list(value)]


def _optional(check: Callable[[Any], Any], value: Any) -> Any:
    return None if value is None else check(value)


def _pack_column(typecode: str, values: Sequence[int]) -> bytes:
    column = array(typecode, values)
    if sys.byteorder == "big":
        column.byteswap()
    return column.tobytes()


def _unpack_column(typecode: str, data: Any) -> list[int]:
    column = array(typecode)
    if type(data) is not bytes or len(data) % column.itemsize:
        raise MalformedMessage("expected a packed integer column")
    column.frombytes(data)
    if sys.byteorder == "big":
        column.byteswap()
    return column.tolist()


def pack_int32(values: Sequence[int]) -> bytes:
    return _pack_column("i", values)


def unpack_int32(data: Any) -> list[int]:
    return _unpack_column("i", data)


def pack_int64(values: Sequence[int]) -> bytes:
    return _pack_column("q", values)


def unpack_int64(data: Any) -> list[int]:
    return _unpack_column("q", data)


def _finish_column(data: Any) -> list[FinishReason]:
    if type(data) is not bytes or any(code > FinishReason.ABORT for code in data):
        raise MalformedMessage("expected a column of finish reasons")
    return [_FINISH_REASONS[code] for code in data]


def _same_length(*columns: Sequence[Any]) -> None:
    if len({len(column) for column in columns}) > 1:
        raise MalformedMessage("columns differ in length")


_sampling_fields = attrgetter(*(spec.name for spec in fields(SamplingParams)))


def _pack_sampling(params: SamplingParams) -> list[Any]:
    return list(_sampling_fields(params))


def _unpack_sampling(value: Any) -> SamplingParams:
    fields = _list(value)
    if len(fields) != 12:
        raise MalformedMessage(f"sampling params have 12 fields, got {len(fields)}")
    return SamplingParams(
        max_new_tokens=_optional(_int, fields[0]),
        temperature=_float(fields[1]),
        top_k=_int(fields[2]),
        top_p=_float(fields[3]),
        min_p=_float(fields[4]),
        seed=_optional(_int, fields[5]),
        min_new_tokens=_int(fields[6]),
        ignore_eos=_bool(fields[7]),
        stop=tuple(_strs(fields[8])),
        stop_token_ids=tuple(_ints(fields[9])),
        skip_special_tokens=_bool(fields[10]),
        no_stop_trim=_bool(fields[11]),
    )


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
    """http -> tokenizer: a validated request. `prompt` is text, token ids, or a list of chat messages."""

    rid: int
    prompt: str | list[int] | list[JsonObject]
    sampling: SamplingParams
    stamps: list[int]
    """Readings of timeline.STAMPS so far; so in every message below."""
    TYPE: ClassVar[int] = 1

    def pack(self) -> list[Any]:
        prompt: Any = self.prompt
        if isinstance(prompt, list) and (not prompt or isinstance(prompt[0], int)):
            prompt = pack_int32(prompt)
        return [self.rid, prompt, _pack_sampling(self.sampling), self.stamps]

    @classmethod
    def unpack(cls, rid: Any, prompt: Any, sampling: Any, stamps: Any) -> GenerateRequest:
        if type(prompt) is bytes:
            prompt = unpack_int32(prompt)
        elif type(prompt) is list:
            if not prompt:
                raise MalformedMessage("a chat needs at least one message")
            prompt = [_object(message) for message in prompt]
        else:
            prompt = _str(prompt)
        return cls(_int(rid), prompt, _unpack_sampling(sampling), _ints(stamps))


@dataclass(slots=True)
class AbortRequest:
    """Travels the pipes of the request it ends. The scheduler answers with a terminal row (FinishReason.ABORT)."""

    rid: int
    TYPE: ClassVar[int] = 2

    def pack(self) -> list[Any]:
        return [self.rid]

    @classmethod
    def unpack(cls, rid: Any) -> AbortRequest:
        return cls(_int(rid))


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
        return cls(_int(rid), unpack_int32(input_ids), _unpack_sampling(sampling), _ints(stamps))


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

    def pack(self) -> list[Any]:
        return list(astuple(self))

    @classmethod
    def unpack(cls, fields: Any) -> StreamOpen:
        values = _list(fields)
        if len(values) != 7:
            raise MalformedMessage(f"StreamOpen has 7 fields, got {len(values)}")
        return cls(
            _int(values[0]),
            _int(values[1]),
            _int(values[2]),
            _strs(values[3]),
            _bool(values[4]),
            _bool(values[5]),
            _ints(values[6]),
        )


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
    ) -> TokenBatch:
        batch = cls(
            _int(replica),
            _int(epoch),
            _int(step),
            _int(launched_ns),
            _int(retired_ns),
            [StreamOpen.unpack(stream) for stream in _list(opened)],
            unpack_int64(rids),
            unpack_int32(token_ids),
            _finish_column(finishes),
        )
        _same_length(batch.rids, batch.token_ids, batch.finishes)
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
        values = _list(fields)
        if len(values) != 4:
            raise MalformedMessage(f"Opening has 4 fields, got {len(values)}")
        return cls(_int(values[0]), _int(values[1]), _int(values[2]), _ints(values[3]))


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
    ) -> DeltaBatch:
        batch = cls(
            unpack_int64(rids),
            _strs(texts),
            unpack_int32(token_counts),
            unpack_int32(token_ids),
            _finish_column(finishes),
            [Opening.unpack(opening) for opening in _list(openings)],
            steps_ns=unpack_int64(steps_ns),
        )
        rows = len(batch.rids)
        _same_length(batch.rids, batch.texts, batch.token_counts, batch.finishes)
        if min(batch.token_counts, default=0) < 0 or sum(batch.token_counts) != len(batch.token_ids):
            raise MalformedMessage("token counts do not add up to the token ids")
        for pair in _list(matched):
            if len(_list(pair)) != 2:
                raise MalformedMessage("matched holds pairs of row and match")
            row, match = pair
            batch.matched[_int(row)] = match if type(match) is str else _int(match)
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
        return cls(_int(rid), _int(status), _str(code), _str(message))


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
        return cls(_int(replica), _int(epoch), unpack_int64(rids))


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
        return cls(_str(worker), _int(epoch), _int(pid), _str(address))


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
        return cls(_str(worker), _int(epoch), _str(stage), _int(done), _int(total))


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
        return cls(_str(worker), _int(epoch), _object(info))


@dataclass(slots=True)
class Heartbeat:
    """worker -> supervisor, several times a second: alive, and how long ago its main loop last came round.

    `stats` are gauges and counters of that worker (requests in flight, KV pages free, frames dropped, ...).
    """

    worker: str
    epoch: int
    loop_age_us: int
    stats: JsonObject
    TYPE: ClassVar[int] = 23

    def pack(self) -> list[Any]:
        return [self.worker, self.epoch, self.loop_age_us, self.stats]

    @classmethod
    def unpack(cls, worker: Any, epoch: Any, loop_age_us: Any, stats: Any) -> Heartbeat:
        return cls(_str(worker), _int(epoch), _int(loop_age_us), _object(stats))


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
        return cls(_str(worker), _int(epoch), _str(cause), _str(details))


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
        return cls(_str(worker), _int(epoch), _str(address))


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
        return cls(_str(worker), _int(epoch), _str(cause))


@dataclass(slots=True)
class Health:
    """supervisor -> http, several times a second: `problems` (one sentence each, empty = healthy) and all workers.

    `workers` maps a worker's name to {"state", "epoch", "pid", "restarts", "heartbeat_age_ms", "loop_age_ms", "info",
    "stats"}; `info` is what it said with Ready.
    """

    problems: list[str]
    workers: JsonObject
    TYPE: ClassVar[int] = 27

    def pack(self) -> list[Any]:
        return [self.problems, self.workers]

    @classmethod
    def unpack(cls, problems: Any, workers: Any) -> Health:
        return cls(_strs(problems), _object(workers))


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
