"""Which sizes of steps get CUDA graphs, in which order they are captured, and which one runs a step.

A graph runs everything that is not larger than itself, so a few serve until the others are captured. No torch here.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeAlias

PrefillSize: TypeAlias = tuple[int, int]
"""Tokens and rows."""

DECODE_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
PREFILL_TOKENS = (16, 32, 64, 128, 256, 512, 576, 1024, 1088)
"""Usual lengths, and what decode rows make of the long ones."""
PREFILL_ROWS = (1, 8, 64)

MOST_MORE_PADDING = 256
"""Tokens by which the graph of chunks may grow to take decode rows in: they cost about as much as those rows' own."""

FIRST_DECODES = (1, 2, 4, 8, 16, 32, 64, 128)
FIRST_PREFILLS = ((16, 1), (64, 1), (64, 8), (512, 1), (512, 8), (512, 64))
"""What the first graphs are, beside the largest of both kinds: a server that is busy from its first second on captures
no others (a graph takes 16 ms), and no step may cost it much more than twice what it needs. The last one takes the
chunks of a long prompt beside up to 63 decode rows."""


def decode_sizes(max_running: int) -> list[int]:
    """Numbers of rows, ascending; the last one is max_running."""
    return [size for size in DECODE_SIZES if size < max_running] + [max_running]


def prefill_sizes(context_length: int) -> list[PrefillSize]:
    """Ascending; without those that no chunks can fill."""
    return [
        (tokens, rows) for tokens in PREFILL_TOKENS for rows in PREFILL_ROWS if rows <= tokens <= context_length * rows
    ]


def capture_order(decodes: list[int], prefills: list[PrefillSize]) -> tuple[list[int | PrefillSize], int]:
    """All sizes in the order of their capture, and how many of them serving must wait for.

    These begin with the largest, so that the others reuse its memory.
    """
    first: list[int | PrefillSize] = [decodes[-1], *(size for size in reversed(FIRST_DECODES) if size in decodes[:-1])]
    first += [prefills[-1], *(size for size in reversed(FIRST_PREFILLS) if size in prefills[:-1])]
    every: list[int | PrefillSize] = [*decodes, *prefills]
    return first + [size for size in every if size not in first], len(first)


def fitting_decode(rows: int, captured: Collection[int]) -> int | None:
    """The smallest captured size that holds so many rows, or None."""
    return min((size for size in captured if size >= rows), default=None)


def fitting_prefill(tokens: int, rows: int, captured: Collection[PrefillSize]) -> PrefillSize | None:
    """The smallest captured size that holds these chunks, or None."""
    return min((size for size in captured if size[0] >= tokens and size[1] >= rows), default=None)


def decodes_join(decodes: int, tokens: int, rows: int) -> bool:
    """Whether decode rows go into the graph of chunks of `tokens` tokens in `rows` rows, instead of their own."""
    if tokens + decodes > PREFILL_TOKENS[-1] or rows + decodes > PREFILL_ROWS[-1]:
        return False
    alone, joined = (next(size for size in PREFILL_TOKENS if size >= count) for count in (tokens, tokens + decodes))
    return joined - alone <= MOST_MORE_PADDING
