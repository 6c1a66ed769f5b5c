"""Matrix products for 2 to 16 rows, on tensor cores: the same three kernels as in row_linear.py.

Weights are the left operand, so that 8 rows need no padding. A program's tile is cut along the summed dimension into
chunks, which follow one another, and those into parts, of which each warp multiplies its own: a product of few outputs
would otherwise leave all warps but one idle. All weights of a program are on its multiprocessor before it waits (see
dependent_launch.py). Tile sizes are the measured best of several (bench/ENGINE_LOG.md, entry 5).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from minisgl.scheduler_proc.kernels.dependent_launch import launch_options


@triton.jit
def _load_parts(
    matrix,
    row,
    inside,
    first_k,
    K: tl.constexpr,
    CHUNKS: tl.constexpr,
    PARTS: tl.constexpr,
    PART_K: tl.constexpr,
):
    """Rows of matrix [.., K] from column first_k on, as a tuple of CHUNKS tiles [PARTS, row, PART_K]."""
    tiles = ()  # type: tuple[tl.tensor, ...]
    for i in tl.static_range(CHUNKS):
        part = i * PARTS + tl.arange(0, PARTS)[:, None, None]
        k = first_k + part * PART_K + tl.arange(0, PART_K)[None, None, :]
        place = matrix + row.to(tl.int64)[None, :, None] * K + k
        tiles = tiles + (tl.load(place, mask=inside[None, :, None] & (k < K), other=0.0),)  # noqa: RUF005
    return tiles


@triton.jit
def _norm_product(
    residual,
    norm_weight,
    weights,
    rows,
    eps,
    TILE_N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    PARTS: tl.constexpr,
    PART_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """weights times the RMS norm of the residual, float32 [TILE_N, ROWS]; waits for the predecessor."""
    one = tl.arange(0, 1)
    scales = _load_parts(norm_weight, one, one < 1, 0, K, CHUNKS, PARTS, PART_K)
    if PDL:
        gdc_wait()
    row = tl.arange(0, ROWS)
    xs = _load_parts(residual, row, row < rows, 0, K, CHUNKS, PARTS, PART_K)
    squares = tl.zeros((PARTS, ROWS), tl.float32)
    y = tl.zeros((PARTS, TILE_N, ROWS), tl.float32)
    for i in tl.static_range(CHUNKS):
        squares += tl.sum(xs[i] * xs[i], axis=2)
        x = (xs[i] * scales[i].to(tl.float32)).to(weights[i].dtype)
        y = tl.dot(weights[i], tl.permute(x, (0, 2, 1)), y, input_precision="ieee")
    return tl.sum(y, axis=0) * tl.rsqrt(tl.sum(squares, axis=0) / K + eps)[None, :]


@triton.jit(do_not_specialize=["rows"])
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
    ROWS: tl.constexpr,
    TILE_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    PARTS: tl.constexpr,
    PART_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    inside = n < width
    weights = _load_parts(weight, n, inside, 0, K, CHUNKS, PARTS, PART_K)
    y = _norm_product(residual, norm_weight, weights, rows, eps, TILE_N, K, ROWS, CHUNKS, PARTS, PART_K, PDL)
    if HAS_BIAS:
        y += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[:, None]
    row = tl.arange(0, ROWS)
    place = output + row[None, :] * width + n[:, None]
    tl.store(place, y.to(output.dtype.element_ty), mask=(row < rows)[None, :] & inside[:, None])


@triton.jit(do_not_specialize=["rows"])
def _norm_gate_up(
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
    CHUNKS: tl.constexpr,
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
    weights = _load_parts(weight, n + (turn % 2) * width, n < width, 0, K, CHUNKS, PARTS, PART_K)
    y = _norm_product(residual, norm_weight, weights, rows, eps, TILE_N, K, ROWS, CHUNKS, PARTS, PART_K, PDL)
    gate, up = tl.split(tl.permute(tl.reshape(y, (TILE_N // 2, 2, ROWS)), (0, 2, 1)))
    product = (gate * tl.sigmoid(gate) * up).to(output.dtype.element_ty)
    column = of_tile + tl.arange(0, TILE_N // 2)
    row = tl.arange(0, ROWS)
    place = output + row[None, :] * width + column[:, None]
    tl.store(place, product, mask=(row < rows)[None, :] & (column < width)[:, None])


@triton.jit(do_not_specialize=["rows"])
def _linear_add(
    x,
    weight,
    residual,
    rows,
    width,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    PARTS: tl.constexpr,
    PART_K: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    inside = n < width
    first_k = tl.program_id(1) * (CHUNKS * PARTS * PART_K)
    weights = _load_parts(weight, n, inside, first_k, K, CHUNKS, PARTS, PART_K)
    if PDL:
        gdc_wait()
    row = tl.arange(0, ROWS)
    xs = _load_parts(x, row, row < rows, first_k, K, CHUNKS, PARTS, PART_K)
    products = tl.zeros((PARTS, TILE_N, ROWS), tl.float32)
    for i in tl.static_range(CHUNKS):
        products = tl.dot(weights[i], tl.permute(xs[i], (0, 2, 1)), products, input_precision="ieee")
    y = tl.sum(products, axis=0)
    place = residual + row[None, :] * width + n[:, None]
    tl.atomic_add(place, y, mask=(row < rows)[None, :] & inside[:, None], sem="relaxed")


def _padded(rows: int) -> int:
    """What the right operand of a tensor core takes."""
    return 8 if rows <= 8 else 16


def norm_linear(
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    pdl: bool,
) -> torch.Tensor:
    """linear(rms_norm(residual)): float32 [rows <= 16, hidden] to [rows, width] in the weight's dtype."""
    rows, k = residual.shape
    width = len(weight)
    output = torch.empty((rows, width), dtype=weight.dtype, device=weight.device)
    tile_n, parts = 16, 4
    part_k = 256 if rows <= 8 else 32
    _norm_linear[(triton.cdiv(width, tile_n),)](
        residual,
        norm_weight,
        weight,
        bias if bias is not None else weight,
        output,
        rows,
        width,
        eps,
        K=k,
        ROWS=_padded(rows),
        TILE_N=tile_n,
        CHUNKS=triton.cdiv(k, parts * part_k),
        PARTS=parts,
        PART_K=part_k,
        HAS_BIAS=bias is not None,
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )
    return output


