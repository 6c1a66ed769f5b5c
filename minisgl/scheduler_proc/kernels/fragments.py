"""How the kernels for few rows feed the tensor cores: from memory into registers, with no shared memory in between.

A tensor core takes its operands from the registers of a warp's 32 lanes in a fixed pattern: lane 4 r + t holds, of row
r of a tile, columns that lie apart. A load of 16 bytes a lane brings lane 4 r + t the columns 8 t .. 8 t + 7 of row r.
Both differ only in the order of the columns, and a sum over columns does not care for their order. So the columns of
both operands are renamed alike: `reshape` and `permute` say so, and Triton finds that no element has to move.

Triton gives lanes to a loaded block's last dimension first, then to its first dimension, then to the next; then warps.
Hence the shape [8 rows, PARTS, 32 columns]: a warp's lanes hold 8 rows of 32 columns, and each warp its own part of the
summed dimension. PARTS is the number of warps everywhere here. CHUNKS such blocks follow one another along that
dimension.

The right operand has 8 columns, one a row of the batch. With fewer rows, SHARE = 8 / rows columns belong to one row and
hold different chunks of it, so that each value is loaded and scaled by one lane; `product` picks what belongs together.

Whether a kernel stays free of shared memory and spilled registers is seen without a GPU: compile it for sm_90 and read
the `local_alloc`s and `convert_layout`s in `asm["ttgir"]` and ptxas's report (bench/ENGINE_LOG.md, entries 5 and 11).
"""

from __future__ import annotations

import triton
import triton.language as tl

ROWS_TOGETHER = 8
"""Rows of a batch that one right operand holds."""


def share_of(rows: int) -> int:
    """How many columns of the right operand belong to one row."""
    return next(share for share in (8, 4, 2, 1) if rows * share <= ROWS_TOGETHER or share == 1)


def warps_for(k: int) -> int:
    """Among how many warps a sum over k is parted: what a warp holds of it must fit in its registers."""
    return 4 if k <= 1024 else 8


@triton.jit
def left_operand(low, high, PARTS: tl.constexpr):
    """Rows 0..7 and 8..15 of a tile, each [8, PARTS, 32], as [PARTS, 16, 32] with renamed columns."""
    both = tl.reshape(tl.join(low, high), (8, PARTS, 4, 2, 4, 2))
    return tl.reshape(tl.permute(both, (1, 5, 0, 3, 2, 4)), (PARTS, 16, 32))


@triton.jit
def right_operand(x, PARTS: tl.constexpr):
    """Eight rows [8, PARTS, 32] as the columns of [PARTS, 32, 8], renamed like left_operand's."""
    x = tl.reshape(x, (8, PARTS, 4, 2, 4))
    return tl.reshape(tl.permute(x, (1, 3, 2, 4, 0)), (PARTS, 32, 8))


@triton.jit
def load_floats(place, low_inside, high_inside, PARTS: tl.constexpr):
    """float32 [8, PARTS, 32], 8 neighbours a lane as of narrower types: two loads of 16 bytes.

    Args:
        place: [8, PARTS, 16], where columns 0..3, 8..11, 16..19 and 24..27 are.
        low_inside, high_inside: whether those, and those 4 columns further, exist.
    """
    low = tl.load(place, mask=low_inside, other=0.0)
    high = tl.load(place + 4, mask=high_inside, other=0.0)
    both = tl.reshape(tl.join(low, high), (8, PARTS, 4, 4, 2))
    return tl.reshape(tl.permute(both, (0, 1, 2, 4, 3)), (8, PARTS, 32))


@triton.jit
def every_other_four(PARTS: tl.constexpr):
    """The columns that load_floats' `place` names: [8, PARTS, 16]."""
    column = tl.arange(0, 16)[None, None, :] + tl.zeros((8, PARTS, 16), tl.int32)
    return column // 4 * 8 + column % 4


@triton.jit
def load_weights(weight, low, high, end, first_k, K: tl.constexpr, CHUNKS: tl.constexpr, PARTS: tl.constexpr):
    """A tuple of CHUNKS left operands: rows `low` and `high` [8] of weight [end, K] from column first_k on."""
    tiles = ()  # type: tuple[tl.tensor, ...]
    for i in tl.static_range(CHUNKS):
        k = first_k + (i * PARTS + tl.arange(0, PARTS)[None, :, None]) * 32 + tl.arange(0, 32)[None, None, :]
        low_place = weight + low.to(tl.int64)[:, None, None] * K + k
        high_place = weight + high.to(tl.int64)[:, None, None] * K + k
        low_rows = tl.load(low_place, mask=(low < end)[:, None, None] & (k < K), other=0.0)
        high_rows = tl.load(high_place, mask=(high < end)[:, None, None] & (k < K), other=0.0)
        tiles = tiles + (left_operand(low_rows, high_rows, PARTS),)  # noqa: RUF005
    return tiles


@triton.jit
def chunk_starts(turn: tl.constexpr, SHARE: tl.constexpr, PARTS: tl.constexpr):
    """Where the chunks begin that the columns of the turn-th right operand hold: [8, PARTS, 1]."""
    chunk = turn * SHARE + tl.arange(0, 8) % SHARE
    return (chunk[:, None, None] * PARTS + tl.arange(0, PARTS)[None, :, None]) * 32


@triton.jit
def product(weights, xs, CHUNKS: tl.constexpr, SHARE: tl.constexpr, PARTS: tl.constexpr):
    """Sum over the chunks of weights times rows, float32 [PARTS, 16, 8]; xs are CHUNKS / SHARE right operands."""
    y = tl.zeros((PARTS, 16, 8), tl.float32)
    # Sums of their own, since a tensor core's result is late for the next product.
    SUMS: tl.constexpr = SHARE if SHARE > 1 else 2
    for first in tl.static_range(SUMS if SUMS < CHUNKS else CHUNKS):
        part = tl.zeros((PARTS, 16, 8), tl.float32)
        for i in tl.static_range(first, CHUNKS, SUMS):
            part = tl.dot(weights[i], xs[i // SHARE], part, input_precision="ieee")
        if SHARE > 1:
            # Only columns that hold these chunks have met the right weights.
            y = tl.where((tl.arange(0, 8) % SHARE == first)[None, None, :], part, y)
        else:
            y += part
    return y


@triton.jit
def sum_columns(y, SHARE: tl.constexpr):
    """Sum the columns that belong to one row: the last dimension becomes 8 / SHARE."""
    if SHARE > 1:
        APART: tl.constexpr = y.shape[:-1] + (8 // SHARE, SHARE)  # noqa: RUF005
        y = tl.sum(tl.reshape(y, APART), axis=len(APART) - 1)
    return y


@triton.jit
def sum_parts(y, PARTS: tl.constexpr):
    """Sum the last dimension, the warps' parts, with one exchange through shared memory."""
    REST: tl.constexpr = y.shape[:-1]
    even, odd = tl.split(tl.reshape(y, REST + (PARTS // 2, 2)))  # noqa: RUF005
    y = even + odd
    if PARTS == 8:
        even, odd = tl.split(tl.reshape(y, REST + (2, 2)))  # noqa: RUF005
        y = even + odd
    even, odd = tl.split(y)
    return even + odd
