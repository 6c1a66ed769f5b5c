"""Penalties, filters and the draw for rows of logits, without a sort, in kernels that can be captured in a CUDA graph.

A row's vocabulary is cut into blocks of BLOCK tokens, one program each. `_survey` finds every block's best logit and
weight, where a token's weight is exp((its logit - the row's best) / temperature). `choose` draws: first a block by the
blocks' weights, then a token in it.

Filters need the last token that they keep. Its *distance* (best - logit) / temperature is searched as a whole number of
2**-23 by `_narrow`: a pass divides an interval of distances into FAN parts, and every program adds what its block has
up to the end of each part - tokens for top-k, weight for top-p - to the row's totals. The next pass takes the part in
which the goal is reached. After PASSES passes the distance is exact; of several tokens with that distance the first
ones in the vocabulary are kept. `_weigh_kept` then weighs the blocks again, without what is filtered out.

Everything is added in an order that does not depend on what runs beside it, or as whole numbers, so a row's token does
not either. The plain reference is sampler.py.
"""

from __future__ import annotations

from enum import IntEnum

import torch
import triton
import triton.language as tl

BLOCK = 2048
CHUNK = 512
"""Tokens of a block that are looked at together."""
FAN = 16
PASSES = 7
UNIT = 2**23
FARTHEST = 2**28 - 1
"""Largest distance; tokens from there on have no weight where filters apply (exp(-32) of the likeliest)."""

_BLOCK = tl.constexpr(BLOCK)
_CHUNK = tl.constexpr(CHUNK)
_FAN = tl.constexpr(FAN)
_PASSES = tl.constexpr(PASSES)
_UNIT = tl.constexpr(float(UNIT))
_FARTHEST = tl.constexpr(FARTHEST)
_OUTSIDE = tl.constexpr(2**30)
_MASS = tl.constexpr(float(2**40))
"""Weights are added up over blocks as whole numbers of 2**-40."""
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


class Kind(IntEnum):
    """What becomes of a row."""

    NOTHING = 0
    LIKELIEST = 1
    """It takes the model's likeliest token, which is known already."""
    LIKELIEST_ADJUSTED = 2
    """It takes the likeliest one after penalties and bans."""
    DRAWN = 3
    FILTERED = 4
    """It draws from a part of the vocabulary."""


class Field(IntEnum):
    """A row's parameters, one 32-bit word each. Those from TEMPERATURE on are float32.

    SLOT is the row of `marks` that tells its history, or negative; stop tokens may come from position EARLIEST_STOP on;
    NEAREST_DROPPED is the distance from which min-p drops tokens; TOP_K 0 and TOP_P 1 keep all.
    """

    KIND = 0
    POSITION = 1
    SEED_LOW = 2
    SEED_HIGH = 3
    SLOT = 4
    EARLIEST_STOP = 5
    TOP_K = 6
    NEAREST_DROPPED = 7
    TEMPERATURE = 8
    TOP_P = 9
    REPETITION = 10
    PRESENCE = 11
    FREQUENCY = 12


_KIND = tl.constexpr(int(Field.KIND))
_POSITION = tl.constexpr(int(Field.POSITION))
_SEED_LOW = tl.constexpr(int(Field.SEED_LOW))
_SEED_HIGH = tl.constexpr(int(Field.SEED_HIGH))
_SLOT = tl.constexpr(int(Field.SLOT))
_EARLIEST_STOP = tl.constexpr(int(Field.EARLIEST_STOP))
_TOP_K = tl.constexpr(int(Field.TOP_K))
_NEAREST_DROPPED = tl.constexpr(int(Field.NEAREST_DROPPED))
_TEMPERATURE = tl.constexpr(int(Field.TEMPERATURE))
_TOP_P = tl.constexpr(int(Field.TOP_P))
_REPETITION = tl.constexpr(int(Field.REPETITION))
_PRESENCE = tl.constexpr(int(Field.PRESENCE))
_FREQUENCY = tl.constexpr(int(Field.FREQUENCY))
_LIKELIEST = tl.constexpr(int(Kind.LIKELIEST))
_LIKELIEST_ADJUSTED = tl.constexpr(int(Kind.LIKELIEST_ADJUSTED))
_DRAWN = tl.constexpr(int(Kind.DRAWN))
_FILTERED = tl.constexpr(int(Kind.FILTERED))

