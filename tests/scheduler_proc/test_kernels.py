"""The Triton kernels against plain torch on random inputs: on a CUDA device, or in Triton's interpreter on the CPU."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds; the interpreter needs it too")

from minisgl.scheduler_proc.kernels.elementwise import (  # noqa: E402
    add_rms_norm,
    rotate_and_store,
    silu_and_multiply,
)
from minisgl.scheduler_proc.kernels.paged_attention import (  # noqa: E402
    decode_attention,
    prefill_attention,
    prefill_blocks,
)

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
TOLERANCE = 2e-2 if DEVICE == "cuda" else 1e-5
HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, PAGES = 6, 2, 32, 4, 200


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(DTYPE)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    assert torch.isfinite(found.float()).all()
    assert error < TOLERANCE, f"relative error {error:.2e}"


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


@pytest.mark.parametrize("hidden", [96, 128])
@pytest.mark.parametrize("with_delta", [False, True])
def test_add_rms_norm(hidden: int, with_delta: bool) -> None:
    residual = torch.randn(5, hidden, device=DEVICE)
    delta, weight = (random(5, hidden) if with_delta else None), random(hidden)
    expected_residual = residual + (delta.float() if delta is not None else 0.0)
    normed = add_rms_norm(residual, delta, weight, 1e-6)
    assert_close(residual, expected_residual)
    assert_close(normed, rms_norm(expected_residual, weight.float(), 1e-6))


@pytest.mark.parametrize("with_norm", [False, True])
def test_rotate_and_store(with_norm: bool) -> None:
    tokens = 7
    qkv = random(tokens, HEADS + 2 * KV_HEADS, HEAD_DIM)
    before = qkv.float().clone()
    positions = torch.randint(0, 50, (tokens,), dtype=torch.int32, device=DEVICE)
    slots = torch.randperm(PAGES * PAGE_SIZE, device=DEVICE)[:tokens].int()
    angles = torch.randn(50, HEAD_DIM // 2, device=DEVICE)
    tables = (angles.cos().to(DTYPE), angles.sin().to(DTYPE))
    weight = random(HEADS + KV_HEADS, HEAD_DIM) if with_norm else None
    pool = torch.zeros(PAGES * PAGE_SIZE, 2, KV_HEADS, HEAD_DIM, device=DEVICE, dtype=DTYPE)
    rotate_and_store(qkv, positions, slots, tables, weight, 1e-6, pool)

    query_key = before[:, : HEADS + KV_HEADS]
    if weight is not None:
        query_key = rms_norm(query_key, weight.float(), 1e-6)
    cos, sin = (table.float()[positions.long()].repeat(1, 2)[:, None] for table in tables)
    low, high = query_key.chunk(2, dim=-1)
    rotated = query_key * cos + torch.cat((-high, low), dim=-1) * sin
    assert_close(qkv[:, :HEADS], rotated[:, :HEADS])
    assert_close(pool[slots.long(), 0], rotated[:, HEADS:])
    assert_close(pool[slots.long(), 1], before[:, HEADS + KV_HEADS :])
    untouched = torch.ones(len(pool), dtype=torch.bool, device=DEVICE)
    untouched[slots.long()] = False
    assert not pool[untouched].any()


def test_stored_values_are_finite() -> None:
    qkv = torch.full((1, HEADS + 2 * KV_HEADS, HEAD_DIM), float("nan"), device=DEVICE, dtype=DTYPE)
    pool = torch.zeros(PAGE_SIZE, 2, KV_HEADS, HEAD_DIM, device=DEVICE, dtype=DTYPE)
    zero = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    table = torch.ones(1, HEAD_DIM // 2, device=DEVICE, dtype=DTYPE)
    rotate_and_store(qkv, zero, zero, (table, table), None, 1e-6, pool)
    assert torch.isfinite(pool).all()


def test_silu_and_multiply() -> None:
    gate_up = random(3, 2 * 1100)
    gate, up = gate_up.float().chunk(2, dim=-1)
    assert_close(silu_and_multiply(gate_up), torch.nn.functional.silu(gate) * up)


def attend(query: torch.Tensor, key_value: torch.Tensor, position: int, window: int | None) -> torch.Tensor:
    """One query [heads, head_dim] at `position` over [length, 2, kv heads, head_dim], in float64."""
    first = 0 if window is None else max(0, position + 1 - window)
    keys, values = (
        key_value[first : position + 1, i].double().repeat_interleave(HEADS // KV_HEADS, dim=1) for i in (0, 1)
    )
    scores = torch.einsum("hd,lhd->hl", query.double(), keys) * HEAD_DIM**-0.5
    return torch.einsum("hl,lhd->hd", scores.softmax(-1), values)


@pytest.mark.parametrize("splits", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 40])
def test_decode_attention(splits: int, window: int | None) -> None:
    lengths = [1, 70, 300, 64]
    qkv = random(len(lengths), HEADS + 2 * KV_HEADS, HEAD_DIM)
    pool = random(PAGES * PAGE_SIZE, 2, KV_HEADS, HEAD_DIM)
    stride = max(-(-length // PAGE_SIZE) for length in lengths)
    table = torch.randint(0, PAGES, (len(lengths), stride), dtype=torch.int32, device=DEVICE)
    found = decode_attention(
        qkv,
        pool,
        table.flatten(),
        torch.tensor([stride], dtype=torch.int32, device=DEVICE),
        torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        page_size=PAGE_SIZE,
        scale=HEAD_DIM**-0.5,
        window=window,
        splits=splits,
    )
    for row, length in enumerate(lengths):
        at = torch.arange(length, device=DEVICE)
        slots = table[row].long()[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE
        assert_close(found[row], attend(qkv[row, :HEADS], pool[slots], length - 1, window))


@pytest.mark.parametrize("window", [None, 40])
def test_prefill_attention(window: int | None) -> None:
    chunks = [(0, 33), (70, 5), (64, 32)]
    tokens = sum(count for _, count in chunks)
    qkv = random(tokens, HEADS + 2 * KV_HEADS, HEAD_DIM)
    pool = random(PAGES * PAGE_SIZE, 2, KV_HEADS, HEAD_DIM)
    pages = torch.randint(0, PAGES, (len(chunks), 40), dtype=torch.int32, device=DEVICE)
    rows, token = [], 0
    for index, (start, count) in enumerate(chunks):
        rows.append((token, start, count, index * 40))
        token += count
    blocks = torch.tensor([*prefill_blocks(rows), 0, 0, 0, 0], dtype=torch.int32, device=DEVICE)
    found = prefill_attention(
        qkv, pool, pages.flatten(), blocks, page_size=PAGE_SIZE, scale=HEAD_DIM**-0.5, window=window
    )
    for index, (token, start, count, _) in enumerate(rows):
        at = torch.arange(start + count, device=DEVICE)
        slots = pages[index].long()[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE
        for offset in range(count):
            expected = attend(qkv[token + offset, :HEADS], pool[slots], start + offset, window)
            assert_close(found[token + offset], expected)
