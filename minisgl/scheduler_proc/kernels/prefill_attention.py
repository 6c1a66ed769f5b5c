"""Attention of prompt chunks over the paged KV pool, for chunks of any length at any position in one captured graph.

A chunk is cut into tiles of queries, and the keys that a tile sees into spans; each program takes one span of one
tile. All query heads that share a key head lie in one tile, so that each key is loaded once for them. Each program
keeps a running maximum and sum per query (online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867). Where a tile
has several spans, the program that ends last combines them, in the order of the keys: results do not depend on which
one that was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from minisgl.scheduler_proc.kernels.dependent_launch import launch_options

_LOG2_E = tl.constexpr(1.4426950408889634)
_FIELDS = tl.constexpr(5)
TABLE_FIELDS = 5
"""Numbers that describe a tile."""
MULTIPROCESSORS = 132
"""Of a Hopper GPU."""
MOST_PROGRAMS = 2 * MULTIPROCESSORS
"""That run at a time."""
MOST_ARRIVALS = 2 * MOST_PROGRAMS
"""Tiles, counted once per key head, up to which a tile can have several spans."""
MOST_SPANS = 64
SHORTEST_SPAN = 768
"""Keys a program walks through before sharing them with another, and combining both results, would pay."""


@dataclass(frozen=True, slots=True)
class TileShape:
    """What one program computes at a time, and by what means.

    Attributes:
        rows: queries of a tile, counted once per head.
        keys, edge_keys: keys that it looks at together where every query sees all of them, and elsewhere.
        warps, stages: warps of a program; blocks of keys in shared memory or on their way there.
        programs: how many fill the device.
    """

    rows: int
    keys: int
    edge_keys: int
    warps: int
    stages: int
    programs: int = MOST_PROGRAMS


def tile_shape(head_dim: int, group: int, dtype: torch.dtype, device: torch.device) -> TileShape:
    """The tiles for `group` query heads to a key head: what was fastest on an H200, and fits in any GPU's memory."""
    if dtype.itemsize > 2:
        shape = TileShape(rows=32 if head_dim <= 64 else 16, keys=32, edge_keys=32, warps=4, stages=1)
    elif head_dim <= 64:
        shape = TileShape(rows=64, keys=128, edge_keys=32, warps=4, stages=3)
    elif head_dim <= 128:
        shape = TileShape(rows=128, keys=64, edge_keys=64, warps=8, stages=3, programs=MULTIPROCESSORS)
    else:
        shape = TileShape(rows=64, keys=32, edge_keys=32, warps=4, stages=2)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) != (9, 0):
        # Three stages take more shared memory than most other GPUs have.
        shape = replace(shape, stages=min(shape.stages, 2))
    return replace(shape, rows=max(shape.rows, triton.next_power_of_2(group)))