SEEN, GENERATED, STOP = 1, 2, -(2**15)
"""What `marks` (int16) is made of: seen before, how often it was generated, and that it is a stop token."""
MOST_GENERATED = 2**14 - 1
"""A token counts as generated so often at most."""

_GENERATED = tl.constexpr(GENERATED)
_MOST_GENERATED = tl.constexpr(MOST_GENERATED)


@triton.jit
def _whole(fields, row, ROWS: tl.constexpr, FIELD: tl.constexpr):
    return tl.load(fields + FIELD * ROWS + row)


@triton.jit
def _real(fields, row, ROWS: tl.constexpr, FIELD: tl.constexpr):
    return tl.load(fields + FIELD * ROWS + row).to(tl.float32, bitcast=True)


@triton.jit
def _scores(addresses, fields, row, columns, VOCAB: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr):
    """Logits of some columns after penalties and bans, finite float32; tokens beyond the vocabulary get the lowest."""
    inside = columns < VOCAB
    logits = tl.multiple_of(tl.load(addresses).to(tl.pointer_type(DTYPE)), 16) + row.to(tl.int64) * VOCAB
    x = tl.load(logits + columns, mask=inside, other=-_LARGEST).to(tl.float32)
    slot = _whole(fields, row, ROWS, _SLOT)
    if slot >= 0:
        marks = tl.multiple_of(tl.load(addresses + 2).to(tl.pointer_type(tl.int16)), 16) + slot.to(tl.int64) * VOCAB
        mark = tl.load(marks + columns, mask=inside, other=0).to(tl.int32)
        history = mark & 0x7FFF
        repetition = _real(fields, row, ROWS, _REPETITION)
        x = tl.where(history > 0, tl.where(x > 0, x / repetition, x * repetition), x)
        count = history // _GENERATED
        lowered = _real(fields, row, ROWS, _PRESENCE) + _real(fields, row, ROWS, _FREQUENCY) * count
        x = tl.where(count > 0, x - lowered, x)
        early = _whole(fields, row, ROWS, _POSITION) < _whole(fields, row, ROWS, _EARLIEST_STOP)
        x = tl.where((mark < 0) & early, -_LARGEST, x)
    x = tl.where(x == x, x, -_LARGEST)
    return tl.minimum(tl.maximum(x, -_LARGEST), _LARGEST)


@triton.jit
def _nearness(x, best, temperature):
    """How far below the best a logit is: not negative, in temperatures; and as a distance."""
    y = tl.maximum((best - x) / temperature, 0.0)
    return y, tl.minimum((tl.minimum(y, 32.0) * _UNIT).to(tl.int32), _FARTHEST)


@triton.jit
def _best_of_row(bests, row, BLOCKS: tl.constexpr, BLOCKS_POW2: tl.constexpr):
    blocks = tl.arange(0, BLOCKS_POW2)
    return tl.max(tl.load(bests + row * BLOCKS + blocks, mask=blocks < BLOCKS, other=-_LARGEST), axis=0)


