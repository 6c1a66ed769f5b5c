"""One whole step of a decoder, from token ids to logits, as a function that every thread of a team runs.

The threads go through the same phases; in each they take items (rows, blocks of output columns, tiles of attention)
until none is left, then wait for each other. Between the products everything is float32.
"""

from __future__ import annotations

import math

import numpy as np

from minisgl.scheduler_proc.cpu.attention import attend, block_bytes, head_bytes
from minisgl.scheduler_proc.cpu.compiler import compiled, compiled_to_sum, inlined
from minisgl.scheduler_proc.cpu.instructions import finish, prepare_attention
from minisgl.scheduler_proc.cpu.memory import (
    get_float,
    get_int,
    get_long,
    get_short,
    set_float,
    set_long,
    set_short,
)
from minisgl.scheduler_proc.cpu.numbers import finite_or_zero, from_bfloat16, to_bfloat16
from minisgl.scheduler_proc.cpu.products import ACTIVATE, ADD, CHOOSE, STORE, choose_tokens, multiply_rows
from minisgl.scheduler_proc.cpu.screening import bound_logits, multiply_the_rest, split_rows
from minisgl.scheduler_proc.cpu.team import take, wait_for_all
from minisgl.scheduler_proc.cpu.tiles import BLOCK, DEPTH, place_in_tiles

PHASES_PER_LAYER = 9
OTHER_PHASES = 7
TOKENS_AT_ONCE = 16
"""Tokens of a long step that one thread rotates together: their values share cache lines in the pool."""


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
            _rotate_token(shape, layer, weights, pool, buffers, token)


@inlined
def _rotate_token(shape, layer, weights, pool, buffers, token):
    """One token of `_rotate_and_store`; its heads are float32 [heads + 2 kv heads, head_dim] of Buffers.qkv."""
    heads, kv_heads, half = shape.heads, shape.kv_heads, shape.half
    head_dim = 2 * half
    depths = head_dim // DEPTH
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
        # What overflows must not stay in pages that another request gets: zero times NaN is NaN.
        if number >= heads + kv_heads:
            target = block + ((number - heads - kv_heads) * 2 + 1) * head_bytes(shape) + 2 * place
            for column in range(head_dim):
                set_short(target, column * BLOCK, finite_or_zero(to_bfloat16(get_float(head, column))))
            continue
        for column in range(0, head_dim, DEPTH):
            if number < heads:
                target = buffers.query + 2 * ((token * heads + number) * head_dim + column)
            else:
                target = block + (number - heads) * 2 * head_bytes(shape) + place_in_tiles(place, column, depths)
            for lane in range(DEPTH):
                set_short(target, lane, finite_or_zero(to_bfloat16(get_float(head, column + lane))))


@inlined
def _attend_all(counts, phase, shape, layer, batch, weights, pool, page_size, buffers, scratch):
    prepare_attention(scratch)
    window = get_int(weights.windows, layer)
    while True:
        item = take(counts, phase)
        if item >= batch.items * shape.kv_heads:
            return
        index, kv_head = item // shape.kv_heads, item % shape.kv_heads
        attend(shape, batch, index, kv_head, pool, page_size, window, buffers.query, buffers.attended, scratch)


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
def run_step(counts, threads, shape, weights, screen, batch, pool, buffers, scratch):
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
        bias, matrix = weights.qkv_bias + 4 * layer * qkv_width, weights.matrices + 24 * product
        if layer == shape.layers:
            columns, bias, target = shape.vocab, 0, buffers.logits
            if target == 0:
                kind, target = CHOOSE, buffers.largest + scratch.thread * buffers.largest_bytes
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
        if kind == CHOOSE and buffers.digits != 0:
            split_rows(counts, phase, rows, shape.hidden, source, buffers)
            phase = wait_for_all(counts, threads, phase)
            bound_logits(counts, phase, threads, shape, rows, screen, buffers, scratch)
            phase = wait_for_all(counts, threads, phase)
            multiply_the_rest(counts, phase, threads, shape, rows, source, matrix, buffers, scratch)
        else:
            multiply_rows(counts, phase, threads, kind, source, depths, rows, matrix, columns, bias, target, scratch)
        phase = wait_for_all(counts, threads, phase)
        if kind == ADD:
            following = 2 * layer + (1 if number == 1 else 2)
            norm = weights.norms + 4 * following * shape.hidden
            if following == 2 * shape.layers:
                norm = weights.last_norm
            _norm_rows(counts, phase, shape, rows, hidden, norm, buffers.normed)
            phase = wait_for_all(counts, threads, phase)
    if buffers.logits == 0:
        choose_tokens(counts, phase, threads, batch, buffers)
    finish(scratch)
