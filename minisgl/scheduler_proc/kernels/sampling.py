"""Drawing tokens on the device without sorting: one program a row.

The smallest logit that top-k and top-p keep is found by a search over the logits' bit patterns, which are ordered like
the numbers themselves; then the draw is located. Each step of that reads the row from the cache again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 4096
_LOG2_E = tl.constexpr(1.4426950408889634)
_LARGEST = tl.constexpr(3.4028234663852886e38)
_BELOW_ALL = tl.constexpr(-(2**31))


@triton.jit
def _load(row, start, vocab, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """Logits start .. start + BLOCK - 1 as float32, and their keys: integers in the same order (ties stay ties).

    NaN counts as the smallest number, infinities as the largest; what lies beyond the row has the key _BELOW_ALL.
    """
    at = start + tl.arange(0, BLOCK)
    logits = tl.load(row + at, mask=at < vocab, other=0.0).to(tl.float32)
    logits = tl.where(logits == logits, logits, -_LARGEST)
    logits = tl.minimum(tl.maximum(logits, -_LARGEST), _LARGEST)
    bits = logits.to(tl.int32, bitcast=True)
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT
    return logits, tl.where(at < vocab, keys, _BELOW_ALL)


@triton.jit
def _weights(logits, keys, best, scale):
    """What is proportional to the probabilities after temperature, the largest 1."""
    return tl.where(keys == _BELOW_ALL, 0.0, tl.exp2((logits - best) * scale))


@triton.jit
def _threshold(
    row, vocab, best, scale, low, high, target, COUNT: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest key in low .. high - 1 that, with all above it, has the weight `target`; or the count, with COUNT.

    The key `low` is taken to have it.
    """
    while high - low > 1:
        step = (high - low + 3) // 4
        above_1 = tl.zeros((BLOCK,), tl.float32)
        above_2 = tl.zeros((BLOCK,), tl.float32)
        above_3 = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, vocab, BLOCK):
            logits, keys = _load(row, start, vocab, SHIFT, BLOCK)
            if COUNT:  # noqa: SIM108
                weights = tl.where(keys == _BELOW_ALL, 0.0, 1.0)
            else:
                weights = _weights(logits, keys, best, scale)
            above_1 += tl.where(keys >= low + step, weights, 0.0)
            above_2 += tl.where(keys >= low + 2 * step, weights, 0.0)
            above_3 += tl.where(keys >= low + 3 * step, weights, 0.0)
        enough = (tl.sum(above_1) >= target).to(tl.int64)
        enough += (tl.sum(above_2) >= target).to(tl.int64)
        enough += (tl.sum(above_3) >= target).to(tl.int64)
        low += enough * step
        high = tl.minimum(high, low + step)
    return low


