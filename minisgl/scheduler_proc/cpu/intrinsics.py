"""The machine instructions that Python has no words for, as functions for numba's compiler.

Tiles are the eight registers of Intel's AMX (Intel 64 and IA-32 Architectures Software Developer's Manual, vol. 1,
chapter 18): up to 16 rows of 64 bytes each. A product adds A [rows, 2 k] times B [k, columns, 2] to C [rows, columns].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as numba_intrinsic

Intrinsic: TypeAlias = Callable[..., Any]

intrinsic: Callable[[Callable[..., Any]], Intrinsic] = numba_intrinsic
"""Its functions get one argument more than their callers give, the compiler's context."""

_BYTE, _INT, _LONG = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_POINTER = ir.IntType(8).as_pointer()
_VOID = ir.VoidType()


def _call(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    """Call a function that LLVM or the process's C library has."""
    kinds = [argument.type for argument in arguments]
    return builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, kinds), name), arguments)


def _tile(number: int) -> Any:
    return ir.Constant(_BYTE, number)


def tile_zero(tile: int) -> Intrinsic:
    """() -> None: set a tile to zero."""

    @intrinsic
    def zero(context: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _call(builder, "llvm.x86.tilezero", _VOID, [_tile(tile)])
            return context.get_dummy_value()

        return types.void(), generate

    return zero


def tile_load(tile: int) -> Intrinsic:
    """(address, stride in bytes) -> None: load a tile's rows, each `stride` after the one before."""
    return _tile_transfer(tile, "llvm.x86.tileloadd64")


def tile_store(tile: int) -> Intrinsic:
    """(address, stride in bytes) -> None: the way back."""
    return _tile_transfer(tile, "llvm.x86.tilestored64")


def _tile_transfer(tile: int, instruction: str) -> Intrinsic:
    @intrinsic
    def transfer(context: Any, address: Any, stride: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address, stride = arguments
            _call(builder, instruction, _VOID, [_tile(tile), builder.inttoptr(address, _POINTER), stride])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return transfer


def tile_multiply(c: int, a: int, b: int) -> Intrinsic:
    """() -> None: C += A B, of bfloat16 with float32 sums."""

    @intrinsic
    def multiply(context: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _call(builder, "llvm.x86.tdpbf16ps", _VOID, [_tile(c), _tile(a), _tile(b)])
            return context.get_dummy_value()

        return types.void(), generate

    return multiply


@intrinsic
def tile_configure(context: Any, address: Any) -> Any:
    """(address of a configuration) -> None: set the shapes of this thread's tiles; see `tile_shapes`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _call(builder, "llvm.x86.ldtilecfg", _VOID, [builder.inttoptr(arguments[0], _POINTER)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def tile_release(context: Any) -> Any:
    """() -> None: give the tiles back, so that the system need not save them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _call(builder, "llvm.x86.tilerelease", _VOID, [])
        return context.get_dummy_value()

    return types.void(), generate


def tile_shapes(shapes: dict[int, tuple[int, int]]) -> npt.NDArray[np.uint8]:
    """The 64 bytes that `tile_configure` wants, from tile numbers to (rows, bytes a row)."""
    configuration = np.zeros(64, np.uint8)
    configuration[0] = 1
    for tile, (rows, row_bytes) in shapes.items():
        configuration[16:32].view(np.uint16)[tile] = row_bytes
        configuration[48 + tile] = rows
    return configuration


@intrinsic
def prefetch(context: Any, address: Any) -> Any:
    """(address) -> None: ask for a cache line that is read soon."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        read, keep, data = (ir.Constant(_INT, value) for value in (0, 3, 1))
        _call(builder, "llvm.prefetch.p0", _VOID, [builder.inttoptr(arguments[0], _POINTER), read, keep, data])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def float_of_bits(context: Any, bits: Any) -> Any:
    """(uint32) -> the float32 with these bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def bits_of_float(context: Any, value: Any) -> Any:
    """(float32) -> its bits as uint32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _INT)

    return types.uint32(types.float32), generate


def loader(kind: Any) -> Intrinsic:
    """(address, index) -> element `index` of an array of a numba type's elements at `address`."""

    @intrinsic
    def load(context: Any, address: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address, index = arguments
            return builder.load(builder.gep(_array_at(context, builder, kind, address), [index]))

        return kind(types.int64, types.int64), generate

    return load


def storer(kind: Any) -> Intrinsic:
    """(address, index, value) -> None: set an element; see `loader`."""

    @intrinsic
    def store(context: Any, address: Any, index: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address, index, value = arguments
            builder.store(value, builder.gep(_array_at(context, builder, kind, address), [index]))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, kind), generate

    return store


def _array_at(context: Any, builder: Any, kind: Any, address: Any) -> Any:
    return builder.inttoptr(address, context.get_value_type(kind).as_pointer())


@intrinsic
def atomic_add(context: Any, address: Any, value: Any) -> Any:
    """(address, int64) -> the int64 that was there; every thread sees its own."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(arguments[0], _LONG.as_pointer()), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def atomic_load(context: Any, address: Any) -> Any:
    """(address) -> the int64 there, and everything that was written before it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(arguments[0], _LONG.as_pointer()), "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def pause(context: Any) -> Any:
    """() -> None: a short wait in a loop."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _call(builder, "llvm.x86.sse2.pause", _VOID, [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def sleep_while_equal(context: Any, address: Any, value: Any) -> Any:
    """(address, value) -> None: sleep until woken, unless the lower 32 bits there are not `value`'s any more."""
    return types.void(types.int64, types.int64), _futex(wait=True)


@intrinsic
def wake_sleepers(context: Any, address: Any) -> Any:
    """(address) -> None: wake all threads that sleep at this address."""
    return types.void(types.int64), _futex(wait=False)


def _futex(wait: bool) -> Intrinsic:
    """Code that makes Linux's system call futex (2) on x86-64, for threads of one process."""
    number, private_wait, private_wake, everyone = 202, 128, 129, 2**31 - 1

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = arguments[1] if wait else ir.Constant(_LONG, everyone)
        operation = ir.Constant(_LONG, private_wait if wait else private_wake)
        nothing = ir.Constant(_LONG, 0)
        call = [ir.Constant(_LONG, number), arguments[0], operation, value, nothing, nothing, nothing]
        _call(builder, "syscall", _LONG, call)
        return context.get_dummy_value()

    return generate
