"""Matrix products of a step, shared out among threads, and what becomes of their outputs."""

from __future__ import annotations

import math

import numpy as np

from minisgl.scheduler_proc.cpu.compiler import compiled, inlined
from minisgl.scheduler_proc.cpu.instructions import multiply, multiply_narrow, prepare_rows
from minisgl.scheduler_proc.cpu.memory import get_float, get_int, get_long, set_float, set_int, set_long, set_short
from minisgl.scheduler_proc.cpu.narrow import NARROW_BYTES
from minisgl.scheduler_proc.cpu.numbers import silu, to_bfloat16
from minisgl.scheduler_proc.cpu.team import take, take_run
from minisgl.scheduler_proc.cpu.tiles import BLOCK, DEPTH, PAIR, TILE_BYTES, place_in_tiles

GROUP_BYTES = 5 * 2**18
"""Of a product's rows that are multiplied together, so that they stay in the second-level cache."""

LARGEST_BYTES = 2 * BLOCK * 4
"""Of one row in Buffers.largest."""

STORE, ADD, ACTIVATE, CHOOSE = 0, 1, 2, 3
"""What becomes of a product: it is stored, added to what is there, or goes through the MLP's activation; or only the
largest outputs of each row are kept, with the columns that they are from."""


@inlined
def multiply_rows(counts, phase, threads, kind, source, depths, rows, matrix, columns, bias, target, scratch):
    """One matrix product of the step: every item is 32 output columns (16 gate and 16 up ones) of a group of rows.

    Args:
        kind: what becomes of the outputs.
        source: bfloat16 [rows, depths * 32], in tiles.
        matrix: address of three int64, see Weights.matrices.
        columns: of the output, as it is stored.
        bias: float32 [columns] (with ACTIVATE gate's, then up's), or 0 for none.
        target: float32 [rows, columns]; with ACTIVATE bfloat16, in tiles; with CHOOSE this thread's Buffers.largest.
    """
    width = BLOCK if kind == ACTIVATE else PAIR
    pairs = (columns + width - 1) // width
    group = max(GROUP_BYTES // (depths * DEPTH * 2 * PAIR), 1) * PAIR
    groups = (rows + group - 1) // group
    prepared = 0
    weight, facts, patches = get_long(matrix, 0), get_long(matrix, 1), get_long(matrix, 2)
    pair_bytes = depths * (NARROW_BYTES if facts != 0 else 2 * TILE_BYTES)
    if kind == CHOOSE:
        forget_largest(rows, target)
    item, last = take_run(counts, phase, threads, pairs * groups)
    while item < last:
        begin, pair = item // pairs * group, item % pairs
        end = min(begin + group, rows)
        column = pair * width
        here = min(width, columns - column)
        gate_bias = bias + 4 * column if bias else 0
        blocks = weight + pair * pair_bytes
        next_blocks = blocks + pair_bytes if item + 1 < last and pair + 1 < pairs else blocks
        parts = (end - begin + PAIR - 1) // PAIR
        for row in range(begin, end, PAIR):
            count = min(PAIR, rows - row)
            if count != prepared:
                prepare_rows(scratch, count)
                prepared = count
            part, place = (row - begin) // PAIR, source + place_in_tiles(row, 0, depths)
            if facts == 0:
                multiply(scratch, False, blocks, next_blocks, pair_bytes, part, parts, depths, place, count)
            elif part == 0:
                fact = get_long(facts, pair)
                multiply_narrow(scratch, blocks, fact, patches, parts > 1, depths, place, count)
            else:
                wide = scratch.wide
                multiply(scratch, False, wide, next_blocks, pair_bytes, part, parts, depths, place, count)
            if kind == CHOOSE:
                keep_largest(scratch.sums, count, here, column, target + row * LARGEST_BYTES)
            else:
                place, stride = target + (row * columns + column) * 4, columns
                if kind == ACTIVATE:
                    place = target + place_in_tiles(row, column, columns // DEPTH)
                    stride = columns // DEPTH * TILE_BYTES
                _use_sums(kind, scratch.sums, count, here, gate_bias, gate_bias + 4 * columns, place, stride)
        item += 1
        if item == last:
            item, last = take_run(counts, phase, threads, pairs * groups)


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
def forget_largest(rows, largest):
    """Begin with no logits for the rows of a thread's Buffers.largest."""
    for row in range(rows):
        for lane in range(BLOCK):
            set_float(largest, row * 2 * BLOCK + lane, np.float32(-np.inf))
            set_int(largest, row * 2 * BLOCK + BLOCK + lane, np.int32(0))


@compiled
def keep_largest(sums, rows, columns, first_column, largest):
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
def choose_tokens(counts, phase, threads, batch, buffers):
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
