"""Attention of a decode step of few rows, in one kernel: rotation, KV write and attention to parts of the keys.

A row's keys are parted among programs, and a program's among its warps: keys, values and scores stay in a warp's
registers (fragments.py) until, at the end, the warps take their sums together. The next kernel, small_output.py, takes
the programs' parts together. What earlier steps have left is loaded before the wait for this one (dependent_launch.py).
Sizes are the measured best of several (bench/ENGINE_LOG.md, entry 11).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from minisgl.scheduler_proc.kernels.dependent_launch import launch_options
from minisgl.scheduler_proc.kernels.fragments import left_operand, sum_parts

MAX_GROUP = 16
"""Most query heads to a key head: the rows of one left operand."""
WARPS = 4
_LOG2_E = tl.constexpr(1.4426950408889634)


class AttentionParts(NamedTuple):
    """What parts of the keys give, for small_output.add_attention; a row uses as many parts as it needs.

    Attributes:
        values: float32 [rows, heads, parts, head_dim], the part's own softmax times its values.
        scores: float32 [rows, heads, parts, 4], log2 of the part's sum of exponentials, four times over: so each lane
            that loads a quarter of a row's values has its own.
        keys: how many keys a warp looks at together.
    """

    values: torch.Tensor
    scores: torch.Tensor
    keys: int


def _most_parts(rows: int) -> int:
    """Among how many programs at most one row's keys are parted: more need more time to be taken together."""
    return 32 if rows <= 2 else 16 if rows <= 4 else 8


