"""The output projection after small_attention.py, added to the residual in one kernel.

It takes the parts of the keys together as it loads them: into the form that tensor cores take (fragments.py), with no
kernel in between and each warp for itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from minisgl.scheduler_proc.kernels.dependent_launch import launch_options
from minisgl.scheduler_proc.kernels.fragments import (
    ROWS_TOGETHER,
    every_other_four,
    left_operand,
    load_floats,
    right_operand,
    share_of,
)
from minisgl.scheduler_proc.kernels.small_attention import AttentionParts, first_key, keys_of_warp

WARPS = 4


@triton.jit
def _by_row(x, SHARE: tl.constexpr):
    """x [8, PARTS, 4] with the columns that belong to one row apart: [8 / SHARE, SHARE, PARTS, 4]."""
    return tl.reshape(x, (x.shape[0] // SHARE, SHARE, x.shape[1], x.shape[2]))


@triton.jit
def _for_columns(x, SHARE: tl.constexpr):
    """x [8 / SHARE, 1, PARTS, 4], one a row, for each of its columns: [8, PARTS, 4]."""
    SPREAD: tl.constexpr = (x.shape[0], SHARE, x.shape[2], x.shape[3])
    return tl.reshape(tl.broadcast_to(x, SPREAD), (x.shape[0] * SHARE, x.shape[2], x.shape[3]))


@triton.jit(do_not_specialize=["rows"])
def _add_attention(
    part_values,
    part_scores,
    positions,
    weight,
    residual,
    rows,
    width,
    window,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    COUNT: tl.constexpr,
    TURNS: tl.constexpr,
    GROUPS: tl.constexpr,
    SHARE: tl.constexpr,
    TILES: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program takes 32 dimensions of one head; here each warp has outputs of its own, 16 a tile."""
    if PDL:
        gdc_launch_dependents()
    K: tl.constexpr = HEADS * HEAD_DIM
    head = tl.program_id(1) // (HEAD_DIM // 32)
    block = tl.program_id(1) % (HEAD_DIM // 32)
    k = tl.program_id(1) * 32 + tl.arange(0, 32)[None, None, :]
    lane = tl.arange(0, 8)
    weights = ()  # type: tuple[tl.tensor, ...]
    for tile in tl.static_range(TILES):
        tile_of_warp = (tl.program_id(0) * TILES + tile) * PARTS + tl.arange(0, PARTS)
        low = tile_of_warp[None, :] * 16 + lane[:, None]
        source = weight + low.to(tl.int64)[:, :, None] * K + k
        low_rows = tl.load(source, mask=(low < width)[:, :, None], other=0.0)
        high_rows = tl.load(source + 8 * K, mask=(low + 8 < width)[:, :, None], other=0.0)
        weights = weights + (left_operand(low_rows, high_rows, PARTS),)  # noqa: RUF005
    dims = block * 32 + every_other_four(PARTS)
    four = tl.arange(0, 4)[None, None, :] + tl.zeros((8, PARTS, 4), tl.int32)
    for group in tl.static_range(GROUPS):
        source_row = group * 8 + lane // SHARE
        position = tl.load(positions + source_row, mask=source_row < rows, other=0)
        first = first_key(position, window, HAS_WINDOW)
        count = tl.cdiv(position + 1 - first, PARTS * keys_of_warp(position, first, COUNT, PARTS, KEYS))
        count = tl.where(source_row < rows, count, 0)
        most = tl.max(count, axis=0)
        if PDL and group == 0:
            gdc_wait()
        of_row = (source_row * HEADS + head) * COUNT
        best = tl.full((8, PARTS, 4), float("-inf"), tl.float32)
        total = tl.zeros((8, PARTS, 4), tl.float32)
        attended = tl.zeros((8, PARTS, 4, 8), tl.float32)
        for start in tl.range(0, most, TURNS * SHARE, num_stages=1):
            scores = ()  # type: tuple[tl.tensor, ...]
            values = ()  # type: tuple[tl.tensor, ...]
            for turn in tl.static_range(TURNS):
                part = start + turn * SHARE + lane % SHARE
                there = (part < count)[:, None, None]
                of_part = (of_row + part)[:, None, None]
                scores = scores + (  # noqa: RUF005
                    tl.load(part_scores + of_part * 4 + four, mask=there, other=float("-inf")),
                )
                values = values + (  # noqa: RUF005
                    load_floats(part_values + of_part * HEAD_DIM + dims, there, there, PARTS),
                )
            new_best = best
            for turn in tl.static_range(TURNS):
                new_best = tl.maximum(new_best, scores[turn])
            safe_best = tl.where(new_best == float("-inf"), 0.0, new_best)
            fade = tl.exp2(best - safe_best)
            total *= fade
            attended *= fade[:, :, :, None]
            for turn in tl.static_range(TURNS):
                share = tl.exp2(scores[turn] - safe_best)
                total += share
                attended += tl.reshape(values[turn], (8, PARTS, 4, 8)) * share[:, :, :, None]
            best = new_best
        if SHARE > 1:
            row_best = tl.max(_by_row(best, SHARE), axis=1, keep_dims=True)
            fade = tl.exp2(best - _for_columns(row_best, SHARE))
            row_total = tl.sum(_by_row(total * fade, SHARE), axis=1, keep_dims=True)
            total = _for_columns(row_total, SHARE)
            attended *= fade[:, :, :, None]
        # Columns without a row have nothing.
        total = tl.where(total == 0.0, 1.0, total)
        attended = (attended / total[:, :, :, None]).to(weight.dtype.element_ty)
        x = right_operand(tl.reshape(attended, (8, PARTS, 32)), PARTS)
        row = group * 8 + tl.arange(0, 8 // SHARE)
        for tile in tl.static_range(TILES):
            y = tl.dot(weights[tile], x, input_precision="ieee")
            if SHARE > 1:
                y = tl.sum(tl.reshape(y, (PARTS, 16, 8 // SHARE, SHARE)), axis=3)
            tile_of_warp = (tl.program_id(0) * TILES + tile) * PARTS + tl.arange(0, PARTS)
            n = tile_of_warp[:, None] * 16 + tl.arange(0, 16)[None, :]
            place = residual + row[None, None, :] * width + n[:, :, None]
            tl.atomic_add(place, y, mask=(row < rows)[None, None, :] & (n < width)[:, :, None], sem="relaxed")


def _tiles_and_turns(rows: int) -> tuple[int, int]:
    """How many tiles a warp has, and how many parts each lane loads at once."""
    if rows <= 2:
        return rows, rows
    if rows <= 4:
        return 2, 4
    return 4, 8 if rows <= 8 else 4


def add_attention(
    parts: AttentionParts,
    positions: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    *,
    window: int | None,
    pdl: bool,
) -> None:
    """Take rotate_attend's parts together, project them, and add that to the float32 residual [rows, width] in place.

    Adds with atomics: the order of a sum, and with it the last bits, may vary.

    Args:
        positions: int32 [rows], as given to rotate_attend.
        weight: [width, heads * head_dim].
    """
    rows, heads, count, head_dim = parts.values.shape
    width = len(weight)
    tiles, turns = _tiles_and_turns(rows)
    _add_attention[(triton.cdiv(width, 16 * WARPS * tiles), heads * head_dim // 32)](
        parts.values,
        parts.scores,
        positions,
        weight,
        residual,
        rows,
        width,
        window or 0,
        HEADS=heads,
        HEAD_DIM=head_dim,
        KEYS=parts.keys,
        COUNT=count,
        TURNS=turns,
        GROUPS=triton.cdiv(rows, ROWS_TOGETHER),
        SHARE=share_of(rows),
        TILES=tiles,
        PARTS=WARPS,
        HAS_WINDOW=window is not None,
        PDL=pdl,
        num_warps=WARPS,
        **launch_options(pdl),
    )
