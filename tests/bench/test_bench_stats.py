"""Percentiles and token timing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from benchlib.stats import inter_token_gaps, percentile, summarize, time_per_output_token
from hypothesis import given
from hypothesis import strategies as st

SAMPLES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60)


@given(SAMPLES, st.floats(0, 100))
def test_percentiles_are_numpys(values, q):
    assert percentile(values, q) == pytest.approx(float(np.percentile(values, q)), rel=1e-9, abs=1e-6)


@given(SAMPLES)
def test_a_summary_holds_the_sample_between_its_ends(values):
    summary = summarize(values)
    assert summary.count == len(values)
    assert summary.max == max(values)
    assert min(values) <= summary.p50 <= summary.p90 <= summary.p99 <= summary.max
    assert summary.mean == pytest.approx(sum(values) / len(values), rel=1e-9, abs=1e-6)


def test_nothing_has_no_percentile():
    assert math.isnan(percentile([], 50))
    assert summarize([]).count == 0
    assert math.isnan(summarize([]).p99)


@pytest.mark.parametrize("q", [-1, 101, math.nan])
def test_a_percentile_outside_0_to_100_is_refused(q):
    with pytest.raises(ValueError, match="between 0 and 100"):
        percentile([1.0], q)


def test_a_merged_arrival_counts_as_equal_gaps():
    arrivals = [(0, 1), (10_000_000, 1), (40_000_000, 3)]
    assert inter_token_gaps(arrivals) == [10.0, 10.0, 10.0, 10.0]
    assert time_per_output_token(arrivals) == 10.0


def test_tokens_of_the_first_arrival_have_no_gap():
    arrivals = [(5_000_000, 4), (6_000_000, 2)]
    assert inter_token_gaps(arrivals) == [0.5, 0.5]
    assert time_per_output_token(arrivals) == 0.5
    assert inter_token_gaps(arrivals[:1]) == []
    assert math.isnan(time_per_output_token(arrivals[:1]))


@given(st.lists(st.tuples(st.integers(1, 10**9), st.integers(1, 20)), min_size=2, max_size=30))
def test_gaps_add_up_to_the_time_between_first_and_last_token(steps):
    at, arrivals = 0, []
    for gap, tokens in steps:
        at += gap
        arrivals.append((at, tokens))
    gaps = inter_token_gaps(arrivals)
    assert len(gaps) == sum(tokens for _, tokens in arrivals[1:])
    assert math.fsum(gaps) == pytest.approx((arrivals[-1][0] - arrivals[0][0]) / 1e6)
    assert time_per_output_token(arrivals) == pytest.approx(math.fsum(gaps) / len(gaps))
