"""One whole step of a decoder, from token ids to logits, as a function that every thread of a team runs.

The threads go through the same phases; in each they take items (rows, blocks of output columns, tiles of attention)
until none is left, then wait for each other. Between the tiles everything is float32.
"""

from __future__ import annotations

import math

import numpy as np

from minisgl.scheduler_proc.cpu.attention import attend, block_bytes, head_bytes
from minisgl.scheduler_proc.cpu.compiler import compiled, compiled_to_sum, inlined
from minisgl.scheduler_proc.cpu.intrinsics import tile_configure, tile_release
from minisgl.scheduler_proc.cpu.memory import (
    get_float,
    get_int,
    get_long,
    get_short,
    set_float,
    set_int,
    set_long,
    set_short,
)
from minisgl.scheduler_proc.cpu.numbers import finite_or_zero, from_bfloat16, silu, to_bfloat16
from minisgl.scheduler_proc.cpu.team import take, wait_for_all
from minisgl.scheduler_proc.cpu.tiles import BLOCK, DEPTH, PAIR, TILE_BYTES, multiply, place_in_tiles

PHASES_PER_LAYER = 9
OTHER_PHASES = 5
GROUP_BYTES = 2**20
"""Of a product's rows that are multiplied together, so that they stay in the second-level cache."""

TOKENS_AT_ONCE = 16
"""Tokens of a long step that one thread rotates together: their values share cache lines in the pool."""
LARGEST_BYTES = 2 * BLOCK * 4
"""Of one row in Scratch.largest."""

STORE, ADD, ACTIVATE, CHOOSE = 0, 1, 2, 3
"""What becomes of a product: it is stored, added to what is there, or goes through the MLP's activation; or only the
largest outputs of each row are kept, with the columns that they are from."""


@compiled_to_sum
def _norm_factor(row, columns, epsilon):
    """1 / sqrt(mean of squares + epsilon) of a float32 row."""
    total = np.float32(0.0)
    for column in range(columns):
        total += get_float(row, column) * get_float(row, column)
    return np.float32(1.0) / np.sqrt(total / np.float32(columns) + np.float32(epsilon))


