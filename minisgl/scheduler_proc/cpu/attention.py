"""Attention of one tile: 16 query heads that share a key head, against the pages before them.

The pool keeps blocks of 16 tokens. For each key head a block has the keys [16, head_dim] in tiles, then the values
transposed, [head_dim, 16], so that both can be multiplied as they lie. Scores come out transposed, too, [keys,
queries]: the softmax then runs down columns, sixteen at a time.
"""

from __future__ import annotations

import numpy as np

from minisgl.scheduler_proc.cpu.compiler import compiled, inlined
from minisgl.scheduler_proc.cpu.instructions import score, sum_values
from minisgl.scheduler_proc.cpu.memory import (
    get_float,
    get_int,
    get_word,
    set_float,
    set_int,
    set_long,
    set_short,
    set_word,
)
from minisgl.scheduler_proc.cpu.numbers import LOG2_E, exp2, to_bfloat16
from minisgl.scheduler_proc.cpu.tiles import BLOCK, BLOCKS_AT_ONCE, DEPTH, place_in_tiles

SEGMENT = 256
"""Keys whose scores are in the first-level cache together."""
ROWS_A_TURN = 8
"""Keys of one turn of the softmax's loops; a block's 16 are whole turns."""
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


@compiled
def _hide(scores, begin, end, first_key, lows, limits):
    """Make the scores of keys that a query does not see -inf, in rows begin to end; row 0 is at `first_key`."""
    for key in range(begin, end):
        at, row = np.int32(first_key + key), key * BLOCK
        for query in range(BLOCK):
            seen = get_int(lows, query) <= at and at < get_int(limits, query)
            set_float(scores, row + query, get_float(scores, row + query) if seen else np.float32(-np.inf))


@compiled
def _weigh(scores, keys, factor, scratch):
    """One more segment of an online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867) for 16 queries.

    Brings scratch.highest (of scores times factor) and scratch.totals up to date, sets scratch.shrink to what earlier
    sums have to be multiplied with, and scratch.weights to 2**(score * factor - highest).
    """
    for query in range(BLOCK):
        set_float(scratch.shrink, query, LOWEST)
    # Several rows a turn, so that few turns wait for what the one before has stored.
    for key in range(0, keys, ROWS_A_TURN):
        for query in range(BLOCK):
            top = get_float(scratch.shrink, query)
            for row in range(ROWS_A_TURN):
                top = max(top, get_float(scores, (key + row) * BLOCK + query))
            set_float(scratch.shrink, query, top)
    for query in range(BLOCK):
        before = get_float(scratch.highest, query)
        now = max(get_float(scratch.shrink, query) * factor, before)
        shrink = exp2(before - now)
        set_float(scratch.highest, query, now)
        set_float(scratch.shrink, query, shrink)
        set_float(scratch.totals, query, get_float(scratch.totals, query) * shrink)
    for key in range(0, keys, ROWS_A_TURN):
        for query in range(BLOCK):
            highest, total = get_float(scratch.highest, query), np.float32(0.0)
            for row in range(key, key + ROWS_A_TURN, 2):
                low = exp2(get_float(scores, row * BLOCK + query) * factor - highest)
                high = exp2(get_float(scores, (row + 1) * BLOCK + query) * factor - highest)
                total += low + high
                both = np.uint32(to_bfloat16(low)) | np.uint32(to_bfloat16(high)) << np.uint32(16)
                set_word(scratch.weights, row // 2 * BLOCK + query, both)
            set_float(scratch.totals, query, get_float(scratch.totals, query) + total)


@compiled
def _merge(output, sums, columns, shrink):
    """output = output * shrink + sums, float32 [columns, 16] each."""
    for column in range(columns):
        for query in range(BLOCK):
            index = column * BLOCK + query
            set_float(output, index, get_float(output, index) * get_float(shrink, query) + get_float(sums, index))


@inlined
def attend(shape, batch, part, tile, kv_head, pool, page_size, window, query, attended, scratch):
    """Attention of one tile: query heads 16 * tile and up of a part's, counted token by token.

    Args:
        pool: address of the layer.
        window: positions that a query sees.
        query, attended: of all tokens, see Buffers.
    """
    begin, start, count = get_int(batch.begins, part), get_int(batch.starts, part), get_int(batch.counts, part)
    pages = batch.pages + 4 * get_int(batch.page_begins, part)
    group, half = shape.group, shape.half
    head_dim = 2 * half
    first = tile * BLOCK
    last = min(first + BLOCK, count * group) - 1
    # Counted along, since divisions would take longer than the rest.
    token, head = first // group, first % group
    for column in range(BLOCK):
        set_int(scratch.limits, column, np.int32(start + token + 1))
        set_int(scratch.lows, column, np.int32(max(0, start + token + 1 - window)))
        source = query + ((begin + token) * shape.heads + kv_head * group + head) * head_dim * 2
        for pair in range(half):
            set_word(scratch.query_tile, pair * BLOCK + column, get_word(source, pair))
        # Columns beyond the last are computed like the last, and not stored.
        if first + column < last:
            head += 1
            if head == group:
                token, head = token + 1, 0
    for column in range(BLOCK):
        set_float(scratch.highest, column, LOWEST)
        set_float(scratch.totals, column, np.float32(0.0))
    for index in range(head_dim * BLOCK):
        set_float(scratch.output, index, np.float32(0.0))
    factor = LOG2_E / np.sqrt(np.float32(head_dim))
    first_key = get_int(scratch.lows, 0) // BLOCK * BLOCK
    end_key = get_int(scratch.limits, BLOCK - 1)
    for key in range(first_key, end_key, SEGMENT):
        blocks = (min(SEGMENT, end_key - key) + BLOCK - 1) // BLOCK
        page, offset = key // page_size, key % page_size
        for block in range((blocks + BLOCKS_AT_ONCE - 1) // BLOCKS_AT_ONCE * BLOCKS_AT_ONCE):
            slot = get_int(pages, page) * page_size + offset
            keys = pool + slot // BLOCK * block_bytes(shape) + kv_head * 2 * head_bytes(shape)
            set_long(scratch.blocks, block, keys)
            # Blocks beyond the last are computed like the last, and not looked at.
            if block < blocks - 1:
                offset += BLOCK
                if offset == page_size:
                    page, offset = page + 1, 0
        score(scratch, blocks, head_dim // DEPTH)
        # The last query's window begins last, the first query's limit comes first; between them nothing is hidden.
        hidden = 0 if key < get_int(scratch.lows, BLOCK - 1) else max(get_int(scratch.limits, 0) - key, 0)
        if hidden < blocks * BLOCK:
            _hide(scratch.scores, hidden, blocks * BLOCK, key, scratch.lows, scratch.limits)
        _weigh(scratch.scores, blocks * BLOCK, factor, scratch)
        for column in range(0, head_dim, 64):
            width = min(64, head_dim - column)
            values = head_bytes(shape) + column * BLOCK * 2
            sum_values(scratch, blocks, values, width)
            _merge(scratch.output + column * BLOCK * 4, scratch.sums, width, scratch.shrink)
    token, head = first // group, first % group
    for index in range(last - first + 1):
        portion = np.float32(1.0) / get_float(scratch.totals, index)
        for column in range(0, head_dim, DEPTH):
            depths = shape.heads * head_dim // DEPTH
            target = attended + place_in_tiles(begin + token, (kv_head * group + head) * head_dim + column, depths)
            for lane in range(DEPTH):
                value = get_float(scratch.output, (column + lane) * BLOCK + index) * portion
                set_short(target, lane, to_bfloat16(value))
        head += 1
        if head == group:
            token, head = token + 1, 0