@triton.jit
def _sums_above(row, vocab, best, scale, key, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """How many keys are above `key`, their weight, and the weight of one token that has it."""
    counts = tl.zeros((BLOCK,), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    own = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        logits, keys = _load(row, start, vocab, SHIFT, BLOCK)
        weights = _weights(logits, keys, best, scale)
        counts += tl.where(keys > key, 1.0, 0.0)
        sums += tl.where(keys > key, weights, 0.0)
        own = tl.maximum(own, tl.where(keys == key, weights, 0.0))
    return tl.sum(counts), tl.sum(sums), tl.max(own)


@triton.jit
def _sample(
    logits_at,
    rows,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    draws,
    tokens,
    vocab,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.load(rows + tl.program_id(0)).to(tl.int64)
    row = logits_at + index * vocab
    largest = tl.full((BLOCK,), _BELOW_ALL, tl.int32)
    best_logits = tl.full((BLOCK,), -_LARGEST, tl.float32)
    for start in range(0, vocab, BLOCK):
        logits, keys = _load(row, start, vocab, SHIFT, BLOCK)
        largest = tl.maximum(largest, keys)
        best_logits = tl.maximum(best_logits, tl.where(keys == _BELOW_ALL, -_LARGEST, logits))
    best = tl.max(best_logits)
    top = tl.max(largest).to(tl.int64) + 1
    scale = _LOG2_E / tl.load(temperatures + index)

    # Kept is what lies above `key`, and the first `ties` of those that have it.
    key = (tl.full((), _BELOW_ALL, tl.int64) >> SHIFT) - 1
    ties = tl.full((), 0.0, tl.float32)
    count = tl.load(top_ks + index)
    if count < vocab:
        key = _threshold(row, vocab, best, scale, key, top, count.to(tl.float32), True, SHIFT, BLOCK)
        higher, _, _ = _sums_above(row, vocab, best, scale, key, SHIFT, BLOCK)
        ties = count.to(tl.float32) - higher
    _, above, one = _sums_above(row, vocab, best, scale, key, SHIFT, BLOCK)
    top_p = tl.load(top_ps + index)
    if top_p < 1.0:
        target = top_p * (above + ties * one)
        new_key = _threshold(row, vocab, best, scale, key, top, target, False, SHIFT, BLOCK)
        _, above, one = _sums_above(row, vocab, best, scale, new_key, SHIFT, BLOCK)
        needed = tl.where(one > 0.0, tl.ceil((target - above) / tl.maximum(one, 1e-37)), 0.0)
        # Of the ties that top-k has left, top-p needs no more than all.
        ties = tl.where(new_key == key, tl.minimum(needed, ties), needed)
        key = new_key
    least = tl.load(min_ps + index)
    if least > 0.0:
        # The weight of the likeliest is 1, so min-p is a bound on weights.
        cut = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, vocab, BLOCK):
            logits, keys = _load(row, start, vocab, SHIFT, BLOCK)
            weights = _weights(logits, keys, best, scale)
            cut += tl.where((keys > key) & (weights >= least), weights, 0.0)
        above = tl.sum(cut)
        ties = tl.where(one >= least, ties, 0.0)

    # The draw falls on those above, in the order of their ids, or after them on the ties, in the same order.
    goal = (tl.load(draws + index).to(tl.float32) + 0.5) * (1.0 / 2147483648.0) * (above + ties * one)
    among_ties = (goal >= above) & (ties > 0.0)
    if among_ties:
        goal = tl.minimum(tl.floor((goal - above) / tl.maximum(one, 1e-37)), ties - 1.0) + 0.5
    passed = tl.full((), 0.0, tl.float32)
    before = tl.full((), 0.0, tl.float32)
    found = tl.full((), 0, tl.int32)
    for start in range(0, vocab, BLOCK):
        logits, keys = _load(row, start, vocab, SHIFT, BLOCK)
        weights = _weights(logits, keys, best, scale)
        kept = tl.where((keys > key) & (weights >= least), weights, 0.0)
        share = tl.sum(tl.where(among_ties, tl.where(keys == key, 1.0, 0.0), kept))
        # Where rounding leaves the goal beyond the last of them, the last block that has any is meant.
        here = (passed <= goal) & (share > 0.0)
        found = tl.where(here, start, found)
        before = tl.where(here, passed, before)
        passed += share
    logits, keys = _load(row, found, vocab, SHIFT, BLOCK)
    weights = _weights(logits, keys, best, scale)
    kept = tl.where((keys > key) & (weights >= least), weights, 0.0)
    shares = tl.where(among_ties, tl.where(keys == key, 1.0, 0.0), kept)
    inside = tl.arange(0, BLOCK)
    reached = (before + tl.cumsum(shares) > goal) & (shares > 0.0)
    first = tl.min(tl.where(reached, inside, BLOCK))
    last = tl.max(tl.where(shares > 0.0, inside, 0))
    tl.store(tokens + tl.program_id(0), (found + tl.where(first < BLOCK, first, last)).to(tl.int64))


def sample_rows(
    logits: torch.Tensor,
    rows: torch.Tensor,
    temperatures: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    min_ps: torch.Tensor,
    draws: torch.Tensor,
) -> torch.Tensor:
    """A token drawn for each of `rows`, after temperature, top-k, top-p and min-p in this order.

    Args:
        logits: [all rows, vocab], bfloat16, float16 or float32.
        rows: int32 [rows], which of them.
        temperatures, top_ps, min_ps: float32 [all rows]; min_p 0 and top_p 1 keep all.
        top_ks: int32 [all rows]; the vocabulary's size or more keeps all.
        draws: int32 [all rows], 31 random bits each.

    Returns:
        int64 [rows].
    """
    tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    if len(rows):
        _sample[(len(rows),)](
            logits,
            rows,
            temperatures,
            top_ks,
            top_ps,
            min_ps,
            draws,
            tokens,
            logits.shape[1],
            # Of a bfloat16 the lower half of the float32 is zero, and need not be searched.
            SHIFT=16 if logits.dtype == torch.bfloat16 else 0,
            BLOCK=_BLOCK,
            num_warps=16,
        )
    return tokens
