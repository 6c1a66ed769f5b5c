"""The end of a step of 1 to 16 rows: final norm, logits, and each row's largest one, in two kernels.

The first is a few hundred programs that stream the head's weights, the next tile's on their way while one is multiplied
(fragments.py), and keep the best of what they have seen; the second takes the best of those.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from minisgl.scheduler_proc.kernels.dependent_launch import launch_options
from minisgl.scheduler_proc.kernels.fragments import (
    ROWS_TOGETHER,
    load_weights,
    product,
    share_of,
    sum_columns,
    sum_parts,
    warps_for,
)
from minisgl.scheduler_proc.kernels.small_linear import load_norm, normed_rows

MULTIPROCESSORS = 132
"""Of an H200."""


@triton.jit(do_not_specialize=["rows"])
def _logits(
    residual,
    norm_weight,
    weight,
    logits,
    best_values,
    best_tokens,
    rows,
    vocab,
    eps,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    SHARE: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    CHUNKS: tl.constexpr = (K + PARTS * 32 - 1) // (PARTS * 32)
    TURNS: tl.constexpr = (CHUNKS + SHARE - 1) // SHARE
    if PDL:
        gdc_launch_dependents()
    lane = tl.arange(0, 8)
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    low = program * 16 + lane
    weights = load_weights(weight, low, low + 8, vocab, 0, K, CHUNKS, PARTS)
    norm = load_norm(norm_weight, K, TURNS, SHARE, PARTS)
    if PDL:
        gdc_wait()
    xs = ()  # type: tuple[tuple[tl.tensor, ...], ...]
    scales = ()  # type: tuple[tl.tensor, ...]
    values = ()  # type: tuple[tl.tensor, ...]
    tokens = ()  # type: tuple[tl.tensor, ...]
    for group in tl.static_range(GROUPS):
        x, squares = normed_rows(residual, norm, group * 8 + lane // SHARE, rows, K, TURNS, SHARE, PARTS)
        mean = sum_columns(tl.sum(squares, axis=0), SHARE) / K
        xs = xs + (x,)  # noqa: RUF005
        scales = scales + (tl.rsqrt(mean + eps),)  # noqa: RUF005
        values = values + (tl.full((16, 8 // SHARE), float("-inf"), tl.float32),)  # noqa: RUF005
        tokens = tokens + (tl.zeros((16, 8 // SHARE), tl.int32),)  # noqa: RUF005
    for first in range(program * 16, vocab, programs * 16):
        low = first + programs * 16 + lane
        next_weights = load_weights(weight, low, low + 8, vocab, 0, K, CHUNKS, PARTS)
        n = first + tl.arange(0, 16)
        new_values = ()  # type: tuple[tl.tensor, ...]
        new_tokens = ()  # type: tuple[tl.tensor, ...]
        for group in tl.static_range(GROUPS):
            row = group * 8 + tl.arange(0, 8 // SHARE)
            y = sum_columns(product(weights, xs[group], CHUNKS, SHARE, PARTS), SHARE)
            y = sum_parts(tl.permute(y, (1, 2, 0)), PARTS) * scales[group][None, :]
            y = y.to(logits.dtype.element_ty)
            place = logits + row.to(tl.int64)[None, :] * vocab + n[:, None]
            tl.store(place, y, mask=(row < rows)[None, :] & (n < vocab)[:, None])
            value = y.to(tl.float32)
            # NaN compares false with everything; as infinity it is found and makes its row not finite.
            value = tl.where(value == value, value, float("inf"))
            # Only a larger one replaces a lane's earlier, lower token.
            better = (value > values[group]) & (n < vocab)[:, None]
            new_values = new_values + (tl.where(better, value, values[group]),)  # noqa: RUF005
            new_tokens = new_tokens + (tl.where(better, n[:, None], tokens[group]),)  # noqa: RUF005
        values = new_values
        tokens = new_tokens
        weights = next_weights
    for group in tl.static_range(GROUPS):
        row = group * 8 + tl.arange(0, 8 // SHARE)
        best = tl.max(values[group], axis=0)
        token = tl.min(tl.where(values[group] == best[None, :], tokens[group], vocab), axis=0)
        tl.store(best_values + row * programs + program, best, mask=row < rows)
        tl.store(best_tokens + row * programs + program, token, mask=row < rows)


@triton.jit
def _pick(best_values, best_tokens, tokens, finite, programs, vocab, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_wait()
    row = tl.program_id(0)
    program = tl.arange(0, BLOCK)
    place = row * programs + program
    values = tl.load(best_values + place, mask=program < programs, other=float("-inf"))
    candidates = tl.load(best_tokens + place, mask=program < programs, other=vocab)
    best = tl.max(values, axis=0)
    # Nothing larger than minus infinity: any token will do, as the row counts as not finite.
    token = tl.minimum(tl.min(tl.where(values == best, candidates, vocab), axis=0), vocab - 1)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(finite + row, (best > float("-inf")) & (best < float("inf")))


def logits_and_best(
    residual: torch.Tensor, norm_weight: torch.Tensor, weight: torch.Tensor, eps: float, pdl: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """linear(rms_norm(residual)) of float32 [rows <= 16, hidden], and where each row is largest.

    Args:
        weight: [vocab, hidden].

    Returns:
        The logits [rows, vocab] in the weight's dtype; int64 [rows], the lowest id of the largest logit; bool [rows],
        whether that logit is finite (false if any is NaN).
    """
    rows, k = residual.shape
    vocab, device = len(weight), weight.device
    # Measured best of several (bench/ENGINE_LOG.md, entry 11).
    each = 4 if rows == 1 or 4 < rows <= ROWS_TOGETHER else 2
    programs = min(MULTIPROCESSORS * each, triton.cdiv(vocab, 16))
    parts = warps_for(k)
    logits = torch.empty((rows, vocab), dtype=weight.dtype, device=device)
    best_values = torch.empty((rows, programs), dtype=torch.float32, device=device)
    best_tokens = torch.empty((rows, programs), dtype=torch.int32, device=device)
    _logits[(programs,)](
        residual,
        norm_weight,
        weight,
        logits,
        best_values,
        best_tokens,
        rows,
        vocab,
        eps,
        K=k,
        GROUPS=triton.cdiv(rows, ROWS_TOGETHER),
        SHARE=share_of(rows),
        PARTS=parts,
        PDL=pdl,
        num_warps=parts,
        **launch_options(pdl),
    )
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    finite = torch.empty(rows, dtype=torch.bool, device=device)
    _pick[(rows,)](
        best_values,
        best_tokens,
        tokens,
        finite,
        programs,
        vocab,
        BLOCK=triton.next_power_of_2(programs),
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )
    return logits, tokens, finite
