"""The machine instructions that Python has no words for, as functions for numba's compiler.

Those that multiply matrices are in amx.py and avx512.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as numba_intrinsic

Intrinsic: TypeAlias = Callable[..., Any]

intrinsic: Callable[[Callable[..., Any]], Intrinsic] = numba_intrinsic
"""Its functions get one argument more than their callers give, the compiler's context."""

BYTE, INT, LONG = ir.IntType(8), ir.IntType(32), ir.IntType(64)
POINTER = ir.IntType(8).as_pointer()
VOID = ir.VoidType()


def call(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    """Call a function that LLVM or the process's C library has."""
    kinds = [argument.type for argument in arguments]
    return builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, kinds), name), arguments)


def call_prefetch(builder: Any, pointer: Any, level: int) -> None:
    """Ask for a cache line that is read soon, into the cache of a level."""
    read, keep, data = (ir.Constant(INT, value) for value in (0, 4 - level, 1))
    call(builder, "llvm.prefetch.p0", VOID, [pointer, read, keep, data])


def _prefetcher(level: int) -> Intrinsic:
    """(address) -> None: ask for a cache line that is read soon, into the cache of a level."""

    @intrinsic
    def ask(context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            call_prefetch(builder, builder.inttoptr(arguments[0], POINTER), level)
            return context.get_dummy_value()

        return types.void(types.int64), generate

    return ask


prefetch, prefetch_far = _prefetcher(1), _prefetcher(2)


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
        return builder.bitcast(arguments[0], INT)

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
        return builder.atomic_rmw("add", builder.inttoptr(arguments[0], LONG.as_pointer()), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def atomic_load(context: Any, address: Any) -> Any:
    """(address) -> the int64 there, and everything that was written before it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(arguments[0], LONG.as_pointer()), "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def pause(context: Any) -> Any:
    """() -> None: a short wait in a loop."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        call(builder, "llvm.x86.sse2.pause", VOID, [])
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
        value = arguments[1] if wait else ir.Constant(LONG, everyone)
        operation = ir.Constant(LONG, private_wait if wait else private_wake)
        nothing = ir.Constant(LONG, 0)
        operands = [ir.Constant(LONG, number), arguments[0], operation, value, nothing, nothing, nothing]
        call(builder, "syscall", LONG, operands)
        return context.get_dummy_value()

    return generate
