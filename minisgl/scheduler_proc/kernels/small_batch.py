"""Decode kernels for up to 16 rows, where a step is bound by its kernel count and by latency rather than by arithmetic.

A layer is six kernels: norm + QKV; rotation + KV write + attention; combination of attention's splits; output
projection + residual; norm + gate/up + SiLU; down projection + residual. Rows are padded to the 16 of a tensor core's
operand. With programmatic dependent launch (`pdl`, compute capability 9.0 and up) a kernel starts while its predecessor
still runs, loads its weights, and only then waits; so everything before `gdc_wait` may read nothing but weights, step
inputs and the keys and values of earlier steps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from minisgl.scheduler_proc.kernels.paged_attention import DECODE_BLOCK

MAX_ROWS = 16
_ROWS = tl.constexpr(16)
_LOG2_E = tl.constexpr(1.4426950408889634)
_TILE_K = 128


@triton.jit
def _load_tiles(weight, n, inside, first_k, K: tl.constexpr, TILE_K: tl.constexpr, TILES: tl.constexpr):
    """A tuple of [n, TILE_K] tiles of weight [.., K], from column first_k on: they stay in registers."""
    k = tl.arange(0, TILE_K)
    tiles = ()
    for i in tl.static_range(TILES):
        place = weight + n[:, None].to(tl.int64) * K + first_k + i * TILE_K + k[None, :]
        tiles = tiles + (tl.load(place, mask=inside[:, None], other=0.0),)  # noqa: RUF005
    return tiles


@triton.jit
def _load_row_tiles(x, rows, first_k, K: tl.constexpr, TILE_K: tl.constexpr, TILES: tl.constexpr):
    """A tuple of [16, TILE_K] tiles of x [rows, K]; all loads are issued together, so their latency is paid once."""
    row = tl.arange(0, _ROWS)
    k = tl.arange(0, TILE_K)
    tiles = ()
    for i in tl.static_range(TILES):
        place = x + row[:, None] * K + first_k + i * TILE_K + k[None, :]
        tiles = tiles + (tl.load(place, mask=(row < rows)[:, None], other=0.0),)  # noqa: RUF005
    return tiles


@triton.jit
def _load_norm_weight(norm_weight, TILE_K: tl.constexpr, TILES: tl.constexpr):
    k = tl.arange(0, TILE_K)
    tiles = ()
    for i in tl.static_range(TILES):
        tiles = tiles + (tl.load(norm_weight + i * TILE_K + k).to(tl.float32)[None, :],)  # noqa: RUF005
    return tiles


@triton.jit
def _norm_linear(
    residual,
    norm_weight,
    weight,
    bias,
    output,
    rows,
    width,
    eps,
    K: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    inside = n < width
    TILES: tl.constexpr = K // TILE_K
    tiles = _load_tiles(weight, n, inside, 0, K, TILE_K, TILES)
    norms = _load_norm_weight(norm_weight, TILE_K, TILES)
    if PDL:
        gdc_wait()
    row = tl.arange(0, _ROWS)
    xs = _load_row_tiles(residual, rows, 0, K, TILE_K, TILES)
    products = tl.zeros((_ROWS, TILE_N), tl.float32)
    squares = tl.zeros((_ROWS, TILE_K), tl.float32)
    for i in tl.static_range(TILES):
        squares += xs[i] * xs[i]
        scaled = (xs[i] * norms[i]).to(weight.dtype.element_ty)
        products = tl.dot(scaled, tl.trans(tiles[i]), products, input_precision="ieee")
    y = products * tl.rsqrt(tl.sum(squares, axis=1) / K + eps)[:, None]
    if HAS_BIAS:
        y += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    place = output + row[:, None] * width + n[None, :]
    tl.store(place, y.to(output.dtype.element_ty), mask=(row < rows)[:, None] & inside[None, :])


def norm_linear(
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    pdl: bool,
) -> torch.Tensor:
    """linear(rms_norm(residual)): float32 [rows <= 16, hidden] to [rows, width] in the weight's dtype."""
    rows, hidden = residual.shape
    width = len(weight)
    output = torch.empty((rows, width), dtype=weight.dtype, device=weight.device)
    _norm_linear[(triton.cdiv(width, 16),)](
        residual,
        norm_weight,
        weight,
        bias if bias is not None else weight,
        output,
        rows,
        width,
        eps,
        K=hidden,
        TILE_K=_TILE_K,
        TILE_N=16,
        HAS_BIAS=bias is not None,
        PDL=pdl,
        num_warps=4,
        **_launch(pdl),
    )
    return output


