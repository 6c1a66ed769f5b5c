"""From the plan of a step to the arrays that the compiled step reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from minisgl.scheduler_proc.cpu.memory import Batch
from minisgl.scheduler_proc.cpu.tiles import BLOCK
from minisgl.scheduler_proc.models.forward_batch import scored_tokens
from minisgl.scheduler_proc.models.rope import Rope
from minisgl.scheduler_proc.request import StepPlan


class Keeper:
    """Holds what has been given to compiled code as an address."""

    def __init__(self) -> None:
        self._held: list[Any] = []

    def address(self, value: npt.NDArray[Any] | torch.Tensor) -> int:
        """The address of a contiguous array's or tensor's first element, which stays valid while this lives."""
        self._held.append(value)
        if isinstance(value, torch.Tensor):
            return value.data_ptr()
        return int(value.ctypes.data)


def make_batch(plan: StepPlan, page_size: int, group: int, rope: Rope, keeper: Keeper) -> Batch:
    """Gather token ids, positions and pages of a plan's rows.

    Args:
        group: query heads that share a key head.
    """
    rows = plan.rows
    token_ids, pages, page_begins = list[int](), list[int](), list[int]()
    for row in rows:
        end = row.start + row.length
        token_ids += row.request.token_ids[row.start : end]
        page_begins.append(len(pages))
        pages += row.request.pages[: -(-end // page_size)]
    starts = np.array([row.start for row in rows], np.int32)
    counts = np.array([row.length for row in rows], np.int32)
    ends = np.cumsum(counts, dtype=np.int32)
    begins = ends - counts
    parts = np.arange(len(rows), dtype=np.int32)
    of_token = np.repeat(parts, counts)
    positions = np.arange(len(token_ids), dtype=np.int32) + (starts - begins)[of_token]
    page_ids, first_pages = np.array(pages, np.int32), np.array(page_begins, np.int32)
    slots = page_ids[first_pages[of_token] + positions // page_size].astype(np.int64) * page_size
    slots += positions % page_size
    angles = torch.from_numpy(positions)[:, None].float() * rope.inverse_frequencies
    sampled = np.concatenate([ends[[row.sample for row in rows]] - 1, *scored_tokens(rows, ends, plan.decode_rows)])
    in_tiles = -(-counts * group // BLOCK)
    tile_parts = np.repeat(parts, in_tiles)
    first_tiles = np.cumsum(in_tiles, dtype=np.int32) - in_tiles
    return Batch(
        tokens=len(token_ids),
        sampled_tokens=len(sampled),
        tiles=len(tile_parts),
        input_ids=keeper.address(np.array(token_ids, np.int32)),
        slots=keeper.address(slots),
        cos=keeper.address(torch.cos(angles).mul_(rope.scaling)),
        sin=keeper.address(torch.sin(angles).mul_(rope.scaling)),
        sampled=keeper.address(sampled),
        begins=keeper.address(begins),
        starts=keeper.address(starts),
        counts=keeper.address(counts),
        page_begins=keeper.address(first_pages),
        pages=keeper.address(page_ids),
        tile_parts=keeper.address(tile_parts),
        tile_numbers=keeper.address(np.arange(len(tile_parts), dtype=np.int32) - first_tiles[tile_parts]),
    )
