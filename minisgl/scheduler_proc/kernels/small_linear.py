"""The products around attention in a decode step of 1 to 16 rows, each one kernel: RMS norm + linear, RMS norm +
gate/up + SiLU, linear + residual.

A program holds all its weights in registers before it waits for its predecessor (dependent_launch.py), in the form
that tensor cores take (fragments.py). Tile sizes are the measured best of several (bench/ENGINE_LOG.md, entry 11).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from minisgl.scheduler_proc.kernels.dependent_launch import launch_options
from minisgl.scheduler_proc.kernels.fragments import (
    ROWS_TOGETHER,
    chunk_starts,
    every_other_four,
    load_floats,
    load_weights,
    product,
    right_operand,
    share_of,
    sum_columns,
    sum_parts,
    warps_for,
)

MAX_ROWS = 16
MAX_WIDTH = {2: 2048, 4: 512}
"""Widest hidden state by a type's bytes, such that a program's warps can hold 16 or 32 rows of weights; float32 goes
through shared memory, since it has no exact products on tensor cores."""


@triton.jit
def load_norm(norm_weight, K: tl.constexpr, TURNS: tl.constexpr, SHARE: tl.constexpr, PARTS: tl.constexpr):
    """The norm's weights for normed_rows, as a tuple of TURNS blocks [8, PARTS, 32]."""
    tiles = ()  # type: tuple[tl.tensor, ...]
    for turn in tl.static_range(TURNS):
        k = chunk_starts(turn, SHARE, PARTS) + tl.arange(0, 32)[None, None, :]
        tiles = tiles + (tl.load(norm_weight + k, mask=k < K, other=0.0),)  # noqa: RUF005
    return tiles


@triton.jit
def normed_rows(
    residual, norm, row, rows, K: tl.constexpr, TURNS: tl.constexpr, SHARE: tl.constexpr, PARTS: tl.constexpr
):
    """Rows `row` [8] of the residual times the norm's weights as a tuple of TURNS right operands, not yet divided by
    the root of the mean square, and the sums of squares [PARTS, 8] for that."""
    xs = ()  # type: tuple[tl.tensor, ...]
    for turn in tl.static_range(TURNS):
        k = chunk_starts(turn, SHARE, PARTS) + every_other_four(PARTS)
        inside = (row < rows)[:, None, None]
        place = residual + row.to(tl.int64)[:, None, None] * K + k
        xs = xs + (load_floats(place, inside & (k < K), inside & (k + 4 < K), PARTS),)  # noqa: RUF005
    squares = tl.zeros((8, PARTS, 32), tl.float32)
    tiles = ()  # type: tuple[tl.tensor, ...]
    for turn in tl.static_range(TURNS):
        squares += xs[turn] * xs[turn]
        x = (xs[turn] * norm[turn].to(tl.float32)).to(norm[turn].dtype)
        tiles = tiles + (right_operand(x, PARTS),)  # noqa: RUF005
    return tiles, tl.permute(tl.sum(squares, axis=2), (1, 0))


