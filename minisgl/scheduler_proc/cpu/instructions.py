"""Which instructions multiply: the tiles of AMX, or the vectors of AVX512-BF16. A step is the same with both.

Each is chosen when a step runs, by Scratch.instructions, and compiled on every CPU: what is compiled for one of them
runs there only.
"""

from __future__ import annotations

from minisgl.scheduler_proc.cpu import amx, avx512
from minisgl.scheduler_proc.cpu.compiler import inlined
from minisgl.scheduler_proc.cpu.tiles import BLOCK, SEGMENT

AMX, AVX512_BF16 = 0, 1
NAMES = {"amx": AMX, "avx512_bf16": AVX512_BF16}
"""By the values of --attention-backend, the faster one first."""
HAVE_NARROW = (AMX,)
"""Those for which weights are made narrow: beside products of vectors, widening them takes longer than it saves."""


def available() -> list[str]:
    """The names of those that this CPU has, and that the system lets this process use."""
    permitted = {"amx": amx.permitted, "avx512_bf16": avx512.permitted}
    return [name for name in NAMES if permitted[name]()]


@inlined
def prepare_rows(scratch, count):
    """Get ready to `multiply` so many rows."""
    if scratch.instructions == AMX:
        amx.tile_configure(scratch.shapes + 64 * count)


@inlined
def multiply(scratch, of_bytes, pair, next_pair, next_bytes, part, parts, depths, rows, count):
    """Products of up to 32 rows with a pair of blocks of a packed weight, to scratch.sums.

    Args:
        of_bytes: whether rows are uint8, an even number of them, the weight is int8 and the sums are int32.
        pair: its address.
        next_pair: of the one that is multiplied after it, whose `next_bytes` may be asked for in time.
        part, parts: which part of the rows this is of so many that are multiplied with the pair one after the other.
        depths: input columns / 32, of bytes / 64.
        rows: address of the first row, in tiles, with which a tile begins.
    """
    if scratch.instructions == AMX:
        amx.multiply(of_bytes, pair, next_pair, next_bytes, part, depths, rows, count, scratch.sums)
    else:
        avx512.multiply(of_bytes, pair, next_pair if part + 1 == parts else pair, depths, rows, count, scratch.sums)


@inlined
def multiply_narrow(scratch, pair, fact, patches, keep, depths, rows, count):
    """`multiply` with a pair in twelve bits, see narrow.py; by instructions that have it.

    Args:
        pair: the address of its data.
        fact: its entry in Narrow.pairs.
        patches: address of all patches of its matrix.
        keep: whether the whole pair is left at scratch.wide, packed as if it had never been narrow.
    """
    lowest, patch = fact & 0xFF, patches + 8 * (fact >> 8)
    amx.multiply_narrow(pair, lowest, patch, keep, depths, rows, count, scratch.sums, scratch.wide)


@inlined
def prepare_attention(scratch):
    """Get ready for `score` and `sum_values`."""
    if scratch.instructions == AMX:
        amx.tile_configure(scratch.attention_shapes)


@inlined
def score(scratch, blocks, queries, count, depths):
    """Products of the keys of so many blocks with 16 queries, to scratch.scores.

    Args:
        blocks: where their keys are; the list goes on to a multiple of BLOCKS_AT_ONCE, as the scores do.
        queries: words [head_dim / 2, 16], two bfloat16 each.
        depths: head_dim / 32.
    """
    if scratch.instructions == AMX:
        amx.score(blocks, count, depths, queries, scratch.scores)
    else:
        avx512.score(blocks, count, depths, queries, scratch.scores)


@inlined
def score_two(scratch, blocks, queries, others, count, depths):
    """The same with 16 other queries, too."""
    scores = scratch.scores + SEGMENT * BLOCK * 4
    if scratch.instructions == AMX:
        amx.score_two(blocks, count, depths, queries, others, scratch.scores, scores)
    else:
        avx512.score(blocks, count, depths, queries, scratch.scores)
        avx512.score(blocks, count, depths, others, scores)


@inlined
def sum_values(scratch, blocks, count, offset, columns):
    """Sums of 32 or 64 columns of values, weighted by scratch.weights, float32 [columns, 16] at scratch.sums.

    Args:
        offset: bytes from a block's keys to its first column.
    """
    if scratch.instructions == AMX:
        amx.sum_values(blocks, count, offset, columns, scratch.weights, scratch.sums)
    else:
        avx512.sum_values(blocks, count, offset, columns, scratch.weights, scratch.sums)


@inlined
def sum_values_two(scratch, blocks, count, offset):
    """The same of 32 columns with both weights, float32 [2, 32, 16]."""
    weights, sums = scratch.weights + SEGMENT * BLOCK * 2, scratch.sums + 32 * BLOCK * 4
    if scratch.instructions == AMX:
        amx.sum_values_two(blocks, count, offset, scratch.weights, weights, scratch.sums, sums)
    else:
        avx512.sum_values(blocks, count, offset, 32, scratch.weights, scratch.sums)
        avx512.sum_values(blocks, count, offset, 32, weights, sums)


@inlined
def finish(scratch):
    """Give back what the system would have to save."""
    if scratch.instructions == AMX:
        amx.tile_release()
