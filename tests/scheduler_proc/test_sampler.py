"""Distributions, independence of batch mates, seeds, filters, bans, and logits that are not numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from minisgl.sampling_params import SamplingParams
from minisgl.scheduler_proc.adjustments import TokenMask
from minisgl.scheduler_proc.models.forward_batch import to_device
from minisgl.scheduler_proc.request import Request, StepRow
from minisgl.scheduler_proc.sampler import (
    CANDIDATES,
    SamplingBatch,
    adjust,
    always_greedy,
    random_bits,
    sample,
    sampling_columns,
)

Row = tuple[int, SamplingParams]
"""The position of the token to be sampled, and how."""


def batch_of(rows: Sequence[Row], stop_ids: frozenset[int] = frozenset(), prompt_len: int = 1) -> SamplingBatch:
    step_rows = [
        StepRow(Request(9, [0] * position, prompt_len, params, 1, stop_ids, []), position - 1, 1, True)
        for position, params in rows
    ]
    return SamplingBatch(*to_device(sampling_columns(step_rows, len(LOGITS)), torch.device("cpu")))


def draw(logits: torch.Tensor, rows: Sequence[Row], **options: Any) -> list[int]:
    """One token per row; logits is [vocab] for all rows or [rows, vocab]."""
    tokens, _ = sample(logits.expand(len(rows), -1).clone(), batch_of(rows, **options))
    return [int(token) for token in tokens]


def draws_at(logits: torch.Tensor, params: SamplingParams, count: int) -> list[int]:
    return draw(logits, [(position, params) for position in range(1, count + 1)])


def chi_square_is_plausible(tokens: Sequence[int], probabilities: Sequence[float]) -> bool:
    """Whether counts fit the probabilities: the statistic is within 5 deviations of its mean."""
    counts = np.bincount(tokens, minlength=len(probabilities))
    expected = np.array(probabilities) * len(tokens)
    assert not counts[expected == 0].any(), "a token of probability 0 was drawn"
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.0, 0.0, 1.5])


def filtered(params: SamplingParams, logits: torch.Tensor = LOGITS) -> list[float]:
    """The distribution that is drawn from, written out token by token in the documented order."""
    weights = [math.exp(float(x - logits.max()) / params.temperature) for x in logits]
    ranked = sorted(range(len(weights)), key=lambda token: -weights[token])
    if params.top_k > 0:
        ranked = ranked[: params.top_k]
    total, mass = sum(weights[token] for token in ranked), 0.0
    kept: set[int] = set()
    for token in ranked:
        if mass < params.top_p * total and weights[token] >= params.min_p * weights[ranked[0]]:
            kept.add(token)
        mass += weights[token]
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(weights))]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7, "top_k": 3},
        {"top_p": 0.75},
        {"min_p": 0.3},
        {"temperature": 1.3, "top_k": 5, "top_p": 0.9, "min_p": 0.2},
        {"top_k": 4, "top_p": 0.999},
    ],
)
def test_draws_follow_the_filtered_distribution(fields: dict[str, Any]) -> None:
    params = SamplingParams(seed=1, **fields)
    assert chi_square_is_plausible(draws_at(LOGITS, params, 4000), filtered(params))


def test_the_chi_square_test_can_fail() -> None:
    tokens = draws_at(LOGITS, SamplingParams(seed=1), 4000)
    assert not chi_square_is_plausible(tokens, filtered(SamplingParams(temperature=1.25)))


def test_random_bits_are_uniform_over_positions_and_over_seeds() -> None:
    by_position = random_bits([5] * 8000, range(8000)) // 2**26
    by_seed = random_bits(range(-4000, 4000), [17] * 8000) // 2**26
    assert chi_square_is_plausible(by_position.tolist(), [1 / 32] * 32)
    assert chi_square_is_plausible(by_seed.tolist(), [1 / 32] * 32)
    assert abs(np.corrcoef(random_bits([1] * 8000, range(8000)), random_bits([2] * 8000, range(8000)))[0, 1]) < 0.05


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    """Neither the batch mates, nor their number, nor the row's place change a token."""
    torch.manual_seed(0)
    kinds: list[dict[str, Any]] = [
        {},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"temperature": 0.0},
        {"top_k": 40, "top_p": 0.7},
    ]
    rows = [(3 + index, SamplingParams(seed=index % 5, **kinds[index % len(kinds)])) for index in range(90)]
    logits = torch.randn(len(rows), 300) * 3
    together = draw(logits, rows)
    assert [draw(logits[i], [row])[0] for i, row in enumerate(rows)] == together
    backwards = draw(logits.flip(0), rows[::-1])
    assert backwards[::-1] == together
    assert draw(logits, rows) == together


