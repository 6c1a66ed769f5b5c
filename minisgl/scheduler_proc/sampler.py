"""From logits to token ids, each row by its own parameters.

Order: logit bias, repetition, frequency and presence penalty, as in vLLM; bans and masks; then, as in sglang,
temperature, softmax, top-k, top-p, min-p, draw. A draw is the inverse of the cumulative distribution over what is left,
in the vocabulary's order, at one uniform number, which is a hash of the request's seed and the token's position: the
same request draws the same tokens whatever runs beside it, after a preemption, and on any replica.

This is what CPUs and plain torch run, and the reference for kernels/sampling.py, which draws on CUDA.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from minisgl.sampling_params import SamplingParams
from minisgl.scheduler_proc.adjustments import Adjustments, withdraw
from minisgl.scheduler_proc.models.forward_batch import Array
from minisgl.scheduler_proc.request import StepRow

CANDIDATES = 512
"""How many of the likeliest tokens a CPU sorts before it sorts all."""
BLOCK = 512
"""Largest number of neighbouring tokens that are summed or compared as one; it divides the vocabulary."""

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """The sampling rows of one step; "row" counts the rows that sample.

    Attributes:
        plain_rows: rows that draw from the whole distribution, int32 [plain].
        filtered_rows: rows with top-k, top-p or min-p, int32 [filtered]. All others are greedy.
        draws: int32 [rows], 31 random bits each.
        temperatures, top_ps, min_ps: float32 [rows].
        top_ks: int32 [rows]; the vocabulary's size or more keeps all.
        banned: int32 [2, bans], pairs of row and token id that must not come.
        biased, biases: int32 [2, biases] and float32 [biases], what is added to which row's and token's logit.
        repeated, repetition: likewise, the repetition penalty of each token seen before.
        generated, lowered: likewise, what is subtracted for each generated token.
        masked_rows, masks: int32 [masked] and [masked, ceil(vocab / 32)], rows and the tokens that may come there: bit
            i % 32 of word i // 32 for token i.
    """

    plain_rows: torch.Tensor
    filtered_rows: torch.Tensor
    draws: torch.Tensor
    temperatures: torch.Tensor
    top_ps: torch.Tensor
    min_ps: torch.Tensor
    top_ks: torch.Tensor
    banned: torch.Tensor
    biased: torch.Tensor
    biases: torch.Tensor
    repeated: torch.Tensor
    repetition: torch.Tensor
    generated: torch.Tensor
    lowered: torch.Tensor
    masked_rows: torch.Tensor
    masks: torch.Tensor


def always_greedy(rows: Sequence[StepRow]) -> bool:
    """Whether every row simply takes the model's likeliest token."""
    return all(row.request.takes_likeliest and not _bans(row) for row in rows)


def _bans(row: StepRow) -> bool:
    """Whether the row's next token comes too early to be a stop token."""
    return row.start + row.length < row.request.earliest_stop


def sampling_columns(rows: Sequence[StepRow], vocab_size: int) -> list[Array]:
    """The arrays of a SamplingBatch for rows that sample, in the order of its fields; make it of them on the device."""
    requests = [row.request for row in rows]
    params = [request.sampling for request in requests]
    positions = [row.start + row.length for row in rows]
    seeds = [p.seed if p.seed is not None else request.rid for p, request in zip(params, requests, strict=True)]
    drawn = [index for index, request in enumerate(requests) if not request.greedy]
    banned = [
        (index, token_id)
        for index, row in enumerate(rows)
        if _bans(row) and row.request.token_mask is None
        for token_id in sorted(row.request.stop_ids)
    ]
    return [
        np.array([index for index in drawn if not _filters(params[index])], np.int32),
        np.array([index for index in drawn if _filters(params[index])], np.int32),
        random_bits(seeds, positions),
        np.array([p.temperature for p in params], np.float32),
        np.array([p.top_p for p in params], np.float32),
        np.array([p.min_p for p in params], np.float32),
        np.array([p.top_k if p.top_k > 0 else 2**31 - 1 for p in params], np.int32),
        np.array(banned, np.int32).reshape(-1, 2).T.copy(),
        *_adjustment_columns([(index, r.adjustments) for index, r in enumerate(requests) if r.adjustments is not None]),
        *_mask_columns([(index, row) for index, row in enumerate(rows) if row.request.token_mask], vocab_size),
    ]