@compiled
def _norm_row(source, columns, weight, epsilon, target, row):
    """RMS norm (Zhang and Sennrich 2019, arXiv 1910.07467) of one float32 row, rounded to bfloat16, into tiles."""
    factor = _norm_factor(source, columns, epsilon)
    for begin in range(0, columns, DEPTH):
        place = target + place_in_tiles(row, begin, columns // DEPTH)
        for lane in range(DEPTH):
            value = get_float(source, begin + lane) * factor * get_float(weight, begin + lane)
            set_short(place, lane, to_bfloat16(value))


@inlined
def _norm_rows(counts, phase, shape, rows, source, weight, target):
    while True:
        row = take(counts, phase)
        if row >= rows:
            return
        _norm_row(source + 4 * row * shape.hidden, shape.hidden, weight, shape.epsilon, target, row)


@inlined
def _embed_and_norm(counts, phase, shape, batch, weights, pool, buffers):
    while True:
        row = take(counts, phase)
        if row >= batch.tokens:
            return
        _place(shape, batch, weights, pool, buffers, row)
        source = weights.embedding + 2 * get_int(batch.input_ids, row) * shape.hidden
        target = buffers.hidden + 4 * row * shape.hidden
        for column in range(shape.hidden):
            set_float(target, column, from_bfloat16(get_short(source, column)))
        _norm_row(target, shape.hidden, weights.norms, shape.epsilon, buffers.normed, row)


@inlined
def _place(shape, batch, weights, pool, buffers, row):
    """Where a token's keys and values go, and by which angles they are rotated."""
    part = get_int(batch.token_parts, row)
    position = get_int(batch.starts, part) + row - get_int(batch.begins, part)
    page = get_int(batch.pages, get_int(batch.page_begins, part) + position // pool.page_size)
    set_long(buffers.slots, row, page * pool.page_size + position % pool.page_size)
    for column in range(shape.half):
        angle = np.float32(position) * get_float(weights.frequencies, column)
        set_float(buffers.cos, row * shape.half + column, np.float32(math.cos(angle) * shape.rope_scaling))
        set_float(buffers.sin, row * shape.half + column, np.float32(math.sin(angle) * shape.rope_scaling))


@compiled
def _use_sums(kind, sums, rows, columns, bias, up_bias, target, stride):
    """Bring a product's sums [rows, 32] where they belong; see STORE, ADD and ACTIVATE.

    Args:
        columns: that exist of the 32.
        bias: address of the first column's, or 0; `up_bias` the same for the second 16 columns if they are ACTIVATEd.
        target: address of the first element; rows are `stride` elements apart. With ACTIVATE it lies in tiles, and
            blocks of 16 rows are `stride` bytes apart.
    """
    for row in range(rows):
        source = sums + row * PAIR * 4
        if kind == STORE and bias == 0:
            for column in range(columns):
                set_float(target, row * stride + column, get_float(source, column))
        elif kind == STORE:
            for column in range(columns):
                set_float(target, row * stride + column, get_float(source, column) + get_float(bias, column))
        elif kind == ADD:
            for column in range(columns):
                value = get_float(source, column) + get_float(bias, column)
                set_float(target, row * stride + column, get_float(target, row * stride + column) + value)
        else:
            for column in range(BLOCK):
                gate = get_float(source, column) + get_float(bias, column)
                up = get_float(source, BLOCK + column) + get_float(up_bias, column)
                place = target + row // BLOCK * stride + row % BLOCK * 64
                set_short(place, column, to_bfloat16(silu(gate) * up))


@compiled
def _keep_largest(sums, rows, columns, first_column, largest):
    """Compare a product's sums [rows, 32], of which so many columns exist, with Buffers.largest. NaN is the largest."""
    for row in range(rows):
        best = largest + row * LARGEST_BYTES
        for half in range(2):
            source = sums + (row * PAIR + half * BLOCK) * 4
            for lane in range(BLOCK):
                value, known = get_float(source, lane), get_float(best, lane)
                value = value if value == value else np.float32(np.inf)
                larger = value > known and half * BLOCK + lane < columns
                set_float(best, lane, value if larger else known)
                column = np.int32(first_column + half * BLOCK + lane)
                set_int(best, BLOCK + lane, column if larger else get_int(best, BLOCK + lane))


@inlined
def _choose_tokens(counts, phase, threads, batch, buffers):
    """Put together what all threads' columns have: the first of each row's largest logits."""
    while True:
        row = take(counts, phase)
        if row >= batch.sampled_tokens:
            return
        largest, token = np.float32(-np.inf), np.int32(0)
        for thread in range(threads):
            best = buffers.largest + thread * buffers.largest_bytes + row * LARGEST_BYTES
            for lane in range(BLOCK):
                value, column = get_float(best, lane), get_int(best, BLOCK + lane)
                if value > largest or (value == largest and column < token):
                    largest, token = value, column
        set_long(buffers.likeliest, row, token)
        set_long(buffers.likeliest, batch.sampled_tokens + row, 1 if math.isfinite(largest) else 0)


@inlined
def _multiply_rows(counts, phase, kind, source, depths, rows, weight, columns, bias, target, scratch):
    """One matrix product of the step: every item is 32 output columns (16 gate and 16 up ones) of a group of rows.

    Args:
        kind: what becomes of the outputs.
        source: bfloat16 [rows, depths * 32], in tiles.
        columns: of the output, as it is stored.
        bias: float32 [columns] (with ACTIVATE gate's, then up's), or 0 for none.
        target: float32 [rows, columns]; with ACTIVATE bfloat16, in tiles; with CHOOSE this thread's Buffers.largest.
    """
    width = BLOCK if kind == ACTIVATE else PAIR
    pairs = (columns + width - 1) // width
    group = max(GROUP_BYTES // (depths * DEPTH * 2 * PAIR), 1) * PAIR
    groups = (rows + group - 1) // group
    configured = 0
    if kind == CHOOSE:
        for row in range(rows):
            for lane in range(BLOCK):
                set_float(target, row * 2 * BLOCK + lane, np.float32(-np.inf))
                set_int(target, row * 2 * BLOCK + BLOCK + lane, np.int32(0))
    while True:
        item = take(counts, phase)
        if item >= pairs * groups:
            return
        begin, pair = item // pairs * group, item % pairs
        column = pair * width
        here = min(width, columns - column)
        first = pair if kind == ACTIVATE else 2 * pair
        second = pair + pairs if kind == ACTIVATE else first + 1
        gate_bias = bias + 4 * column if bias else 0
        for row in range(begin, min(begin + group, rows), PAIR):
            count = min(PAIR, rows - row)
            if count != configured:
                tile_configure(scratch.shapes + 64 * count)
                configured = count
            multiply(weight, first, second, depths, source + place_in_tiles(row, 0, depths), count, scratch.sums)
            if kind == CHOOSE:
                _keep_largest(scratch.sums, count, here, column, target + row * LARGEST_BYTES)
            else:
                place, stride = target + (row * columns + column) * 4, columns
                if kind == ACTIVATE:
                    place = target + place_in_tiles(row, column, columns // DEPTH)
                    stride = columns // DEPTH * TILE_BYTES
                _use_sums(kind, scratch.sums, count, here, gate_bias, gate_bias + 4 * columns, place, stride)


@compiled
def _rotate(head, half, cos, sin):
    """Rotate a float32 head [2 * half] in place by a position's angles (Su et al. 2021, arXiv 2104.09864)."""
    for column in range(half):
        one, other = get_float(head, column), get_float(head, column + half)
        set_float(head, column, one * get_float(cos, column) - other * get_float(sin, column))
        set_float(head, column + half, other * get_float(cos, column) + one * get_float(sin, column))


@compiled
def _scale_head(head, columns, weight, epsilon):
    factor = _norm_factor(head, columns, epsilon)
    for column in range(columns):
        set_float(head, column, get_float(head, column) * factor * get_float(weight, column))


@inlined
def _rotate_and_store(counts, phase, shape, layer, batch, weights, pool, buffers):
    """Norm and rotate each token's query and key heads; store queries for attention, keys and values in the pool."""
    at_once = TOKENS_AT_ONCE if batch.tokens > 8 * TOKENS_AT_ONCE else 1
    while True:
        begin = take(counts, phase) * at_once
        if begin >= batch.tokens:
            return
        for token in range(begin, min(begin + at_once, batch.tokens)):
            _rotate_token(shape, layer, batch, weights, pool, buffers, token)


@inlined
def _rotate_token(shape, layer, batch, weights, pool, buffers, token):
    heads, kv_heads, half = shape.heads, shape.kv_heads, shape.half
    head_dim = 2 * half
    slot = get_long(buffers.slots, token)
    block = pool + slot // BLOCK * block_bytes(shape)
    place = slot % BLOCK
    cos, sin = buffers.cos + 4 * token * half, buffers.sin + 4 * token * half
    for number in range(heads + 2 * kv_heads):
        head = buffers.qkv + 4 * (token * (heads + 2 * kv_heads) + number) * head_dim
        if number < heads + kv_heads:
            if shape.has_head_norms:
                norm = weights.head_norms + 4 * (layer * (heads + kv_heads) + number) * head_dim
                _scale_head(head, head_dim, norm, shape.epsilon)
            _rotate(head, half, cos, sin)
        if number < heads:
            target, step = buffers.query + 2 * (token * heads + number) * head_dim, 1
        elif number < heads + kv_heads:
            target, step = block + (number - heads) * 2 * head_bytes(shape) + 2 * place * head_dim, 1
        else:
            values = ((number - heads - kv_heads) * 2 + 1) * head_bytes(shape)
            target, step = block + values + 2 * place, BLOCK
        # What overflows must not stay in pages that another request gets: zero times NaN is NaN.
        for column in range(head_dim):
            set_short(target, column * step, finite_or_zero(to_bfloat16(get_float(head, column))))


@inlined
def _attend_all(counts, phase, shape, layer, batch, weights, pool, page_size, buffers, scratch):
    tile_configure(scratch.attention_shapes)
    window = get_int(weights.windows, layer)
    while True:
        item = take(counts, phase)
        if item >= batch.tiles * shape.kv_heads:
            return
        index, kv_head = item // shape.kv_heads, item % shape.kv_heads
        part, tile = get_int(batch.tile_parts, index), get_int(batch.tile_numbers, index)
        attend(shape, batch, part, tile, kv_head, pool, page_size, window, buffers.query, buffers.attended, scratch)


@inlined
def _gather_sampled(counts, phase, shape, batch, buffers):
    width = shape.heads * 2 * shape.half
    while True:
        row = take(counts, phase)
        if row >= batch.sampled_tokens:
            return
        token = get_int(batch.sampled, row)
        for column in range(shape.hidden):
            value = get_float(buffers.hidden, token * shape.hidden + column)
            set_float(buffers.last_hidden, row * shape.hidden + column, value)
        for column in range(0, width, DEPTH):
            source = buffers.attended + place_in_tiles(token, column, width // DEPTH)
            target = buffers.last_attended + place_in_tiles(row, column, width // DEPTH)
            for lane in range(DEPTH):
                set_short(target, lane, get_short(source, lane))


@compiled
def run_step(counts, threads, shape, weights, batch, pool, buffers, scratch):
    """One thread's share of a step; Buffers.logits or Buffers.likeliest is what it leads to, when all have returned.

    Args:
        counts: address of zeroed counters for all phases.
        threads: how many run this.
        scratch: this thread's own.
    """
    phase = 0
    width = shape.heads * 2 * shape.half
    qkv_width = (shape.heads + 2 * shape.kv_heads) * 2 * shape.half
    hidden, attended, rows = buffers.hidden, buffers.attended, batch.tokens
    _embed_and_norm(counts, phase, shape, batch, weights, pool, buffers)
    phase = wait_for_all(counts, threads, phase)
    # The head is one product more, after the last layer.
    for product in range(4 * shape.layers + 1):
        layer, number = product // 4, product % 4
        kind, source, depths, columns, target = STORE, buffers.normed, shape.hidden // DEPTH, qkv_width, buffers.qkv
        bias, matrix = weights.qkv_bias + 4 * layer * qkv_width, weights.head
        if layer == shape.layers:
            columns, bias, target = shape.vocab, 0, buffers.logits
            if target == 0:
                kind, target = CHOOSE, buffers.largest + scratch.thread * buffers.largest_bytes
        else:
            matrix = get_long(weights.matrices, product)
        if number == 1:
            _rotate_and_store(counts, phase, shape, layer, batch, weights, get_long(pool.layers, layer), buffers)
            phase = wait_for_all(counts, threads, phase)
            _attend_all(
                counts,
                phase,
                shape,
                layer,
                batch,
                weights,
                get_long(pool.layers, layer),
                pool.page_size,
                buffers,
                scratch,
            )
            phase = wait_for_all(counts, threads, phase)
            if layer == shape.layers - 1:
                # Only the tokens that get logits go on from here.
                _gather_sampled(counts, phase, shape, batch, buffers)
                phase = wait_for_all(counts, threads, phase)
                hidden, attended = buffers.last_hidden, buffers.last_attended
                rows = batch.sampled_tokens
            kind, source, depths, columns, target = ADD, attended, width // DEPTH, shape.hidden, hidden
            bias = weights.output_bias + 4 * layer * shape.hidden
        elif number == 2:
            kind, columns, target = ACTIVATE, shape.intermediate, buffers.activated
            bias = weights.gate_up_bias + 8 * layer * shape.intermediate
        elif number == 3:
            kind, source, depths = ADD, buffers.activated, shape.intermediate // DEPTH
            columns, target = shape.hidden, hidden
            bias = weights.down_bias + 4 * layer * shape.hidden
        _multiply_rows(counts, phase, kind, source, depths, rows, matrix, columns, bias, target, scratch)
        phase = wait_for_all(counts, threads, phase)
        if kind == ADD:
            following = 2 * layer + (1 if number == 1 else 2)
            norm = weights.norms + 4 * following * shape.hidden
            if following == 2 * shape.layers:
                norm = weights.last_norm
            _norm_rows(counts, phase, shape, rows, hidden, norm, buffers.normed)
            phase = wait_for_all(counts, threads, phase)
    if buffers.logits == 0:
        _choose_tokens(counts, phase, threads, batch, buffers)
    tile_release()