@triton.jit
def _normed(y, squares, eps, K: tl.constexpr, SHARE: tl.constexpr, PARTS: tl.constexpr):
    """A product [PARTS, 16, 8] of normed_rows, summed and divided: [16, 8 / SHARE]."""
    y = sum_columns(y, SHARE)
    squares = sum_columns(squares, SHARE)
    # Joined, so that both sums take one exchange.
    both = tl.join(y, tl.broadcast_to(squares[:, None, :], y.shape))
    y, total = tl.split(sum_parts(tl.permute(both, (1, 2, 3, 0)), PARTS))
    return y * tl.rsqrt(total / K + eps)


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
    GROUPS: tl.constexpr,
    SHARE: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    CHUNKS: tl.constexpr = (K + PARTS * 32 - 1) // (PARTS * 32)
    TURNS: tl.constexpr = (CHUNKS + SHARE - 1) // SHARE
    if PDL:
        gdc_launch_dependents()
    lane = tl.arange(0, 8)
    low = tl.program_id(0) * 16 + lane
    n = tl.program_id(0) * 16 + tl.arange(0, 16)
    weights = load_weights(weight, low, low + 8, width, 0, K, CHUNKS, PARTS)
    norm = load_norm(norm_weight, K, TURNS, SHARE, PARTS)
    if HAS_BIAS:
        added = tl.load(bias + n, mask=n < width, other=0.0).to(tl.float32)[:, None]
    if PDL:
        gdc_wait()
    for group in tl.static_range(GROUPS):
        xs, squares = normed_rows(residual, norm, group * 8 + lane // SHARE, rows, K, TURNS, SHARE, PARTS)
        y = _normed(product(weights, xs, CHUNKS, SHARE, PARTS), squares, eps, K, SHARE, PARTS)
        if HAS_BIAS:
            y += added
        row = group * 8 + tl.arange(0, 8 // SHARE)
        place = output + row[None, :] * width + n[:, None]
        tl.store(place, y.to(output.dtype.element_ty), mask=(row < rows)[None, :] & (n < width)[:, None])


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
    GROUPS: tl.constexpr,
    SHARE: tl.constexpr,
    TILES: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    CHUNKS: tl.constexpr = (K + PARTS * 32 - 1) // (PARTS * 32)
    TURNS: tl.constexpr = (CHUNKS + SHARE - 1) // SHARE
    if PDL:
        gdc_launch_dependents()
    lane = tl.arange(0, 8)
    # A tile's upper 8 rows are gate's, its lower 8 up's: both halves of a result meet in one lane.
    weights = ()  # type: tuple[tuple[tl.tensor, ...], ...]
    for tile in tl.static_range(TILES):
        n = (tl.program_id(0) * TILES + tile) * 8 + lane
        gate = tl.where(n < width, n, 2 * width)
        weights = weights + (load_weights(weight, gate, n + width, 2 * width, 0, K, CHUNKS, PARTS),)  # noqa: RUF005
    norm = load_norm(norm_weight, K, TURNS, SHARE, PARTS)
    if PDL:
        gdc_wait()
    for group in tl.static_range(GROUPS):
        xs, squares = normed_rows(residual, norm, group * 8 + lane // SHARE, rows, K, TURNS, SHARE, PARTS)
        row = group * 8 + tl.arange(0, 8 // SHARE)
        for tile in tl.static_range(TILES):
            y = _normed(product(weights[tile], xs, CHUNKS, SHARE, PARTS), squares, eps, K, SHARE, PARTS)
            gate, up = tl.split(tl.permute(tl.reshape(y, (2, 8, 8 // SHARE)), (1, 2, 0)))
            n = (tl.program_id(0) * TILES + tile) * 8 + lane
            place = output + row[None, :] * width + n[:, None]
            inside = (row < rows)[None, :] & (n < width)[:, None]
            tl.store(place, (gate * tl.sigmoid(gate) * up).to(output.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _linear_add(
    x,
    weight,
    residual,
    rows,
    width,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    SHARE: tl.constexpr,
    CHUNKS: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    TURNS: tl.constexpr = (CHUNKS + SHARE - 1) // SHARE
    if PDL:
        gdc_launch_dependents()
    lane = tl.arange(0, 8)
    low = tl.program_id(0) * 16 + lane
    n = tl.program_id(0) * 16 + tl.arange(0, 16)
    first_k = tl.program_id(1) * (CHUNKS * PARTS * 32)
    weights = load_weights(weight, low, low + 8, width, first_k, K, CHUNKS, PARTS)
    if PDL:
        gdc_wait()
    for group in tl.static_range(GROUPS):
        source = group * 8 + lane // SHARE
        xs = ()  # type: tuple[tl.tensor, ...]
        for turn in tl.static_range(TURNS):
            k = first_k + chunk_starts(turn, SHARE, PARTS) + tl.arange(0, 32)[None, None, :]
            place = x + source.to(tl.int64)[:, None, None] * K + k
            block = tl.load(place, mask=(source < rows)[:, None, None] & (k < K), other=0.0)
            xs = xs + (right_operand(block, PARTS),)  # noqa: RUF005
        y = sum_columns(product(weights, xs, CHUNKS, SHARE, PARTS), SHARE)
        y = sum_parts(tl.permute(y, (1, 2, 0)), PARTS)
        row = group * 8 + tl.arange(0, 8 // SHARE)
        inside = (row < rows)[None, :] & (n < width)[:, None]
        tl.atomic_add(residual + row[None, :] * width + n[:, None], y, mask=inside, sem="relaxed")


def _options(rows: int, parts: int, pdl: bool) -> dict[str, Any]:
    """What all kernels of this file are launched with."""
    return {
        "GROUPS": triton.cdiv(rows, ROWS_TOGETHER),
        "SHARE": share_of(rows),
        "PARTS": parts,
        "PDL": pdl,
        "num_warps": parts,
        **launch_options(pdl),
    }


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
    _norm_linear[(triton.cdiv(width, 16),)](
        residual,
        norm_weight,
        weight,
        bias if bias is not None else weight,
        output,
        rows,
        width,
        eps,
        K=k,
        HAS_BIAS=bias is not None,
        **_options(rows, warps_for(k), pdl),
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
    options = _options(rows, warps_for(k), pdl)
    tiles = 1 if weight.itemsize > 2 else 2
    if tiles == 2 and 4 < rows <= ROWS_TOGETHER:
        # Two tiles want so many registers that only two programs fit on a multiprocessor; with more columns than these
        # a limit makes them spill.
        if k <= 896:
            options["maxnreg"] = 160
        else:
            tiles = 1
    _norm_gate_up[(triton.cdiv(width, 8 * tiles),)](
        residual, norm_weight, weight, output, rows, width, eps, K=k, TILES=tiles, **options
    )
    return output


def linear_add(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, pdl: bool) -> None:
    """Add linear(x) to the float32 residual [rows <= 16, width] in place; x is [rows, K].

    The sum is split over programs that add with atomics, so its order, and with it the last bits, may vary.
    """
    rows, k = x.shape
    width = len(weight)
    parts = 4 if rows <= ROWS_TOGETHER else 8
    most_chunks = 10 if 1 < rows <= 4 else 8 if rows <= ROWS_TOGETHER else 5
    chunks = min(triton.cdiv(k, parts * 32), most_chunks)
    _linear_add[(triton.cdiv(width, 16), triton.cdiv(k, chunks * parts * 32))](
        x, weight, residual, rows, width, K=k, CHUNKS=chunks, **_options(rows, parts, pdl)
    )