def _adjustment_columns(adjusted: Sequence[tuple[int, Adjustments]]) -> list[Array]:
    """`biased` to `lowered` of SamplingBatch, from pairs of row and what is adjusted there."""
    rows = [row for row, _ in adjusted]
    every = [adjustments for _, adjustments in adjusted]
    seen, generated = [a.seen for a in every], [a.generated for a in every]
    presence = _spread([a.presence_penalty for a in every], generated)
    frequency = _spread([a.frequency_penalty for a in every], generated)
    return [
        _pairs(rows, [a.bias_ids for a in every]),
        np.concatenate([np.zeros(0, np.float32), *(a.biases for a in every)]),
        _pairs(rows, seen),
        _spread([a.repetition_penalty for a in every], seen),
        _pairs(rows, generated),
        presence + frequency * np.concatenate([np.zeros(0, np.float32), *(a.counts for a in every)]),
    ]


def _pairs(rows: Sequence[int], token_ids: Sequence[Array]) -> Array:
    """int32 [2, all token ids]: each row with each of its token ids."""
    row_of_each = np.repeat(np.array(rows, np.int32), [len(ids) for ids in token_ids])
    return np.stack((row_of_each, np.concatenate([np.zeros(0, np.int32), *token_ids])))


def _spread(values: Sequence[float], token_ids: Sequence[Array]) -> Array:
    """float32 [all token ids]: each row's value for each of its token ids."""
    return np.repeat(np.array(values, np.float32), [len(ids) for ids in token_ids])


