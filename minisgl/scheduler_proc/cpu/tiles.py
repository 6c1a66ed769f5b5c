"""Matrix products on tiles: rows that lie in tiles times a packed weight, 32 output columns at a time."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from minisgl.scheduler_proc.cpu.compiler import compiled, inlined
from minisgl.scheduler_proc.cpu.intrinsics import (
    prefetch,
    tile_load,
    tile_multiply,
    tile_shapes,
    tile_store,
    tile_zero,
)

BLOCK = 16
"""Output columns of one packed block, and rows of a tile."""
DEPTH = 32
"""Input columns that one tile instruction sums over."""
PAIR = 2 * BLOCK
"""Rows and columns of the output that a thread has in its tiles at a time."""
TILE_BYTES = 1024
"""Of 16 rows by 32 bfloat16 columns."""
AHEAD = 2048
"""Bytes of a weight that are asked for ahead of their use, from memory or from the second-level cache."""

zero_0, zero_1, zero_2, zero_3 = tile_zero(0), tile_zero(1), tile_zero(2), tile_zero(3)
load_4, load_5, load_6, load_7 = tile_load(4), tile_load(5), tile_load(6), tile_load(7)
store_0, store_1, store_2, store_3 = tile_store(0), tile_store(1), tile_store(2), tile_store(3)
multiply_046, multiply_147 = tile_multiply(0, 4, 6), tile_multiply(1, 4, 7)
multiply_256, multiply_357 = tile_multiply(2, 5, 6), tile_multiply(3, 5, 7)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """A bfloat16 weight [out, in] as tiles: [out / 16, in / 32, 16 pairs of inputs, 16 outputs, 2], flat.

    `out` is filled up to a multiple of 32 with zeros; `in` must be a multiple of 32.
    """
    weight = F.pad(weight, (0, 0, 0, -len(weight) % PAIR))
    blocks = weight.view(len(weight) // BLOCK, BLOCK, weight.shape[1] // DEPTH, BLOCK, 2)
    return blocks.permute(0, 2, 3, 1, 4).contiguous()


def shapes_of_rows(rows: int) -> np.ndarray:
    """Tile shapes for products of up to 32 rows: outputs in tiles 0 to 3, rows in 4 and 5, weights in 6 and 7."""
    upper, lower = max(min(rows, BLOCK), 1), max(rows - BLOCK, 1)
    row_counts = (upper, upper, lower, lower, upper, lower, BLOCK, BLOCK)
    return tile_shapes({tile: (count, 64) for tile, count in enumerate(row_counts)})


@inlined
def place_in_tiles(row, column, depths):
    """Bytes to an element of rows that lie in tiles: bfloat16 [rows / 16, depths, 16, 32], depths = columns / 32."""
    return (row // BLOCK * depths + column // DEPTH) * TILE_BYTES + row % BLOCK * 64 + column % DEPTH * 2


@compiled
def multiply(weight, first, second, depths, rows, count, sums):
    """Products of up to 32 rows with two blocks of a packed weight.

    Args:
        weight: address of the packed weight; `first` and `second` number its blocks.
        depths: input columns / 32.
        rows: address of the first row, in tiles; the tiles' shapes must be those of `count` rows.
        sums: address of float32 [32, 32], which gets the first block's outputs in columns 0 to 15, then the second's.
    """
    one, other = weight + first * depths * TILE_BYTES, weight + second * depths * TILE_BYTES
    both = count > BLOCK
    zero_0()
    zero_1()
    if both:
        zero_2()
        zero_3()
    for depth in range(depths):
        here = depth * TILE_BYTES
        for line in range(0, TILE_BYTES, 64):
            prefetch(one + here + AHEAD + line)
            prefetch(other + here + AHEAD + line)
        load_4(rows + here, 64)
        load_6(one + here, 64)
        multiply_046()
        load_7(other + here, 64)
        multiply_147()
        if both:
            load_5(rows + depths * TILE_BYTES + here, 64)
            multiply_256()
            multiply_357()
    if both:
        store_2(sums + BLOCK * PAIR * 4, PAIR * 4)
        store_3(sums + BLOCK * PAIR * 4 + BLOCK * 4, PAIR * 4)
    store_0(sums, PAIR * 4)
    store_1(sums + BLOCK * 4, PAIR * 4)


def permitted() -> bool:
    """Whether this CPU has tiles and the system lets this process use them, which is asked for here."""
    return torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()
