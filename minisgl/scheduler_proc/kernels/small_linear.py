"""Matrix products for a decode step of few rows, where a step is bound by latency and no longer by arithmetic.

Three kernels, each with what surrounds it: RMS norm + linear, RMS norm + gate/up + SiLU, linear + residual. Each exists
twice: for one row on the ordinary cores, and for 2 to 16 rows on tensor cores, whose tiles are cut along the
summed dimension so that each warp multiplies a part of its own.

All follow one pattern. With programmatic dependent launch (`pdl`, compute capability 9.0 and up) a kernel starts while
its predecessor still runs, loads its weights into registers, and only then waits. So what stands before `gdc_wait` may
read nothing but weights and the step's inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MAX_ROWS = 16
MAX_WIDTH = 2048
"""Widest hidden state whose weight tiles still fit in registers."""


class RowTiles(NamedTuple):
    """How the kernels for one row cut a weight: each program takes `n` outputs, `k` summed columns at a time."""

    n: int
    k: int
    warps: int


class BatchTiles(NamedTuple):
    """How the kernels for several rows cut a weight: `n` outputs, `parts` times `part_k` summed columns a program."""

    n: int
    parts: int
    part_k: int
    warps: int


# ---- one row ---------------------------------------------------------------------------------------------------------


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
def _row_product(weights, xs, N: tl.constexpr, K: tl.constexpr, TILE_K: tl.constexpr):
    y = tl.zeros((N, TILE_K), tl.float32)
    for i in tl.static_range((K + TILE_K - 1) // TILE_K):
        y += weights[i].to(tl.float32) * xs[i].to(tl.float32)
    return tl.sum(y, axis=1)


@triton.jit
def _row_norm_linear(
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
    y = _row_product(weights, xs, TILE_N, K, TILE_K) * tl.rsqrt(squares / K + eps)
    if HAS_BIAS:
        y += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + n, y.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _row_norm_gate_up(
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
    gate = _row_product(gates, xs, TILE_N, K, TILE_K) * scale
    up = _row_product(ups, xs, TILE_N, K, TILE_K) * scale
    tl.store(output + n, (gate * tl.sigmoid(gate) * up).to(output.dtype.element_ty), mask=inside)


@triton.jit
def _row_linear_add(
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
    tl.store(residual + n, before + _row_product(weights, xs, TILE_N, K, TILE_K), mask=inside)


# ---- several rows ----------------------------------------------------------------------------------------------------


@triton.jit
def _load_parts(matrix, row, inside, first_k, end_k, K: tl.constexpr, PARTS: tl.constexpr, PART_K: tl.constexpr):
    """Rows of matrix [.., K] as [PARTS, row, PART_K]: the columns first_k .. end_k - 1, cut into parts."""
    k = first_k + tl.arange(0, PARTS)[:, None, None] * PART_K + tl.arange(0, PART_K)[None, None, :]
    place = matrix + row.to(tl.int64)[None, :, None] * K + k
    return tl.load(place, mask=inside[None, :, None] & (k < end_k), other=0.0)


@triton.jit
def _batch_product(weight, x):
    """[PARTS, n, PART_K] times [PARTS, row, PART_K] to float32 [n, row]; a batched product gives each warp a part."""
    return tl.sum(tl.dot(weight, tl.permute(x, (0, 2, 1)), input_precision="ieee"), axis=0)


@triton.jit
def _batch_norm_product(
    residual,
    norm_weight,
    weights,
    rows,
    eps,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    PART_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """weights [PARTS, n, PART_K] times the RMS norm of the residual, float32 [n, ROWS]; waits for the predecessor."""
    k = tl.arange(0, PARTS)[:, None, None] * PART_K + tl.arange(0, PART_K)[None, None, :]
    scales = tl.load(norm_weight + k, mask=k < K, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    row = tl.arange(0, ROWS)
    x = _load_parts(residual, row, row < rows, 0, K, K, PARTS, PART_K)
    squares = tl.sum(tl.sum(x * x, axis=2), axis=0)
    return _batch_product(weights, (x * scales).to(weights.dtype)) * tl.rsqrt(squares / K + eps)[None, :]


@triton.jit
def _batch_norm_linear(
    residual,
    norm_weight,
    weight,
    bias,
    output,
    rows,
    width,
    eps,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_N: tl.constexpr,
    PARTS: tl.constexpr,
    PART_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    inside = n < width
    weights = _load_parts(weight, n, inside, 0, K, K, PARTS, PART_K)
    y = _batch_norm_product(residual, norm_weight, weights, rows, eps, K, ROWS, PARTS, PART_K, PDL)
    if HAS_BIAS:
        y += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[:, None]
    row = tl.arange(0, ROWS)
    place = output + row[None, :] * width + n[:, None]
    tl.store(place, y.to(output.dtype.element_ty), mask=(row < rows)[None, :] & inside[:, None])


@triton.jit
def _batch_norm_gate_up(
    residual,
    norm_weight,
    weight,
    output,
    rows,
    width,
    eps,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_N: tl.constexpr,
    PARTS: tl.constexpr,
    PART_K: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    # Rows of gate and up take turns in the tile, so that one product serves both.
    turn = tl.arange(0, TILE_N)
    of_tile = tl.program_id(0) * (TILE_N // 2)
    n = of_tile + turn // 2
    weights = _load_parts(weight, n + (turn % 2) * width, n < width, 0, K, K, PARTS, PART_K)
    y = _batch_norm_product(residual, norm_weight, weights, rows, eps, K, ROWS, PARTS, PART_K, PDL)
    gate, up = tl.split(tl.permute(tl.reshape(y, (TILE_N // 2, 2, ROWS)), (0, 2, 1)))
    product = (gate * tl.sigmoid(gate) * up).to(output.dtype.element_ty)
    column = of_tile + tl.arange(0, TILE_N // 2)
    row = tl.arange(0, ROWS)
    place = output + row[None, :] * width + column[:, None]
    tl.store(place, product, mask=(row < rows)[None, :] & (column < width)[:, None])


@triton.jit
def _batch_linear_add(
    x,
    weight,
    residual,
    rows,
    width,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_N: tl.constexpr,
    PARTS: tl.constexpr,
    PART_K: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    inside = n < width
    first_k = tl.program_id(1) * (PARTS * PART_K)
    weights = _load_parts(weight, n, inside, first_k, K, K, PARTS, PART_K)
    if PDL:
        gdc_wait()
    row = tl.arange(0, ROWS)
    y = _batch_product(weights, _load_parts(x, row, row < rows, first_k, K, K, PARTS, PART_K))
    place = residual + row[None, :] * width + n[:, None]
    tl.atomic_add(place, y, mask=(row < rows)[None, :] & inside[:, None], sem="relaxed")


# ---- launches --------------------------------------------------------------------------------------------------------


def launch_options(pdl: bool) -> dict[str, bool]:
    """Launch options; Triton knows this one only where it exists."""
    return {"launch_pdl": True} if pdl else {}


def _padded(rows: int) -> int:
    return 8 if rows <= 8 else 16


def _parts_of(k: int, part_k: int) -> int:
    return int(triton.next_power_of_2(triton.cdiv(k, part_k)))


def norm_linear(
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    pdl: bool,
    tiles: RowTiles | BatchTiles | None = None,
) -> torch.Tensor:
    """linear(rms_norm(residual)): float32 [rows <= 16, hidden] to [rows, width] in the weight's dtype."""
    rows, k = residual.shape
    width = len(weight)
    output = torch.empty((rows, width), dtype=weight.dtype, device=weight.device)
    some_bias = bias if bias is not None else weight
    if rows == 1:
        cut = tiles or RowTiles(4, 256, 2)
        _row_norm_linear[(triton.cdiv(width, cut[0]),)](
            residual,
            norm_weight,
            weight,
            some_bias,
            output,
            width,
            eps,
            K=k,
            TILE_N=cut[0],
            TILE_K=cut[1],
            HAS_BIAS=bias is not None,
            PDL=pdl,
            num_warps=cut[-1],
            **launch_options(pdl),
        )
        return output
    batch = tiles or BatchTiles(16, _parts_of(k, 256), 256, _parts_of(k, 256))
    _batch_norm_linear[(triton.cdiv(width, batch[0]),)](
        residual,
        norm_weight,
        weight,
        some_bias,
        output,
        rows,
        width,
        eps,
        K=k,
        ROWS=_padded(rows),
        TILE_N=batch[0],
        PARTS=batch[1],
        PART_K=batch[2],
        HAS_BIAS=bias is not None,
        PDL=pdl,
        num_warps=batch[-1],
        **launch_options(pdl),
    )
    return output