def test_seeds_differ_and_an_absent_one_is_the_request_id() -> None:
    flat = torch.zeros(1000)
    assert draws_at(flat, SamplingParams(seed=1), 50) != draws_at(flat, SamplingParams(seed=2), 50)
    assert draws_at(flat, SamplingParams(seed=None), 50) == draws_at(flat, SamplingParams(seed=9), 50)
    for seed in (-(2**63), 2**63 - 1):
        assert len(set(draws_at(flat, SamplingParams(seed=seed), 50))) > 30


def test_greedy_rows_take_the_largest_whatever_the_filters() -> None:
    for fields in ({"temperature": 0.0}, {"temperature": 0.0, "top_p": 0.1, "seed": 3}, {"top_k": 1}):
        assert set(draws_at(LOGITS, SamplingParams(**fields), 20)) == {1}
    assert set(draws_at(LOGITS, SamplingParams(temperature=1e-5, seed=1), 20)) == {1}


def test_filters_beyond_the_sorted_candidates_are_exact() -> None:
    """A flat distribution over a large vocabulary needs more tokens than a CPU sorts at first."""
    vocab_size = 4 * CANDIDATES
    logits = torch.linspace(0.1, 0.0, vocab_size)[
        torch.randperm(vocab_size, generator=torch.Generator().manual_seed(0))
    ]
    for fields in ({"top_p": 0.5}, {"top_k": 2 * CANDIDATES}, {"min_p": 0.97}, {"top_k": 3000, "top_p": 0.9}):
        params = SamplingParams(seed=1, **fields)
        allowed = filtered(params, logits)
        tokens = draws_at(logits, params, 1000)
        assert all(allowed[token] > 0 for token in tokens)
        # In quarters of the kept tokens by rank, the counts fit.
        ranked = sorted((token for token in range(vocab_size) if allowed[token]), key=lambda token: -allowed[token])
        assert len(ranked) > CANDIDATES and set(ranked[CANDIDATES:]) & set(tokens)
        part = {token: min(3, 4 * place // len(ranked)) for place, token in enumerate(ranked)}
        masses = [sum(allowed[token] for token in ranked if part[token] == quarter) for quarter in range(4)]
        assert chi_square_is_plausible([part[token] for token in tokens], masses)


def test_min_new_tokens_bans_the_stop_ids_until_then() -> None:
    greedy = SamplingParams(temperature=0.0, min_new_tokens=2)
    sampled = SamplingParams(temperature=0.5, seed=1, min_new_tokens=2)
    stop_ids = frozenset({1, 5})
    # The prompt has 4 tokens: positions 4 and 5 are the first two new ones.
    tokens = draw(LOGITS, [(4, greedy), (5, greedy), (6, greedy)], stop_ids=stop_ids, prompt_len=4)
    assert tokens == [3, 3, 1]
    early = draw(
        LOGITS, [(position, sampled) for position in (4, 5) for _ in range(200)], stop_ids=stop_ids, prompt_len=4
    )
    assert not stop_ids & set(early)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"top_k": 3, "min_p": 0.1}])
