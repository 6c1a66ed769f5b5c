"""Products on the tiles of Intel's AMX.

Tiles are eight registers (Intel 64 and IA-32 Architectures Software Developer's Manual, vol. 1, chapter 18): up to 16
rows of 64 bytes each. A product adds A [rows, 2 k] times B [k, columns, 2] to C [rows, columns]; of bytes, A has 4 k
columns and B [k, columns, 4].
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from numba import types

from minisgl.scheduler_proc.cpu.compiler import compiled, inlined
from minisgl.scheduler_proc.cpu.intrinsics import (
    BYTE,
    POINTER,
    VOID,
    Intrinsic,
    call,
    intrinsic,
    prefetch,
    prefetch_far,
)
from minisgl.scheduler_proc.cpu.memory import get_long
from minisgl.scheduler_proc.cpu.narrow import NARROW_BYTES, put_patches, widen
from minisgl.scheduler_proc.cpu.tiles import BLOCK, BLOCKS_AT_ONCE, LINE, PAIR, TILE_BYTES
from minisgl.scheduler_proc.device import cpu_flags

AHEAD = 2048
"""Bytes of a pair that are asked for ahead of their use, from memory or from the second-level cache."""
ASKED_LINES = 4
"""Lines of the next pair that are asked for with each depth of all rows but the first 32, about as fast as they come.
The first 32 read their own pair from memory, and the CPU reads ahead for them by itself."""
RING = 8
"""Depths of a narrow pair that are kept in full width where only one part of the rows needs them."""
LEAD = 2
"""Depths that are widened before they are multiplied."""


def permitted() -> bool:
    """Whether this CPU has tiles and the system lets this process use them, which is asked for here."""
    return {"amx_tile", "amx_bf16", "amx_int8"} <= cpu_flags() and torch.cpu._init_amx()


def _tile(number: int) -> Any:
    return ir.Constant(BYTE, number)


def tile_zero(tile: int) -> Intrinsic:
    """() -> None: set a tile to zero."""

    @intrinsic
    def zero(context: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            call(builder, "llvm.x86.tilezero", VOID, [_tile(tile)])
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
            call(builder, instruction, VOID, [_tile(tile), builder.inttoptr(address, POINTER), stride])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return transfer


def tile_multiply(c: int, a: int, b: int) -> Intrinsic:
    """() -> None: C += A B, of bfloat16 with float32 sums."""
    return _tile_product("llvm.x86.tdpbf16ps", c, a, b)


def tile_multiply_bytes(c: int, a: int, b: int) -> Intrinsic:
    """() -> None: C += A B, of uint8 and int8 with int32 sums."""
    return _tile_product("llvm.x86.tdpbusd", c, a, b)


def _tile_product(instruction: str, c: int, a: int, b: int) -> Intrinsic:
    @intrinsic
    def multiply(context: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            call(builder, instruction, VOID, [_tile(c), _tile(a), _tile(b)])
            return context.get_dummy_value()

        return types.void(), generate

    return multiply


@intrinsic
def tile_configure(context: Any, address: Any) -> Any:
    """(address of a configuration) -> None: set the shapes of this thread's tiles; see `tile_shapes`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        call(builder, "llvm.x86.ldtilecfg", VOID, [builder.inttoptr(arguments[0], POINTER)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def tile_release(context: Any) -> Any:
    """() -> None: give the tiles back, so that the system need not save them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        call(builder, "llvm.x86.tilerelease", VOID, [])
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


zero_0, zero_1, zero_2, zero_3 = (tile_zero(tile) for tile in range(4))
store_0, store_1, store_2, store_3 = (tile_store(tile) for tile in range(4))

load_4, load_5, load_6, load_7 = (tile_load(tile) for tile in range(4, 8))
multiply_046, multiply_147 = tile_multiply(0, 4, 6), tile_multiply(1, 4, 7)
multiply_256, multiply_357 = tile_multiply(2, 5, 6), tile_multiply(3, 5, 7)
bytes_046, bytes_147 = tile_multiply_bytes(0, 4, 6), tile_multiply_bytes(1, 4, 7)
bytes_256, bytes_357 = tile_multiply_bytes(2, 5, 6), tile_multiply_bytes(3, 5, 7)

load_keys, load_values, load_queries, load_weights = load_4, load_5, load_6, load_7
score_0, score_1, score_2, score_3 = (tile_multiply(tile, 4, 6) for tile in range(4))
sum_0, sum_1, sum_2, sum_3 = (tile_multiply(tile, 5, 7) for tile in range(4))

ATTENTION_SHAPES = tile_shapes(
    {0: (16, 64), 1: (16, 64), 2: (16, 64), 3: (16, 64), 4: (16, 64), 5: (16, 32), 6: (16, 64), 7: (8, 64)}
)
"""Sums in 0 to 3; 16 keys by 32 columns in 4, 32 columns by 16 queries in 6; 16 columns by 16 values in 5, 16 weights
by 16 queries in 7."""


def shapes_of_rows(rows: int) -> np.ndarray:
    """Tile shapes for products of up to 32 rows: outputs in tiles 0 to 3, rows in 4 and 5, weights in 6 and 7."""
    upper, lower = max(min(rows, BLOCK), 1), max(rows - BLOCK, 1)
    row_counts = (upper, upper, lower, lower, upper, lower, BLOCK, BLOCK)
    return tile_shapes({tile: (count, 64) for tile, count in enumerate(row_counts)})


@compiled
def multiply(of_bytes, pair, next_pair, next_bytes, part, depths, rows, count, sums):
    """Products of up to 32 rows with a pair of blocks; see instructions.py. The tiles must have their shapes."""
    both = count > BLOCK
    # Each line once, and none after the last.
    asked = ASKED_LINES if part > 0 and (part - 1) * ASKED_LINES * depths * LINE < next_bytes else 0
    ahead = next_pair + (part - 1) * ASKED_LINES * depths * LINE
    _zero(both)
    for depth in range(depths):
        lines = pair + depth * 2 * TILE_BYTES
        if part == 0:
            for line in range(AHEAD, AHEAD + 2 * TILE_BYTES, LINE):
                prefetch(lines + line)
        for line in range(asked):
            prefetch_far(ahead + line * LINE)
        ahead += asked * LINE
        _load(both, rows, depth, depths, lines)
        if of_bytes:
            bytes_046()
            bytes_147()
            if both:
                bytes_256()
                bytes_357()
        else:
            _multiply(both)
    _store(both, sums)


@compiled
def multiply_narrow(pair, lowest, patch, keep, depths, rows, count, sums, wide):
    """Products of up to 32 rows with a narrow pair of blocks; see instructions.py."""
    both = count > BLOCK
    # The first level keeps the ring. Tiles are loaded from what was widened some time ago: a line cannot be read from
    # the buffer that writes pass through.
    ring = -1 if keep else RING - 1
    _zero(both)
    for ready in range(depths + LEAD):
        if ready < depths:
            target = wide + (ready & ring) * 2 * TILE_BYTES
            widen(pair + ready * NARROW_BYTES, lowest, target)
            patch = put_patches(patch, ready, target)
        depth = ready - LEAD
        if depth >= 0:
            _load(both, rows, depth, depths, wide + (depth & ring) * 2 * TILE_BYTES)
            _multiply(both)
    _store(both, sums)


@inlined
def _zero(both):
    zero_0()
    zero_1()
    if both:
        zero_2()
        zero_3()


@inlined
def _load(both, rows, depth, depths, lines):
    load_4(rows + depth * TILE_BYTES, LINE)
    load_6(lines, 2 * LINE)
    load_7(lines + LINE, 2 * LINE)
    if both:
        load_5(rows + (depths + depth) * TILE_BYTES, LINE)


@inlined
def _multiply(both):
    multiply_046()
    multiply_147()
    if both:
        multiply_256()
        multiply_357()


@inlined
def _store(both, sums):
    if both:
        store_2(sums + BLOCK * PAIR * 4, PAIR * 4)
        store_3(sums + BLOCK * PAIR * 4 + BLOCK * 4, PAIR * 4)
    store_0(sums, PAIR * 4)
    store_1(sums + BLOCK * 4, PAIR * 4)


@compiled
def score(blocks, count, depths, queries, scores):
    """Products of keys with queries; see instructions.py."""
    for block in range(0, count, BLOCKS_AT_ONCE):
        zero_0()
        zero_1()
        zero_2()
        zero_3()
        for depth in range(depths):
            load_queries(queries + depth * TILE_BYTES, LINE)
            load_keys(get_long(blocks, block) + depth * TILE_BYTES, LINE)
            score_0()
            load_keys(get_long(blocks, block + 1) + depth * TILE_BYTES, LINE)
            score_1()
            load_keys(get_long(blocks, block + 2) + depth * TILE_BYTES, LINE)
            score_2()
            load_keys(get_long(blocks, block + 3) + depth * TILE_BYTES, LINE)
            score_3()
        here = scores + block * 1024
        store_0(here, LINE)
        store_1(here + 1024, LINE)
        store_2(here + 2048, LINE)
        store_3(here + 3072, LINE)


@compiled
def score_two(blocks, count, depths, queries, others, scores, other_scores):
    """Products of keys with two tiles of queries; see instructions.py. Keys come from afar, so each is loaded once."""
    for block in range(0, count, 2):
        zero_0()
        zero_1()
        zero_2()
        zero_3()
        for depth in range(depths):
            load_keys(get_long(blocks, block) + depth * TILE_BYTES, LINE)
            load_queries(queries + depth * TILE_BYTES, LINE)
            score_0()
            load_queries(others + depth * TILE_BYTES, LINE)
            score_2()
            load_keys(get_long(blocks, block + 1) + depth * TILE_BYTES, LINE)
            score_3()
            load_queries(queries + depth * TILE_BYTES, LINE)
            score_1()
        store_0(scores + block * 1024, LINE)
        store_1(scores + block * 1024 + 1024, LINE)
        store_2(other_scores + block * 1024, LINE)
        store_3(other_scores + block * 1024 + 1024, LINE)


@compiled
def sum_values(blocks, count, offset, columns, weights, sums):
    """Weighted sums of values; see instructions.py."""
    zero_0()
    zero_1()
    if columns == 64:
        zero_2()
        zero_3()
        for block in range(count):
            values = get_long(blocks, block) + offset
            load_weights(weights + block * 512, LINE)
            load_values(values, 32)
            sum_0()
            load_values(values + 512, 32)
            sum_1()
            load_values(values + 1024, 32)
            sum_2()
            load_values(values + 1536, 32)
            sum_3()
        store_2(sums + 2048, LINE)
        store_3(sums + 3072, LINE)
    else:
        for block in range(count):
            values = get_long(blocks, block) + offset
            load_weights(weights + block * 512, LINE)
            load_values(values, 32)
            sum_0()
            load_values(values + 512, 32)
            sum_1()
    store_0(sums, LINE)
    store_1(sums + 1024, LINE)


@compiled
def sum_values_two(blocks, count, offset, weights, other_weights, sums, other_sums):
    """Sums of 32 columns of values, with two tiles of weights; see instructions.py."""
    zero_0()
    zero_1()
    zero_2()
    zero_3()
    for block in range(count):
        values = get_long(blocks, block) + offset
        load_values(values, 32)
        load_weights(weights + block * 512, LINE)
        sum_0()
        load_weights(other_weights + block * 512, LINE)
        sum_2()
        load_values(values + 512, 32)
        sum_3()
        load_weights(weights + block * 512, LINE)
        sum_1()
    store_0(sums, LINE)
    store_1(sums + 1024, LINE)
    store_2(other_sums, LINE)
    store_3(other_sums + 1024, LINE)
