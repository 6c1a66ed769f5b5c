"""The sampling kernel against a plain sort in float64: on a CUDA device, or in Triton's interpreter."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds; the interpreter needs it too")

from minisgl.scheduler_proc.kernels.sampling import sample_rows  # noqa: E402

VOCAB = 5000
ALL = 2**31 - 1
FILTERS = [
    (ALL, 1.0, 0.0),
    (1, 1.0, 0.0),
    (20, 1.0, 0.0),
    (ALL, 0.8, 0.0),
    (ALL, 0.05, 0.0),
    (20, 0.8, 0.0),
    (50, 0.95, 0.02),
    (ALL, 1.0, 0.1),
    (VOCAB, 0.999, 0.001),
]


def kept_tokens(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[list[int], np.ndarray]:
    """The tokens that the filters keep, as the kernel orders them - the last group of equal logits at the end, ids
    ascending in both parts - and their weights."""
    values = logits.double().numpy()
    weights = np.exp((values - values.max()) / temperature)
    order = np.lexsort((np.arange(len(values)), -values))
    ranked = weights[order].copy()
    ranked[top_k:] = 0.0
    before = np.cumsum(ranked) - ranked
    keep = (ranked > 0) & (before < top_p * ranked.sum() * (1 - 1e-9)) if top_p < 1 else ranked > 0
    keep &= ranked >= min_p
    kept = order[keep]
    if top_k >= len(values) and top_p >= 1:
        kept = np.sort(kept)
        return kept.tolist(), weights[kept]
    last = values[kept].min()
    cut_short = (values == last).sum() if min_p == 0 else 0
    tied = np.sort(kept[values[kept] == last]) if cut_short or min_p == 0 else np.array([], int)
    others = np.sort(np.setdiff1d(kept, tied))
    kept = np.concatenate([others, tied])
    return kept.tolist(), weights[kept]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), FILTERS)
def test_draws_are_the_inverse_of_the_kept_distribution(
    dtype: torch.dtype, top_k: int, top_p: float, min_p: float
) -> None:
    generator = torch.Generator().manual_seed(top_k % 1000 + int(top_p * 100))
    rows, temperature = 6, 0.7
    logits = (torch.randn(rows, VOCAB, generator=generator) * 3).to(dtype)
    draws = torch.randint(0, 2**31 - 1, (rows,), generator=generator, dtype=torch.int32)
    which = torch.tensor([4, 0, 1, 5, 2], dtype=torch.int32)
    tokens = sample_rows(
        logits.to(DEVICE),
        which.to(DEVICE),
        torch.full((rows,), temperature, device=DEVICE),
        torch.full((rows,), top_k, dtype=torch.int32, device=DEVICE),
        torch.full((rows,), top_p, device=DEVICE),
        torch.full((rows,), min_p, device=DEVICE),
        draws.to(DEVICE),
    ).tolist()
    for row, token in zip(which.tolist(), tokens, strict=True):
        kept, weights = kept_tokens(logits[row].float(), temperature, top_k, top_p, min_p)
        assert token in kept
        if min_p == 0:
            cumulative = np.cumsum(weights) / weights.sum()
            uniform = (draws[row].item() + 0.5) / 2**31
            at = kept.index(token)
            # Float32 sums may put a draw that falls on a border to its neighbour.
            assert (cumulative[at - 1] if at else 0.0) - 1e-5 <= uniform <= cumulative[at] + 1e-5


def draw_one(logits: list[float], draws: list[int], dtype: torch.dtype = torch.float32, **filters: float) -> list[int]:
    rows = len(draws)
    return sample_rows(
        torch.tensor([logits] * rows, device=DEVICE).to(dtype),
        torch.arange(rows, dtype=torch.int32, device=DEVICE),
        torch.full((rows,), filters.get("temperature", 1.0), device=DEVICE),
        torch.full((rows,), int(filters.get("top_k", ALL)), dtype=torch.int32, device=DEVICE),
        torch.full((rows,), filters.get("top_p", 1.0), device=DEVICE),
        torch.full((rows,), filters.get("min_p", 0.0), device=DEVICE),
        torch.tensor(draws, dtype=torch.int32, device=DEVICE),
    ).tolist()


DRAWS = [0, 2**29, 2**30, 2**30 + 2**29, 2**31 - 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_of_equal_logits_the_first_are_kept(dtype: torch.dtype) -> None:
    flat = [1.0] * 4 + [3.0] * 4 + [2.0] * 4
    assert draw_one(flat, DRAWS, dtype, top_k=2) == [4, 4, 5, 5, 5]
    assert draw_one(flat, DRAWS, dtype, top_k=6, temperature=100.0)[-1] == 9
    assert set(draw_one([0.0] * 8, DRAWS, dtype, top_p=0.25)) == {0, 1}


def test_any_logits_give_a_token() -> None:
    nan, inf = float("nan"), float("inf")
    for logits in ([nan] * 5, [inf, nan, -inf], [-inf] * 4, [inf, inf], [0.0]):
        for filters in ({}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}, {"top_k": 2, "top_p": 0.9}):
            assert all(0 <= token < len(logits) for token in draw_one(logits, DRAWS, **filters))
    assert draw_one([nan, 1.0, nan], DRAWS) == [1] * 5
    assert draw_one([5.0, 1.0], DRAWS, temperature=1e-6) == [0] * 5
