"""The inputs of decode steps on CUDA, kept on the device from step to step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from minisgl.scheduler_proc.input_block import InputBlock
from minisgl.scheduler_proc.kernels.paged_attention import decode_splits
from minisgl.scheduler_proc.kernels.step_state import begin_decode
from minisgl.scheduler_proc.models.forward_batch import Array
from minisgl.scheduler_proc.models.fused_decoder import DecodeInputs
from minisgl.scheduler_proc.request import StepRow
from minisgl.scheduler_proc.step_results import TURNS, StepResults

SPARE_PAGES = 8
"""Page ids that a row of the table has room for beyond those that were sent: so long it can go on."""


class DecodeRows:
    """What decode graphs read. Rows that go on from one step to the next are not sent again, only their new pages.

    Args:
        padding_slot: where rows that only fill up a graph write their keys and values.
        kv_heads: of the model.
    """

    def __init__(
        self,
        max_running: int,
        context_length: int,
        page_size: int,
        padding_slot: int,
        kv_heads: int,
        results: StepResults,
        device: torch.device,
    ) -> None:
        self._max_running = max_running
        self._context_length = context_length
        self._page_size = page_size
        self._padding_slot = padding_slot
        self._kv_heads = kv_heads
        self._results = results
        self._row_pages = -(-context_length // page_size) + SPARE_PAGES
        self._block = InputBlock(
            {
                "control": 6,
                "input_ids": max_running,
                "sources": max_running,
                "positions": max_running,
                "page_table": max_running * self._row_pages,
            },
            device,
        )
        self._next_pages = InputBlock({"pages": max_running}, device)
        self._slots, self._lengths = (torch.zeros(max_running, dtype=torch.int32, device=device) for _ in range(2))
        self._places: dict[int, int] = {}
        self._company: list[list[int]] = []
        self._starts: list[int] = []
        self._stride = 0
        self._went_on = False

    def inputs(self, size: int) -> DecodeInputs:
        """What a step of `size` rows reads, after `begin`."""
        block = self._block
        return DecodeInputs(
            input_ids=block.view("input_ids", size),
            sources=block.view("sources", size),
            last_tokens=self._results.last_tokens,
            positions=block.view("positions", size),
            slots=self._slots[:size],
            lengths=self._lengths[:size],
            table_stride=block.view("control", 6)[2:3],
            page_table=block.view("page_table", size * self._row_pages),
            splits=decode_splits(size, self._kv_heads, self._context_length),
        )

    def begin(self, size: int) -> None:
        """Work out the inputs of a step of `size` rows on the device: a graph's first kernel."""
        block = self._block
        begin_decode(
            block.view("control", 6),
            block.view("sources", size),
            self._next_pages.view("pages", size),
            block.view("positions", size),
            self._slots[:size],
            self._lengths[:size],
            block.view("page_table", size * self._row_pages),
            most=self._max_running,
            page_size=self._page_size,
            padding_slot=self._padding_slot,
            turns=TURNS,
        )

    def output(self) -> torch.Tensor:
        """int32 [2], where a step's results go, see StepResults.publish."""
        return self._block.view("control", 6)[4:6]

    def send(self, rows: Sequence[StepRow]) -> None:
        """Bring the next step's rows to the device, as far as they are not there."""
        self._went_on = self._all_go_on(rows)
        self._starts = [row.start for row in rows]
        if not self._went_on:
            self._send_all(rows)
        elif any(start % self._page_size == 0 for start in self._starts):
            self._next_pages.fill({"pages": [row.request.pages[row.start // self._page_size] for row in rows]})

    def _send_all(self, rows: Sequence[StepRow]) -> None:
        input_ids, sources, positions, table = self.columns(rows)
        count, self._stride = len(rows), table.shape[1] + SPARE_PAGES
        arrays = self._block.open()
        arrays["control"][:] = (0, count, self._stride, 0, self._results.turn, 0)
        arrays["input_ids"][:] = 0
        arrays["input_ids"][:count] = input_ids
        arrays["sources"][:] = -1
        arrays["sources"][:count] = sources
        arrays["positions"][:count] = positions
        size = count * self._stride
        arrays["page_table"][:size].reshape(count, self._stride)[:, : table.shape[1]] = table
        self._block.send(size)
        self._company = [row.request.pages for row in rows]

    def _all_go_on(self, rows: Sequence[StepRow]) -> bool:
        """Whether these are the rows of the last step, each one further, and with room for their pages."""
        # A request's list of pages grows as long as it is the same list (see Request.pages).
        return (
            0 < len(rows) == len(self._company)
            and all(
                row.request.pages is pages and row.start == start + 1
                for row, pages, start in zip(rows, self._company, self._starts, strict=True)
            )
            and max(self._starts) + 1 < self._stride * self._page_size
        )

    def columns(self, rows: Sequence[StepRow]) -> tuple[Array, Array, Array, Array]:
        """Input ids, their places in last_tokens or -1, and positions of decode rows, each int32 [rows], and their page
        table, int32 [rows, most pages of a row]."""
        page_size = self._page_size
        counts = [row.start // page_size + 1 for row in rows]
        table = np.zeros((len(rows), max(counts, default=0)), np.int32)
        input_ids, sources = np.zeros(len(rows), np.int32), np.full(len(rows), -1, np.int32)
        for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
            table[index, :count] = row.request.pages[:count]
            token_ids = row.request.token_ids
            if row.start < len(token_ids):
                input_ids[index] = token_ids[row.start]
            else:
                sources[index] = self._places[row.request.rid]
        return input_ids, sources, np.array([row.start for row in rows], np.int32), table

    def remember(self, sampled: Sequence[StepRow], only_decodes: bool) -> None:
        """Note in which order a step's tokens are left on the device: the next one may come before the host has them.

        Args:
            sampled: the step's rows with tokens.
            only_decodes: whether the step was just the rows of `send`.
        """
        if not only_decodes:
            self._company = []
        elif self._went_on:
            return
        self._places = {row.request.rid: place for place, row in enumerate(sampled)}
