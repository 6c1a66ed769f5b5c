"""bfloat16 and the exponential function, for numba's compiler. All are inlined into loops that it can vectorise."""

from __future__ import annotations

import numpy as np

from minisgl.scheduler_proc.cpu.compiler import inlined
from minisgl.scheduler_proc.cpu.intrinsics import bits_of_float, float_of_bits

LOG2_E = np.float32(1.4426950408889634)
_MAGIC = np.float32(12582912.0)
"""1.5 * 2**23: adding it rounds a small float to the nearest integer, which then stands in the lowest bits."""


@inlined
def from_bfloat16(bits):
    """uint16 to float32."""
    return float_of_bits(np.uint32(bits) << np.uint32(16))


@inlined
def to_bfloat16(value):
    """float32 to the nearest bfloat16 (ties to even), as uint16."""
    bits = bits_of_float(value)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@inlined
def bfloat16_pair(low, high):
    """A word of two float32 as the nearest bfloat16, for finite ones; ties go away from zero, which takes less time."""
    half = np.uint32(0x8000)
    return (bits_of_float(low) + half) >> np.uint32(16) | (bits_of_float(high) + half) & np.uint32(0xFFFF0000)


@inlined
def finite_or_zero(bits):
    """A bfloat16 (uint16) itself, or 0 for an infinity or NaN."""
    return np.uint16(0) if (bits & np.uint16(0x7F80)) == np.uint16(0x7F80) else bits


@inlined
def to_nearest(value):
    """The int32 next to a float32 from -2**22 to 2**22."""
    return np.int32(bits_of_float(value + _MAGIC) - bits_of_float(_MAGIC))


@inlined
def exp2(x):
    """2**x of a float32 from -126 to 126, and the value at the nearer end beyond them; relative error below 3e-7.

    The fraction by the minimax polynomial of degree 5 on [-0.5, 0.5], the whole part put into the exponent's bits.
    """
    return _exp2(min(max(x, np.float32(-126.0)), np.float32(126.0)))


@inlined
def _exp2(x):
    shifted = x + _MAGIC
    fraction = x - (shifted - _MAGIC)
    whole = bits_of_float(shifted) << np.uint32(23)
    power = np.float32(0.00132765)
    power = power * fraction + np.float32(0.00967554)
    power = power * fraction + np.float32(0.05550713)
    power = power * fraction + np.float32(0.2402212)
    power = power * fraction + np.float32(0.69314697)
    power = power * fraction + np.float32(1.00000007)
    return float_of_bits(bits_of_float(power) + whole)


@inlined
def exp2_below(x):
    """The same of a float32 up to 1, in less time."""
    return _exp2(max(x, np.float32(-126.0)))


@inlined
def silu(x):
    """x / (1 + exp(-x))."""
    return x / (np.float32(1.0) + exp2(-x * LOG2_E))
