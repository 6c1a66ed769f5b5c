"""The likeliest tokens without reading the whole head: bytes rule out all columns but a few, which are then computed.

A head of bytes with a scale for each column (as weights in Dettmers et al. 2022, arXiv 2208.07339) is half as long. A
row is written as whole numbers of 16 bits, two digits each, so that its products with bytes are exact. How much these
can differ from the logits that the head itself gives is bounded by the Cauchy-Schwarz inequality:

    |x . w - x' . w'| <= |x| |w - w'| + |x - x'| |w'|

A column whose upper bound is below the highest lower bound of a row is not its likeliest token. The rest goes through
the same product as without a screen, so that tokens are the same to the last bit, whatever is computed beside them.
"""

from __future__ import annotations

import numpy as np
import torch

from minisgl.scheduler_proc.cpu.compiler import compiled, compiled_to_sum, inlined
from minisgl.scheduler_proc.cpu.instructions import AMX, AVX512_BF16, multiply, multiply_narrow, prepare_rows
from minisgl.scheduler_proc.cpu.intrinsics import bits_of_float
from minisgl.scheduler_proc.cpu.memory import (
    Keeper,
    Screen,
    get_float,
    get_int,
    get_long,
    get_short,
    set_byte,
    set_float,
    set_int,
    set_long,
)
from minisgl.scheduler_proc.cpu.narrow import NARROW_BYTES
from minisgl.scheduler_proc.cpu.numbers import from_bfloat16, to_nearest
from minisgl.scheduler_proc.cpu.products import forget_largest, keep_largest
from minisgl.scheduler_proc.cpu.team import take, take_run
from minisgl.scheduler_proc.cpu.tiles import (
    BLOCK,
    BYTES_DEPTH,
    DEPTH,
    LINE,
    PAIR,
    TILE_BYTES,
    pack_bytes,
    place_in_tiles,
)

ROWS = {AMX: 32, AVX512_BF16: 8}
"""Sampled rows, by instructions, up to which reading the head is most of its time: with vectors the two digits of a row
take as long to multiply as the row itself, on tiles that is little beside reading."""
MOST_ROWS = max(ROWS.values())
LARGEST_HIDDEN = 2**15
"""Columns of a row up to which products of digits and bytes fit into 32 bits."""
FACTS = 3
"""Numbers of a row in Buffers.facts."""

_LARGEST_DIGITS = 32767
_COLUMNS_AT_ONCE = 8192
_MARGIN = 1.001
"""What lengths and errors of columns are taken longer than they were computed."""


