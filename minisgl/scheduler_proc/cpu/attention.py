"""Attention of tiles: 16 query heads each that share a key head, against the pages before them.

The pool keeps blocks of 16 tokens. For each key head a block has the keys [16, head_dim] in tiles, then the values
transposed, [head_dim, 16], so that both can be multiplied as they lie. Scores come out transposed, too, [keys,
queries]: the softmax then runs down columns, sixteen at a time.

Tiles of the same tokens' other heads, and of the next tokens, need the same keys. Some are computed together, so
that these are read from memory once, and two at a time, so that both get them from the second-level cache at once.
"""

from __future__ import annotations

import numpy as np

from minisgl.scheduler_proc.cpu.compiler import compiled, inlined
from minisgl.scheduler_proc.cpu.instructions import score, score_two, sum_values, sum_values_two
from minisgl.scheduler_proc.cpu.intrinsics import prefetch_far
from minisgl.scheduler_proc.cpu.memory import (
    get_float,
    get_int,
    get_long,
    get_word,
    set_float,
    set_int,
    set_long,
    set_short,
    set_word,
)
from minisgl.scheduler_proc.cpu.numbers import LOG2_E, bfloat16_pair, exp2_below, to_bfloat16
from minisgl.scheduler_proc.cpu.tiles import BLOCK, BLOCKS_AT_ONCE, DEPTH, LINE, SEGMENT, place_in_tiles

TILES_AT_ONCE = 4
"""Tiles that go through the keys together at most."""
ROWS_A_TURN = 8
"""Keys of one turn of the softmax's loops; a block's 16 are whole turns."""
COLUMNS_A_TURN = 8
"""Of the sums of values."""
LOWS, LIMITS, HIGHEST, TOTALS, QUERIES = (64 * place for place in range(5))
"""Where in a tile's state (bytes) are: int32 [16] each, between which positions its queries see keys; float32 [16],
the highest score so far, times a factor, and the sum of the softmax's numerators; words [half, 16], two bfloat16 each,
the queries. The sums of values so far follow, float32 [head_dim, 16]."""
LOWEST = np.float32(-1e30)
"""Below every score; finite, so that no difference of two is NaN."""


@inlined
def block_bytes(shape):
    """Of one block of the pool: 16 keys and values of every key head."""
    return BLOCK * 2 * shape.kv_heads * 2 * shape.half * 2


@inlined
def head_bytes(shape):
    """Of one head's 16 keys, which its 16 values follow."""
    return BLOCK * 2 * shape.half * 2


def state_bytes(half: int) -> int:
    """Of one tile's state."""
    return QUERIES + 64 * half + 64 * 2 * half


_state_bytes = inlined(state_bytes)


@compiled
def _hide(scores, begin, end, first_key, lows, limits):
    """Make the scores of keys that a query does not see -inf, in rows begin to end; row 0 is at `first_key`."""
    for key in range(begin, end):
        at, row = np.int32(first_key + key), key * BLOCK
        for query in range(BLOCK):
            seen = get_int(lows, query) <= at and at < get_int(limits, query)
            set_float(scores, row + query, get_float(scores, row + query) if seen else np.float32(-np.inf))


@inlined
def _ask(blocks, count, lines, first, run):
    """Ask for lines `first` to `first + run` of a segment's blocks, which have so many each: keys and values."""
    block = first // lines
    if block < count:
        begin = get_long(blocks, block) + first % lines * LINE
        for line in range(run):
            prefetch_far(begin + line * LINE)


