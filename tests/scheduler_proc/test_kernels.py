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
from minisgl.scheduler_proc.kernels.paged_attention import decode_attention  # noqa: E402
from minisgl.scheduler_proc.kernels.prefill_attention import (  # noqa: E402
    MOST_ARRIVALS,
    SHORTEST_SPAN,
    TABLE_FIELDS,
    PrefillTiles,
    prefill_attention,
)

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
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


def attend_chunk(qkv: torch.Tensor, key_value: torch.Tensor, start: int, window: int | None) -> torch.Tensor:
    """A chunk's queries [tokens, heads + 2 * kv heads, head_dim] over [length, 2, kv heads, head_dim], in float64."""
    heads, group = qkv.shape[1] - 2 * key_value.shape[2], qkv.shape[1] // key_value.shape[2] - 2
    keys, values = (key_value[:, i].double().repeat_interleave(group, dim=1) for i in (0, 1))
    scores = torch.einsum("thd,lhd->htl", qkv[:, :heads].double(), keys) * qkv.shape[-1] ** -0.5
    place = start + torch.arange(len(qkv), device=DEVICE)[:, None]
    at = torch.arange(len(key_value), device=DEVICE)[None, :]
    seen = (at <= place) & (at > place - (window or len(key_value)))
    return torch.einsum("htl,lhd->thd", scores.masked_fill(~seen, float("-inf")).softmax(-1), values)


def check_prefill(
    chunks: list[tuple[int, int]],
    *,
    shape: tuple[int, int, int] = (HEADS, KV_HEADS, HEAD_DIM),
    page_size: int = 16,
    window: int | None = None,
    spare_tiles: int = 0,
) -> list[int]:
    """Compare (position, tokens) chunks of one call; the table that it read."""
    heads, kv_heads, head_dim = shape
    tokens = sum(count for _, count in chunks)
    row_pages = max(-(-(start + count) // page_size) for start, count in chunks)
    qkv = random(tokens, heads + 2 * kv_heads, head_dim)
    pool = random(2 * row_pages * page_size, 2, kv_heads, head_dim)
    pages = torch.stack([torch.randperm(2 * row_pages)[:row_pages] for _ in chunks]).to(DEVICE, torch.int32)
    rows, token = [], 0
    for index, (start, count) in enumerate(chunks):
        rows.append((token, start, count, index * row_pages))
        token += count
    tiles = PrefillTiles(heads, kv_heads, head_dim, DTYPE, torch.device(DEVICE))
    table = tiles.table(rows, tiles.most(tokens, len(chunks)) + spare_tiles)
    arrivals = torch.zeros(MOST_ARRIVALS, dtype=torch.int32, device=DEVICE)
    found = prefill_attention(
        qkv,
        pool,
        pages.flatten(),
        torch.tensor(table, dtype=torch.int32, device=DEVICE),
        arrivals,
        tiles,
        page_size=page_size,
        scale=head_dim**-0.5,
        window=window,
    )
    assert not arrivals.any(), "the next call would count the arrivals of this one"
    for index, (token, start, count, _) in enumerate(rows):
        at = torch.arange(start + count, device=DEVICE)
        slots = pages[index].long()[at // page_size] * page_size + at % page_size
        assert_close(found[token : token + count], attend_chunk(qkv[token : token + count], pool[slots], start, window))
    return table


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("page_size", [4, 16])
def test_prefill_attention(window: int | None, page_size: int) -> None:
    table = check_prefill([(0, 33), (70, 5), (64, 32), (0, 1)], page_size=page_size, window=window, spare_tiles=2)
    assert max(table[4::TABLE_FIELDS]) == SHORTEST_SPAN


@pytest.mark.parametrize("window", [None, 700])
def test_prefill_attention_of_keys_spread_over_programs(window: int | None) -> None:
    """Several spans a tile; one of them begins behind the first queries of a tile, which see nothing of it."""
    check_prefill([(SHORTEST_SPAN - 3, 7), (1400, 40), (0, 20), (2 * SHORTEST_SPAN, 1)], window=window)


@pytest.mark.parametrize("shape", [(14, 2, 64), (2, 2, 128), (3, 1, 80)])
def test_prefill_attention_of_other_shapes(shape: tuple[int, int, int]) -> None:
    check_prefill([(0, 20), (600, 30)], shape=shape)


def test_a_table_of_tiles_covers_every_query_once() -> None:
    tiles = PrefillTiles(14, 2, 64, torch.bfloat16, torch.device("cpu"))
    chunks = [(0, 5, 40, 7), (40, 0, 1, 9), (41, 30000, 471, 11)]
    most = tiles.most(512, 8)
    table = tiles.table(chunks, most)
    assert len(table) == TABLE_FIELDS * most
    found = [table[i : i + TABLE_FIELDS] for i in range(0, len(table), TABLE_FIELDS)]
    for token, position, count, pages_at in chunks:
        mine = [tile for tile in found if tile[0] and tile[3] == pages_at]
        assert [place for tile in mine for place in range(tile[1], tile[1] + tile[0])] == [*range(token, token + count)]
        assert all(tile[2] - tile[1] == position - token and tile[0] <= tiles.tokens for tile in mine)
        span = mine[0][4]
        assert span % tiles.shape.keys == 0 and span * tiles.most_spans(most) >= position + count


def test_a_long_chunk_fills_the_device_beside_decode_rows_too() -> None:
    tiles = PrefillTiles(14, 2, 64, torch.bfloat16, torch.device("cpu"))
    chunks = [*((index, 300, 1, 0) for index in range(32)), (32, 15776, 224, 0)]
    most = tiles.most(256, 64)
    table = tiles.table(chunks, most)
    spans = [
        -(-(position + count) // span) for count, _, position, _, span in zip(*[iter(table)] * 5, strict=True) if count
    ]
    assert max(spans) <= tiles.most_spans(most)
    assert 0.75 * tiles.shape.programs < 2 * sum(count for count in spans if count > 1) <= tiles.shape.programs
