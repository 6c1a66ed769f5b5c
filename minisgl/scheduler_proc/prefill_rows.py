"""The inputs of prefill steps on CUDA: decode rows, as chunks of one token, and prompt chunks, end to end."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from minisgl.scheduler_proc.decode_rows import DecodeRows
from minisgl.scheduler_proc.graph_sizes import PREFILL_ROWS, PREFILL_TOKENS, PrefillSize
from minisgl.scheduler_proc.input_block import PulledBlock
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
        self._block = PulledBlock(
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
        # Kernels that are launched only to be compiled may run where `pull` does not: they find padding.
        self._block.view("sources", tokens).fill_(-1)
        self._block.view("slots", tokens).fill_(padding_slot)

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

    def begin(self) -> None:
        """Fetch what `send` has sent: a graph's first kernel."""
        self._block.pull()

    def send(self, rows: Sequence[StepRow], decodes: int, place: int, size: PrefillSize) -> None:
        """Bring a part of a step to the device, for a graph of a size that holds it.

        Args:
            decodes: how many of the rows decode; they are the first.
            place: of the part's first token among the step's results.
        """
        tokens, most_rows = size
        arrays = self._block.open()
        arrays["output"][:] = (self._results.turn, place)
        used, sampled, pages = self._write(arrays, rows, decodes, self._tiles.most(tokens, most_rows))
        for name, fill in (("input_ids", 0), ("sources", -1), ("positions", 0), ("slots", self._padding_slot)):
            arrays[name][used:tokens] = fill
        arrays["sampled"][sampled:most_rows] = 0
        self._block.send(pages)

    def loose(self, rows: Sequence[StepRow], decodes: int, place: int) -> tuple[PrefillInputs, torch.Tensor]:
        """The inputs of a part that fits no graph, and where its results go."""
        tokens = sum(row.length for row in rows)
        tiles = self._tiles.most(tokens, len(rows))
        sizes = dict.fromkeys(("input_ids", "sources", "positions", "slots"), tokens)
        sizes["sampled"] = len(rows) + sum(len(scored_positions(row)) for row in rows)
        sizes["tiles"] = TABLE_FIELDS * tiles
        sizes["page_table"] = len(rows) * max((len(row.request.pages) for row in rows), default=0)
        arrays = {name: np.empty(size, np.int32) for name, size in sizes.items()}
        _, sampled, pages = self._write(arrays, rows, decodes, tiles)
        arrays["sampled"], arrays["page_table"] = arrays["sampled"][:sampled], arrays["page_table"][:pages]
        output = np.array([self._results.turn, place], np.int32)
        on_device, *tensors = to_device([output, *arrays.values()], self._device)
        return (
            PrefillInputs(last_tokens=self._results.last_tokens, **dict(zip(arrays, tensors, strict=True))),
            on_device,
        )

    def _write(
        self, arrays: Mapping[str, Array], rows: Sequence[StepRow], decodes: int, tiles: int
    ) -> tuple[int, int, int]:
        """Write the arrays of PrefillInputs for decode rows and chunks, with `tiles` tiles, to the arrays' beginnings.

        Returns:
            How many tokens there are, how many of them are sampled, and how many page ids.
        """
        page_size = self._page_size
        input_ids, positions, slots = arrays["input_ids"], arrays["positions"], arrays["slots"]
        token = page = 0
        places = list[tuple[int, int, int, int]]()
        if decodes:
            decode_ids, sources, at, table = self._decodes.columns(rows[:decodes])
            input_ids[:decodes], arrays["sources"][:decodes], positions[:decodes] = decode_ids, sources, at
            slots[:decodes] = table[np.arange(decodes), at // page_size] * page_size + at % page_size
            arrays["page_table"][: table.size] = table.reshape(-1)
            places = [(index, row.start, 1, index * table.shape[1]) for index, row in enumerate(rows[:decodes])]
            token, page = decodes, table.size
        sampled = list(range(decodes))
        scored: list[int] = []
        for row in rows[decodes:]:
            begin, end, after = row.start, row.start + row.length, token + row.length
            pages = np.array(row.request.pages[: -(-end // page_size)], np.int32)
            # numpy takes far longer for a list.
            input_ids[token:after] = array("i", row.request.token_ids[begin:end])
            positions[token:after] = self._all_positions[begin:end]
            places.append((token, begin, row.length, page))
            arrays["page_table"][page : page + len(pages)] = pages
            own_slots = (pages[begin // page_size :, None] * page_size + self._all_positions[:page_size]).reshape(-1)
            slots[token:after] = own_slots[begin % page_size :][: row.length]
            scored += [token + position - begin for position in scored_positions(row)]
            if row.sample:
                sampled.append(after - 1)
            token, page = after, page + len(pages)
        arrays["sources"][decodes:token] = -1
        sampled += scored
        arrays["sampled"][: len(sampled)] = sampled
        arrays["tiles"][: TABLE_FIELDS * tiles] = self._tiles.table(places, tiles)
        return token, len(sampled), page
