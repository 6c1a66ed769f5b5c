"""The sampling kernels against sampler.py and against the definition; without CUDA in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds; the interpreter needs it too")

from minisgl.sampling_params import SamplingParams  # noqa: E402
from minisgl.scheduler_proc.device_sampler import DeviceSampler  # noqa: E402
from minisgl.scheduler_proc.kernels.sampling import BLOCK  # noqa: E402
from minisgl.scheduler_proc.models.forward_batch import to_device  # noqa: E402
from minisgl.scheduler_proc.request import Request, StepRow  # noqa: E402
from minisgl.scheduler_proc.sampler import SamplingBatch, random_bits, sample, sampling_columns  # noqa: E402

VOCAB_SIZE = BLOCK + 77
INTERPRETED_LONG = [] if torch.cuda.is_available() else [pytest.mark.long]
"""Each takes the interpreter several seconds."""
CAPTURED = pytest.mark.parametrize("captured", [False, pytest.param(True, marks=pytest.mark.gpu)])
WISHES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 0.0},
    {"top_k": 20, "top_p": 0.8, "temperature": 0.7, "repetition_penalty": 1.1},
    {"top_k": 7},
    {"top_k": VOCAB_SIZE - 3},
    {"top_p": 0.9},
    {"top_p": 0.2, "temperature": 2.0},
    {"min_p": 0.1},
    {"top_k": 1200, "top_p": 0.95, "min_p": 0.02, "temperature": 1.5},
    {"presence_penalty": 1.5, "frequency_penalty": -0.5},
    {"repetition_penalty": 0.8, "temperature": 0.0},
    {"min_new_tokens": 2, "temperature": 0.0},
    {"min_new_tokens": 3, "top_p": 0.7},
    {"logit_bias": ((3, 5.0), (70, -5.0)), "repetition_penalty": 1.3},
]


def request_of(index: int, fields: dict[str, Any]) -> Request:
    params = SamplingParams(**{"seed": index - 5, "max_new_tokens": 20, **fields})
    prompt = np.random.default_rng(index).integers(0, VOCAB_SIZE, 9).tolist()
    return Request(index, prompt, len(prompt), params, 20, frozenset({2, 11, 40}), [], pages=[0])


def row_of(request: Request) -> StepRow:
    return StepRow(request, len(request.token_ids) - 1, 1, True)


def sampler_of(captured: bool, dtype: torch.dtype = torch.float32, vocab_size: int = VOCAB_SIZE) -> DeviceSampler:
    sampler = DeviceSampler(vocab_size, 16, dtype, DEVICE, lambda tokens: None)
    if captured:
        sampler.capture()
    return sampler


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@CAPTURED
def test_tokens_are_those_of_the_plain_sampler(captured: bool) -> None:
    """In changing company, step after step: what only the device remembers must be right, too."""
    generator = torch.Generator().manual_seed(0)
    sampler = sampler_of(captured)
    requests = [request_of(index, fields) for index, fields in enumerate(WISHES)]
    # Of 15 and 12 rows graphs for 16 are filled up with rows that must not leave a trace.
    companies = [range(15), [6, 3, 14, 10], [6, 3, 14, 10], [3], range(14, 2, -1)]
    if not captured:
        # Triton's interpreter takes half a second for a row.
        companies = [range(15), [6, 3, 14, 10], range(14, 7, -1)]
    for company in companies:
        rows = [row_of(requests[index]) for index in company]
        logits = torch.randn(len(rows), VOCAB_SIZE, generator=generator) * 3
        # Few candidates and repetition: what was generated before matters.
        logits[:, :60] += 6
        batch = SamplingBatch(*to_device(sampling_columns(rows, VOCAB_SIZE), torch.device("cpu")))
        expected, _ = sample(logits, batch)
        on_device = logits.to(DEVICE)
        found = sampler.sample(rows, on_device, on_device.argmax(-1)).tolist()
        assert found == expected.tolist()
        for row, token in zip(rows, found, strict=True):
            row.request.token_ids.append(token)
            if row.request.keeps_history:
                row.request.observe(token)


def by_definition(logits: torch.Tensor, params: SamplingParams, position: int) -> int:
    """Rank by logit and then by id, filter, and draw in the order of ids; in float64."""
    x = logits.double().numpy()
    weights = np.exp((x - x.max()) / params.temperature)
    ranked = np.argsort(-x, kind="stable")
    kept = np.zeros(len(x))
    ranked = ranked[: params.top_k] if params.top_k > 0 else ranked
    before = np.cumsum(weights[ranked]) - weights[ranked]
    ranked = ranked[before < params.top_p * weights[ranked].sum() * (1 - 1e-12)]
    kept[ranked] = weights[ranked]
    kept[weights < params.min_p] = 0.0
    assert params.seed is not None
    uniform = (random_bits([params.seed], [position])[0] + 0.5) * 2.0**-31
    cumulative = np.cumsum(kept)
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))


@CAPTURED
@pytest.mark.parametrize("levels", [pytest.param(1, marks=INTERPRETED_LONG), 9])
def test_of_equal_logits_the_first_are_kept(levels: int, captured: bool) -> None:
    """As in bfloat16, where many tokens have the same logit: ties at every border of the filters."""
    generator = torch.Generator().manual_seed(levels)
    fields: Sequence[dict[str, Any]] = (
        {"top_k": 5},
        {"top_k": 900},
        {"top_p": 0.3},
        {"top_p": 0.95, "temperature": 0.5},
        {"top_k": 1500, "top_p": 0.4},
        {"top_k": 3, "top_p": 0.99},
        {"min_p": 0.5},
        {},
    )
    sampler = sampler_of(captured, torch.bfloat16)
    logits = torch.randint(0, levels, (len(fields), VOCAB_SIZE), generator=generator).to(torch.bfloat16) / 2
    requests = [request_of(index, one) for index, one in enumerate(fields)]
    on_device = logits.to(DEVICE)
    found = sampler.sample([row_of(one) for one in requests], on_device, on_device.argmax(-1)).tolist()
    assert found == [by_definition(row, one.sampling, 9) for row, one in zip(logits, requests, strict=True)]


def test_the_likeliest_token_is_taken_as_the_forward_found_it() -> None:
    """So that a greedy request gets the same token beside sampled ones, where its own logits have ties."""
    logits = torch.zeros(2, VOCAB_SIZE, device=DEVICE)
    rows = [row_of(request_of(index, {"temperature": temperature})) for index, temperature in enumerate((0.0, 1.0))]
    sampler = sampler_of(False)
    # The second time all is as expected but for where the likeliest tokens are.
    likeliest = [torch.tensor([token, 0], device=DEVICE) for token in (1234, 567)]
    for tokens in likeliest:
        assert sampler.sample(rows, logits, tokens)[0] == tokens[0]
        for row in rows:
            row.start += 1


@pytest.mark.parametrize(
    "value", [float("nan"), *(pytest.param(float(name), marks=INTERPRETED_LONG) for name in ("inf", "-inf"))]
)
def test_logits_that_are_not_numbers_still_give_a_token(value: float) -> None:
    fields: Sequence[dict[str, Any]] = ({}, {"top_p": 0.5}, {"top_k": 3}, {"temperature": 0.0, "presence_penalty": 1.0})
    requests = [request_of(index, one) for index, one in enumerate(fields)]
    whole = torch.full((4, VOCAB_SIZE), value)
    single = torch.where(torch.arange(VOCAB_SIZE) == 2100, value, torch.zeros(4, VOCAB_SIZE))
    sampler = sampler_of(False)
    for logits in (whole.to(DEVICE), single.to(DEVICE)):
        tokens = sampler.sample([row_of(one) for one in requests], logits, logits.argmax(-1)).tolist()
        assert all(0 <= token < VOCAB_SIZE for token in tokens)
        if logits[0, 0] == 0:
            assert (tokens == [2100] * 4) if value == float("inf") else (2100 not in tokens)


def test_requests_that_ended_make_room_for_others() -> None:
    """More requests with penalties, one after another, than have room at once."""
    sampler, logits = sampler_of(False, vocab_size=50), torch.zeros(1, 50, device=DEVICE)
    logits[0, 7] = 1.0
    for index in range(40):
        params = SamplingParams(temperature=0.0, presence_penalty=2.0)
        request = Request(index, [1], 1, params, 4, frozenset(), [], pages=[0])
        found = []
        for _ in range(2):
            found += sampler.sample([row_of(request)], logits, logits.argmax(-1)).tolist()
            request.token_ids.append(found[-1])
            request.observe(found[-1])
        assert found == [7, 0]
        request.pages = []


@pytest.mark.gpu
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_it_takes_a_small_part_of_a_step(spread: float, capsys: pytest.CaptureFixture[str]) -> None:
    """At Qwen2.5-0.5B's vocabulary, where a step takes 0.5 ms for one row and 1.1 ms for 64; random logits are flat."""
    vocab_size = 151936
    settings: dict[str, dict[str, Any]] = {
        "temperature": {},
        "top-p 0.9": {"temperature": 0.8, "top_p": 0.9},
        "chat": {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1},
    }
    sampler = DeviceSampler(vocab_size, 256, torch.bfloat16, DEVICE, lambda tokens: None)
    sampler.capture()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for rows in (1, 8, 64, 256):
        logits = (torch.randn(rows, vocab_size, device=DEVICE) * spread).to(torch.bfloat16)
        likeliest = logits.argmax(-1)
        for name, fields in settings.items():
            requests = [request_of(index, fields) for index in range(rows)]
            steps = [row_of(request) for request in requests]
            for repeat in range(25):
                if repeat == 5:
                    begin.record()
                sampler.sample(steps, logits, likeliest)
                for step in steps:
                    step.start += 1
            end.record()
            end.synchronize()
            for request in requests:
                request.pages = []
            microseconds = begin.elapsed_time(end) / 20 * 1e3
            with capsys.disabled():
                print(f"\nspread {spread:g}, {rows} rows, {name}: {microseconds:.0f} us", end="")
            assert microseconds < 150 + 8 * rows
