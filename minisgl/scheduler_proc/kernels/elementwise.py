"""The small steps between a decoder's matrix products, each one kernel: residual and norm, rotation and KV write, SiLU.

The residual stream is float32: its rounding would otherwise dominate the step's error.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from minisgl.scheduler_proc.kernels.dependent_launch import launch_options


@triton.jit
def _embed(input_ids, sources, last_tokens, table, residual, hidden, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    token = tl.load(input_ids + row).to(tl.int64)
    source = tl.load(sources + row)
    if source >= 0:
        token = tl.load(last_tokens + source)
    x = tl.load(table + token * hidden + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(residual + row * hidden + columns, x, mask=inside)


def embed(
    input_ids: torch.Tensor,
    table: torch.Tensor,
    sources: torch.Tensor,
    last_tokens: torch.Tensor,
    pdl: bool,
) -> torch.Tensor:
    """Embeddings of int32 ids [tokens] as float32 [tokens, hidden].

    Where `sources` (int32 [tokens]) is not negative, the id is last_tokens[source] (int64) instead: a token that the
    step before has sampled and the host has not seen yet. With `pdl` the next kernel may begin at once, if it waits
    (dependent_launch.py).
    """
    tokens, hidden = len(input_ids), table.shape[1]
    residual = torch.empty((tokens, hidden), dtype=torch.float32, device=table.device)
    _embed[(tokens,)](
        input_ids,
        sources,
        last_tokens,
        table,
        residual,
        hidden,
        BLOCK=triton.next_power_of_2(hidden),
        PDL=pdl,
        num_warps=4,
    )
    return residual


@triton.jit
def _add_rms_norm(
    residual, delta, weight, normed, hidden, eps, HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(residual + row * hidden + columns, mask=inside, other=0.0)
    if HAS_DELTA:
        x += tl.load(delta + row * hidden + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(residual + row * hidden + columns, x, mask=inside)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / hidden + eps)
    tl.store(normed + row * hidden + columns, (x * scale * w).to(normed.dtype.element_ty), mask=inside)


def add_rms_norm(
    residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float, pdl: bool = False
) -> torch.Tensor:
    """Add `delta` to the residual stream in place, and return its RMS norm.

    Args:
        residual: float32 [tokens, hidden].
        delta: [tokens, hidden] in the model's dtype, or None to add nothing.
        weight: [hidden] in the model's dtype.
        pdl: whether this and the next kernel overlap with those before them (dependent_launch.py).

    Returns:
        [tokens, hidden] in the weight's dtype.
    """
    tokens, hidden = residual.shape
    normed = torch.empty_like(residual, dtype=weight.dtype)
    block = triton.next_power_of_2(hidden)
    _add_rms_norm[(tokens,)](
        residual,
        delta if delta is not None else residual,
        weight,
        normed,
        hidden,
        eps,
        HAS_DELTA=delta is not None,
        BLOCK=block,
        PDL=pdl,
        num_warps=4 if block <= 2048 else 8,
        **launch_options(pdl),
    )
    return normed


@triton.jit(do_not_specialize=["tokens"])
def _rotate_and_store(
    qkv,
    positions,
    slots,
    cos_table,
    sin_table,
    norm_weight,
    pool,
    eps,
    tokens,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1)
    columns = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (token < tokens)[:, None] & (columns < HALF)
    source = qkv + ((token * (HEADS + 2 * KV_HEADS) + head) * (2 * HALF))[:, None] + columns
    low = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    if head < HEADS + KV_HEADS:
        if HAS_NORM:
            squares = tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)
            scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
            weights = norm_weight + head * (2 * HALF) + columns
            low *= scale * tl.load(weights, mask=columns < HALF, other=0.0).to(tl.float32)
            high *= scale * tl.load(weights + HALF, mask=columns < HALF, other=0.0).to(tl.float32)
        position = tl.load(positions + token, mask=token < tokens, other=0).to(tl.int64)
        angles = (position * HALF)[:, None] + columns
        cos = tl.load(cos_table + angles, mask=inside, other=0.0).to(tl.float32)
        sin = tl.load(sin_table + angles, mask=inside, other=0.0).to(tl.float32)
        rotated = low * cos - high * sin
        high = high * cos + low * sin
        low = rotated
    if head < HEADS:
        target = source
    else:
        # A request whose values overflow must not leave NaN in pages that another request gets later: hidden slots
        # are multiplied by zero, and zero times NaN is NaN.
        low = tl.where(tl.abs(low) < float("inf"), low, 0.0)
        high = tl.where(tl.abs(high) < float("inf"), high, 0.0)
        slot = tl.load(slots + token, mask=token < tokens, other=0).to(tl.int64)
        target = pool + ((slot * (2 * KV_HEADS) + head - HEADS) * (2 * HALF))[:, None] + columns
    tl.store(target, low.to(target.dtype.element_ty), mask=inside)
    tl.store(target + HALF, high.to(target.dtype.element_ty), mask=inside)


def rotate_and_store(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    norm_weight: torch.Tensor | None,
    eps: float,
    pool: torch.Tensor,
    pdl: bool = False,
) -> None:
    """Rotate queries (in place) and keys by their positions, and write keys and values to their slots of the pool.

    Args:
        qkv: [tokens, heads + 2 * kv heads, head_dim]; queries first, then keys, then values.
        positions, slots: int32 [tokens].
        tables: cosines and sines, each [context length, head_dim / 2].
        norm_weight: [heads + kv heads, head_dim] for an RMS norm of each query and key head before rotation, or None.
        pool: [slots, 2, kv heads, head_dim].
        pdl: whether this and the next kernel overlap with those before them (dependent_launch.py).
    """
    tokens, all_heads, head_dim = qkv.shape
    kv_heads = pool.shape[2]
    cos, sin = tables
    # One token a program is soonest done while all run at once.
    tokens_each, warps = (1, 1) if tokens <= 64 else (32, 4)
    _rotate_and_store[(triton.cdiv(tokens, tokens_each), all_heads)](
        qkv,
        positions,
        slots,
        cos,
        sin,
        norm_weight if norm_weight is not None else qkv,
        pool,
        eps,
        tokens,
        HEADS=all_heads - 2 * kv_heads,
        KV_HEADS=kv_heads,
        HALF=head_dim // 2,
        HALF_BLOCK=triton.next_power_of_2(head_dim // 2),
        TOKENS=tokens_each,
        HAS_NORM=norm_weight is not None,
        PDL=pdl,
        num_warps=warps,
        **launch_options(pdl),
    )


@triton.jit
def _silu_and_multiply(gate_up, product, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + columns, mask=inside, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    tl.store(product + row * width + columns, value.to(product.dtype.element_ty), mask=inside)


def silu_and_multiply(gate_up: torch.Tensor, pdl: bool = False) -> torch.Tensor:
    """silu(gate) * up of [tokens, 2 * width], gate first; [tokens, width].

    With `pdl` this and the next kernel overlap with those before them (dependent_launch.py).
    """
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    product = torch.empty((tokens, width), dtype=gate_up.dtype, device=gate_up.device)
    _silu_and_multiply[(tokens, triton.cdiv(width, 1024))](
        gate_up, product, width, BLOCK=1024, PDL=pdl, num_warps=4, **launch_options(pdl)
    )
    return product