def _mask_columns(masked: Sequence[tuple[int, StepRow]], vocab_size: int) -> list[Array]:
    """`masked_rows` and `masks` of SamplingBatch, from pairs of row index and row."""
    masks = np.zeros((len(masked), -(-vocab_size // 32)), np.int32)
    for mask, (_, row) in zip(masks, masked, strict=True):
        if row.request.token_mask is not None:
            row.request.token_mask.fill(mask)
        if _bans(row):
            # Nothing else allowed: then the grammar leaves no choice.
            withdraw(mask, row.request.stop_ids)
    return [np.array([index for index, _ in masked], np.int32), masks]


def _filters(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def random_bits(seeds: Sequence[int], positions: Sequence[int]) -> Array:
    """31 random bits (int32, not negative) for each pair of a seed and a token position.

    Two rounds of splitmix64's finaliser (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"),
    the seed in the first and the position in the second, so that neighbouring seeds have unrelated sequences.
    """
    state = _mix(mixed_seeds(seeds) + _GOLDEN_GAMMA * np.array(positions, np.uint64))
    bits: Array = (state >> np.uint64(33)).astype(np.int32)
    return bits


def mixed_seeds(seeds: Sequence[int]) -> npt.NDArray[np.uint64]:
    """The first round of random_bits."""
    # Unsigned overflow is the point here; numpy's arrays wrap silently.
    return _mix(np.array([seed % 2**64 for seed in seeds], np.uint64) + _GOLDEN_GAMMA)


def _mix(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = state ^ (state >> np.uint64(31))
    return mixed


def sample(logits: torch.Tensor, batch: SamplingBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose a token for every row.

    NaN counts as the least likely logit and infinities as the largest finite numbers, so that any logits give a token.

    Args:
        logits: [rows, vocab], any float dtype.

    Returns:
        Token ids int64 [rows], each in 0 .. vocab - 1, and bool [rows]: whether the row's largest logit was finite.
    """
    logits = adjust(logits, batch)
    tokens, best = _largest(logits)
    for sampled, choose in ((batch.plain_rows, _sample_plain), (batch.filtered_rows, _sample_filtered)):
        for rows in torch.split(sampled, _rows_at_once(logits)) if len(sampled) else ():
            tokens[rows] = choose(logits, batch, rows)
    return tokens.clamp_(0, logits.shape[1] - 1), torch.isfinite(best)


def _rows_at_once(logits: torch.Tensor) -> int:
    # Few rows at a time stay in a CPU's cache from one operation to the next; a GPU's memory is only to be bounded.
    return 4 if logits.device.type == "cpu" else 64


def adjust(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Float32 logits after biases, penalties, bans and masks; `logits` itself where there are none.

    The repetition penalty is that of Keskar et al. 2019, "CTRL", as transformers has it: positive logits are divided by
    it and negative ones multiplied.
    """
    biased, repeated, generated, banned = batch.biased, batch.repeated, batch.generated, batch.banned
    if not any(column.numel() for column in (biased, repeated, generated, banned, batch.masks)):
        return logits
    # A small bias would be lost in bfloat16; and log probabilities are taken of the model's own logits later.
    logits = logits.to(torch.float32, copy=True)
    logits[biased[0], biased[1]] += batch.biases
    repeats = logits[repeated[0], repeated[1]]
    logits[repeated[0], repeated[1]] = torch.where(repeats > 0, repeats / batch.repetition, repeats * batch.repetition)
    logits[generated[0], generated[1]] -= batch.lowered
    logits[banned[0], banned[1]] = float("-inf")
    at_once = _rows_at_once(logits)
    bits = torch.arange(8, dtype=torch.uint8, device=logits.device)
    for rows, masks in zip(torch.split(batch.masked_rows, at_once), torch.split(batch.masks, at_once), strict=True):
        allowed = (masks.view(torch.uint8)[:, :, None] >> bits).bitwise_and_(1).flatten(1)[:, : logits.shape[1]]
        logits[rows] = logits[rows].masked_fill_(allowed == 0, float("-inf"))
    return logits


def _largest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index and value of each row's first largest element; NaN is larger than all.

    The largest block is found first: reducing values alone is much faster on a CPU than carrying indices along.
    """
    blocks = torch.unflatten(logits, 1, (-1, math.gcd(logits.shape[1], BLOCK)))
    block = blocks.amax(dim=-1).argmax(dim=-1)
    inside = blocks[torch.arange(len(logits), device=logits.device), block]
    index = inside.argmax(dim=-1, keepdim=True)
    return block * blocks.shape[2] + index.squeeze(-1), inside.gather(1, index).squeeze(-1)


def _sample_plain(logits: torch.Tensor, batch: SamplingBatch, rows: torch.Tensor) -> torch.Tensor:
    return _draw(*_weights_and_draws(logits, batch, rows))


def _sample_filtered(logits: torch.Tensor, batch: SamplingBatch, rows: torch.Tensor) -> torch.Tensor:
    weights, draws = _weights_and_draws(logits, batch, rows)
    total = weights.sum(dim=-1, keepdim=True, dtype=_wide(weights))
    filters = Filters(batch.top_ks[rows, None], batch.top_ps[rows, None], batch.min_ps[rows, None], total)
    if logits.device.type != "cpu":
        return _sample_sorted(weights, filters, draws)
    vocab_size = weights.shape[1]
    ranked, order = weights.topk(min(CANDIDATES, vocab_size), dim=-1)
    kept = _keep(ranked, filters)
    order, by_token = order.sort(dim=-1)
    tokens = order.gather(1, _draw(kept.gather(1, by_token), draws)[:, None]).squeeze(-1)
    # A row is right if nothing that its filters would keep lies outside the candidates.
    top_p_inside = ranked.sum(dim=-1, keepdim=True) >= filters.top_p * filters.total
    min_p_inside = ranked[:, -1:] < filters.min_p * ranked[:, :1]
    top_k_inside = filters.top_k <= ranked.shape[1]
    enough = top_k_inside | ((filters.top_k >= vocab_size) & (top_p_inside | min_p_inside))
    (short,) = torch.nonzero(~enough.squeeze(-1), as_tuple=True)
    if len(short):
        tokens[short] = _sample_sorted(weights[short], Filters(*(column[short] for column in filters)), draws[short])
    return tokens


def _sample_sorted(weights: torch.Tensor, filters: Filters, draws: torch.Tensor) -> torch.Tensor:
    """Filter all weights [rows, vocab] and draw; of equal ones the first are kept."""
    if weights.device.type == "cpu":
        # numpy sorts with vector instructions, torch does not.
        ranked = torch.from_numpy(-np.sort(-weights.numpy(), axis=-1))
    else:
        ranked = weights.sort(dim=-1, descending=True).values
    kept = _keep(ranked, filters)
    last = kept.masked_fill(kept == 0.0, math.inf).amin(dim=-1, keepdim=True)
    equal = weights == last
    surplus = equal & (equal.cumsum(dim=-1) > (kept == last).sum(dim=-1, keepdim=True))
    return _draw(weights.masked_fill(surplus | (weights < last), 0.0), draws)


class Filters(NamedTuple):
    """Columns [rows, 1]: each row's filters, and the sum of all its weights."""

    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    total: torch.Tensor


def _keep(ranked: torch.Tensor, filters: Filters) -> torch.Tensor:
    """Weights sorted downwards ([rows, n]), those that are filtered out replaced by zeros."""
    rank = torch.arange(ranked.shape[1], device=ranked.device)
    kept = ranked.masked_fill(rank >= filters.top_k, 0.0)
    cumulative = kept.cumsum(dim=-1, dtype=_wide(ranked))
    # top_p is a share of what top_k left over; without top_k that is all, also when only candidates were ranked.
    mass = torch.where(filters.top_k <= ranked.shape[1], cumulative[:, -1:], filters.total)
    dropped = (cumulative - kept >= filters.top_p * mass) | (ranked < filters.min_p * ranked[:, :1])
    return kept.masked_fill_(dropped, 0.0)


def _weights_and_draws(
    logits: torch.Tensor, batch: SamplingBatch, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 [rows, vocab] proportional to the probabilities after temperature, the largest 1; and uniform numbers.

    The numbers are [rows, 1], above 0 and below 1.
    """
    weights = logits[rows].float()
    limits = torch.finfo(torch.float32)
    weights.nan_to_num_(limits.min, limits.max, limits.min)
    # The largest becomes 0 before the division, so that a tiny temperature cannot make infinities.
    weights.sub_(weights.amax(dim=-1, keepdim=True)).div_(batch.temperatures[rows, None]).exp_()
    return weights, (batch.draws[rows, None].to(_wide(weights)) + 0.5) * 2.0**-31


def _draw(weights: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """The index at which the cumulative sum of [rows, n] first exceeds the draw's share of the total; [rows].

    First a block is found and then an index in it, so that only the blocks' sums and one block are accumulated.
    """
    blocks = torch.unflatten(weights, 1, (-1, math.gcd(weights.shape[1], BLOCK)))
    sums = blocks.sum(dim=-1, dtype=_wide(weights))
    cumulative = sums.cumsum(dim=-1)
    goal = draws * cumulative[:, -1:]
    block = _first_above(cumulative, goal)
    inside = blocks[torch.arange(len(weights), device=weights.device), block.squeeze(-1)]
    before = cumulative.gather(1, block) - sums.gather(1, block)
    index = _first_above(inside.cumsum(dim=-1, dtype=_wide(weights)), (goal - before).clamp_(min=0.0))
    return (block * blocks.shape[2] + index).squeeze(-1)


def _first_above(cumulative: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """The first index of [rows, n] above `goal` [rows, 1]; [rows, 1]."""
    index = torch.searchsorted(cumulative, goal, right=True)
    # Where rounding lifted the goal to the total itself, the last index that adds to it is meant.
    return torch.minimum(index, torch.searchsorted(cumulative, cumulative[:, -1:].contiguous()))


def _wide(tensor: torch.Tensor) -> torch.dtype:
    """The type that sums are kept in: float64, but for MPS, which has none."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64