@triton.jit
def _page_ids(table, start, stop, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The pages of the keys start .. start + BLOCK_N - 1, as far as they lie before stop."""
    at = start + tl.arange(0, BLOCK_N)
    return tl.load(table + at // PAGE_SIZE, mask=at < stop, other=0)


@triton.jit
def _attend_block(
    q,
    pool,
    page,
    start,
    stop,
    place,
    kv_head,
    factor,
    window,
    best,
    total,
    sums,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Take the keys start .. start + BLOCK_N - 1 into the running softmax; only MASKED blocks may hide any of them."""
    dims = tl.arange(0, DIM_BLOCK)
    at = start + tl.arange(0, BLOCK_N)
    keys = pool + ((page.to(tl.int64) * PAGE_SIZE + at % PAGE_SIZE) * (2 * KV_HEADS) + kv_head) * HEAD_DIM
    keys = keys[:, None] + dims[None, :]
    if MASKED or DIM_BLOCK != HEAD_DIM:
        there = (at < stop)[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(keys, mask=there, other=0.0)
        v = tl.load(keys + KV_HEADS * HEAD_DIM, mask=there, other=0.0)
    else:
        k = tl.load(keys)
        v = tl.load(keys + KV_HEADS * HEAD_DIM)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        visible = (at[None, :] <= place[:, None]) & (at < stop)[None, :]
        if HAS_WINDOW:
            visible = visible & (at[None, :] > place[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, axis=1) * factor)
    shift = new_best
    if MASKED:
        # With nothing seen so far this is -inf; subtracting that would make NaN.
        shift = tl.where(new_best == float("-inf"), 0.0, new_best)
    weights = tl.exp2(scores * factor - shift[:, None])
    fade = tl.exp2(best - shift)
    total = total * fade + tl.sum(weights, axis=1)
    sums = tl.dot(weights.to(v.dtype), v, sums * fade[:, None], input_precision="ieee")
    return new_best, total, sums


# The table and the page ids lie anywhere in a step's block of inputs; that must not bring a compilation.
@triton.jit(do_not_specialize_on_alignment=["page_table", "tiles"])
def _prefill(
    qkv,
    pool,
    page_table,
    tiles,
    output,
    partial,
    partial_max,
    partial_sum,
    arrivals,
    scale,
    window,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EDGE_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    GROUP: tl.constexpr = HEADS // KV_HEADS
    # Results of several spans are loaded at once, as far as registers go.
    UNROLL: tl.constexpr = 4 if DIM_BLOCK <= 64 else 2 if DIM_BLOCK <= 128 else 1
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    index = tl.program_id(2)
    count = tl.load(tiles + tile * _FIELDS)
    position = tl.load(tiles + tile * _FIELDS + 2)
    span = tl.load(tiles + tile * _FIELDS + 4)
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(position + 1 - window, 0) // EDGE_N * EDGE_N
    end = position + count
    begin = first + index * span
    if begin < end:
        token = tl.load(tiles + tile * _FIELDS + 1).to(tl.int64)
        table = page_table + tl.load(tiles + tile * _FIELDS + 3)
        rows = tl.arange(0, BLOCK_M)
        dims = tl.arange(0, DIM_BLOCK)
        token += rows // GROUP
        head = kv_head * GROUP + rows % GROUP
        place = position + rows // GROUP
        mine = (rows < count * GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
        queries = qkv + (token * (HEADS + 2 * KV_HEADS) + head)[:, None] * HEAD_DIM + dims[None, :]
        q = tl.load(queries, mask=mine, other=0.0)

        factor = scale * _LOG2_E
        best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        sums = tl.zeros((BLOCK_M, DIM_BLOCK), tl.float32)
        stop = tl.minimum(begin + span, end)
        edge = begin
        # Page ids are loaded a block ahead: keys would otherwise wait for their addresses.
        if not HAS_WINDOW:
            # Up to the edge every query sees every key.
            edge += tl.maximum(tl.minimum(stop, position + 1) - begin, 0) // BLOCK_N * BLOCK_N
            page = _page_ids(table, begin, edge, PAGE_SIZE, BLOCK_N)
            for start in range(begin, edge, BLOCK_N):
                following = _page_ids(table, start + BLOCK_N, edge, PAGE_SIZE, BLOCK_N)
                best, total, sums = _attend_block(
                    q, pool, page, start, stop, place, kv_head, factor, window, best, total, sums,
                    KV_HEADS, HEAD_DIM, DIM_BLOCK, PAGE_SIZE, BLOCK_N, False, HAS_WINDOW,
                )  # fmt: skip
                page = following
        page = _page_ids(table, edge, stop, PAGE_SIZE, EDGE_N)
        for start in range(edge, stop, EDGE_N):
            following = _page_ids(table, start + EDGE_N, stop, PAGE_SIZE, EDGE_N)
            best, total, sums = _attend_block(
                q, pool, page, start, stop, place, kv_head, factor, window, best, total, sums,
                KV_HEADS, HEAD_DIM, DIM_BLOCK, PAGE_SIZE, EDGE_N, True, HAS_WINDOW,
            )  # fmt: skip
            page = following

        results = output + (token * HEADS + head)[:, None] * HEAD_DIM + dims[None, :]
        spans = tl.cdiv(end - first, span)
        if spans == 1:
            tl.store(results, (sums / total[:, None]).to(output.dtype.element_ty), mask=mine)
        else:
            pair = tile * KV_HEADS + kv_head
            part = (pair * tl.num_programs(2) + index) * BLOCK_M + rows
            tl.store(partial + part[:, None] * DIM_BLOCK + dims[None, :], sums)
            tl.store(partial_max + part, best)
            tl.store(partial_sum + part, total)
            # All threads' stores come before the one thread's announcement of them.
            tl.debug_barrier()
            if tl.atomic_add(arrivals + pair, 1, sem="acq_rel") == spans - 1:
                best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
                total = tl.zeros((BLOCK_M,), tl.float32)
                sums = tl.zeros((BLOCK_M, DIM_BLOCK), tl.float32)
                for other in tl.range(0, spans, loop_unroll_factor=UNROLL):
                    part = (pair * tl.num_programs(2) + other) * BLOCK_M + rows
                    other_best = tl.load(partial_max + part, cache_modifier=".cg")
                    other_total = tl.load(partial_sum + part, cache_modifier=".cg")
                    other_sums = tl.load(partial + part[:, None] * DIM_BLOCK + dims[None, :], cache_modifier=".cg")
                    new_best = tl.maximum(best, other_best)
                    shift = tl.where(new_best == float("-inf"), 0.0, new_best)
                    fade, share = tl.exp2(best - shift), tl.exp2(other_best - shift)
                    total = total * fade + other_total * share
                    sums = sums * fade[:, None] + other_sums * share[:, None]
                    best = new_best
                tl.store(results, (sums / total[:, None]).to(output.dtype.element_ty), mask=mine)
                tl.store(arrivals + pair, 0)


class PrefillTiles:
    """Cuts chunks into the tiles and spans of prefill_attention.

    Attributes:
        shape: see TileShape.
        tokens: of a chunk in one tile.
    """

    def __init__(self, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        group = heads // kv_heads
        self.shape = tile_shape(head_dim, group, dtype, device)
        self.tokens = self.shape.rows // group
        self._kv_heads = kv_heads

    def most(self, tokens: int, chunks: int) -> int:
        """Into how many tiles `chunks` chunks of `tokens` tokens together can fall."""
        return (tokens + (self.tokens - 1) * chunks) // self.tokens

    def most_spans(self, tiles: int) -> int:
        """Over how many programs one tile's keys are spread at most, where there are `tiles` tiles."""
        return min(MOST_SPANS, 1 + 2 * self.shape.programs // (tiles * self._kv_heads))

    def _programs(self, counts: Sequence[int], ends: Sequence[int], span: int) -> float:
        """How many programs work all the time where so many tiles each, up to position `end`, are cut into spans."""
        return self._kv_heads * sum(
            count * (-(-end // span) if end > span else end / span) for count, end in zip(counts, ends, strict=True)
        )

    def table(self, chunks: Sequence[tuple[int, int, int, int]], tiles: int) -> list[int]:
        """The flat int32 table of a step's tiles, padded to `tiles` of them.

        Args:
            chunks: per chunk (first token in the step, its position, number of tokens, where its page ids begin).

        Returns:
            TABLE_FIELDS numbers a tile: queries in it (0: padding), first token, its position, where the chunk's page
            ids begin, keys in a span. All spans are equally long, so programs have equal work.
        """
        counts = [-(-count // self.tokens) for _, _, count, _ in chunks]
        ends = [position + count for _, position, count, _ in chunks]
        work = sum(count * end for count, end in zip(counts, ends, strict=True)) * self._kv_heads
        longest = max(ends, default=0)
        span = max(SHORTEST_SPAN, work // self.shape.programs, -(-longest // self.most_spans(tiles)))
        span = -(-span // self.shape.keys) * self.shape.keys
        while span < longest and self._programs(counts, ends, span) > self.shape.programs:
            span += self.shape.keys
        table: list[int] = []
        for token, position, count, pages_at in chunks:
            for offset in range(0, count, self.tokens):
                table += (min(self.tokens, count - offset), token + offset, position + offset, pages_at, span)
        return table + [0] * (TABLE_FIELDS * tiles - len(table))


def prefill_attention(
    qkv: torch.Tensor,
    pool: torch.Tensor,
    page_table: torch.Tensor,
    table: torch.Tensor,
    arrivals: torch.Tensor,
    tiles: PrefillTiles,
    *,
    page_size: int,
    scale: float,
    window: int | None,
    pdl: bool = False,
) -> torch.Tensor:
    """Causal attention of prompt chunks to themselves and to what their pages already hold.

    Args:
        qkv: [tokens, heads + 2 * kv heads, head_dim]; the queries are its first heads.
        pool: [slots, 2, kv heads, head_dim], with the keys and values of this step already in it.
        page_table: int32, flat.
        table: int32, of tiles.table.
        arrivals: int32 [MOST_ARRIVALS], zero, and zero again afterwards.
        pdl: whether this and the next kernel overlap with those before them (dependent_launch.py).

    Returns:
        [tokens, heads, head_dim]; tokens in no tile hold arbitrary values.
    """
    tokens, all_heads, head_dim = qkv.shape
    kv_heads = pool.shape[2]
    heads = all_heads - 2 * kv_heads
    shape = tiles.shape
    count = table.numel() // TABLE_FIELDS
    spans = tiles.most_spans(count)
    dim_block = max(16, triton.next_power_of_2(head_dim))
    parts = count * kv_heads * spans * shape.rows if spans > 1 else 1
    output = torch.empty((tokens, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    partial = torch.empty((parts, dim_block), dtype=torch.float32, device=qkv.device)
    partial_max = torch.empty(parts, dtype=torch.float32, device=qkv.device)
    partial_sum = torch.empty_like(partial_max)
    _prefill[(count, kv_heads, spans)](
        qkv,
        pool,
        page_table,
        table,
        output,
        partial,
        partial_max,
        partial_sum,
        arrivals,
        scale,
        window or 0,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        DIM_BLOCK=dim_block,
        PAGE_SIZE=page_size,
        BLOCK_M=shape.rows,
        BLOCK_N=shape.keys,
        EDGE_N=shape.edge_keys,
        HAS_WINDOW=window is not None,
        PDL=pdl,
        num_warps=shape.warps,
        num_stages=shape.stages,
        **launch_options(pdl),
    )
    return output