@triton.jit
def _survey(
    addresses,
    fields,
    bests,
    masses,
    totals,
    VOCAB: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Every block's best logit, and its weight relative to that; and totals that begin at zero."""
    block, row = tl.program_id(0), tl.program_id(1)
    kind = _whole(fields, row, ROWS, _KIND)
    if kind >= _LIKELIEST_ADJUSTED:
        if (kind == _FILTERED) & (block == 0):
            places = tl.arange(0, 256)
            size: tl.constexpr = 2 * _PASSES * _FAN
            tl.store(totals + row * size + places, tl.zeros((256,), tl.int64), mask=places < size)
        columns = block * _BLOCK + tl.arange(0, _BLOCK)
        x = _scores(addresses, fields, row, columns, VOCAB, ROWS, DTYPE)
        best = tl.max(x, axis=0)
        tl.store(bests + row * BLOCKS + block, best)
        if kind == _DRAWN:
            weights = tl.exp((x - best) / _real(fields, row, ROWS, _TEMPERATURE))
            weights = tl.where(columns < VOCAB, weights, 0.0)
            tl.store(masses + row * BLOCKS + block, tl.sum(weights.to(tl.float64), axis=0))


@triton.jit
def _searches(fields, row, ROWS: tl.constexpr, phase):
    """Whether a row takes part in a phase of the search: 0 for top-k or else top-p, 1 for top-p after top-k."""
    has_k = _whole(fields, row, ROWS, _TOP_K) > 0
    has_p = _real(fields, row, ROWS, _TOP_P) < 1.0
    wanted = (has_k & has_p) | ((has_k | has_p) & (phase == 0))
    return wanted & (_whole(fields, row, ROWS, _KIND) == _FILTERED)


@triton.jit
def _goal(fields, totals, row, limit, extra, ROWS: tl.constexpr, phase):
    """How many tokens, or how much weight, a phase keeps. The totals of its first pass must be complete.

    It looks at tokens nearer than `limit` and, without searching, at the `extra` first ones at that distance.
    """
    top_k = _whole(fields, row, ROWS, _TOP_K)
    nearer = tl.load(totals + ((row * 2 + phase) * _PASSES + 1) * _FAN - 1)
    everything = nearer.to(tl.float64) + extra * (tl.exp(-limit / _UNIT) * _MASS).to(tl.float64)
    weight = (everything * _real(fields, row, ROWS, _TOP_P)).to(tl.int64)
    return tl.where((top_k > 0) & (phase == 0), top_k.to(tl.int64), tl.maximum(weight, 1))


@triton.jit
def _interval(fields, totals, starts, below, row, limit, extra, ROWS: tl.constexpr, phase, number):
    """Where the interval of pass `number` begins, and the total of everything nearer; _PASSES for the search's end."""
    before = (row * 2 + phase) * _PASSES + number - 1
    start = tl.load(starts + before, mask=number > 1, other=0)
    nearer = tl.load(below + before, mask=number > 1, other=0)
    total = tl.load(totals + before * _FAN + tl.arange(0, _FAN), mask=tl.arange(0, _FAN) < number * _FAN, other=0)
    short = (total < _goal(fields, totals, row, limit, extra, ROWS, phase)) & (number > 0)
    part = tl.minimum(tl.sum(short.to(tl.int32), axis=0), _FAN - 1)
    start += part << (number * -4 + 4 * _PASSES)
    return start, tl.maximum(nearer, tl.max(tl.where(short, total, 0), axis=0))


@triton.jit
def _cut(fields, totals, starts, below, row, limit, extra, ROWS: tl.constexpr, phase):
    """The distance of the last token that a phase keeps, and how many of those at that distance."""
    last, nearer = _interval(fields, totals, starts, below, row, limit, extra, ROWS, phase, _PASSES)
    by_count = (phase == 0) & (_whole(fields, row, ROWS, _TOP_K) > 0)
    most = tl.where(last < limit, 2**30, extra)
    last = tl.minimum(last, limit)
    one = tl.where(by_count, 1.0, tl.exp(-last / _UNIT) * _MASS).to(tl.float64)
    short = _goal(fields, totals, row, limit, extra, ROWS, phase) - nearer
    ties = tl.ceil(short.to(tl.float64) / tl.maximum(one, 1.0))
    return last, tl.minimum(tl.minimum(tl.maximum(ties, 1.0), 2.0**30).to(tl.int32), most)


@triton.jit(do_not_specialize=["phase", "number"])
def _narrow(
    addresses,
    fields,
    bests,
    totals,
    starts,
    below,
    cuts,
    phase,
    number,
    VOCAB: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_POW2: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Add a block's tokens or weight up to the end of each part of the row's interval."""
    block, row = tl.program_id(0), tl.program_id(1)
    if _searches(fields, row, ROWS, phase):
        limit = tl.full((), _FARTHEST + 1, tl.int32)
        extra = tl.full((), 0, tl.int32)
        if phase == 1:
            if number == 0:
                limit, extra = _cut(fields, totals, starts, below, row, limit, extra, ROWS, 0)
                if block == 0:
                    tl.store(cuts + row * 2, limit)
                    tl.store(cuts + row * 2 + 1, extra)
            else:
                limit = tl.load(cuts + row * 2)
                extra = tl.load(cuts + row * 2 + 1)
        start, nearer = _interval(fields, totals, starts, below, row, limit, extra, ROWS, phase, number)
        index = (row * 2 + phase) * _PASSES + number
        if block == 0:
            tl.store(starts + index, start)
            tl.store(below + index, nearer)
        step = 1 << (number * -4 + 4 * (_PASSES - 1))
        ends = tl.minimum(start + (tl.arange(0, _FAN) + 1) * step, limit) - 1

        temperature = _real(fields, row, ROWS, _TEMPERATURE)
        best = _best_of_row(bests, row, BLOCKS, BLOCKS_POW2)
        _, nearest = _nearness(tl.load(bests + row * BLOCKS + block), best, temperature)
        if nearest <= tl.max(ends, axis=0):
            by_count = (phase == 0) & (_whole(fields, row, ROWS, _TOP_K) > 0)
            added = tl.zeros((_FAN, _CHUNK), tl.float32)
            for chunk in range(_BLOCK // _CHUNK):
                columns = block * _BLOCK + chunk * _CHUNK + tl.arange(0, _CHUNK)
                x = _scores(addresses, fields, row, columns, VOCAB, ROWS, DTYPE)
                y, distance = _nearness(x, best, temperature)
                distance = tl.where(columns < VOCAB, distance, _OUTSIDE)
                value = tl.where(distance < _FARTHEST, tl.exp(-y), 0.0)
                value = tl.where(by_count, 1.0, value)
                added += tl.where(distance[None, :] <= ends[:, None], value[None, :], 0.0)
            scale = tl.where(by_count, 1.0, _MASS)
            sums = (tl.sum(added, axis=1) * scale).to(tl.int64)
            tl.atomic_add(totals + index * _FAN + tl.arange(0, _FAN), sums, mask=sums > 0, sem="relaxed")


@triton.jit
def _weigh_kept(
    addresses,
    fields,
    bests,
    masses,
    tied,
    totals,
    starts,
    below,
    cuts,
    VOCAB: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_POW2: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Where a filtered row ends, and each block's weight before that distance and number of tokens at it."""
    block, row = tl.program_id(0), tl.program_id(1)
    if _whole(fields, row, ROWS, _KIND) == _FILTERED:
        last = tl.full((), _FARTHEST, tl.int32)
        ties = tl.full((), 2**30, tl.int32)
        if _searches(fields, row, ROWS, 1):
            limit, extra = tl.load(cuts + row * 2), tl.load(cuts + row * 2 + 1)
            last, ties = _cut(fields, totals, starts, below, row, limit, extra, ROWS, 1)
        elif _searches(fields, row, ROWS, 0):
            last, ties = _cut(fields, totals, starts, below, row, last + 1, 0 * ties, ROWS, 0)
        dropped = _whole(fields, row, ROWS, _NEAREST_DROPPED)
        ties = tl.where(dropped <= last, 2**30, ties)
        last = tl.minimum(last, dropped - 1)
        if block == 0:
            # Elsewhere than the first phase's, which other programs may still have to read.
            tl.store(cuts + (ROWS + row) * 2, last)
            tl.store(cuts + (ROWS + row) * 2 + 1, ties)
        temperature = _real(fields, row, ROWS, _TEMPERATURE)
        best = _best_of_row(bests, row, BLOCKS, BLOCKS_POW2)
        _, nearest = _nearness(tl.load(bests + row * BLOCKS + block), best, temperature)
        mass = tl.full((), 0.0, tl.float64)
        count = tl.full((), 0, tl.int32)
        if nearest <= last:
            columns = block * _BLOCK + tl.arange(0, _BLOCK)
            x = _scores(addresses, fields, row, columns, VOCAB, ROWS, DTYPE)
            y, distance = _nearness(x, best, temperature)
            distance = tl.where(columns < VOCAB, distance, _OUTSIDE)
            mass = tl.sum(tl.where(distance < last, tl.exp(-y), 0.0).to(tl.float64), axis=0)
            count = tl.sum((distance == last).to(tl.int32), axis=0)
        tl.store(masses + row * BLOCKS + block, mass)
        tl.store(tied + row * BLOCKS + block, count)


@triton.jit
def _mix(state):
    """splitmix64's finaliser, as in sampler.py."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB
    return state ^ (state >> 31)


@triton.jit
def _uniform(fields, row, ROWS: tl.constexpr):
    """A number above 0 and below 1 from the row's mixed seed and position: sampler.random_bits'."""
    low = _whole(fields, row, ROWS, _SEED_LOW).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = _whole(fields, row, ROWS, _SEED_HIGH).to(tl.uint32, bitcast=True).to(tl.uint64)
    position = _whole(fields, row, ROWS, _POSITION).to(tl.uint64)
    bits = _mix((high << 32 | low) + position * 0x9E3779B97F4A7C15) >> 33
    return (bits.to(tl.int64).to(tl.float64) + 0.5) * 2.0**-31


@triton.jit
def _first_above(cumulative, goal):
    """The first index above the goal, or the last one that adds to the total if rounding has lifted the goal to it."""
    above = tl.sum((cumulative <= goal).to(tl.int32), axis=0)
    return tl.minimum(above, tl.sum((cumulative < tl.max(cumulative, axis=0)).to(tl.int32), axis=0))


@triton.jit
def _choose(
    addresses,
    fields,
    bests,
    masses,
    tied,
    cuts,
    tokens,
    VOCAB: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_POW2: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The row's token; its position goes on by one, and its marks tell of the token."""
    row = tl.program_id(0)
    kind = _whole(fields, row, ROWS, _KIND)
    token = tl.zeros((), tl.int64)
    if kind == _LIKELIEST:
        token = tl.load(tl.load(addresses + 1).to(tl.pointer_type(tl.int64)) + row)
    if kind >= _LIKELIEST_ADJUSTED:
        blocks = tl.arange(0, BLOCKS_POW2)
        exists = blocks < BLOCKS
        block_bests = tl.load(bests + row * BLOCKS + blocks, mask=exists, other=-_LARGEST)
        best = tl.max(block_bests, axis=0)
        if kind == _LIKELIEST_ADJUSTED:
            block = tl.min(tl.where(exists & (block_bests == best), blocks, BLOCKS_POW2), axis=0)
            columns = block * _BLOCK + tl.arange(0, _BLOCK)
            x = _scores(addresses, fields, row, columns, VOCAB, ROWS, DTYPE)
            token += tl.min(tl.where((x == tl.max(x, axis=0)) & (columns < VOCAB), columns, VOCAB - 1), axis=0)
        else:
            temperature = _real(fields, row, ROWS, _TEMPERATURE)
            mass = tl.load(masses + row * BLOCKS + blocks, mask=exists, other=0.0)
            last = tl.full((), _OUTSIDE, tl.int32)
            ties = tl.zeros((), tl.int32)
            ties_before = tl.zeros((BLOCKS_POW2,), tl.int32)
            if kind == _FILTERED:
                last = tl.load(cuts + (ROWS + row) * 2)
                ties = tl.load(cuts + (ROWS + row) * 2 + 1)
                there = tl.load(tied + row * BLOCKS + blocks, mask=exists, other=0)
                ties_before = tl.cumsum(there, axis=0) - there
                kept = tl.minimum(tl.maximum(ties - ties_before, 0), there)
                weight = tl.where(last < _FARTHEST, tl.exp(-last / _UNIT), 0.0)
                mass += kept * weight.to(tl.float64)
            else:
                mass *= tl.exp((block_bests - best) / temperature).to(tl.float64)
            cumulative = tl.cumsum(mass, axis=0)
            goal = _uniform(fields, row, ROWS) * tl.max(cumulative, axis=0)
            block = _first_above(cumulative, goal)
            here = blocks == block
            goal -= tl.sum(tl.where(here, cumulative - mass, 0.0), axis=0)
            ties -= tl.sum(tl.where(here, ties_before, 0), axis=0)

            columns = block * _BLOCK + tl.arange(0, _BLOCK)
            x = _scores(addresses, fields, row, columns, VOCAB, ROWS, DTYPE)
            y, distance = _nearness(x, best, temperature)
            tie = (distance == last).to(tl.int32)
            drawn = (columns < VOCAB) & ((distance < last) | ((tie > 0) & (tl.cumsum(tie, axis=0) <= ties)))
            # Without filters distances count for nothing.
            drawn = drawn & ((kind == _DRAWN) | (distance < _FARTHEST))
            weights = tl.where(drawn, tl.exp(-y), 0.0)
            token += block * _BLOCK + _first_above(tl.cumsum(weights.to(tl.float64), axis=0), goal)
    tl.store(tokens + row, tl.minimum(token, VOCAB - 1))
    tl.store(fields + _POSITION * ROWS + row, _whole(fields, row, ROWS, _POSITION) + 1)
    slot = _whole(fields, row, ROWS, _SLOT)
    if (slot >= 0) & (kind >= _LIKELIEST):
        mark = tl.load(addresses + 2).to(tl.pointer_type(tl.int16)) + slot.to(tl.int64) * VOCAB + token
        before = tl.load(mark).to(tl.int32)
        more = ((before & 0x7FFF) // _GENERATED < _MOST_GENERATED).to(tl.int32)
        tl.store(mark, (before + more * _GENERATED).to(tl.int16))


class Scratch:
    """What the kernels leave for each other; for up to `rows` rows of `vocab_size` logits."""

    def __init__(self, rows: int, vocab_size: int, device: torch.device) -> None:
        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty((rows, *shape), dtype=dtype, device=device)

        blocks = triton.cdiv(vocab_size, BLOCK)
        self.rows, self.vocab_size, self.blocks = rows, vocab_size, blocks
        self.bests = empty(blocks, dtype=torch.float32)
        self.masses = empty(blocks, dtype=torch.float64)
        self.tied = empty(blocks, dtype=torch.int32)
        self.totals = empty(2, PASSES, FAN, dtype=torch.int64)
        self.starts = empty(2, PASSES, dtype=torch.int32)
        self.below = empty(2, PASSES, dtype=torch.int64)
        self.cuts = torch.empty((2, rows, 2), dtype=torch.int32, device=device)


_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def sample_rows(
    rows: int,
    phases: int,
    addresses: torch.Tensor,
    fields: torch.Tensor,
    tokens: torch.Tensor,
    scratch: Scratch,
    dtype: torch.dtype,
) -> None:
    """Write a token for each of the first `rows` rows; nothing here depends on values, so it can be captured.

    Args:
        phases: 0 if no row filters; 1 if rows have top-k, top-p or min-p; 2 if some have top-k and top-p.
        addresses: int64 [3], where these lie: logits [rows, vocab] of `dtype`; the likeliest tokens, int64 [rows]; and
            marks, int16 [slots, vocab], if any row has a slot.
        fields: int32 [fields, scratch.rows], see Field.
        tokens: int64 [rows].
    """
    shape = {"VOCAB": scratch.vocab_size, "ROWS": scratch.rows, "BLOCKS": scratch.blocks, "DTYPE": _DTYPES[dtype]}
    blocks_pow2 = triton.next_power_of_2(scratch.blocks)
    s, grid = scratch, (scratch.blocks, rows)
    _survey[grid](addresses, fields, s.bests, s.masses, s.totals, **shape, num_warps=4)
    shape["BLOCKS_POW2"] = blocks_pow2
    search = (s.totals, s.starts, s.below, s.cuts)
    for phase in range(phases):
        for number in range(PASSES):
            _narrow[grid](addresses, fields, s.bests, *search, phase, number, **shape, num_warps=4)
    if phases:
        _weigh_kept[grid](addresses, fields, s.bests, s.masses, s.tied, *search, **shape, num_warps=4)
    _choose[(rows,)](addresses, fields, s.bests, s.masses, s.tied, s.cuts, tokens, **shape, num_warps=4)
