"""bfloat16 weights in twelve bits each, without any loss: fewer bytes to read for every step.

Sign and mantissa of a bfloat16 take eight bits. The exponents of a matrix's weights are mostly among sixteen
neighbours, so four bits say which one; the few weights outside are kept apart, as patches. (Zhang et al. 2025, arXiv
2504.11651, do the same with codes of different lengths; these have one length, so that vectors can widen them.)

A pair of blocks (see tiles.pack) goes depth by depth. Of its 32 lines four make a group of 192 bytes: sign and mantissa
of the first two lines, then of the other two, then the exponents, the first two lines' in the lower four bits of each
byte. The bytes of two lines lie as the instruction that interleaves bytes within 128 bits wants them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import types

from minisgl.scheduler_proc.cpu.compiler import compiled, inlined
from minisgl.scheduler_proc.cpu.intrinsics import (
    BYTE,
    INT,
    LONG,
    POINTER,
    call,
    call_prefetch,
    intrinsic,
)
from minisgl.scheduler_proc.cpu.memory import (
    get_byte,
    get_long,
    get_short,
    get_word,
    set_byte,
    set_int,
    set_long,
    set_short,
    set_word,
)
from minisgl.scheduler_proc.cpu.team import Team
from minisgl.scheduler_proc.cpu.tiles import BLOCK, DEPTH, LINE, PAIR, TILE_BYTES, aligned_zeros

GROUP_BYTES = 3 * LINE
GROUPS = 8
"""Of a depth."""
NARROW_BYTES = GROUPS * GROUP_BYTES
"""Of a pair's depth, which is 2 * TILE_BYTES otherwise."""
AHEAD = 8192
"""Bytes that are asked for ahead of what is widened, into the second-level cache."""
MOST_PATCHES = 1 / 256
"""Of a matrix's weights. With more it stays as it is: a patch takes as long as a line."""

_EXPONENTS = 16
_NO_MORE = np.int64(2**62)
"""A patch beyond the end of any pair."""

_BYTES = ir.VectorType(BYTE, 64)
_SHORTS = ir.VectorType(ir.IntType(16), 32)


class Narrow(NamedTuple):
    """A packed matrix in twelve bits.

    Attributes:
        data: uint8 [pairs, depths, NARROW_BYTES].
        pairs: int64 [pairs], of each the number of its first patch * 256, plus its lowest exponent.
        patches: int64, in the order of their places: place in the pair * 65536, plus the bfloat16's bits. Each pair's
            end with one that is beyond all places.
    """

    data: np.ndarray
    pairs: np.ndarray
    patches: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.pairs.nbytes + self.patches.nbytes