def make_screen(head: torch.Tensor, keeper: Keeper) -> tuple[Screen, int]:
    """A head's screen and the bytes that it takes.

    Args:
        head: bfloat16 [vocab, hidden].
    """
    columns = -(-len(head) // PAIR) * PAIR
    weight = torch.zeros(columns, head.shape[1], dtype=torch.int8)
    scales, lengths = torch.zeros(columns), torch.zeros(columns)
    # What is not there, or not finite, cannot be ruled out.
    errors = torch.full((columns,), torch.inf)
    for begin in range(0, len(head), _COLUMNS_AT_ONCE):
        exact = head[begin : begin + _COLUMNS_AT_ONCE].float()
        here = slice(begin, begin + len(exact))
        scale = exact.abs().amax(dim=1) / 127
        fine = scale.isfinite()
        rounded = (exact / scale.clamp(min=1e-30)[:, None]).round_().nan_to_num_(0.0).clamp_(-127, 127)
        weight[here] = rounded
        scales[here] = scale.where(fine, 0.0)
        lengths[here] = exact.norm(dim=1).where(fine, 0.0) * _MARGIN
        error = exact.sub_(rounded * scales[here, None]).norm(dim=1)
        errors[here] = (error * _MARGIN).where(fine, torch.inf)
    offsets = weight.sum(dim=1, dtype=torch.int32) * 128
    places = (pack_bytes(weight), scales, offsets, errors, lengths)
    return Screen(*(keeper.address(place) for place in places)), sum(place.nbytes for place in places)


@compiled
def _magnitude(row, columns):
    """The largest magnitude of a bfloat16 row in tiles, as the bits of a bfloat16."""
    largest = np.uint16(0)
    for begin in range(0, columns, DEPTH):
        for lane in range(DEPTH):
            largest = max(largest, np.uint16(get_short(row + begin // DEPTH * TILE_BYTES, lane) & np.uint16(0x7FFF)))
    return largest


@compiled_to_sum
def _length(row, columns):
    """The root of the sum of squares of a bfloat16 row in tiles."""
    total = np.float32(0.0)
    for begin in range(0, columns, DEPTH):
        for lane in range(DEPTH):
            value = from_bfloat16(get_short(row + begin // DEPTH * TILE_BYTES, lane))
            total += value * value
    return np.sqrt(total)


@compiled
def _write_digits(row, columns, factor, target):
    """Whole numbers next to a row's values times `factor`, plus 2**15, as two bytes: the upper ones, then the lower."""
    for begin in range(0, columns, DEPTH):
        place = target + begin // BYTES_DEPTH * TILE_BYTES + begin % BYTES_DEPTH
        for lane in range(DEPTH):
            value = from_bfloat16(get_short(row + begin // DEPTH * TILE_BYTES, lane)) * factor
            digits = to_nearest(value) + np.int32(1 << 15)
            set_byte(place, lane, np.uint8(digits >> np.int32(8)))
            set_byte(place + LINE, lane, np.uint8(digits & np.int32(0xFF)))


@inlined
def split_rows(counts, phase, rows, columns, source, buffers):
    """Fill Buffers.digits and Buffers.facts from rows in tiles."""
    while True:
        row = take(counts, phase)
        if row >= rows:
            return
        place = source + place_in_tiles(row, 0, columns // DEPTH)
        magnitude = from_bfloat16(_magnitude(place, columns))
        facts = buffers.facts + row * FACTS * 4
        # Rounding: at most 1.5 times for each of a logit's products, each time by 2**-24 of their sum at most.
        slack = np.float32((columns + 64) * 2.0**-23)
        length = _length(place, columns) * (np.float32(1.0) + slack)
        step, factor = np.float32(0.0), np.float32(0.0)
        if np.float32(1e-20) < magnitude and magnitude < np.float32(1e20):
            step = magnitude / np.float32(_LARGEST_DIGITS)
            factor = np.float32(1.0) / step
        else:
            # Nothing can be ruled out.
            length = np.float32(np.inf)
        set_float(facts, 0, step)
        set_float(facts, 1, length)
        # No value is off by more than half a last digit.
        set_float(facts, 2, length * slack + step * np.float32(0.51) * np.sqrt(np.float32(columns)))
        depths = (columns + BYTES_DEPTH - 1) // BYTES_DEPTH
        digits = 2 * row
        target = buffers.digits + digits // BLOCK * depths * TILE_BYTES + digits % BLOCK * LINE
        _write_digits(place, columns, factor, target)


@inlined
def ordered(value):
    """An int32 that is the larger, the larger the float32 is; NaN comes after infinity."""
    bits = np.int32(bits_of_float(value if value == value else np.float32(np.inf)))
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@compiled
def _bound(sums, rows, scales, offsets, errors, lengths, facts, lows, highs):
    """Bound the logits of a pair's 32 columns by the sums [2 * rows, 32] of their bytes and the rows' digits."""
    for row in range(rows):
        step, with_error = get_float(facts, row * FACTS), get_float(facts, row * FACTS + 1)
        with_length = get_float(facts, row * FACTS + 2)
        upper, lower = sums + 2 * row * PAIR * 4, sums + (2 * row + 1) * PAIR * 4
        highest = np.int32(-(2**31))
        for half in range(2):
            for lane in range(BLOCK):
                column = half * BLOCK + lane
                product = np.float32(np.int32(get_int(upper, column) - get_int(offsets, column))) * np.float32(256.0)
                product += np.float32(get_int(lower, column))
                logit = product * (get_float(scales, column) * step)
                off = get_float(errors, column) * with_error + get_float(lengths, column) * with_length
                least, known = logit - off, get_float(lows, row * BLOCK + lane)
                set_float(lows, row * BLOCK + lane, least if least > known else known)
                highest = max(highest, ordered(logit + off))
        set_int(highs, row, highest)


@inlined
def bound_logits(counts, phase, threads, shape, rows, screen, buffers, scratch):
    """Fill Buffers.highs and Buffers.lows."""
    pairs = (shape.vocab + PAIR - 1) // PAIR
    depths = (shape.hidden + BYTES_DEPTH - 1) // BYTES_DEPTH
    pair_bytes = 2 * depths * TILE_BYTES
    lows = buffers.lows + scratch.thread * rows * LINE
    for index in range(rows * BLOCK):
        set_float(lows, index, np.float32(-np.inf))
    # Two rows of digits for each.
    parts, prepared = (rows + BLOCK - 1) // BLOCK, 0
    pair, last = take_run(counts, phase, threads, pairs)
    while pair < last:
        blocks = screen.weight + pair * pair_bytes
        next_blocks = blocks + pair_bytes if pair + 1 < last else blocks
        places = 4 * pair * PAIR
        for part in range(parts):
            row = part * BLOCK
            count = min(BLOCK, rows - row)
            if count != prepared:
                prepare_rows(scratch, 2 * count)
                prepared = count
            place = buffers.digits + 2 * part * depths * TILE_BYTES
            multiply(scratch, True, blocks, next_blocks, pair_bytes, part, parts, depths, place, 2 * count)
            _bound(
                scratch.sums,
                count,
                screen.scales + places,
                screen.offsets + places,
                screen.errors + places,
                screen.lengths + places,
                buffers.facts + row * FACTS * 4,
                lows + row * LINE,
                buffers.highs + 4 * (pair * rows + row),
            )
        pair += 1
        if pair == last:
            pair, last = take_run(counts, phase, threads, pairs)


@compiled
def _set_thresholds(threads, rows, lows, thresholds):
    """Bring together what all threads' columns have at least."""
    for row in range(rows):
        highest = np.float32(-np.inf)
        for thread in range(threads):
            for lane in range(BLOCK):
                highest = max(highest, get_float(lows, (thread * rows + row) * BLOCK + lane))
        set_int(thresholds, row, ordered(highest))


@compiled
def _ruled_out(rows, highs, thresholds):
    """Whether no row's likeliest token can be in a pair of blocks."""
    possible = 0
    for row in range(rows):
        possible += 1 if get_int(highs, row) >= get_int(thresholds, row) else 0
    return possible == 0


@inlined
def multiply_the_rest(counts, phase, threads, shape, rows, source, head, buffers, scratch):
    """Compute the logits that have not been ruled out, and keep the largest in Buffers.largest."""
    pairs = (shape.vocab + PAIR - 1) // PAIR
    depths = shape.hidden // DEPTH
    weight, facts, patches = get_long(head, 0), get_long(head, 1), get_long(head, 2)
    largest = buffers.largest + scratch.thread * buffers.largest_bytes
    thresholds = buffers.thresholds + 4 * scratch.thread * rows
    forget_largest(rows, largest)
    _set_thresholds(threads, rows, buffers.lows, thresholds)
    prepare_rows(scratch, rows)
    computed = 0
    pair, last = take_run(counts, phase, threads, pairs)
    while pair < last:
        if not _ruled_out(rows, buffers.highs + 4 * pair * rows, thresholds):
            if facts == 0:
                blocks = weight + pair * 2 * depths * TILE_BYTES
                multiply(scratch, False, blocks, blocks, 0, 0, 1, depths, source, rows)
            else:
                blocks = weight + pair * depths * NARROW_BYTES
                multiply_narrow(scratch, blocks, get_long(facts, pair), patches, False, depths, source, rows)
            keep_largest(scratch.sums, rows, min(PAIR, shape.vocab - pair * PAIR), pair * PAIR, largest)
            computed += 1
        pair += 1
        if pair == last:
            pair, last = take_run(counts, phase, threads, pairs)
    set_long(buffers.computed, scratch.thread, computed)
