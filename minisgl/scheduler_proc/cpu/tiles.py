"""How matrices lie in memory: in tiles of 1 KB, for AMX as well as for vector instructions."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from minisgl.scheduler_proc.cpu.compiler import inlined

BLOCK = 16
"""Output columns of one packed block, and rows of a tile."""
DEPTH = 32
"""Input columns of a tile."""
BYTES_DEPTH = 64
"""Input columns of a tile of bytes."""
PAIR = 2 * BLOCK
"""Output columns of a pair of blocks, and rows that are multiplied with it at a time."""
TILE_BYTES = 1024
"""Of 16 rows by 32 bfloat16 columns."""
LINE = 64
"""Bytes of a cache line, of a vector, and of a tile's row."""
BLOCKS_AT_ONCE = 4
"""Blocks of 16 keys whose scores are computed together."""
SEGMENT = 128
"""Keys whose scores, and those of two tiles of queries, are in the first-level cache together."""


def pack(weight: torch.Tensor, halves: int = 1) -> torch.Tensor:
    """A bfloat16 weight [out, in] as pairs of blocks: [out / 32, in / 32, 16 pairs of inputs, 2, 16 outputs, 2], flat.

    Lines of both blocks take turns, so that memory is read as it lies: only then do CPUs read ahead by themselves.

    Args:
        weight: `out` is filled up to a multiple of 32 with what nobody reads; `in` must be a multiple of 32.
        halves: 1 if a pair has 32 neighbours; 2 if it has 16 outputs of the weight's first half and the same 16 of its
            second half, both multiples of 16.
    """
    if missing := -len(weight) % PAIR:
        # Copies of the last row: unlike zeros they can be made narrow.
        weight = torch.cat((weight, weight[-1:].expand(missing, -1)))
    outputs, inputs = weight.shape
    blocks = weight.view(halves, outputs // PAIR, 2 // halves, BLOCK, inputs // DEPTH, BLOCK, 2)
    pairs = blocks.permute(1, 4, 5, 0, 2, 3, 6)
    packed = torch.from_numpy(aligned_zeros(pairs.numel(), np.uint16)).view(torch.bfloat16).view(pairs.shape)
    return packed.copy_(pairs)


def pack_bytes(weight: torch.Tensor) -> torch.Tensor:
    """An int8 weight [out, in] as pairs of blocks: [out / 32, in / 64, 16 fours of inputs, 2, 16 outputs, 4], flat.

    Both are filled up with zeros to whole tiles.
    """
    weight = F.pad(weight, (0, -weight.shape[1] % BYTES_DEPTH, 0, -len(weight) % PAIR))
    outputs, inputs = weight.shape
    blocks = weight.view(outputs // PAIR, 2, BLOCK, inputs // BYTES_DEPTH, BLOCK, 4)
    pairs = blocks.permute(0, 3, 4, 1, 2, 5)
    packed = torch.from_numpy(aligned_zeros(pairs.numel(), np.int8)).view(pairs.shape)
    return packed.copy_(pairs)


def aligned_zeros(size: int, dtype: type[np.generic]) -> npt.NDArray[Any]:
    """An array that begins with a cache line, on huge pages if it is large: numpy asks for them, torch does not."""
    count = size * np.dtype(dtype).itemsize
    room = np.zeros(count + LINE, np.uint8)
    begin = -room.ctypes.data % LINE
    return room[begin : begin + count].view(dtype)


@inlined
def place_in_tiles(row, column, depths):
    """Bytes to an element of rows that lie in tiles: bfloat16 [rows / 16, depths, 16, 32], depths = columns / 32."""
    return (row // BLOCK * depths + column // DEPTH) * TILE_BYTES + row % BLOCK * LINE + column % DEPTH * 2
