"""From logits to token ids, each row by its own parameters.

Order as in sglang: temperature, softmax, top-k, top-p, min-p, draw. A draw is the inverse of the cumulative
distribution at one uniform number, which is a hash of the request's seed and the token's position: the same request
draws the same tokens whatever runs beside it, after a preemption, and on any replica.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from minisgl.sampling_params import SamplingParams
from minisgl.scheduler_proc.models.forward_batch import Array
from minisgl.scheduler_proc.request import StepRow

CPU_CANDIDATES = 1024
"""How many of the likeliest tokens a CPU sorts before it sorts all: a whole vocabulary takes it 10 ms a row."""

ROWS_AT_ONCE = 64
"""Rows that are filtered and drawn together, which bounds the memory of their sorted copies."""

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
    """

    plain_rows: torch.Tensor
    filtered_rows: torch.Tensor
    draws: torch.Tensor
    temperatures: torch.Tensor
    top_ps: torch.Tensor
    min_ps: torch.Tensor
    top_ks: torch.Tensor
    banned: torch.Tensor


def always_greedy(rows: Sequence[StepRow]) -> bool:
    """Whether every row simply takes its likeliest token."""
    return all(row.request.sampling.greedy and not _bans(row) for row in rows)


def _bans(row: StepRow) -> bool:
    """Whether the row's next token comes too early to be a stop token."""
    request = row.request
    return row.start + row.length - request.prompt_len < request.sampling.min_new_tokens


def sampling_columns(rows: Sequence[StepRow]) -> list[Array]:
    """The arrays of a SamplingBatch for rows that sample, in the order of its fields; make it of them on the device."""
    params = [row.request.sampling for row in rows]
    positions = [row.start + row.length for row in rows]
    seeds = [p.seed if p.seed is not None else row.request.rid for p, row in zip(params, rows, strict=True)]
    filtered = [index for index, p in enumerate(params) if not p.greedy and _filters(p)]
    plain = [index for index, p in enumerate(params) if not p.greedy and not _filters(p)]
    banned = [
        (index, token_id) for index, row in enumerate(rows) if _bans(row) for token_id in sorted(row.request.stop_ids)
    ]
    return [
        np.array(plain, np.int32),
        np.array(filtered, np.int32),
        random_bits(seeds, positions),
        np.array([p.temperature for p in params], np.float32),
        np.array([p.top_p for p in params], np.float32),
        np.array([p.min_p for p in params], np.float32),
        np.array([p.top_k if p.top_k > 0 else 2**31 - 1 for p in params], np.int32),
        np.array(banned, np.int32).reshape(-1, 2).T.copy(),
    ]