def norm_gate_up(
    residual: torch.Tensor, norm_weight: torch.Tensor, weight: torch.Tensor, eps: float, pdl: bool
) -> torch.Tensor:
    """silu(gate) * up of linear(rms_norm(residual)): float32 [rows <= 16, hidden] to [rows, width].

    Args:
        weight: [2 * width, hidden], gate first.
    """
    rows, k = residual.shape
    width = len(weight) // 2
    output = torch.empty((rows, width), dtype=weight.dtype, device=weight.device)
    tile_n, parts, part_k = 32, 4, 32
    _norm_gate_up[(triton.cdiv(2 * width, tile_n),)](
        residual,
        norm_weight,
        weight,
        output,
        rows,
        width,
        eps,
        K=k,
        ROWS=_padded(rows),
        TILE_N=tile_n,
        CHUNKS=triton.cdiv(k, parts * part_k),
        PARTS=parts,
        PART_K=part_k,
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )
    return output


def linear_add(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, pdl: bool) -> None:
    """Add linear(x) to the float32 residual [rows <= 16, width] in place; x is [rows, K].

    The sum is split over programs that add with atomics, so its order, and with it the last bits, may vary.
    """
    rows, k = x.shape
    width = len(weight)
    tile_n, parts, part_k = (16, 2, 128) if k <= 2048 else (32, 1, 256)
    _linear_add[(triton.cdiv(width, tile_n), triton.cdiv(k, parts * part_k))](
        x,
        weight,
        residual,
        rows,
        width,
        K=k,
        ROWS=_padded(rows),
        TILE_N=tile_n,
        CHUNKS=1,
        PARTS=parts,
        PART_K=part_k,
        PDL=pdl,
        num_warps=parts,
        **launch_options(pdl),
    )