def test_logits_that_are_not_numbers_still_give_a_token(value: float, fields: dict[str, Any]) -> None:
    params = SamplingParams(seed=1, **fields)
    for logits in (torch.full((6,), value), torch.where(torch.arange(6) == 3, value, LOGITS)):
        tokens, finite = sample(logits[None].clone(), batch_of([(1, params)]))
        assert 0 <= int(tokens[0]) < 6
        assert bool(finite[0]) == math.isfinite(max(logits.tolist(), key=lambda x: (math.isnan(x), x)))


def test_one_nan_does_not_disturb_the_other_tokens_or_rows() -> None:
    params = SamplingParams(seed=1, temperature=0.7)
    spoilt = LOGITS.clone()
    spoilt[1] = math.nan
    without = LOGITS.clone()
    without[1] = -math.inf
    rows = [(position, params) for position in range(1, 200)]
    assert draw(spoilt, rows) == draw(without, rows)
    mixed = torch.stack((LOGITS, torch.full((6,), math.nan)))
    assert draw(mixed, rows[:2])[0] == draw(LOGITS, rows[:1])[0]


# ---- biases, penalties and masks ----

VOCAB_SIZE = 77


def asking(prompt: list[int], answer: list[int], mask: TokenMask | None = None, **fields: Any) -> StepRow:
    """A row that samples the token after `answer`."""
    params = SamplingParams(**{"temperature": 0.0, "seed": 3, **fields})
    request = Request(9, list(prompt), len(prompt), params, 50, frozenset({1, 5}), [], mask)
    for token_id in answer:
        request.token_ids.append(token_id)
        if request.keeps_history:
            request.observe(token_id)
    return StepRow(request, len(request.token_ids) - 1, 1, True)


def device_batch(rows: list[StepRow]) -> SamplingBatch:
    return SamplingBatch(*to_device(sampling_columns(rows, VOCAB_SIZE), torch.device("cpu")))


def history(seed: int) -> tuple[list[int], list[int]]:
    generator = np.random.default_rng(seed)
    return generator.integers(0, VOCAB_SIZE, 30).tolist(), generator.integers(0, VOCAB_SIZE, 20).tolist()


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    torch.manual_seed(1)
    penalties = [1.3, 0.7, 2.0, 1.0]
    rows = [asking(*history(seed), repetition_penalty=penalty) for seed, penalty in enumerate(penalties)]
    logits = torch.randn(len(rows), VOCAB_SIZE) * 4
    logits[0, 0] = 0.0
    found = adjust(logits, device_batch(rows))
    for row, penalty, before, after in zip(rows, penalties, logits, found, strict=True):
        ids = torch.tensor([row.request.token_ids])
        assert torch.equal(after, RepetitionPenaltyLogitsProcessor(penalty)(ids, before[None].clone())[0])


def test_frequency_and_presence_count_the_answer_alone() -> None:
    torch.manual_seed(2)
    prompt, answer = history(5)
    counts = torch.bincount(torch.tensor(answer), minlength=VOCAB_SIZE).float()
    assert counts.max() > 1 and set(prompt) - set(answer)
    cases = [(0.3, 0.0), (0.0, 0.5), (-0.25, 1.5), (0.0, 0.0)]
    rows = [asking(prompt, answer, frequency_penalty=f, presence_penalty=p) for f, p in cases]
    logits = torch.randn(len(rows), VOCAB_SIZE).to(torch.bfloat16)
    found = adjust(logits, device_batch(rows))
    for (frequency, presence), before, after in zip(cases, logits.float(), found, strict=True):
        assert torch.allclose(after, before - frequency * counts - presence * (counts > 0), atol=1e-6)


