"""Products on the vectors of AVX512-BF16, for CPUs without AMX.

`vdpbf16ps` (Intel 64 and IA-32 Architectures Software Developer's Manual, vol. 2) adds to each of 16 float32 sums the
products of two pairs of bfloat16. Here one operand is a line of a packed block, two inputs of 16 output columns; the
other is two inputs of one row, 16 times. Every sum is made in the order of its inputs, whatever is computed beside it.
`vpdpbusd` does the same with four bytes instead of two bfloat16, and int32 sums.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from minisgl.scheduler_proc.cpu.compiler import compiled
from minisgl.scheduler_proc.cpu.intrinsics import INT, LONG, POINTER, Intrinsic, call, call_prefetch, intrinsic
from minisgl.scheduler_proc.cpu.memory import get_long, set_int
from minisgl.scheduler_proc.cpu.tiles import BLOCK, BLOCKS_AT_ONCE, LINE, PAIR, TILE_BYTES
from minisgl.scheduler_proc.device import cpu_flags

ROWS = 8
"""Rows whose sums are in registers together: 16 of the 32, where 6 would hide how long an instruction takes."""
CHUNK = 28
"""Depths that all rows are multiplied with before the next: 56 KB of a pair."""
WORDS = TILE_BYTES // LINE

FLOATS = ir.VectorType(ir.FloatType(), 16)
# Two bfloat16 in each word: the only form that all versions of LLVM take.
HALVES = ir.VectorType(INT, 16)


def permitted() -> bool:
    """Whether this CPU multiplies vectors of bfloat16 and of bytes."""
    return {"avx512_bf16", "avx512_vnni"} <= cpu_flags()


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, POINTER)


def _at(builder: Any, base: Any, offset: int, kind: Any) -> Any:
    return builder.bitcast(builder.gep(base, [ir.Constant(LONG, offset)]), kind.as_pointer())


def _load(builder: Any, base: Any, offset: int, kind: Any) -> Any:
    # Aligned loads would be as fast, and would fail where an array is not aligned.
    return builder.load(_at(builder, base, offset, kind), align=4)


def _store(builder: Any, base: Any, offset: int, value: Any) -> None:
    builder.store(value, _at(builder, base, offset, value.type), align=4)


def _add_products(
    builder: Any, sums: list[Any], rows: Any, row_bytes: int, word: int, lines: list[Any], of_bytes: bool = False
) -> list[Any]:
    """Add one word of each row times a line of each block to sums [rows][blocks]; see `multiply` for of_bytes."""
    added: list[Any] = []
    for index in range(len(sums) // len(lines)):
        pair = _load(builder, rows, index * row_bytes + word * 4, INT)
        nothing = ir.Constant(HALVES, ir.Undefined)
        pairs = builder.insert_element(nothing, pair, ir.Constant(INT, 0))
        pairs = builder.shuffle_vector(pairs, nothing, ir.Constant(HALVES, [0] * 16))
        for line in lines:
            earlier = sums[len(added)]
            if of_bytes:
                added.append(call(builder, "llvm.x86.avx512.vpdpbusd.512", HALVES, [earlier, pairs, line]))
            else:
                added.append(call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, [earlier, line, pairs]))
    return added


def _in_registers(builder: Any, values: list[Any]) -> list[Any]:
    """Variables, which the compiler keeps in registers."""
    return [cgutils.alloca_once_value(builder, value) for value in values]


def row_products(rows: int, of_bytes: bool = False) -> Intrinsic:
    """(rows, pair, ahead, advance, depths, sums) -> None: add products of rows with a pair of blocks.

    Meanwhile lines from `ahead` on are asked for, `advance` bytes further with each word.
    """

    @intrinsic
    def multiply(context: Any, first_row: Any, pair: Any, ahead: Any, advance: Any, depths: Any, sums: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            first_row, pair, ahead, advance, depths, sums = arguments
            first_row, pair, ahead, sums = (_pointer(builder, address) for address in (first_row, pair, ahead, sums))
            places = [row * PAIR * 4 + block * LINE for row in range(rows) for block in range(2)]
            kind = HALVES if of_bytes else FLOATS
            kept = _in_registers(builder, [_load(builder, sums, place, kind) for place in places])
            asked = _in_registers(builder, [ahead])[0]
            with cgutils.for_range(builder, depths, intp=LONG) as loop:
                row = builder.gep(first_row, [builder.mul(loop.index, ir.Constant(LONG, TILE_BYTES))])
                lines = builder.gep(pair, [builder.mul(loop.index, ir.Constant(LONG, 2 * TILE_BYTES))])
                values = [builder.load(variable) for variable in kept]
                ahead = builder.load(asked)
                for word in range(WORDS):
                    # Into the first level they would push out what is multiplied now.
                    call_prefetch(builder, ahead, 2)
                    ahead = builder.gep(ahead, [advance])
                    both = [_load(builder, lines, (2 * word + block) * LINE, HALVES) for block in range(2)]
                    values = _add_products(builder, values, row, LINE, word, both, of_bytes)
                for variable, value in zip([*kept, asked], [*values, ahead], strict=True):
                    builder.store(value, variable)
            for place, variable in zip(places, kept, strict=True):
                _store(builder, sums, place, builder.load(variable))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    return multiply


@intrinsic
def score_block(context: Any, keys: Any, queries: Any, depths: Any, scores: Any) -> Any:
    """(keys, queries, depths, scores) -> None: products of a block's 16 keys with 16 queries."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        keys, queries, depths, scores = arguments
        keys, queries, scores = (_pointer(builder, address) for address in (keys, queries, scores))
        kept = _in_registers(builder, [ir.Constant(FLOATS, [0.0] * 16)] * BLOCK)
        with cgutils.for_range(builder, depths, intp=LONG) as loop:
            here = builder.mul(loop.index, ir.Constant(LONG, TILE_BYTES))
            key, query = builder.gep(keys, [here]), builder.gep(queries, [here])
            values = [builder.load(variable) for variable in kept]
            for word in range(WORDS):
                values = _add_products(builder, values, key, LINE, word, [_load(builder, query, word * LINE, HALVES)])
            for variable, value in zip(kept, values, strict=True):
                builder.store(value, variable)
        for row, variable in enumerate(kept):
            _store(builder, scores, row * LINE, builder.load(variable))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def sum_columns(context: Any, blocks: Any, count: Any, offset: Any, weights: Any, sums: Any) -> Any:
    """(blocks, count, offset, weights, sums) -> None: weighted sums of 16 columns over all blocks."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        blocks, count, offset, weights, sums = arguments
        blocks, weights, sums = (_pointer(builder, address) for address in (blocks, weights, sums))
        kept = _in_registers(builder, [ir.Constant(FLOATS, [0.0] * 16)] * BLOCK)
        words = BLOCK // 2
        with cgutils.for_range(builder, count, intp=LONG) as loop:
            block = builder.load(builder.gep(builder.bitcast(blocks, LONG.as_pointer()), [loop.index]))
            columns = _pointer(builder, builder.add(block, offset))
            weight = builder.gep(weights, [builder.mul(loop.index, ir.Constant(LONG, words * LINE))])
            values = [builder.load(variable) for variable in kept]
            for word in range(words):
                lines = [_load(builder, weight, word * LINE, HALVES)]
                values = _add_products(builder, values, columns, BLOCK * 2, word, lines)
            for variable, value in zip(kept, values, strict=True):
                builder.store(value, variable)
        for row, variable in enumerate(kept):
            _store(builder, sums, row * LINE, builder.load(variable))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


row_1, row_2, row_3, row_4, row_5, row_6, row_7, row_8 = (row_products(rows) for rows in range(1, ROWS + 1))
bytes_2, bytes_4, bytes_6, bytes_8 = (row_products(rows, of_bytes=True) for rows in range(2, ROWS + 1, 2))


@compiled
def _multiply_some(count, rows, pair, ahead, advance, depths, sums):
    """Products of 1 to 8 rows of a tile; see `row_products`."""
    if count == 1:
        row_1(rows, pair, ahead, advance, depths, sums)
    elif count == 2:
        row_2(rows, pair, ahead, advance, depths, sums)
    elif count == 3:
        row_3(rows, pair, ahead, advance, depths, sums)
    elif count == 4:
        row_4(rows, pair, ahead, advance, depths, sums)
    elif count == 5:
        row_5(rows, pair, ahead, advance, depths, sums)
    elif count == 6:
        row_6(rows, pair, ahead, advance, depths, sums)
    elif count == 7:
        row_7(rows, pair, ahead, advance, depths, sums)
    else:
        row_8(rows, pair, ahead, advance, depths, sums)


@compiled
def _multiply_some_bytes(count, rows, pair, ahead, advance, depths, sums):
    """The same of 2, 4, 6 or 8 rows of bytes."""
    if count == 2:
        bytes_2(rows, pair, ahead, advance, depths, sums)
    elif count == 4:
        bytes_4(rows, pair, ahead, advance, depths, sums)
    elif count == 6:
        bytes_6(rows, pair, ahead, advance, depths, sums)
    else:
        bytes_8(rows, pair, ahead, advance, depths, sums)


@compiled
def multiply(of_bytes, pair, next_pair, depths, rows, count, sums):
    """Products of up to 32 rows with a pair of blocks; see instructions.py.

    Up to 8 rows go right through the pair, which the CPU reads ahead by itself. More take it chunk by chunk, 8 at a
    time, and meanwhile the next chunk is asked for, as the CPU does not see that it comes next.
    """
    for index in range(count * PAIR):
        set_int(sums, index, np.int32(0))
    size = ROWS if count > BLOCK else (count + 1) // 2
    if of_bytes:
        # Rows of bytes come in twos.
        size += size & 1
    if count <= ROWS:
        size = count
    groups = (count + size - 1) // size
    chunk, advance = (CHUNK, 2 * LINE // groups) if groups > 1 else (depths, 0)
    for begin in range(0, depths, chunk):
        here = min(chunk, depths - begin)
        ahead = pair + (begin + here) * 2 * TILE_BYTES if begin + here < depths else next_pair
        for group in range(groups):
            row = group * size
            some, lines = min(size, count - row), pair + begin * 2 * TILE_BYTES
            place = rows + (row // BLOCK * depths + begin) * TILE_BYTES + row % BLOCK * LINE
            asked = ahead + group * here * WORDS * advance if advance else sums
            if of_bytes:
                _multiply_some_bytes(some, place, lines, asked, advance, here, sums + row * PAIR * 4)
            else:
                _multiply_some(some, place, lines, asked, advance, here, sums + row * PAIR * 4)


@compiled
def score(blocks, count, depths, queries, scores):
    """Products of keys with queries; see instructions.py."""
    for block in range((count + BLOCKS_AT_ONCE - 1) // BLOCKS_AT_ONCE * BLOCKS_AT_ONCE):
        score_block(get_long(blocks, block), queries, depths, scores + block * BLOCK * LINE)


@compiled
def sum_values(blocks, count, offset, columns, weights, sums):
    """Weighted sums of values; see instructions.py."""
    for column in range(0, columns, BLOCK):
        sum_columns(blocks, count, offset + column * BLOCK * 2, weights, sums + column * LINE)
