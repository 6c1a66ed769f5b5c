"""The inputs of prefill steps on CUDA: decode rows, as chunks of one token, and prompt chunks, end to end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from minisgl.scheduler_proc.decode_rows import DecodeRows
from minisgl.scheduler_proc.graph_sizes import PREFILL_ROWS, PREFILL_TOKENS, PrefillSize
from minisgl.scheduler_proc.input_block import InputBlock
from minisgl.scheduler_proc.kernels.prefill_attention import TABLE_FIELDS, PrefillTiles
from minisgl.scheduler_proc.models.forward_batch import Array, to_device
from minisgl.scheduler_proc.models.fused_decoder import PrefillInputs
from minisgl.scheduler_proc.request import StepRow, scored_positions
from minisgl.scheduler_proc.step_results import StepResults


class PrefillRows:
    """What prefill graphs read, filled anew for each part of a step.

    Args:
        tiles: how attention cuts chunks.
        padding_slot: where tokens that only fill up a graph write their keys and values.
        decodes: knows where the decode rows' tokens are.
    """

    def __init__(
        self,
        tiles: PrefillTiles,
        context_length: int,
        page_size: int,
        padding_slot: int,
        decodes: DecodeRows,
        results: StepResults,
        device: torch.device,
    ) -> None:
        self._tiles = tiles
        self._page_size = page_size
        self._padding_slot = padding_slot
        self._decodes = decodes
        self._results = results
        self._device = device
        self._row_pages = -(-context_length // page_size)
        self._all_positions = np.arange(context_length, dtype=np.int32)
        tokens, rows = PREFILL_TOKENS[-1], PREFILL_ROWS[-1]
        self._block = InputBlock(
            {
                "output": 2,
                "input_ids": tokens,
                "sources": tokens,
                "positions": tokens,
                "slots": tokens,
                "sampled": rows,
                "tiles": TABLE_FIELDS * tiles.most(tokens, rows),
                "page_table": rows * self._row_pages,
            },
            device,
        )

    def inputs(self, size: PrefillSize) -> PrefillInputs:
        """What a graph of so many tokens and rows reads."""
        block, (tokens, rows) = self._block, size
        return PrefillInputs(
            input_ids=block.view("input_ids", tokens),
            sources=block.view("sources", tokens),
            last_tokens=self._results.last_tokens,
            positions=block.view("positions", tokens),
            slots=block.view("slots", tokens),
            sampled=block.view("sampled", rows),
            tiles=block.view("tiles", TABLE_FIELDS * self._tiles.most(tokens, rows)),
            page_table=block.view("page_table", rows * self._row_pages),
        )

    def output(self) -> torch.Tensor:
        """int32 [2], where the results go of what `send` has sent, see StepResults.publish."""
        return self._block.view("output", 2)

    def send(self, rows: Sequence[StepRow], decodes: int, place: int, size: PrefillSize) -> None:
        """Bring a part of a step to the device, for a graph of a size that holds it.

        Args:
            decodes: how many of the rows decode; they are the first.
            place: of the part's first token among the step's results.
        """
        tokens, most_rows = size
        tiles = self._tiles.most(tokens, most_rows)
        columns = self._columns(rows, decodes, tiles)
        arrays = self._block.open()
        arrays["output"][:] = (self._results.turn, place)
        padding = {"input_ids": 0, "sources": -1, "positions": 0, "slots": self._padding_slot, "sampled": 0}
        for name, fill in padding.items():
            column = columns[name]
            arrays[name][: len(column)] = column
            arrays[name][len(column) : most_rows if name == "sampled" else tokens] = fill
        for name in ("tiles", "page_table"):
            arrays[name][: len(columns[name])] = columns[name]
        self._block.send(len(columns["page_table"]))

    def loose(self, rows: Sequence[StepRow], decodes: int, place: int) -> tuple[PrefillInputs, torch.Tensor]:
        """The inputs of a part that fits no graph, and where its results go."""
        columns = self._columns(rows, decodes, self._tiles.most(sum(row.length for row in rows), len(rows)))
        output = np.array([self._results.turn, place], np.int32)
        on_device, *tensors = to_device([output, *columns.values()], self._device)
        return (
            PrefillInputs(last_tokens=self._results.last_tokens, **dict(zip(columns, tensors, strict=True))),
            on_device,
        )

    def _columns(self, rows: Sequence[StepRow], decodes: int, tiles: int) -> Mapping[str, Array]:
        """The arrays of PrefillInputs for decode rows and chunks, with `tiles` tiles."""
        page_size = self._page_size
        input_ids, pages = list[int](), list[int]()
        sources, positions, token_pages = list[Array](), list[Array](), list[Array]()
        places = list[tuple[int, int, int, int]]()
        if decodes:
            decode_ids, decode_sources, decode_positions, table = self._decodes.columns(rows[:decodes])
            input_ids, pages = decode_ids.tolist(), table.reshape(-1).tolist()
            sources.append(decode_sources)
            positions.append(decode_positions)
            token_pages.append(table[np.arange(decodes), decode_positions // page_size])
            places = [(index, row.start, 1, index * table.shape[1]) for index, row in enumerate(rows[:decodes])]
        sampled = list(range(decodes))
        scored: list[int] = []
        for row in rows[decodes:]:
            token, end = len(input_ids), row.start + row.length
            row_pages = row.request.pages[: -(-end // page_size)]
            at = self._all_positions[row.start : end]
            input_ids += row.request.token_ids[row.start : end]
            positions.append(at)
            token_pages.append(np.array(row_pages, np.int32)[at // page_size])
            places.append((token, row.start, row.length, len(pages)))
            pages += row_pages
            scored += [token + position - row.start for position in scored_positions(row)]
            if row.sample:
                sampled.append(token + row.length - 1)
        sources.append(np.full(len(input_ids) - decodes, -1, np.int32))
        all_positions = _joined(positions)
        return {
            "input_ids": np.array(input_ids, np.int32),
            "sources": _joined(sources),
            "positions": all_positions,
            "slots": _joined(token_pages) * page_size + all_positions % page_size,
            "sampled": np.array(sampled + scored, np.int32),
            "tiles": np.array(self._tiles.table(places, tiles), np.int32),
            "page_table": np.array(pages, np.int32),
        }


def _joined(parts: Sequence[Array]) -> Array:
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)
