"""From the plan of a step to the numbers that the compiled step reads."""

from __future__ import annotations

import numpy as np

from minisgl.scheduler_proc.cpu.attention import TILES_AT_ONCE
from minisgl.scheduler_proc.cpu.memory import Batch, Keeper, Shape
from minisgl.scheduler_proc.cpu.tiles import BLOCK
from minisgl.scheduler_proc.request import StepPlan, scored_positions


def make_batch(plan: StepPlan, page_size: int, shape: Shape, threads: int, keeper: Keeper) -> Batch:
    """Gather token ids, positions and pages of a plan's rows.

    All goes through lists into one array: for the few numbers of a decode step that takes a third of the time of arrays
    that are computed with.

    Args:
        threads: that share in the step.
    """
    input_ids, token_parts, sampled, scored = list[int](), list[int](), list[int](), list[int]()
    begins, starts, counts = list[int](), list[int](), list[int]()
    page_begins, pages = list[int](), list[int]()
    item_parts, item_firsts, item_tiles = list[int](), list[int](), list[int]()
    for part, row in enumerate(plan.rows):
        begin, length, end = len(input_ids), row.length, row.start + row.length
        input_ids += row.request.token_ids[row.start : end]
        token_parts += [part] * length
        begins.append(begin)
        starts.append(row.start)
        counts.append(length)
        page_begins.append(len(pages))
        pages += row.request.pages[: -(-end // page_size)]
        tiles = -(-length * shape.group // BLOCK)
        # As many together as leave a share for every thread.
        together = max(1, min(TILES_AT_ONCE, tiles * shape.kv_heads // threads))
        for first in range(0, tiles, together):
            item_parts.append(part)
            item_firsts.append(first)
            item_tiles.append(min(together, tiles - first))
        if row.sample:
            sampled.append(begin + length - 1)
        scored += [begin + position - row.start for position in scored_positions(row)]
    sampled += scored
    parts = (begins, starts, counts, page_begins)
    columns = (input_ids, token_parts, sampled, *parts, pages, item_parts, item_firsts, item_tiles)
    base = keeper.address(np.array([number for column in columns for number in column], np.int32))
    places = []
    for column in columns:
        places.append(base)
        base += 4 * len(column)
    return Batch(len(input_ids), len(sampled), len(item_parts), *places)