@triton.jit
def _norm_gate_up(
    residual,
    norm_weight,
    weight,
    output,
    rows,
    width,
    eps,
    K: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_N: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    inside = n < width
    TILES: tl.constexpr = K // TILE_K
    gates = _load_tiles(weight, n, inside, 0, K, TILE_K, TILES)
    ups = _load_tiles(weight, n + width, inside, 0, K, TILE_K, TILES)
    norms = _load_norm_weight(norm_weight, TILE_K, TILES)
    if PDL:
        gdc_wait()
    row = tl.arange(0, _ROWS)
    xs = _load_row_tiles(residual, rows, 0, K, TILE_K, TILES)
    gate = tl.zeros((_ROWS, TILE_N), tl.float32)
    up = tl.zeros((_ROWS, TILE_N), tl.float32)
    squares = tl.zeros((_ROWS, TILE_K), tl.float32)
    for i in tl.static_range(TILES):
        squares += xs[i] * xs[i]
        scaled = (xs[i] * norms[i]).to(weight.dtype.element_ty)
        gate = tl.dot(scaled, tl.trans(gates[i]), gate, input_precision="ieee")
        up = tl.dot(scaled, tl.trans(ups[i]), up, input_precision="ieee")
    scale = tl.rsqrt(tl.sum(squares, axis=1) / K + eps)[:, None]
    gate *= scale
    y = gate * tl.sigmoid(gate) * (up * scale)
    place = output + row[:, None] * width + n[None, :]
    tl.store(place, y.to(output.dtype.element_ty), mask=(row < rows)[:, None] & inside[None, :])


def norm_gate_up(
    residual: torch.Tensor, norm_weight: torch.Tensor, weight: torch.Tensor, eps: float, pdl: bool
) -> torch.Tensor:
    """silu(gate) * up of linear(rms_norm(residual)); weight [2 * width, hidden], gate first; [rows <= 16, width]."""
    rows, hidden = residual.shape
    width = len(weight) // 2
    output = torch.empty((rows, width), dtype=weight.dtype, device=weight.device)
    _norm_gate_up[(triton.cdiv(width, 16),)](
        residual,
        norm_weight,
        weight,
        output,
        rows,
        width,
        eps,
        K=hidden,
        TILE_K=_TILE_K,
        TILE_N=16,
        PDL=pdl,
        num_warps=8,
        **_launch(pdl),
    )
    return output


@triton.jit
def _linear_add(
    x,
    weight,
    residual,
    rows,
    width,
    K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_N: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    TILES: tl.constexpr = K // (SPLIT_K * TILE_K)
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    inside = n < width
    first_k = tl.program_id(1) * (TILES * TILE_K)
    tiles = _load_tiles(weight, n, inside, first_k, K, TILE_K, TILES)
    if PDL:
        gdc_wait()
    row = tl.arange(0, _ROWS)
    xs = _load_row_tiles(x, rows, first_k, K, TILE_K, TILES)
    place = residual + row[:, None] * width + n[None, :]
    mine = (row < rows)[:, None] & inside[None, :]
    if SPLIT_K == 1:  # noqa: SIM108
        products = tl.load(place, mask=mine, other=0.0)
    else:
        products = tl.zeros((_ROWS, TILE_N), tl.float32)
    for i in tl.static_range(TILES):
        products = tl.dot(xs[i], tl.trans(tiles[i]), products, input_precision="ieee")
    if SPLIT_K == 1:
        tl.store(place, products, mask=mine)
    else:
        tl.atomic_add(place, products, mask=mine, sem="relaxed")


def linear_add(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, pdl: bool) -> None:
    """Add linear(x) to the float32 residual [rows <= 16, width] in place; x is [rows, K].

    Long rows of weights are split over programs that add up with atomics, so the order of additions is not fixed.
    """
    rows, k = x.shape
    width = len(weight)
    split_k = 1
    if k > 1024:
        split_k = next(parts for parts in range(k // 256, 0, -1) if k % (parts * _TILE_K) == 0)
    tile_n = 16 if split_k == 1 else 32
    _linear_add[(triton.cdiv(width, tile_n), split_k)](
        x,
        weight,
        residual,
        rows,
        width,
        K=k,
        SPLIT_K=split_k,
        TILE_K=_TILE_K,
        TILE_N=tile_n,
        PDL=pdl,
        num_warps=4,
        **_launch(pdl),
    )


@triton.jit
def _norm_and_rotate(low, high, weights, cos, sin, eps, half, HALF: tl.constexpr, HAS_NORM: tl.constexpr):
    """RMS-norm (optional) and rotate heads given as two halves [heads, HALF]."""
    if HAS_NORM:
        scale = tl.rsqrt((tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / (2 * HALF) + eps)[:, None]
        low = low * scale * tl.load(weights + half[None, :]).to(tl.float32)
        high = high * scale * tl.load(weights + HALF + half[None, :]).to(tl.float32)
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
    """Keys (two halves) and values of positions start .. end - 1, at most BLOCK of them, and their positions."""
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
def _attend_block(q_low, q_high, low, high, values, seen, scale, best, total, sums):
    """Take a block of keys and values into the running softmax (best, total, sums); `seen` masks its positions."""
    scores = tl.dot(q_low, tl.trans(low), input_precision="ieee")
    scores = tl.dot(q_high, tl.trans(high), scores, input_precision="ieee") * scale
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
    output,
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
    # Positions before the new token are split; the new token itself is split 0's.
    position = tl.load(positions + row)
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(position + 1 - window, 0) // BLOCK * BLOCK
    span = tl.cdiv(position - first, SPLITS * BLOCK) * BLOCK
    begin = first + split * span
    end = tl.minimum(begin + span, position)
    table = page_table + row * tl.load(table_stride_at)
    head = tl.arange(0, _ROWS)
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
    q_low, q_high = _norm_and_rotate(q_low, q_high, q_weights, cos, sin, eps, half, HALF, HAS_NORM)
    q_low, q_high = q_low.to(dtype), q_high.to(dtype)

    factor = scale * _LOG2_E
    best = tl.full((_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((_ROWS,), tl.float32)
    sums = tl.zeros((_ROWS, HEAD_DIM), tl.float32)
    if split == 0:
        k_weights = norm_weight + (HEADS + kv_head) * HEAD_DIM + one[:, None]
        k_low, k_high = _norm_and_rotate(k_low, k_high, k_weights, cos, sin, eps, half, HALF, HAS_NORM)
        # Not finite values must not stay in pages that another request gets later.
        k_low = tl.where(tl.abs(k_low) < float("inf"), k_low, 0.0).to(dtype)
        k_high = tl.where(tl.abs(k_high) < float("inf"), k_high, 0.0).to(dtype)
        v_stored = tl.where(tl.abs(v) < float("inf"), v, 0.0).to(dtype)
        tl.store(target + one[:, None] * HEAD_DIM + half[None, :], k_low)
        tl.store(target + HALF + one[:, None] * HEAD_DIM + half[None, :], k_high)
        tl.store(target + KV_HEADS * HEAD_DIM + dims, v_stored)
        own = q_low.to(tl.float32) * k_low.to(tl.float32) + q_high.to(tl.float32) * k_high.to(tl.float32)
        best = tl.sum(own, axis=1) * factor
        total = tl.full((_ROWS,), 1.0, tl.float32)
        sums += v_stored.to(tl.float32)[None, :]
    if begin < end:
        seen = at < end
        if HAS_WINDOW:
            seen = seen & (at > position - window)
        best, total, sums = _attend_block(q_low, q_high, low, high, values, seen, factor, best, total, sums)
        for start in range(begin + BLOCK, end, BLOCK):
            low, high, values, at = _load_block(pool, table, start, end, kv_head, KV_HEADS, HALF, PAGE_SIZE, BLOCK)
            seen = at < end
            if HAS_WINDOW:
                seen = seen & (at > position - window)
            best, total, sums = _attend_block(q_low, q_high, low, high, values, seen, factor, best, total, sums)

    head_at = row * HEADS + kv_head * GROUP + head
    if SPLITS == 1:
        place = output + head_at[:, None] * HEAD_DIM + dims[None, :]
        tl.store(place, (sums / total[:, None]).to(dtype), mask=in_group[:, None])
    else:
        part = head_at * SPLITS + split
        tl.store(partial + part[:, None] * HEAD_DIM + dims[None, :], sums, mask=in_group[:, None])
        tl.store(partial_max + part, best, mask=in_group)
        tl.store(partial_sum + part, total, mask=in_group)


@triton.jit
def _combine(
    partial,
    partial_max,
    partial_sum,
    output,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row_head = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    dims = tl.arange(0, HEAD_DIM)
    best = tl.load(partial_max + row_head * SPLITS + split)
    shares = tl.exp2(best - tl.max(best, axis=0))
    total = tl.sum(shares * tl.load(partial_sum + row_head * SPLITS + split), axis=0)
    sums = tl.load(partial + (row_head * SPLITS + split[:, None]) * HEAD_DIM + dims[None, :])
    result = tl.sum(sums * shares[:, None], axis=0) / total
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
        qkv: [rows, heads + 2 * kv heads, head_dim], not rotated; head_dim is a power of two, at least 32, and at most
            16 query heads share a key head.
        Others as in elementwise.rotate_and_store and paged_attention.decode_attention; a row sees its position and all
        before it.

    Returns:
        [rows, heads * head_dim].
    """
    rows, all_heads, head_dim = qkv.shape
    kv_heads = pool.shape[2]
    heads = all_heads - 2 * kv_heads
    output = torch.empty((rows, heads * head_dim), dtype=qkv.dtype, device=qkv.device)
    parts = (rows, heads, splits)
    partial = torch.empty((*parts, head_dim) if splits > 1 else 1, dtype=torch.float32, device=qkv.device)
    partial_max = torch.empty(parts if splits > 1 else 1, dtype=torch.float32, device=qkv.device)
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
        output,
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
        BLOCK=DECODE_BLOCK,
        SPLITS=splits,
        HAS_NORM=norm_weight is not None,
        HAS_WINDOW=window is not None,
        PDL=pdl,
        num_warps=4,
        **_launch(pdl),
    )
    if splits > 1:
        _combine[(rows * heads,)](
            partial,
            partial_max,
            partial_sum,
            output,
            HEAD_DIM=head_dim,
            SPLITS=splits,
            PDL=pdl,
            num_warps=2,
            **_launch(pdl),
        )
    return output


def _launch(pdl: bool) -> dict[str, bool]:
    """Launch options; Triton knows this one only where it exists."""
    return {"launch_pdl": True} if pdl else {}