def _keys_together(rows: int, bytes_of_key: int) -> int:
    """How many keys a warp looks at together: no more than its registers hold; tensor cores sum over 16 at least."""
    return min(16 if 1 < rows <= 4 else 32, max(16, 4096 // bytes_of_key))


@triton.jit
def first_key(position, window, HAS_WINDOW: tl.constexpr):
    """The first position that the one at `position` sees."""
    first = position * 0
    if HAS_WINDOW:
        first = tl.maximum(position + 1 - window, 0)
    return first


@triton.jit
def keys_of_warp(position, first, COUNT: tl.constexpr, PARTS: tl.constexpr, KEYS: tl.constexpr):
    """How many of the positions first .. position each warp of COUNT programs has."""
    return tl.cdiv(position + 1 - first, COUNT * PARTS * KEYS) * KEYS


@triton.jit
def _slots(table, at, seen, PAGE_SIZE: tl.constexpr):
    page = tl.load(table + at // PAGE_SIZE, mask=seen, other=0).to(tl.int64)
    return page * PAGE_SIZE + at % PAGE_SIZE


@triton.jit
def _load_keys(keys, table, at, seen, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Keys of positions `at` [8, PARTS, KEYS / 8] as a tuple of blocks [8, PARTS, KEYS / 8, 32 dimensions]."""
    places = keys + _slots(table, at, seen, PAGE_SIZE) * STRIDE
    blocks = ()  # type: tuple[tl.tensor, ...]
    for c in tl.static_range(HEAD_DIM // 32):
        place = places[:, :, :, None] + (c * 32 + tl.arange(0, 32))[None, None, None, :]
        blocks = blocks + (tl.load(place, mask=seen[:, :, :, None], other=0.0),)  # noqa: RUF005
    return blocks


@triton.jit
def _value_dims(HEAD_DIM: tl.constexpr):
    """The dimensions of each of 8 groups of lanes: [1, 8, 1, 1, HEAD_DIM / 8]."""
    group = tl.arange(0, 8)[None, :, None, None, None]
    return group * (HEAD_DIM // 8) + tl.arange(0, HEAD_DIM // 8)[None, None, None, None, :]


@triton.jit
def _load_values(values, table, at, position, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Values of positions `at` [4, PARTS, KEYS / 4] before `position`: [4, 8, PARTS, KEYS / 4, HEAD_DIM / 8]."""
    seen = at < position
    places = values + _slots(table, at, seen, PAGE_SIZE) * STRIDE
    return tl.load(places[:, None, :, :, None] + _value_dims(HEAD_DIM), mask=seen[:, None, :, :, None], other=0.0)


@triton.jit
def _with_new_value(values, new_value, at, position, HEAD_DIM: tl.constexpr):
    """The same with the value of `position` itself, which is not in the pool yet."""
    places = new_value + _value_dims(HEAD_DIM) + tl.zeros(values.shape, tl.int32)
    return tl.load(places, mask=(at == position)[:, None, :, :, None], other=values)


@triton.jit
def _load_heads(places, inside, PARTS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Vectors that begin at places [8] as a tuple of blocks [8, PARTS, 32 dimensions], the same for each part."""
    blocks = ()  # type: tuple[tl.tensor, ...]
    for c in tl.static_range(HEAD_DIM // 32):
        dims = c * 32 + tl.arange(0, 32)[None, None, :] + tl.zeros((8, PARTS, 32), tl.int32)
        blocks = blocks + (tl.load(places[:, None, None] + dims, mask=inside[:, None, None], other=0.0),)  # noqa: RUF005
    return blocks


@triton.jit
def _rotate(blocks, norm, cos, sin, eps, HAS_NORM: tl.constexpr, HALF: tl.constexpr):
    """RMS-norm (optional) and rotate heads given as 2 * HALF blocks; float32."""
    scale = 1.0
    if HAS_NORM:
        squares = blocks[0].to(tl.float32) * 0.0
        for c in tl.static_range(2 * HALF):
            squares += blocks[c].to(tl.float32) * blocks[c].to(tl.float32)
        scale = tl.rsqrt(tl.sum(squares, axis=2) / (64 * HALF) + eps)[:, :, None]
    lows = ()  # type: tuple[tl.tensor, ...]
    highs = ()  # type: tuple[tl.tensor, ...]
    for c in tl.static_range(HALF):
        low = blocks[c].to(tl.float32)
        high = blocks[c + HALF].to(tl.float32)
        if HAS_NORM:
            low = low * scale * norm[c].to(tl.float32)
            high = high * scale * norm[c + HALF].to(tl.float32)
        cosine = cos[c].to(tl.float32)
        sine = sin[c].to(tl.float32)
        lows = lows + (low * cosine - high * sine,)  # noqa: RUF005
        highs = highs + (high * cosine + low * sine,)  # noqa: RUF005
    return lows + highs


@triton.jit
def _attend(
    queries,
    keys,
    values,
    at,
    own,
    position,
    first,
    factor,
    best,
    total,
    sums,
    PARTS: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Take KEYS keys and values of each part into its running softmax (best, total, sums).

    Args:
        at: [PARTS, KEYS], their positions.
        own: [PARTS, 16], the score of the key of `position`, which is not in the pool yet.
    """
    scores = tl.zeros((PARTS, 16, KEYS), tl.float32)
    for c in tl.static_range(HEAD_DIM // 32):
        # Dimensions renamed like those of left_operand.
        key = tl.reshape(keys[c], (8, PARTS, KEYS // 8, 4, 2, 4))
        key = tl.reshape(tl.permute(key, (1, 4, 3, 5, 2, 0)), (PARTS, 32, KEYS))
        scores = tl.dot(queries[c], key, scores, input_precision="ieee")
    scores = tl.where((at == position)[:, None, :], own[:, :, None], scores)
    seen = (at >= first) & (at <= position)
    scores = tl.where(seen[:, None, :], scores * factor, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, axis=2))
    # With nothing seen so far this is -inf; subtracting that would make NaN.
    safe_best = tl.where(new_best == float("-inf"), 0.0, new_best)
    weights = tl.exp2(scores - safe_best[:, :, None])
    fade = tl.exp2(best - safe_best)
    total = total * fade + tl.sum(weights, axis=2)
    # A lane has 4 keys of 16, as it has scores, and of each HEAD_DIM / 8 neighbouring dimensions.
    value = tl.reshape(values, (4, 8, PARTS, KEYS // 8, 2, HEAD_DIM // 8))
    value = tl.reshape(tl.permute(value, (2, 3, 0, 4, 5, 1)), (PARTS, KEYS, HEAD_DIM))
    sums = tl.dot(weights.to(value.dtype), value, sums * fade[:, :, None], input_precision="ieee")
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
    part_values,
    part_scores,
    eps,
    scale,
    window,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    COUNT: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    GROUP: tl.constexpr = HEADS // KV_HEADS
    # Query heads come in one or two eights, of which the last may be incomplete.
    EIGHTS: tl.constexpr = (GROUP + 7) // 8
    BLOCKS: tl.constexpr = HEAD_DIM // 32
    STRIDE: tl.constexpr = 2 * KV_HEADS * HEAD_DIM
    dtype = qkv.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    position = tl.load(positions + row)
    first = first_key(position, window, HAS_WINDOW)
    share = keys_of_warp(position, first, COUNT, PARTS, KEYS)
    begin = first + (part * PARTS + tl.arange(0, PARTS)) * share
    if first + part * PARTS * share > position:
        return
    lane = tl.arange(0, 8)
    every = lane < 8
    angles = position * (HEAD_DIM // 2) + lane * 0
    cos = _load_heads(cos_table + angles, every, PARTS, HEAD_DIM // 2)
    sin = _load_heads(sin_table + angles, every, PARTS, HEAD_DIM // 2)
    # A key block's lanes 4 r .. 4 r + 3 have keys r, r + 8, ...; lane t of each four in a value block 2 t, 2 t + 1, ...
    key_at = begin[None, :, None] + lane[:, None, None] + tl.arange(0, KEYS // 8)[None, None, :] * 8
    turn = tl.arange(0, KEYS // 4)[None, None, :]
    value_at = begin[None, :, None] + turn // 2 * 8 + tl.arange(0, 4)[:, None, None] * 2 + turn % 2
    at = begin[:, None] + tl.arange(0, KEYS)[None, :]
    table = page_table + row * tl.load(table_stride_at)
    pool_keys = pool + kv_head * HEAD_DIM
    pool_values = pool_keys + KV_HEADS * HEAD_DIM
    keys = _load_keys(pool_keys, table, key_at, key_at < position, STRIDE, HEAD_DIM, PAGE_SIZE)
    values = _load_values(pool_values, table, value_at, position, STRIDE, HEAD_DIM, PAGE_SIZE)
    slot = tl.load(slots + row).to(tl.int64)
    if PDL:
        gdc_wait()

    source = qkv + row * ((HEADS + 2 * KV_HEADS) * HEAD_DIM)
    new_value = source + (HEADS + KV_HEADS + kv_head) * HEAD_DIM
    # All loads before any use of one, so that they wait for memory together.
    heads = ()  # type: tuple[tuple[tl.tensor, ...], ...]
    for eight in tl.static_range(EIGHTS):
        head = eight * 8 + lane
        places = source + (kv_head * GROUP + head) * HEAD_DIM
        heads = heads + (_load_heads(places, head < GROUP, PARTS, HEAD_DIM),)  # noqa: RUF005
    new_key = _load_heads(source + (HEADS + kv_head) * HEAD_DIM + lane * 0, every, PARTS, HEAD_DIM)
    values = _with_new_value(values, new_value, value_at, position, HEAD_DIM)
    norm = cos
    if HAS_NORM:
        norm = _load_heads(norm_weight + (HEADS + kv_head) * HEAD_DIM + lane * 0, every, PARTS, HEAD_DIM)
    new_key = _rotate(new_key, norm, cos, sin, eps, HAS_NORM, BLOCKS // 2)
    rotated = ()  # type: tuple[tuple[tl.tensor, ...], ...]
    owns = ()  # type: tuple[tl.tensor, ...]
    for eight in tl.static_range(EIGHTS):
        if HAS_NORM:
            head = kv_head * GROUP + tl.minimum(eight * 8 + lane, GROUP - 1)
            norm = _load_heads(norm_weight + head * HEAD_DIM, every, PARTS, HEAD_DIM)
        query = _rotate(heads[eight], norm, cos, sin, eps, HAS_NORM, BLOCKS // 2)
        own = tl.zeros((8, PARTS, 32), tl.float32)
        cut = ()  # type: tuple[tl.tensor, ...]
        for c in tl.static_range(BLOCKS):
            cut = cut + (query[c].to(dtype),)  # noqa: RUF005
            own += cut[c].to(tl.float32) * new_key[c].to(dtype).to(tl.float32)
        rotated = rotated + (cut,)  # noqa: RUF005
        owns = owns + (tl.permute(tl.sum(own, axis=2), (1, 0))[:, None, :],)  # noqa: RUF005
    own = tl.broadcast_to(owns[0], (PARTS, 2, 8))
    queries = ()  # type: tuple[tl.tensor, ...]
    for c in tl.static_range(BLOCKS):
        if EIGHTS == 2:
            queries = queries + (left_operand(rotated[0][c], rotated[1][c], PARTS),)  # noqa: RUF005
        else:
            nothing = tl.zeros((8, PARTS, 32), dtype)
            queries = queries + (left_operand(rotated[0][c], nothing, PARTS),)  # noqa: RUF005
    if EIGHTS == 2:
        own = tl.where((tl.arange(0, 2) == 0)[None, :, None], own, owns[1])
    own = tl.reshape(own, (PARTS, 16))

    if part == 0:
        # Not finite values must not stay in pages that another request gets later.
        once = (lane == 0)[:, None, None] & (tl.arange(0, PARTS) == 0)[None, :, None]
        for c in tl.static_range(BLOCKS):
            place = pool_keys + slot * STRIDE + c * 32 + tl.arange(0, 32)[None, None, :]
            key = tl.where(tl.abs(new_key[c]) < float("inf"), new_key[c], 0.0).to(dtype)
            tl.store(place + tl.zeros((8, PARTS, 32), tl.int32), key, mask=once)
        dim = tl.arange(0, HEAD_DIM)
        value = tl.load(new_value + dim).to(tl.float32)
        tl.store(pool_values + slot * STRIDE + dim, tl.where(tl.abs(value) < float("inf"), value, 0.0).to(dtype))

    factor = scale * _LOG2_E
    best = tl.full((PARTS, 16), float("-inf"), tl.float32)
    total = tl.zeros((PARTS, 16), tl.float32)
    sums = tl.zeros((PARTS, 16, HEAD_DIM), tl.float32)
    best, total, sums = _attend(
        queries, keys, values, at, own, position, first, factor, best, total, sums, PARTS, KEYS, HEAD_DIM
    )
    # One stage: Triton's own prefetching would take the detour through shared memory.
    for step in tl.range(KEYS, share, KEYS, num_stages=1):
        keys = _load_keys(pool_keys, table, key_at + step, key_at + step < position, STRIDE, HEAD_DIM, PAGE_SIZE)
        values = _load_values(pool_values, table, value_at + step, position, STRIDE, HEAD_DIM, PAGE_SIZE)
        values = _with_new_value(values, new_value, value_at + step, position, HEAD_DIM)
        best, total, sums = _attend(
            queries, keys, values, at + step, own, position, first, factor, best, total, sums, PARTS, KEYS, HEAD_DIM
        )

    # The warps take their sums together; one that has seen nothing has -inf, 0 and 0.
    top = tl.max(best, axis=0)
    fade = tl.exp2(best - top[None, :])
    total = tl.sum(total * fade, axis=0)
    sums *= fade[:, :, None]
    # Rows of the sums are (eight, r), columns (d, 2 t + e), which means dimension (2 t + e) * HEAD_DIM / 8 + d.
    sums = tl.reshape(sums, (PARTS, 2, 8, HEAD_DIM // 8, 8))
    sums = tl.split(tl.permute(sums, (2, 4, 3, 0, 1)))
    total = tl.split(tl.permute(tl.reshape(total, (2, 8)), (1, 0)))
    top = tl.split(tl.permute(tl.reshape(top, (2, 8)), (1, 0)))
    for eight in tl.static_range(EIGHTS):
        head = eight * 8 + lane
        of_part = (row * HEADS + kv_head * GROUP + head) * COUNT + part
        value = tl.reshape(sum_parts(sums[eight], PARTS), (8, HEAD_DIM)) / total[eight][:, None]
        place = part_values + of_part[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
        tl.store(place, value, mask=(head < GROUP)[:, None])
        score = tl.broadcast_to((top[eight] + tl.log2(total[eight]))[:, None], (8, 4))
        place = part_scores + of_part[:, None] * 4 + tl.arange(0, 4)[None, :]
        tl.store(place, score, mask=(head < GROUP)[:, None])


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
    pdl: bool,
) -> AttentionParts:
    """Rotate, store this step's keys and values, and attend by parts: one query a row.

    Args:
        qkv: [rows, heads + 2 * kv heads, head_dim], not rotated; head_dim is 64 or 128.
        Others as in elementwise.rotate_and_store and paged_attention.decode_attention; a row sees its position and all
            before it.
    """
    rows, all_heads, head_dim = qkv.shape
    kv_heads = pool.shape[2]
    heads = all_heads - 2 * kv_heads
    count = _most_parts(rows)
    parts = AttentionParts(
        torch.empty((rows, heads, count, head_dim), dtype=torch.float32, device=qkv.device),
        torch.empty((rows, heads, count, 4), dtype=torch.float32, device=qkv.device),
        _keys_together(rows, head_dim * qkv.itemsize),
    )
    _rotate_attend[(rows, kv_heads, count)](
        qkv,
        positions,
        slots,
        *tables,
        norm_weight if norm_weight is not None else qkv,
        pool,
        page_table,
        table_stride,
        parts.values,
        parts.scores,
        eps,
        head_dim**-0.5,
        window or 0,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        KEYS=parts.keys,
        COUNT=count,
        PARTS=WARPS,
        HAS_NORM=norm_weight is not None,
        HAS_WINDOW=window is not None,
        PDL=pdl,
        num_warps=WARPS,
        **launch_options(pdl),
    )
    return parts
