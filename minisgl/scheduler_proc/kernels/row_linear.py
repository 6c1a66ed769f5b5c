"""Matrix products for one row: each weight is read once, on the ordinary cores, at the speed of the memory.

RMS norm + linear, RMS norm + gate/up + SiLU, linear + residual, each one kernel; batch_linear.py has the same three for
several rows. A program computes a few outputs and holds all of their weights in registers before it waits for its
predecessor (see dependent_launch.py). The numbers of outputs, columns and warps are the measured best of several
(bench/ENGINE_LOG.md, entry 5).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from minisgl.scheduler_proc.kernels.dependent_launch import launch_options


@triton.jit
def _load_tiles(weight, n, inside, K: tl.constexpr, TILE_K: tl.constexpr):
    """Rows n of weight [.., K] as a tuple of [n, TILE_K] tiles, which stay in registers."""
    tiles = ()  # type: tuple[tl.tensor, ...]
    for i in tl.static_range((K + TILE_K - 1) // TILE_K):
        k = i * TILE_K + tl.arange(0, TILE_K)
        place = weight + n[:, None].to(tl.int64) * K + k[None, :]
        tiles = tiles + (tl.load(place, mask=inside[:, None] & (k < K)[None, :], other=0.0),)  # noqa: RUF005
    return tiles


@triton.jit
def _load_row(x, N: tl.constexpr, K: tl.constexpr, TILE_K: tl.constexpr):
    """x [K] once for each of N outputs: so it comes in the layout of the weight's tiles and need not be exchanged."""
    tiles = ()  # type: tuple[tl.tensor, ...]
    for i in tl.static_range((K + TILE_K - 1) // TILE_K):
        k = i * TILE_K + tl.arange(0, TILE_K)[None, :] + tl.zeros((N, 1), tl.int32)
        tiles = tiles + (tl.load(x + k, mask=k < K, other=0.0),)  # noqa: RUF005
    return tiles


@triton.jit
def _scale_row(xs, scales, N: tl.constexpr, K: tl.constexpr, TILE_K: tl.constexpr):
    """xs * scales, and the sum of the squares of xs [N]."""
    squares = tl.zeros((N, TILE_K), tl.float32)
    tiles = ()  # type: tuple[tl.tensor, ...]
    for i in tl.static_range((K + TILE_K - 1) // TILE_K):
        squares += xs[i] * xs[i]
        tiles = tiles + (xs[i] * scales[i].to(tl.float32),)  # noqa: RUF005
    return tiles, tl.sum(squares, axis=1)


@triton.jit
def _product(weights, xs, N: tl.constexpr, K: tl.constexpr, TILE_K: tl.constexpr):
    y = tl.zeros((N, TILE_K), tl.float32)
    for i in tl.static_range((K + TILE_K - 1) // TILE_K):
        y += weights[i].to(tl.float32) * xs[i].to(tl.float32)
    return tl.sum(y, axis=1)


@triton.jit
def _norm_linear(
    residual,
    norm_weight,
    weight,
    bias,
    output,
    width,
    eps,
    K: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    inside = n < width
    weights = _load_tiles(weight, n, inside, K, TILE_K)
    scales = _load_row(norm_weight, TILE_N, K, TILE_K)
    if PDL:
        gdc_wait()
    xs, squares = _scale_row(_load_row(residual, TILE_N, K, TILE_K), scales, TILE_N, K, TILE_K)
    y = _product(weights, xs, TILE_N, K, TILE_K) * tl.rsqrt(squares / K + eps)
    if HAS_BIAS:
        y += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + n, y.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _norm_gate_up(
    residual,
    norm_weight,
    weight,
    output,
    width,
    eps,
    K: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    inside = n < width
    gates = _load_tiles(weight, n, inside, K, TILE_K)
    ups = _load_tiles(weight, n + width, inside, K, TILE_K)
    scales = _load_row(norm_weight, TILE_N, K, TILE_K)
    if PDL:
        gdc_wait()
    xs, squares = _scale_row(_load_row(residual, TILE_N, K, TILE_K), scales, TILE_N, K, TILE_K)
    scale = tl.rsqrt(squares / K + eps)
    gate = _product(gates, xs, TILE_N, K, TILE_K) * scale
    up = _product(ups, xs, TILE_N, K, TILE_K) * scale
    tl.store(output + n, (gate * tl.sigmoid(gate) * up).to(output.dtype.element_ty), mask=inside)


@triton.jit
def _linear_add(
    x, weight, residual, width, K: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, PDL: tl.constexpr
):
    if PDL:
        gdc_launch_dependents()
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    inside = n < width
    weights = _load_tiles(weight, n, inside, K, TILE_K)
    if PDL:
        gdc_wait()
    xs = _load_row(x, TILE_N, K, TILE_K)
    before = tl.load(residual + n, mask=inside, other=0.0)
    tl.store(residual + n, before + _product(weights, xs, TILE_N, K, TILE_K), mask=inside)


def norm_linear(
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    pdl: bool,
) -> torch.Tensor:
    """linear(rms_norm(residual)): float32 [1, hidden] to [1, width] in the weight's dtype."""
    width, k = weight.shape
    output = torch.empty((1, width), dtype=weight.dtype, device=weight.device)
    tile_n = 4
    _norm_linear[(triton.cdiv(width, tile_n),)](
        residual,
        norm_weight,
        weight,
        bias if bias is not None else weight,
        output,
        width,
        eps,
        K=k,
        TILE_N=tile_n,
        TILE_K=256,
        HAS_BIAS=bias is not None,
        PDL=pdl,
        num_warps=2,
        **launch_options(pdl),
    )
    return output


def norm_gate_up(
    residual: torch.Tensor, norm_weight: torch.Tensor, weight: torch.Tensor, eps: float, pdl: bool
) -> torch.Tensor:
    """silu(gate) * up of linear(rms_norm(residual)): float32 [1, hidden] to [1, width].

    Args:
        weight: [2 * width, hidden], gate first.
    """
    width, k = len(weight) // 2, weight.shape[1]
    output = torch.empty((1, width), dtype=weight.dtype, device=weight.device)
    tile_n = 8
    _norm_gate_up[(triton.cdiv(width, tile_n),)](
        residual,
        norm_weight,
        weight,
        output,
        width,
        eps,
        K=k,
        TILE_N=tile_n,
        TILE_K=256,
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )
    return output


def linear_add(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, pdl: bool) -> None:
    """Add linear(x) to the float32 residual [1, width] in place; x is [1, K]."""
    width, k = weight.shape
    tile_n, tile_k, warps = (2, 256, 2) if k <= 2048 else (2, 512, 4)
    _linear_add[(triton.cdiv(width, tile_n),)](
        x,
        weight,
        residual,
        width,
        K=k,
        TILE_N=tile_n,
        TILE_K=tile_k,
        PDL=pdl,
        num_warps=warps,
        **launch_options(pdl),
    )
