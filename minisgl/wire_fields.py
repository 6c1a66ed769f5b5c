"""The field types of messages.py: checks for what arrives, and the packing of columns of numbers.

Each check returns its value or raises MalformedMessage. Columns travel as packed little-endian bytes.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

JsonObject: TypeAlias = dict[str, Any]


class MalformedMessage(ValueError):
    """The frame is not a message of this protocol version."""


def check_int(value: Any) -> int:
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise MalformedMessage(f"expected a 64-bit int, got {type(value).__name__}")
    return value


def check_float(value: Any) -> float:
    if type(value) not in (int, float):
        raise MalformedMessage(f"expected a number, got {type(value).__name__}")
    return float(value)


def check_bool(value: Any) -> bool:
    if type(value) is not bool:
        raise MalformedMessage(f"expected a bool, got {type(value).__name__}")
    return value


def check_str(value: Any) -> str:
    if type(value) is not str:
        raise MalformedMessage(f"expected a string, got {type(value).__name__}")
    return value


def check_list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise MalformedMessage(f"expected a list, got {type(value).__name__}")
    return value


def check_object(value: Any) -> JsonObject:
    if type(value) is not dict or not all(type(key) is str for key in value):
        raise MalformedMessage("expected an object with string keys")
    return value


def check_ints(value: Any) -> list[int]:
    return [check_int(item) for item in check_list(value)]


def check_strs(value: Any) -> list[str]:
    items = check_list(value)
    if not {str}.issuperset(map(type, items)):
        raise MalformedMessage("expected a list of strings")
    return items


def check_optional(check: Callable[[Any], Any], value: Any) -> Any:
    return None if value is None else check(value)


def _pack_column(typecode: str, values: Sequence[float]) -> bytes:
    column = array(typecode, values)
    if sys.byteorder == "big":
        column.byteswap()
    return column.tobytes()


def _unpack_column(typecode: str, data: Any) -> list[Any]:
    column = array(typecode)
    if type(data) is not bytes or len(data) % column.itemsize:
        raise MalformedMessage("expected a packed column")
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


def pack_float32(values: Sequence[float]) -> bytes:
    return _pack_column("f", values)


def unpack_float32(data: Any) -> list[float]:
    return _unpack_column("f", data)


def check_blobs(value: Any) -> list[bytes]:
    blobs = check_list(value)
    if not {bytes}.issuperset(map(type, blobs)):
        raise MalformedMessage("expected a list of byte strings")
    return blobs


def check_same_length(*columns: Sequence[Any]) -> None:
    if len({len(column) for column in columns}) > 1:
        raise MalformedMessage("columns differ in length")