def norm_gate_up(
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    pdl: bool,
    tiles: RowTiles | BatchTiles | None = None,
) -> torch.Tensor:
    """silu(gate) * up of linear(rms_norm(residual)); weight [2 * width, hidden], gate first; [rows <= 16, width]."""
    rows, k = residual.shape
    width = len(weight) // 2
    output = torch.empty((rows, width), dtype=weight.dtype, device=weight.device)
    if rows == 1:
        cut = tiles or RowTiles(8, 256, 4)
        _row_norm_gate_up[(triton.cdiv(width, cut[0]),)](
            residual,
            norm_weight,
            weight,
            output,
            width,
            eps,
            K=k,
            TILE_N=cut[0],
            TILE_K=cut[1],
            PDL=pdl,
            num_warps=cut[-1],
            **launch_options(pdl),
        )
        return output
    batch = tiles or BatchTiles(32, _parts_of(k, 256), 256, _parts_of(k, 256))
    _batch_norm_gate_up[(triton.cdiv(2 * width, batch[0]),)](
        residual,
        norm_weight,
        weight,
        output,
        rows,
        width,
        eps,
        K=k,
        ROWS=_padded(rows),
        TILE_N=batch[0],
        PARTS=batch[1],
        PART_K=batch[2],
        PDL=pdl,
        num_warps=batch[-1],
        **launch_options(pdl),
    )
    return output


def linear_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    pdl: bool,
    tiles: RowTiles | BatchTiles | None = None,
) -> None:
    """Add linear(x) to the float32 residual [rows <= 16, width] in place; x is [rows, K].

    With several rows the sum is split over programs that add with atomics, so its order, and rounding, may vary.
    """
    rows, k = x.shape
    width = len(weight)
    if rows == 1:
        cut = tiles or (RowTiles(4, 256, 4) if k <= MAX_WIDTH else RowTiles(2, 512, 4))
        _row_linear_add[(triton.cdiv(width, cut[0]),)](
            x,
            weight,
            residual,
            width,
            K=k,
            TILE_N=cut[0],
            TILE_K=cut[1],
            PDL=pdl,
            num_warps=cut[-1],
            **launch_options(pdl),
        )
        return
    batch = tiles or (BatchTiles(16, 2, 128, 2) if k <= MAX_WIDTH else BatchTiles(32, 2, 128, 2))
    _batch_linear_add[(triton.cdiv(width, batch[0]), triton.cdiv(k, batch[1] * batch[2]))](
        x,
        weight,
        residual,
        rows,
        width,
        K=k,
        ROWS=_padded(rows),
        TILE_N=batch[0],
        PARTS=batch[1],
        PART_K=batch[2],
        PDL=pdl,
        num_warps=batch[-1],
        **launch_options(pdl),
    )