@compiled
def _weigh(scores, keys, factor, tile, shrinks, weights, ahead, ahead_count, lines, first, run):
    """One more segment of an online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867) for 16 queries.

    Brings the tile's HIGHEST and TOTALS up to date, sets `shrinks` to what earlier sums have to be multiplied with, and
    `weights` to 2**(score * factor - highest). Meanwhile it asks for memory of the next segment, for which the products
    leave no time: `run` lines a turn, from `first` on; for the other arguments see `_ask`.
    """
    highests, totals = tile + HIGHEST, tile + TOTALS
    for query in range(BLOCK):
        set_float(shrinks, query, LOWEST)
    # Several rows a turn, so that few turns wait for what the one before has stored.
    for key in range(0, keys, ROWS_A_TURN):
        _ask(ahead, ahead_count, lines, first, run)
        first += run
        for query in range(BLOCK):
            top = get_float(shrinks, query)
            for row in range(ROWS_A_TURN):
                top = max(top, get_float(scores, (key + row) * BLOCK + query))
            set_float(shrinks, query, top)
    for query in range(BLOCK):
        before = get_float(highests, query)
        now = max(get_float(shrinks, query) * factor, before)
        shrink = exp2_below(before - now)
        set_float(highests, query, now)
        set_float(shrinks, query, shrink)
        set_float(totals, query, get_float(totals, query) * shrink)
    for key in range(0, keys, ROWS_A_TURN):
        _ask(ahead, ahead_count, lines, first, run)
        first += run
        for query in range(BLOCK):
            highest, total = get_float(highests, query), np.float32(0.0)
            for row in range(key, key + ROWS_A_TURN, 2):
                low = exp2_below(get_float(scores, row * BLOCK + query) * factor - highest)
                high = exp2_below(get_float(scores, (row + 1) * BLOCK + query) * factor - highest)
                total += low + high
                set_word(weights, row // 2 * BLOCK + query, bfloat16_pair(low, high))
            set_float(totals, query, get_float(totals, query) + total)


@compiled
def _merge(output, sums, columns, shrink):
    """output = output * shrink + sums, float32 [columns, 16] each."""
    # Several columns a turn, or the compiler makes single numbers of the sixteen.
    for first in range(0, columns, COLUMNS_A_TURN):
        for query in range(BLOCK):
            factor = get_float(shrink, query)
            for column in range(first, first + COLUMNS_A_TURN):
                index = column * BLOCK + query
                set_float(output, index, get_float(output, index) * factor + get_float(sums, index))


@compiled
def _begin_tile(tile, first, last, start, group, half, heads, window, queries):
    """Set up the state of query heads `first` to `last` of a part, counted token by token.

    Args:
        queries: of the part's first token, those of the key head: see Buffers.query.
    """
    # Counted along, since divisions would take longer than the rest.
    token, head = first // group, first % group
    for column in range(BLOCK):
        set_int(tile + LIMITS, column, np.int32(start + token + 1))
        set_int(tile + LOWS, column, np.int32(max(0, start + token + 1 - window)))
        source = queries + (token * heads + head) * 2 * half * 2
        for pair in range(half):
            set_word(tile + QUERIES, pair * BLOCK + column, get_word(source, pair))
        # Columns beyond the last are computed like the last, and not stored.
        if first + column < last:
            head += 1
            if head == group:
                token, head = token + 1, 0
    for column in range(BLOCK):
        set_float(tile + HIGHEST, column, LOWEST)
        set_float(tile + TOTALS, column, np.float32(0.0))
    for index in range(2 * half * BLOCK):
        set_float(tile + QUERIES + 64 * half, index, np.float32(0.0))


@compiled
def _end_tile(tile, first, last, group, half, heads, begin, first_head, attended):
    """Store what a tile's queries attended to; `begin` is its part's first token, `first_head` its key head's first."""
    head_dim = 2 * half
    output, depths = tile + QUERIES + 64 * half, heads * head_dim // DEPTH
    token, head = first // group, first % group
    for index in range(last - first + 1):
        portion = np.float32(1.0) / get_float(tile + TOTALS, index)
        for column in range(0, head_dim, DEPTH):
            target = attended + place_in_tiles(begin + token, (first_head + head) * head_dim + column, depths)
            for lane in range(DEPTH):
                value = get_float(output, (column + lane) * BLOCK + index) * portion
                set_short(target, lane, to_bfloat16(value))
        head += 1
        if head == group:
            token, head = token + 1, 0


@inlined
def attend(shape, batch, item, kv_head, pool, page_size, window, query, attended, scratch):
    """Attention of a batch's item: some tiles of a part, with one key head.

    Args:
        pool: address of the layer.
        window: positions that a query sees.
        query, attended: of all tokens, see Buffers.
    """
    part, tiles = get_int(batch.item_parts, item), get_int(batch.item_tiles, item)
    begin, start, count = get_int(batch.begins, part), get_int(batch.starts, part), get_int(batch.counts, part)
    group, half = shape.group, shape.half
    first, end, size = get_int(batch.item_firsts, item) * BLOCK, count * group, _state_bytes(half)
    queries = query + (begin * shape.heads + kv_head * group) * 2 * half * 2
    for number in range(tiles):
        one = first + number * BLOCK
        last = min(one + BLOCK, end) - 1
        _begin_tile(scratch.tiles + number * size, one, last, start, group, half, shape.heads, window, queries)
    # Where a window begins, each tile has keys of its own.
    together = tiles if get_int(scratch.tiles + (tiles - 1) * size + LOWS, BLOCK - 1) == 0 else 1
    pages = batch.pages + 4 * get_int(batch.page_begins, part)
    for number in range(0, tiles, together):
        _attend_together(shape, together, scratch.tiles + number * size, kv_head, pages, pool, page_size, scratch)
    for number in range(tiles):
        one = first + number * BLOCK
        last = min(one + BLOCK, end) - 1
        tile = scratch.tiles + number * size
        _end_tile(tile, one, last, group, half, shape.heads, begin, kv_head * group, attended)


@inlined
def _attend_together(shape, tiles, first_tile, kv_head, pages, pool, page_size, scratch):
    """Bring the states of some tiles through all keys that they see: those of the first one's first query, and on."""
    size = _state_bytes(shape.half)
    first_key = get_int(first_tile + LOWS, 0) // BLOCK * BLOCK
    end_key = get_int(first_tile + (tiles - 1) * size + LIMITS, BLOCK - 1)
    here, ahead = scratch.blocks, scratch.blocks + 8 * (SEGMENT // BLOCK)
    blocks = _find_blocks(shape, first_key, end_key, kv_head, pages, pool, page_size, here)
    # All turns of all tiles that ask, two for each of a segment's rows, are to ask for what a segment has.
    asking = 4 if tiles >= 4 else min(tiles, 2)
    lines = 2 * head_bytes(shape) // LINE
    run = lines * (SEGMENT // BLOCK) // (2 * (SEGMENT // ROWS_A_TURN) * asking)
    for key in range(first_key, end_key, SEGMENT):
        blocks_ahead = _find_blocks(shape, key + SEGMENT, end_key, kv_head, pages, pool, page_size, ahead)
        for number in range(0, tiles, 2):
            tile, two = first_tile + number * size, number + 1 < tiles
            last = tile + size if two else tile
            # The last tile sees the most.
            seen = min(blocks, (get_int(last + LIMITS, BLOCK - 1) - key + BLOCK - 1) // BLOCK)
            if seen > 0:
                asked = blocks_ahead if number < asking else 0
                first_line = number * 2 * (SEGMENT // ROWS_A_TURN) * run
                _attend_segment(shape, tile, two, key, here, seen, ahead, asked, lines, first_line, run, scratch)
        here, ahead, blocks = ahead, here, blocks_ahead


@inlined
def _find_blocks(shape, key, end_key, kv_head, pages, pool, page_size, target):
    """Write down where the keys of a segment's blocks are; returns how many there are before `end_key`."""
    blocks = (min(SEGMENT, max(end_key - key, 0)) + BLOCK - 1) // BLOCK
    page, offset = key // page_size, key % page_size
    for block in range((blocks + BLOCKS_AT_ONCE - 1) // BLOCKS_AT_ONCE * BLOCKS_AT_ONCE):
        slot = get_int(pages, page) * page_size + offset
        set_long(target, block, pool + slot // BLOCK * block_bytes(shape) + kv_head * 2 * head_bytes(shape))
        # Blocks beyond the last are computed like the last, and not looked at.
        if block < blocks - 1:
            offset += BLOCK
            if offset == page_size:
                page, offset = page + 1, 0
    return blocks


@inlined
def _attend_segment(shape, tile, two, key, here, blocks, ahead, asked, lines, first_line, run, scratch):
    """Bring the state of a tile, or of it and the next one, through the keys of so many blocks, the first at `key`."""
    head_dim, size, rows = 2 * shape.half, _state_bytes(shape.half), blocks * BLOCK
    if two:
        score_two(scratch, here, tile + QUERIES, tile + size + QUERIES, blocks, head_dim // DEPTH)
    else:
        score(scratch, here, tile + QUERIES, blocks, head_dim // DEPTH)
    factor = LOG2_E / np.sqrt(np.float32(head_dim))
    for number in range(2 if two else 1):
        one, scores = tile + number * size, scratch.scores + number * SEGMENT * BLOCK * 4
        # The last query's window begins last, the first query's limit comes first; between them nothing is hidden.
        hidden = 0 if key < get_int(one + LOWS, BLOCK - 1) else max(get_int(one + LIMITS, 0) - key, 0)
        if hidden < rows:
            _hide(scores, hidden, rows, key, one + LOWS, one + LIMITS)
        weights, shrink = scratch.weights + number * SEGMENT * BLOCK * 2, scratch.shrink + number * BLOCK * 4
        first = first_line + number * 2 * (SEGMENT // ROWS_A_TURN) * run
        _weigh(scores, rows, factor, one, shrink, weights, ahead, asked, lines, first, run)
    output, columns = tile + QUERIES + 64 * shape.half, 32 if two else 64
    for column in range(0, head_dim, columns):
        width, place = min(columns, head_dim - column), column * BLOCK * 4
        values = head_bytes(shape) + column * BLOCK * 2
        if two:
            sum_values_two(scratch, here, blocks, values)
            _merge(output + size + place, scratch.sums + width * BLOCK * 4, width, scratch.shrink + BLOCK * 4)
        else:
            sum_values(scratch, here, blocks, values, width)
        _merge(output + place, scratch.sums, width, scratch.shrink)