def test_everything_together_goes_in_the_documented_order() -> None:
    torch.manual_seed(3)
    prompt, answer = history(6)
    bias = ((answer[0], 4.0), (prompt[0], -3.0), (76, 100.0))
    fields = {"repetition_penalty": 1.5, "frequency_penalty": 0.2, "presence_penalty": 0.1, "logit_bias": bias}
    rows = [asking([1], [2]), asking(prompt, answer, min_new_tokens=40, **fields), asking([1], [2])]
    logits = torch.randn(3, VOCAB_SIZE) * 3
    untouched = logits.clone()
    found = adjust(logits, device_batch(rows))
    expected = logits[1].clone()
    for token_id, value in bias:
        expected[token_id] += value
    for token_id in {*prompt, *answer}:
        expected[token_id] = expected[token_id] / 1.5 if expected[token_id] > 0 else expected[token_id] * 1.5
    for token_id in set(answer):
        expected[token_id] -= 0.2 * answer.count(token_id) + 0.1
    expected[[1, 5]] = -math.inf
    assert torch.allclose(found[1], expected, atol=1e-5)
    assert torch.equal(found[[0, 2]], logits[[0, 2]])
    assert torch.equal(logits, untouched), "log probabilities need the model's own logits"
    assert adjust(logits, device_batch([rows[0]])) is logits


class SomeTokens:
    """A TokenMask that always allows the same tokens."""

    def __init__(self, *token_ids: int) -> None:
        self.token_ids = token_ids
        self.accepted: list[int] = []
        self.ready, self.problem, self.ended = True, None, False

    def fill(self, row: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        row[:] = 0
        for token_id in self.token_ids:
            row.view(np.uint32)[token_id // 32] |= np.uint32(1 << token_id % 32)

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)


def test_masks_leave_only_what_they_allow_and_touch_no_other_row() -> None:
    torch.manual_seed(4)
    allowed = [(0, 31, 32, 63, 64, 76), (76,), (31,), (1, 40), tuple(range(VOCAB_SIZE))]
    rows = [asking([1], [], None, temperature=t, seed=s) for s, t in enumerate((0.0, 1.0))] * 3
    rows[1:1] = [
        asking([1], [], SomeTokens(*tokens), temperature=temperature, top_p=top_p, seed=seed)
        for tokens in allowed
        for temperature, top_p in ((0.0, 1.0), (2.0, 1.0), (2.0, 0.9))
        for seed in range(3)
    ]
    logits = torch.randn(len(rows), VOCAB_SIZE)
    found = adjust(logits, device_batch(rows))
    tokens, finite = sample(logits, device_batch(rows))
    assert finite.all()
    for row, before, after, token in zip(rows, logits, found, tokens.tolist(), strict=True):
        mask = row.request.token_mask
        if mask is None:
            assert torch.equal(before, after)
            continue
        assert isinstance(mask, SomeTokens)
        assert torch.isfinite(after).nonzero().flatten().tolist() == list(mask.token_ids)
        assert token in mask.token_ids
        if row.request.greedy:
            assert token == max(mask.token_ids, key=lambda token_id: float(before[token_id]))


def test_an_early_stop_token_comes_only_when_a_mask_allows_nothing_else() -> None:
    logits = torch.zeros(2, VOCAB_SIZE)
    logits[:, 5] = 9.0
    rows = [asking([1], [], SomeTokens(*tokens), min_new_tokens=3) for tokens in ((1, 5, 8), (1, 5))]
    assert sample(logits, device_batch(rows))[0].tolist() == [8, 5]


def test_only_plain_greedy_rows_skip_the_sampler() -> None:
    assert always_greedy([asking([1], [2]), asking([1], [2, 3], min_new_tokens=2)])
    for row in (
        asking([1], [2], min_new_tokens=2),
        asking([1], [2], temperature=1.0),
        asking([1], [2], SomeTokens(3)),
        asking([1], [2], logit_bias=((3, 1.0),)),
        asking([1], [2], presence_penalty=0.1),
    ):
        assert not always_greedy([asking([1], [2]), row])