def _filters(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def random_bits(seeds: Sequence[int], positions: Sequence[int]) -> Array:
    """31 random bits (int32, not negative) for each pair of a seed and a token position.

    Two rounds of splitmix64's finaliser (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"),
    the seed in the first and the position in the second, so that neighbouring seeds have unrelated sequences.
    """
    state = np.array([seed % 2**64 for seed in seeds], np.uint64)
    # Unsigned overflow is the point here; numpy's arrays wrap silently.
    state = _mix(state + _GOLDEN_GAMMA)
    state = _mix(state + _GOLDEN_GAMMA * np.array(positions, np.uint64))
    bits: Array = (state >> np.uint64(33)).astype(np.int32)
    return bits


def _mix(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = state ^ (state >> np.uint64(31))
    return mixed


def sample(logits: torch.Tensor, batch: SamplingBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose a token for every row.

    NaN counts as the least likely logit and infinities as the largest finite numbers, so that any logits give a token.

    Args:
        logits: [rows, vocab], any float dtype; banned entries are overwritten.

    Returns:
        Token ids int64 [rows], each in 0 .. vocab - 1, and bool [rows]: whether the row's largest logit was finite.
    """
    if batch.banned.shape[1]:
        logits[batch.banned[0], batch.banned[1]] = float("-inf")
    best, tokens = logits.max(dim=-1)
    if len(batch.plain_rows):
        for rows in torch.split(batch.plain_rows, ROWS_AT_ONCE):
            tokens[rows] = _draw(*_probabilities_and_draws(logits, batch, rows))
    if len(batch.filtered_rows):
        for rows in torch.split(batch.filtered_rows, ROWS_AT_ONCE):
            tokens[rows] = _sample_filtered(logits, batch, rows)
    return tokens.clamp_(0, logits.shape[1] - 1), torch.isfinite(best)


def _probabilities_and_draws(
    logits: torch.Tensor, batch: SamplingBatch, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 [rows, vocab] after temperature, and [rows, 1] uniform numbers above 0 and below 1."""
    chosen = logits[rows].float()
    limits = torch.finfo(torch.float32)
    chosen = chosen.nan_to_num_(limits.min, limits.max, limits.min)
    # The largest becomes 0 before the division, so that a tiny temperature cannot make infinities.
    chosen -= chosen.amax(dim=-1, keepdim=True)
    chosen /= batch.temperatures[rows, None]
    draws = (batch.draws[rows, None].to(_wide(chosen)) + 0.5) * 2.0**-31
    return torch.softmax(chosen, dim=-1), draws


def _wide(tensor: torch.Tensor) -> torch.dtype:
    """The type that sums are kept in: float64, but for MPS, which has none."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _draw(probabilities: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """The index at which the cumulative sum of [rows, n] first exceeds the draw's share of the total; [rows]."""
    cumulative = probabilities.cumsum(dim=-1, dtype=_wide(probabilities))
    total = cumulative[:, -1:].contiguous()
    index = torch.searchsorted(cumulative, draws * total, right=True)
    # Where rounding lifted the draw to the total itself, the last index that adds to it is meant.
    last = torch.searchsorted(cumulative, total)
    return torch.minimum(index, last).squeeze(-1)


def _sample_filtered(logits: torch.Tensor, batch: SamplingBatch, rows: torch.Tensor) -> torch.Tensor:
    probabilities, draws = _probabilities_and_draws(logits, batch, rows)
    top_k, top_p, min_p = (column[rows, None] for column in (batch.top_ks, batch.top_ps, batch.min_ps))
    vocab_size = probabilities.shape[1]
    if logits.device.type != "cpu" or vocab_size <= CPU_CANDIDATES:
        ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
        return _draw_ranked(ranked, order, top_k, top_p, min_p, draws)
    ranked, order = probabilities.topk(CPU_CANDIDATES, dim=-1)
    tokens = _draw_ranked(ranked, order, top_k, top_p, min_p, draws)
    # A row is right if nothing that its filters would keep lies outside the candidates.
    kept_mass = ranked.sum(dim=-1, keepdim=True) >= top_p
    enough = (top_k <= CPU_CANDIDATES) | (
        (top_k >= vocab_size) & (kept_mass | (ranked[:, -1:] < min_p * ranked[:, :1]))
    )
    (short,) = torch.nonzero(~enough.squeeze(-1), as_tuple=True)
    if len(short):
        ranked, order = probabilities[short].sort(dim=-1, descending=True, stable=True)
        tokens[short] = _draw_ranked(ranked, order, top_k[short], top_p[short], min_p[short], draws[short])
    return tokens


def _draw_ranked(
    ranked: torch.Tensor,
    order: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    draws: torch.Tensor,
) -> torch.Tensor:
    """Filter probabilities sorted downwards ([rows, n], of tokens `order`) and draw a token id from what is left."""
    rank = torch.arange(ranked.shape[1], device=ranked.device)
    kept = ranked.masked_fill(rank >= top_k, 0.0).to(_wide(ranked))
    # top_p is a share of what top_k left over; without top_k that is all, also when only candidates were ranked.
    mass = torch.where(top_k <= ranked.shape[1], kept.sum(dim=-1, keepdim=True), 1.0)
    before = kept.cumsum(dim=-1) - kept
    kept.masked_fill_((before >= top_p * mass) | (ranked < min_p * ranked[:, :1]), 0.0)
    return order.gather(1, _draw(kept, draws)[:, None]).squeeze(-1)
