"""Paged attention against attention written out over contiguous keys and values."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from minisgl.sampling_params import SamplingParams
from minisgl.scheduler_proc.attention.backend import AttentionSpec, make_attention
from minisgl.scheduler_proc.attention.kv_pool import KVPool, KVShape, bytes_per_token
from minisgl.scheduler_proc.models.forward_batch import ForwardBatch, make_forward_batch
from minisgl.scheduler_proc.request import Request, StepPlan, StepRow

PAGE_SIZE, NUM_PAGES, HEADS, KV_HEADS, HEAD_DIM = 4, 64, 6, 2, 8
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DECODE_LENGTHS = (1, 5, 30, 12, 31)
CHUNKS = ((0, 9), (6, 5), (0, 1), (17, 4))
"""(start, length) of prefill rows."""


@dataclass
class History:
    """All keys and values [length, 2, kv heads, head_dim] of one request, and where its row begins."""

    key_value: torch.Tensor
    start: int


def make_step(pool: KVPool) -> tuple[ForwardBatch, list[History]]:
    """A step of decode rows and chunks on scattered pages, whose earlier positions are in the pool."""
    device = pool.layers[0].device
    free = np.random.default_rng(0).permutation(NUM_PAGES).tolist()
    rows, histories = [], []
    for start, length in [(length - 1, 1) for length in DECODE_LENGTHS] + list(CHUNKS):
        total = start + length
        pages = [free.pop() for _ in range(-(-total // PAGE_SIZE))]
        request = Request(0, [0] * total, total, SamplingParams(), 1, frozenset(), [], pages=pages)
        rows.append(StepRow(request, start, length, True))
        history = History(torch.randn(total, 2, KV_HEADS, HEAD_DIM, device=device), start)
        for position in range(start):
            slot = pages[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE
            pool.layers[1][slot] = history.key_value[position]
        histories.append(history)
    batch, _ = make_forward_batch(StepPlan(1, rows, len(DECODE_LENGTHS)), PAGE_SIZE, device)
    return batch, histories


def reference(query: torch.Tensor, history: History, spec: AttentionSpec) -> torch.Tensor:
    """[row's tokens, heads, head_dim], one query and head at a time."""
    output = torch.empty_like(query)
    for token in range(len(query)):
        position = history.start + token
        first = 0 if spec.window is None else max(0, position - spec.window + 1)
        for head in range(HEADS):
            key, value = history.key_value[first : position + 1, :, head // (HEADS // KV_HEADS)].unbind(1)
            scores = key @ query[token, head] * spec.scale
            if spec.softcap is not None:
                scores = torch.tanh(scores / spec.softcap) * spec.softcap
            if spec.sinks is not None:
                scores = torch.cat((scores, spec.sinks[head : head + 1]))
            output[token, head] = torch.softmax(scores, 0)[: len(value)] @ value
    return output


def new_pool(device: str = "cpu") -> KVPool:
    return KVPool([KVShape(KV_HEADS, HEAD_DIM)] * 2, NUM_PAGES, PAGE_SIZE, torch.float32, torch.device(device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "spec",
    [
        AttentionSpec(HEAD_DIM**-0.5),
        AttentionSpec(0.7, window=5),
        AttentionSpec(0.5, softcap=1.5),
        AttentionSpec(0.5, sinks=torch.linspace(-2, 2, HEADS)),
        AttentionSpec(0.5, window=3, softcap=2.0, sinks=torch.linspace(-1, 3, HEADS)),
    ],
    ids=["full", "window", "softcap", "sinks", "all"],
)
def test_mixed_rows_equal_attention_written_out(spec: AttentionSpec, device: str) -> None:
    torch.manual_seed(0)
    if spec.sinks is not None:
        spec = replace(spec, sinks=spec.sinks.to(device))
    pool = new_pool(device)
    batch, histories = make_step(pool)
    query = torch.randn(len(batch.positions), HEADS, HEAD_DIM, device=device)
    fresh = torch.cat([history.key_value[history.start :] for history in histories])
    output = make_attention("auto", pool).begin_step(batch).attend(1, query, fresh.clone(), spec)

    expected = [
        reference(rows, history, spec)
        for rows, history in zip(
            query.split([len(history.key_value) - history.start for history in histories]), histories, strict=True
        )
    ]
    torch.testing.assert_close(output, torch.cat(expected))
    assert torch.equal(pool.layers[1][batch.slots], fresh)
    assert not pool.layers[0].any()


def test_values_that_overflow_in_one_request_do_not_reach_the_next_owner_of_its_pages() -> None:
    pool = new_pool()
    attention = make_attention("auto", pool)
    spec = AttentionSpec(1.0)

    def decode(position: int, key_value: torch.Tensor) -> torch.Tensor:
        request = Request(0, [0] * 3, 3, SamplingParams(), 1, frozenset(), [], pages=[7])
        # A second row, so that the first is padded to a length of which it must see nothing.
        other = Request(1, [0] * 4, 4, SamplingParams(), 1, frozenset(), [], pages=[8])
        rows = [StepRow(request, position, 1, True), StepRow(other, 3, 1, True)]
        batch, _ = make_forward_batch(StepPlan(1, rows, 2), PAGE_SIZE, torch.device("cpu"))
        query = torch.ones(2, HEADS, HEAD_DIM)
        return attention.begin_step(batch).attend(0, query, key_value, spec)[0]

    broken = torch.full((2, 2, KV_HEADS, HEAD_DIM), math.nan)
    broken[0, 1] = math.inf
    decode(2, broken)
    healthy = torch.ones(2, 2, KV_HEADS, HEAD_DIM)
    torch.testing.assert_close(decode(0, healthy), torch.ones(HEADS, HEAD_DIM))


def test_pool_size_is_what_was_counted() -> None:
    shapes = [KVShape(2, 8), KVShape(1, 16)]
    pool = KVPool(shapes, 5, 4, torch.bfloat16, torch.device("cpu"))
    assert sum(layer.nbytes for layer in pool.layers) == 5 * 4 * bytes_per_token(shapes, torch.bfloat16)
    assert not any(layer.any() for layer in pool.layers)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="no-such"):
        make_attention("no-such", new_pool())
