"""Percentiles, and the latencies of one streamed answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100), linear between the two closest ranks, as numpy's default; NaN when empty."""
    if not 0 <= q <= 100:
        raise ValueError(f"a percentile lies between 0 and 100, got {q}")
    if not values:
        return math.nan
    ordered = sorted(values)
    position = (len(ordered) - 1) * q / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


@dataclass(frozen=True)
class Summary:
    """A sample of latencies: its size, mean, percentiles and maximum, in the unit of its values."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


def summarize(values: Sequence[float]) -> Summary:
    """The summary of a sample; every figure is NaN when it is empty."""
    if not values:
        return Summary(0, math.nan, math.nan, math.nan, math.nan, math.nan)
    ordered = sorted(values)
    p50, p90, p99 = (percentile(ordered, q) for q in (50, 90, 99))
    return Summary(len(ordered), math.fsum(ordered) / len(ordered), p50, p90, p99, ordered[-1])


def inter_token_gaps(arrivals: Sequence[tuple[int, int]]) -> list[float]:
    """Milliseconds between tokens, from (nanoseconds, new tokens) of each arrival.

    An arrival of n tokens counts as n equal gaps, so merged chunks neither hide tokens nor invent zero gaps. The tokens
    of the first arrival have no gap: they belong to the time to first token.
    """
    gaps: list[float] = []
    for (before, _), (after, tokens) in pairwise(arrivals):
        gaps.extend([(after - before) / 1e6 / tokens] * tokens)
    return gaps


def time_per_output_token(arrivals: Sequence[tuple[int, int]]) -> float:
    """Mean milliseconds per token after the first arrival; NaN when nothing follows it."""
    later = sum(tokens for _, tokens in arrivals[1:])
    return (arrivals[-1][0] - arrivals[0][0]) / 1e6 / later if later else math.nan
