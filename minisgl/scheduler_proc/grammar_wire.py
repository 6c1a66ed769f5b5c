"""What goes between the scheduler and its grammar_server: frames of msgpack behind their length."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import IO, Any

import msgpack

BUSY_FACTOR = 3
"""How many times its CPU time limit a grammar may take by the clock."""

_HEADER = struct.Struct("<I")


@dataclass(frozen=True)
class CompilerSettings:
    """What the server is started with; `seconds` is the CPU time that one grammar may take."""

    directory: str
    trust_remote_code: bool
    vocab_size: int
    eos_ids: list[int]
    seconds: float


def write_frame(stream: IO[bytes], value: Any) -> None:
    data = msgpack.packb(value)
    stream.write(_HEADER.pack(len(data)) + data)
    stream.flush()


def read_frame(stream: IO[bytes]) -> Any:
    """The next frame; raises EOFError when the other side is gone."""
    header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise EOFError
    data = stream.read(_HEADER.unpack(header)[0])
    return msgpack.unpackb(data)
