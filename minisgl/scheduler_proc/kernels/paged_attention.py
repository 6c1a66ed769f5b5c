"""Attention of decode rows over the paged KV pool.

Lengths and page tables are read on the device, so a captured CUDA graph serves any of them. Each program keeps a
running maximum and sum per query (online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867); a long row's keys are
split over several programs, whose results are combined (as in Flash-Decoding).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
DECODE_BLOCK = 64
"""Keys a program looks at together."""
TARGET_PROGRAMS = 264
"""Programs that fill the device: two for each of a Hopper GPU's 132 multiprocessors."""


def decode_splits(rows: int, kv_heads: int, longest: int) -> int:
    """Over how many programs one row's keys are split at most, a power of two."""
    wanted = min(TARGET_PROGRAMS // (rows * kv_heads), longest // DECODE_BLOCK)
    return min(64, 1 << max(0, wanted.bit_length() - 1)) if wanted > 1 else 1


def _dim_block(head_dim: int) -> int:
    """A head's width padded to what a tensor core takes."""
    return max(16, int(triton.next_power_of_2(head_dim)))


@triton.jit
def _decode(
    qkv,
    pool,
    page_table,
    table_stride_at,
    lengths,
    output,
    partial,
    partial_max,
    partial_sum,
    scale,
    window,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    GROUP: tl.constexpr = HEADS // KV_HEADS
    GROUP_BLOCK: tl.constexpr = 16 if GROUP <= 16 else 32
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths + row)
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(length - window, 0) // BLOCK * BLOCK
    span = tl.cdiv(length - first, SPLITS * BLOCK) * BLOCK
    begin = first + split * span
    end = tl.minimum(begin + span, length)

    heads = tl.arange(0, GROUP_BLOCK)
    dims = tl.arange(0, DIM_BLOCK)
    in_group = heads < GROUP
    in_dims = dims < HEAD_DIM
    head = kv_head * GROUP + heads
    queries = qkv + (row * (HEADS + 2 * KV_HEADS) + head[:, None]) * HEAD_DIM + dims[None, :]
    q = tl.load(queries, mask=in_group[:, None] & in_dims[None, :], other=0.0)

    table = page_table + row * tl.load(table_stride_at)
    best = tl.full((GROUP_BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_BLOCK,), tl.float32)
    sums = tl.zeros((GROUP_BLOCK, DIM_BLOCK), tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        seen = at < end
        page = tl.load(table + at // PAGE_SIZE, mask=seen, other=0).to(tl.int64)
        keys = pool + ((page * PAGE_SIZE + at % PAGE_SIZE) * (2 * KV_HEADS) + kv_head) * HEAD_DIM
        there = seen[:, None] & in_dims[None, :]
        k = tl.load(keys[:, None] + dims[None, :], mask=there, other=0.0)
        v = tl.load(keys[:, None] + KV_HEADS * HEAD_DIM + dims[None, :], mask=there, other=0.0)
        if HAS_WINDOW:
            seen = seen & (at >= length - window)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * _LOG2_E)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        # A block that hides everything (before a window) leaves -inf; subtracting that would make NaN.
        safe_best = tl.where(new_best == float("-inf"), 0.0, new_best)
        weights = tl.exp2(scores - safe_best[:, None])
        fade = tl.exp2(best - safe_best)
        total = total * fade + tl.sum(weights, axis=1)
        sums = sums * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        best = new_best

    if SPLITS == 1:
        result = sums / total[:, None]
        places = output + (row * HEADS + head[:, None]) * HEAD_DIM + dims[None, :]
        tl.store(places, result.to(output.dtype.element_ty), mask=in_group[:, None] & in_dims[None, :])
    else:
        place = (row * HEADS + head) * SPLITS + split
        places = partial + place[:, None] * HEAD_DIM + dims[None, :]
        tl.store(places, sums, mask=in_group[:, None] & in_dims[None, :])
        tl.store(partial_max + place, best, mask=in_group)
        tl.store(partial_sum + place, total, mask=in_group)


@triton.jit
def _combine_splits(
    partial,
    partial_max,
    partial_sum,
    output,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row_head = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, SPLITS)
    dims = tl.arange(0, DIM_BLOCK)
    in_dims = dims < HEAD_DIM
    best = tl.load(partial_max + row_head * SPLITS + splits)
    shares = tl.exp2(best - tl.max(best, axis=0))
    total = tl.sum(shares * tl.load(partial_sum + row_head * SPLITS + splits), axis=0)
    places = partial + (row_head * SPLITS + splits[:, None]) * HEAD_DIM + dims[None, :]
    sums = tl.sum(tl.load(places, mask=in_dims[None, :], other=0.0) * shares[:, None], axis=0)
    tl.store(output + row_head * HEAD_DIM + dims, (sums / total).to(output.dtype.element_ty), mask=in_dims)


def decode_attention(
    qkv: torch.Tensor,
    pool: torch.Tensor,
    page_table: torch.Tensor,
    table_stride: torch.Tensor,
    lengths: torch.Tensor,
    *,
    page_size: int,
    scale: float,
    window: int | None,
    splits: int,
) -> torch.Tensor:
    """Attention of rows with one query each.

    Args:
        qkv: [rows, heads + 2 * kv heads, head_dim]; the queries are its first heads.
        pool: [slots, 2, kv heads, head_dim], with the keys and values of this step already in it.
        page_table: int32, flat; row r's page ids begin at r * table_stride.
        table_stride: int32 [1].
        lengths: int32 [rows], at least 1: positions each row sees, its own included.
        splits: see decode_splits.

    Returns:
        [rows, heads, head_dim].
    """
    rows, all_heads, head_dim = qkv.shape
    kv_heads = pool.shape[2]
    heads = all_heads - 2 * kv_heads
    output = torch.empty((rows, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    parts = (rows, heads, splits)
    partial = torch.empty((*parts, head_dim) if splits > 1 else 1, dtype=torch.float32, device=qkv.device)
    partial_max = torch.empty(parts if splits > 1 else 1, dtype=torch.float32, device=qkv.device)
    partial_sum = torch.empty_like(partial_max)
    dim_block = _dim_block(head_dim)
    _decode[(rows, kv_heads, splits)](
        qkv,
        pool,
        page_table,
        table_stride,
        lengths,
        output,
        partial,
        partial_max,
        partial_sum,
        scale,
        window or 0,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        DIM_BLOCK=dim_block,
        PAGE_SIZE=page_size,
        BLOCK=DECODE_BLOCK,
        SPLITS=splits,
        HAS_WINDOW=window is not None,
        num_warps=4,
    )
    if splits > 1:
        _combine_splits[(rows * heads,)](
            partial,
            partial_max,
            partial_sum,
            output,
            HEAD_DIM=head_dim,
            DIM_BLOCK=dim_block,
            SPLITS=splits,
            num_warps=2,
        )
    return output
