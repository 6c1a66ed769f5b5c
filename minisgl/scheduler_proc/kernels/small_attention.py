"""Attention of a decode step of few rows, from the unrotated projection to the attended heads, in two kernels.

The first rotates, writes the new key and value to the KV pool and attends to a share of the positions; the second
combines the shares. What earlier steps have left is loaded before the wait for this one (see dependent_launch.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from minisgl.scheduler_proc.kernels.dependent_launch import launch_options

MAX_GROUP = 16
"""Most query heads to a key head: the rows of one tensor core operand."""
BLOCK = 64
"""Keys a program looks at together."""
_GROUP_BLOCK = tl.constexpr(16)
_LOG2_E = tl.constexpr(1.4426950408889634)


def small_splits(rows: int) -> int:
    """Over how many programs one row's keys are split."""
    return 32 if rows == 1 else 16 if rows <= 4 else 8


@triton.jit
def _rotate(low, high, norm_weights, cos, sin, eps, half, HALF: tl.constexpr, HAS_NORM: tl.constexpr):
    """RMS-norm (optional) and rotate heads given as two halves [heads, HALF]."""
    if HAS_NORM:
        scale = tl.rsqrt((tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / (2 * HALF) + eps)[:, None]
        low = low * scale * tl.load(norm_weights + half[None, :]).to(tl.float32)
        high = high * scale * tl.load(norm_weights + HALF + half[None, :]).to(tl.float32)
    return low * cos[None, :] - high * sin[None, :], high * cos[None, :] + low * sin[None, :]


@triton.jit
def _load_block(
    pool,
    table,
    start,
    end,
    kv_head,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Keys (two halves) and values of positions start .. end - 1, at most BLOCK of them, and those positions."""
    half = tl.arange(0, HALF)
    dims = tl.arange(0, 2 * HALF)
    at = start + tl.arange(0, BLOCK)
    seen = at < end
    page = tl.load(table + at // PAGE_SIZE, mask=seen, other=0).to(tl.int64)
    keys = pool + ((page * PAGE_SIZE + at % PAGE_SIZE) * (2 * KV_HEADS) + kv_head) * (2 * HALF)
    low = tl.load(keys[:, None] + half[None, :], mask=seen[:, None], other=0.0)
    high = tl.load(keys[:, None] + HALF + half[None, :], mask=seen[:, None], other=0.0)
    values = tl.load(keys[:, None] + KV_HEADS * 2 * HALF + dims[None, :], mask=seen[:, None], other=0.0)
    return low, high, values, at


@triton.jit
def _attend_block(q_low, q_high, low, high, values, seen, factor, best, total, sums):
    """Take a block of keys and values into the running softmax (best, total, sums); `seen` masks its positions."""
    scores = tl.dot(q_low, tl.trans(low), input_precision="ieee")
    scores = tl.dot(q_high, tl.trans(high), scores, input_precision="ieee") * factor
    scores = tl.where(seen[None, :], scores, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, axis=1))
    # With nothing seen so far this is -inf; subtracting that would make NaN.
    safe_best = tl.where(new_best == float("-inf"), 0.0, new_best)
    weights = tl.exp2(scores - safe_best[:, None])
    fade = tl.exp2(best - safe_best)
    total = total * fade + tl.sum(weights, axis=1)
    sums = sums * fade[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    return new_best, total, sums


@triton.jit
def _rotate_attend(
    qkv,
    positions,
    slots,
    cos_table,
    sin_table,
    norm_weight,
    pool,
    page_table,
    table_stride_at,
    partial,
    partial_max,
    partial_sum,
    eps,
    scale,
    window,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    GROUP: tl.constexpr = HEADS // KV_HEADS
    HEAD_DIM: tl.constexpr = 2 * HALF
    dtype = qkv.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    # The positions before the new token are split; the new token itself is split 0's.
    position = tl.load(positions + row)
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(position + 1 - window, 0) // BLOCK * BLOCK
    span = tl.cdiv(position - first, SPLITS * BLOCK) * BLOCK
    begin = first + split * span
    end = tl.minimum(begin + span, position)
    table = page_table + row * tl.load(table_stride_at)
    head = tl.arange(0, _GROUP_BLOCK)
    half = tl.arange(0, HALF)
    dims = tl.arange(0, HEAD_DIM)
    in_group = head < GROUP
    cos = tl.load(cos_table + position.to(tl.int64) * HALF + half).to(tl.float32)
    sin = tl.load(sin_table + position.to(tl.int64) * HALF + half).to(tl.float32)
    low, high, values, at = _load_block(pool, table, begin, end, kv_head, KV_HEADS, HALF, PAGE_SIZE, BLOCK)
    target = pool + (tl.load(slots + row).to(tl.int64) * (2 * KV_HEADS) + kv_head) * HEAD_DIM
    if PDL:
        gdc_wait()

    source = qkv + row * ((HEADS + 2 * KV_HEADS) * HEAD_DIM)
    one = tl.arange(0, 1)
    queries = source + (kv_head * GROUP + head[:, None]) * HEAD_DIM + half[None, :]
    key = source + (HEADS + kv_head) * HEAD_DIM + one[:, None] * HEAD_DIM + half[None, :]
    # All loads before any use of one, so that they wait for memory together.
    q_low = tl.load(queries, mask=in_group[:, None], other=0.0).to(tl.float32)
    q_high = tl.load(queries + HALF, mask=in_group[:, None], other=0.0).to(tl.float32)
    k_low, k_high = tl.load(key).to(tl.float32), tl.load(key + HALF).to(tl.float32)
    v = tl.load(source + (HEADS + KV_HEADS + kv_head) * HEAD_DIM + dims).to(tl.float32)
    q_weights = norm_weight + (kv_head * GROUP + tl.where(in_group, head, 0)[:, None]) * HEAD_DIM
    q_low, q_high = _rotate(q_low, q_high, q_weights, cos, sin, eps, half, HALF, HAS_NORM)
    q_low_cut, q_high_cut = q_low.to(dtype), q_high.to(dtype)

    factor = scale * _LOG2_E
    best = tl.full((_GROUP_BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((_GROUP_BLOCK,), tl.float32)
    sums = tl.zeros((_GROUP_BLOCK, HEAD_DIM), tl.float32)
    if split == 0:
        k_weights = norm_weight + (HEADS + kv_head) * HEAD_DIM + one[:, None]
        new_low, new_high = _rotate(k_low, k_high, k_weights, cos, sin, eps, half, HALF, HAS_NORM)
        # Not finite values must not stay in pages that another request gets later.
        new_low = tl.where(tl.abs(new_low) < float("inf"), new_low, 0.0).to(dtype)
        new_high = tl.where(tl.abs(new_high) < float("inf"), new_high, 0.0).to(dtype)
        new_v = tl.where(tl.abs(v) < float("inf"), v, 0.0).to(dtype)
        tl.store(target + one[:, None] * HEAD_DIM + half[None, :], new_low)
        tl.store(target + HALF + one[:, None] * HEAD_DIM + half[None, :], new_high)
        tl.store(target + KV_HEADS * HEAD_DIM + dims, new_v)
        own = q_low_cut.to(tl.float32) * new_low.to(tl.float32) + q_high_cut.to(tl.float32) * new_high.to(tl.float32)
        best = tl.sum(own, axis=1) * factor
        total = tl.full((_GROUP_BLOCK,), 1.0, tl.float32)
        sums += new_v.to(tl.float32)[None, :]
    if begin < end:
        seen = at < end
        if HAS_WINDOW:
            seen = seen & (at > position - window)
        best, total, sums = _attend_block(q_low_cut, q_high_cut, low, high, values, seen, factor, best, total, sums)
        for start in range(begin + BLOCK, end, BLOCK):
            low, high, values, at = _load_block(pool, table, start, end, kv_head, KV_HEADS, HALF, PAGE_SIZE, BLOCK)
            seen = at < end
            if HAS_WINDOW:
                seen = seen & (at > position - window)
            best, total, sums = _attend_block(q_low_cut, q_high_cut, low, high, values, seen, factor, best, total, sums)

    part = (row * HEADS + kv_head * GROUP + head) * SPLITS + split
    tl.store(partial + part[:, None] * HEAD_DIM + dims[None, :], sums, mask=in_group[:, None])
    tl.store(partial_max + part, best, mask=in_group)
    tl.store(partial_sum + part, total, mask=in_group)


@triton.jit
def _combine(
    partial, partial_max, partial_sum, output, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row_head = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    dims = tl.arange(0, HEAD_DIM)
    best = tl.load(partial_max + row_head * SPLITS + split)
    totals = tl.load(partial_sum + row_head * SPLITS + split)
    sums = tl.load(partial + (row_head * SPLITS + split[:, None]) * HEAD_DIM + dims[None, :])
    shares = tl.exp2(best - tl.max(best, axis=0))
    result = tl.sum(sums * shares[:, None], axis=0) / tl.sum(shares * totals, axis=0)
    tl.store(output + row_head * HEAD_DIM + dims, result.to(output.dtype.element_ty))


def rotate_attend(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    norm_weight: torch.Tensor | None,
    eps: float,
    pool: torch.Tensor,
    page_table: torch.Tensor,
    table_stride: torch.Tensor,
    *,
    page_size: int,
    window: int | None,
    splits: int,
    pdl: bool,
) -> torch.Tensor:
    """Rotate, store this step's keys and values, and attend: one query a row.

    Args:
        qkv: [rows, heads + 2 * kv heads, head_dim], not rotated; head_dim is a power of two, at least 32.
        splits: see small_splits.
        Others as in elementwise.rotate_and_store and paged_attention.decode_attention; a row sees its position and all
            before it.

    Returns:
        [rows, heads * head_dim].
    """
    rows, all_heads, head_dim = qkv.shape
    kv_heads = pool.shape[2]
    heads = all_heads - 2 * kv_heads
    output = torch.empty((rows, heads * head_dim), dtype=qkv.dtype, device=qkv.device)
    partial = torch.empty((rows, heads, splits, head_dim), dtype=torch.float32, device=qkv.device)
    partial_max = torch.empty((rows, heads, splits), dtype=torch.float32, device=qkv.device)
    partial_sum = torch.empty_like(partial_max)
    cos, sin = tables
    _rotate_attend[(rows, kv_heads, splits)](
        qkv,
        positions,
        slots,
        cos,
        sin,
        norm_weight if norm_weight is not None else qkv,
        pool,
        page_table,
        table_stride,
        partial,
        partial_max,
        partial_sum,
        eps,
        head_dim**-0.5,
        window or 0,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=head_dim // 2,
        PAGE_SIZE=page_size,
        BLOCK=BLOCK,
        SPLITS=splits,
        HAS_NORM=norm_weight is not None,
        HAS_WINDOW=window is not None,
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )
    _combine[(rows * heads,)](
        partial,
        partial_max,
        partial_sum,
        output,
        HEAD_DIM=head_dim,
        SPLITS=splits,
        PDL=pdl,
        num_warps=2,
        **launch_options(pdl),
    )
    return output
