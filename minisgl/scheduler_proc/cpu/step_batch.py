"""From the plan of a step to the numbers that the compiled step reads."""

from __future__ import annotations

import numpy as np

from minisgl.scheduler_proc.cpu.memory import Batch, Keeper
from minisgl.scheduler_proc.cpu.tiles import BLOCK
from minisgl.scheduler_proc.request import StepPlan, scored_positions


def make_batch(plan: StepPlan, page_size: int, group: int, keeper: Keeper) -> Batch:
    """Gather token ids, positions and pages of a plan's rows.

    All goes through lists into one array: for the few numbers of a decode step that takes a third of the time of arrays
    that are computed with.

    Args:
        group: query heads that share a key head.
    """
    input_ids, token_parts, sampled, scored = list[int](), list[int](), list[int](), list[int]()
    begins, starts, counts = list[int](), list[int](), list[int]()
    page_begins, pages, tile_parts, tile_numbers = list[int](), list[int](), list[int](), list[int]()
    for part, row in enumerate(plan.rows):
        begin, length, end = len(input_ids), row.length, row.start + row.length
        input_ids += row.request.token_ids[row.start : end]
        token_parts += [part] * length
        begins.append(begin)
        starts.append(row.start)
        counts.append(length)
        page_begins.append(len(pages))
        pages += row.request.pages[: -(-end // page_size)]
        tiles = -(-length * group // BLOCK)
        tile_parts += [part] * tiles
        tile_numbers += range(tiles)
        if row.sample:
            sampled.append(begin + length - 1)
        scored += [begin + position - row.start for position in scored_positions(row)]
    sampled += scored
    columns = (input_ids, token_parts, sampled, begins, starts, counts, page_begins, pages, tile_parts, tile_numbers)
    base = keeper.address(np.array([number for column in columns for number in column], np.int32))
    places = []
    for column in columns:
        places.append(base)
        base += 4 * len(column)
    return Batch(len(input_ids), len(sampled), len(tile_parts), *places)