def narrow(weight: torch.Tensor, halves: int, team: Team) -> Narrow | None:
    """A bfloat16 weight [out, in], packed as tiles.pack does it, in twelve bits.

    None if too many of its weights need patches.
    """
    outputs, inputs = weight.shape
    weight = weight.contiguous()
    pairs, depths = -(-outputs // PAIR), inputs // DEPTH
    facts, counts = np.zeros(pairs, np.int64), np.zeros(pairs, np.int32)
    shape = (weight.data_ptr(), outputs, inputs, halves)

    def share(thread: int) -> tuple[int, int]:
        return thread * pairs // team.threads, (thread + 1) * pairs // team.threads

    team.run(lambda thread: _survey(*shape, *share(thread), facts.ctypes.data, counts.ctypes.data), team.threads)
    if counts.sum() > weight.numel() * MOST_PATCHES:
        return None
    ends = np.cumsum(counts + 1, dtype=np.int64)
    facts += (ends - counts - 1) * 256
    data = aligned_zeros(pairs * depths * NARROW_BYTES, np.uint8)
    patches = np.empty(ends[-1], np.int64)
    places = facts.ctypes.data, data.ctypes.data, patches.ctypes.data

    def narrow_share(thread: int) -> None:
        depth = aligned_zeros(2 * TILE_BYTES, np.uint8)
        _narrow_pairs(*shape, *share(thread), *places, depth.ctypes.data)

    team.run(narrow_share, team.threads)
    return Narrow(data, facts, patches)


@inlined
def _exponent(bits):
    """Of a bfloat16, with its bias."""
    return np.uint8(np.uint16(bits >> np.uint16(7)) & np.uint16(0xFF))


@inlined
def _row_of(pair, column, outputs, halves):
    """Which row of the weight is a column of a pair; rows beyond the last are like the last."""
    if halves == 2:
        return pair * BLOCK + column % BLOCK + column // BLOCK * (outputs // 2)
    return min(pair * PAIR + column, outputs - 1)


@compiled
def _survey(weight, outputs, inputs, halves, first, last, facts, counts):
    """Of each pair the lowest of the sixteen exponents that most of its weights have, and how many have others."""
    seen = np.zeros(256, np.int64)
    for pair in range(first, last):
        seen[:] = 0
        for column in range(PAIR):
            row = weight + 2 * inputs * _row_of(pair, column, outputs, halves)
            for index in range(inputs):
                seen[_exponent(get_short(row, index))] += 1
        inside = seen[:_EXPONENTS].sum()
        most, lowest = inside, 0
        for begin in range(1, 256 - _EXPONENTS + 1):
            inside += seen[begin + _EXPONENTS - 1] - seen[begin - 1]
            if inside > most:
                most, lowest = inside, begin
        set_long(facts, pair, lowest)
        set_int(counts, pair, np.int32(inputs * PAIR - most))


@compiled
def _narrow_pairs(weight, outputs, inputs, halves, first, last, facts, data, patches, depth):
    """Write the pairs from `first` to before `last`; `depth` is room for one depth in full width."""
    depths = inputs // DEPTH
    for pair in range(first, last):
        lowest = np.uint8(get_long(facts, pair) & 0xFF)
        patch = get_long(facts, pair) >> 8
        for number in range(depths):
            for column in range(PAIR):
                row = weight + 2 * inputs * _row_of(pair, column, outputs, halves) + 2 * DEPTH * number
                for two in range(DEPTH // 2):
                    set_word(depth, (2 * two + column // BLOCK) * BLOCK + column % BLOCK, get_word(row, two))
            target = data + (pair * depths + number) * NARROW_BYTES
            for group in range(GROUPS):
                lines = depth + group * 4 * LINE
                _narrow_group(lines, lowest, target + group * GROUP_BYTES)
                if _count_outside(lines, lowest):
                    for index in range(4 * LINE // 2):
                        bits = get_short(lines, index)
                        if _is_outside(bits, lowest):
                            place = (number * GROUPS + group) * 4 * LINE // 2 + index
                            set_long(patches, patch, place * 65536 + np.int64(bits))
                            patch += 1
        set_long(patches, patch, _NO_MORE)


@inlined
def _is_outside(bits, lowest):
    return np.uint8(_exponent(bits) - lowest) >= np.uint8(_EXPONENTS)


@compiled
def _count_outside(lines, lowest):
    count = np.uint16(0)
    for index in range(4 * LINE // 2):
        count += np.uint16(1) if _is_outside(get_short(lines, index), lowest) else np.uint16(0)
    return count


@compiled
def _narrow_group(lines, lowest, target):
    """Write a group's 192 bytes. What has another exponent gets a wrong one here."""
    for couple in range(2):
        for part in range(8):
            # Eight weights of the first line, eight of the second, and so on.
            source = lines + (2 * couple + part % 2) * LINE + part // 2 * 16
            for index in range(8):
                bits = get_short(source, index)
                mantissa = np.uint8(np.uint16(bits << np.uint16(1)) & np.uint16(0xFF))
                set_byte(target + couple * LINE, part * 8 + index, mantissa | np.uint8(bits >> np.uint16(15)))
                number = np.uint8(_exponent(bits) - lowest) & np.uint8(_EXPONENTS - 1)
                if couple == 0:
                    set_byte(target + 2 * LINE, part * 8 + index, number)
                else:
                    both = get_byte(target + 2 * LINE, part * 8 + index) | np.uint8(number << np.uint8(4))
                    set_byte(target + 2 * LINE, part * 8 + index, both)


def _interleaved(first: int) -> ir.Constant:
    """Bytes of two vectors in turn, eight of each 128 bits from the `first` on."""
    places = [lane * 16 + first + byte + vector for lane in range(4) for byte in range(8) for vector in (0, 64)]
    return ir.Constant(ir.VectorType(INT, 64), places)


@intrinsic
def widen(context: Any, source: Any, lowest: Any, target: Any) -> Any:
    """(narrow depth, lowest exponent, target) -> None: its 2 KB, without patches. Asks for what comes AHEAD."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, lowest, target = arguments
        source, target = builder.inttoptr(source, POINTER), builder.inttoptr(target, POINTER)

        def at(place: Any, offset: int, kind: Any) -> Any:
            return builder.bitcast(builder.gep(place, [ir.Constant(LONG, offset)]), kind.as_pointer())

        def constant(value: int) -> Any:
            return ir.Constant(_SHORTS, [value] * 32)

        nothing = ir.Constant(_BYTES, ir.Undefined)
        lowests = builder.insert_element(nothing, builder.trunc(lowest, BYTE), ir.Constant(INT, 0))
        lowests = builder.shuffle_vector(lowests, nothing, ir.Constant(ir.VectorType(INT, 64), [0] * 64))
        for group in range(GROUPS):
            here = group * GROUP_BYTES
            for line in range(3):
                call_prefetch(builder, at(source, AHEAD + here + line * LINE, BYTE), 2)
            both = builder.load(at(source, here + 2 * LINE, _SHORTS), align=LINE)
            numbers = (
                builder.and_(both, constant(0x0F0F)),
                builder.and_(builder.lshr(both, constant(4)), constant(0x0F0F)),
            )
            for couple, number in enumerate(numbers):
                mantissas = builder.load(at(source, here + couple * LINE, _BYTES), align=LINE)
                exponents = builder.add(builder.bitcast(number, _BYTES), lowests)
                for line in range(2):
                    # Exponent, mantissa, sign: turned by one bit it is a bfloat16.
                    turned = builder.shuffle_vector(mantissas, exponents, _interleaved(8 * line))
                    turned = builder.bitcast(turned, _SHORTS)
                    bits = call(builder, "llvm.fshr.v32i16", _SHORTS, [turned, turned, constant(1)])
                    builder.store(bits, at(target, (group * 4 + couple * 2 + line) * LINE, _SHORTS), align=LINE)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@inlined
def put_patches(patch, depth, target):
    """Put the patches of a pair's depth into its 2 KB, from the one at address `patch` on; returns the next one's."""
    found = get_long(patch, 0)
    while found >> 16 < (depth + 1) * DEPTH * PAIR:
        set_short(target, (found >> 16) - depth * DEPTH * PAIR, np.uint16(found & 0xFFFF))
        patch += 8
        found = get_long(patch, 0)
    return patch
