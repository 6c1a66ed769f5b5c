"""The CUDA path of the engine: steps as captured graphs, their inputs in one block of integers.

A graph has fixed shapes, so decode rows are padded to the next captured batch size and prompt chunks to the next token
count; padding writes its keys and values to a page of its own. A step replays one graph for its decode rows and one or
more for its chunks, or a single one for all of them; what fits no graph (long prompts) runs the same kernels
uncaptured. A few graphs are captured before serving, the others one by one while there is nothing else to do (see
graph_sizes.py).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch

from minisgl.scheduler_proc.attention.kv_pool import KVPool
from minisgl.scheduler_proc.device_sampler import DeviceSampler
from minisgl.scheduler_proc.graph_sizes import (
    PREFILL_ROWS,
    PREFILL_TOKENS,
    PrefillSize,
    capture_order,
    decode_sizes,
    decodes_join,
    fitting_decode,
    fitting_prefill,
    prefill_sizes,
)
from minisgl.scheduler_proc.input_block import InputBlock
from minisgl.scheduler_proc.kernels.compile_ahead import compile_ahead
from minisgl.scheduler_proc.kernels.paged_attention import decode_splits
from minisgl.scheduler_proc.kernels.prefill_attention import TABLE_FIELDS
from minisgl.scheduler_proc.models.forward_batch import Array, to_device
from minisgl.scheduler_proc.models.fused_decoder import DecodeInputs, FusedDecoder, PrefillInputs, StepLogits
from minisgl.scheduler_proc.request import StepPlan, StepRow, scored_positions

logger = logging.getLogger(__name__)


class GraphRunner:
    """Runs decode rows and prompt chunks of a FusedDecoder, by graph where one fits.

    Args:
        pool: holds one page more than the scheduler knows; padding goes there.

    Attributes:
        last_tokens: int64, what the step before has sampled.
        last_places: where in it each request's token is.
        sampler: draws tokens from a step's logits.
    """

    def __init__(self, model: FusedDecoder, pool: KVPool, max_running: int, context_length: int) -> None:
        self._model = model
        self._page_size = pool.page_size
        self._padding_slot = (pool.num_pages - 1) * pool.page_size
        self._context_length = context_length
        device = pool.layers[0].device
        row_pages = -(-context_length // pool.page_size)
        self._decode_sizes = decode_sizes(max_running)
        self._decode_block = InputBlock(
            {
                "table_stride": 1,
                "input_ids": max_running,
                "sources": max_running,
                "positions": max_running,
                "slots": max_running,
                "lengths": max_running,
                "page_table": max_running * row_pages,
            },
            device,
        )
        most_tokens, most_rows = PREFILL_TOKENS[-1], PREFILL_ROWS[-1]
        self._prefill_block = InputBlock(
            {
                "input_ids": most_tokens,
                "sources": most_tokens,
                "positions": most_tokens,
                "slots": most_tokens,
                "sampled": most_rows,
                "tiles": TABLE_FIELDS * model.tiles.most(most_tokens, most_rows),
                "page_table": most_rows * row_pages,
            },
            device,
        )
        self._device = device
        self.last_tokens = torch.zeros(max_running + most_rows, dtype=torch.int64, device=device)
        self.last_places: dict[int, int] = {}
        head = model.weights.head
        self.sampler = DeviceSampler(head.shape[0], max(max_running, most_rows), head.dtype, device)
        self._decode_graphs: dict[int, tuple[torch.cuda.CUDAGraph, StepLogits]] = {}
        self._prefill_graphs: dict[PrefillSize, tuple[torch.cuda.CUDAGraph, StepLogits]] = {}
        self._graph_memory: Any = None
        self._uncaptured: deque[int | PrefillSize] = deque()

    # ---- capture ----

    def compile_kernels(self, threads: int, progress: Callable[[int, int], None]) -> None:
        """Compile what the graphs' kernels need, or load it from Triton's cache; nothing is computed."""

        def launch_all() -> None:
            sizes, _ = capture_order(self._decode_sizes, prefill_sizes(self._context_length))
            for size in sizes:
                self._forward_of(size)()
            self.sampler.launch_all()

        compile_ahead(launch_all, self._device, threads, progress)

    def capture_first(self, progress: Callable[[int, int], None]) -> None:
        """Capture what every step finds a graph among."""
        sizes, first = capture_order(self._decode_sizes, prefill_sizes(self._context_length))
        self._graph_memory = torch.cuda.graph_pool_handle()
        self._uncaptured.extend(sizes)
        for done in range(1, first + 1):
            self.capture_next()
            progress(done, first)
        self.sampler.capture()

    def capture_next(self) -> bool:
        """Capture one graph more, while no step runs; False when none is left, or none was asked for at start."""
        if not self._uncaptured:
            return False
        size = self._uncaptured.popleft()
        if isinstance(size, int):
            self._fill_padding_decode(size)
            self._decode_graphs[size] = self._capture(self._forward_of(size))
        else:
            self._fill_prefill([], 0, *size)
            self._prefill_graphs[size] = self._capture(self._forward_of(size))
        return True

    def capture_no_more(self) -> None:
        """Do without the graphs that are still missing."""
        self._uncaptured.clear()

    def _forward_of(self, size: int | PrefillSize) -> Callable[[], StepLogits]:
        if isinstance(size, int):
            return partial(self._model.decode, self._decode_inputs(size))
        return partial(self._model.prefill, self._prefill_inputs(*size))

    def _capture(self, forward: Callable[[], StepLogits]) -> tuple[torch.cuda.CUDAGraph, StepLogits]:
        # The first run loads kernels and lets cuBLAS allocate, neither of which a capture allows.
        forward()
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._graph_memory):
            result = forward()
        return graph, result

    # ---- steps ----

    def run(self, plan: StepPlan, take: Callable[[list[StepRow], StepLogits], None]) -> None:
        """Compute a step; `take` is called with each part's rows and logits, in row order, before the next part
        overwrites them. Parts of which no logits are wanted are left out."""
        decodes, chunks = plan.rows[: plan.decode_rows], plan.rows[plan.decode_rows :]
        parts = _parts(chunks)
        joining = len(decodes) if parts and _joins(len(decodes), parts[0]) else 0
        if joining:
            parts[0] = decodes + parts[0]
        elif decodes:
            take(decodes, self._decode(decodes))
        for part in parts:
            result = self._prefill(part, joining)
            joining = 0
            if any(row.sample or scored_positions(row) for row in part):
                take(part, result)

    def remember(self, rows: Iterable[StepRow], tokens: torch.Tensor) -> None:
        """Keep what a step has sampled ([rows], int64): the next one may be launched before the host has seen it."""
        if len(tokens) > len(self.last_tokens):
            raise ValueError(f"{len(tokens)} tokens were sampled, at most {len(self.last_tokens)} can be kept")
        self.last_tokens[: len(tokens)].copy_(tokens)
        self.last_places = {row.request.rid: place for place, row in enumerate(rows)}

    def graph_of(self, plan: StepPlan) -> torch.cuda.CUDAGraph:
        """The graph that runs a plan of decode rows alone, or of chunks that fit one graph (for measuring it)."""
        if plan.decode_rows:
            return self._decode_graphs[self._decode_size(plan.decode_rows)][0]
        key = fitting_prefill(sum(row.length for row in plan.rows), len(plan.rows), self._prefill_graphs)
        if key is None:
            raise ValueError("no graph fits this plan")
        return self._prefill_graphs[key][0]

    def _decode_size(self, rows: int) -> int:
        """How many rows to pad to: a captured number, or without any a usual one."""
        size = fitting_decode(rows, self._decode_graphs)
        return size if size is not None else next(size for size in self._decode_sizes if size >= rows)

    def _decode(self, rows: list[StepRow]) -> StepLogits:
        size = self._decode_size(len(rows))
        padding = size - len(rows)
        input_ids, sources, positions, slots, table = self._decode_columns(rows)
        self._decode_block.fill(
            {
                "table_stride": [table.shape[1]],
                "input_ids": np.pad(input_ids, (0, padding)),
                "sources": np.pad(sources, (0, padding), constant_values=-1),
                "positions": np.pad(positions, (0, padding)),
                "slots": np.pad(slots, (0, padding), constant_values=self._padding_slot),
                # A padding row sees one position, whatever page its table row happens to name.
                "lengths": np.pad(positions + 1, (0, padding), constant_values=1),
                "page_table": np.pad(table, ((0, padding), (0, 0))).reshape(-1),
            }
        )
        if size not in self._decode_graphs:
            return _first_rows(self._model.decode(self._decode_inputs(size)), len(rows))
        graph, result = self._decode_graphs[size]
        graph.replay()
        return _first_rows(result, len(rows))

    def _prefill(self, rows: list[StepRow], decodes: int) -> StepLogits:
        """Logits of a part of a step; its first `decodes` rows decode."""
        tokens = sum(row.length for row in rows)
        sampling = sum(row.sample for row in rows)
        # Graphs give each row one token's logits.
        scores = any(scored_positions(row) for row in rows)
        key = None if scores else fitting_prefill(tokens, len(rows), self._prefill_graphs)
        if key is None:
            result = self._model.prefill(self._loose_prefill_inputs(rows, decodes))
            return StepLogits(result.logits, result.tokens[:sampling], result.finite[:sampling])
        self._fill_prefill(rows, decodes, *key)
        graph, result = self._prefill_graphs[key]
        graph.replay()
        return _first_rows(result, sampling)

    # ---- inputs ----

    def _fill_padding_decode(self, size: int) -> None:
        self._decode_block.fill(
            {
                "table_stride": [1],
                "input_ids": [0] * size,
                "sources": [-1] * size,
                "positions": [0] * size,
                "slots": [self._padding_slot] * size,
                "lengths": [1] * size,
                "page_table": [0] * size,
            }
        )

    def _decode_inputs(self, size: int) -> DecodeInputs:
        block = self._decode_block
        row_pages = -(-self._context_length // self._page_size)
        return DecodeInputs(
            input_ids=block.view("input_ids", size),
            sources=block.view("sources", size),
            last_tokens=self.last_tokens,
            positions=block.view("positions", size),
            slots=block.view("slots", size),
            lengths=block.view("lengths", size),
            table_stride=block.view("table_stride", 1),
            page_table=block.view("page_table", size * row_pages),
            splits=decode_splits(size, self._model.config.num_kv_heads, self._context_length),
        )

    def _decode_columns(self, rows: list[StepRow]) -> tuple[Array, Array, Array, Array, Array]:
        """Input ids, their places in last_tokens or -1, positions and slots of decode rows, and their page table."""
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
                sources[index] = self.last_places[row.request.rid]
        positions = np.array([row.start for row in rows], np.int32)
        slots = table[np.arange(len(rows)), positions // page_size] * page_size + positions % page_size
        return input_ids, sources, positions, slots, table

    def _prefill_columns(
        self, rows: list[StepRow], decodes: int, tokens: int, sampling: int, tiles: int
    ) -> dict[str, Array]:
        """The input arrays of decode rows and chunks, padded to `tokens`, `sampling` logits and `tiles` tiles."""
        page_size = self._page_size
        decode_ids, sources, decode_positions, decode_slots, decode_table = self._decode_columns(rows[:decodes])
        input_ids, positions, slots = [decode_ids], [decode_positions], [decode_slots]
        table, stride = [decode_table.reshape(-1)], decode_table.shape[1]
        places = [(index, row.start, 1, index * stride) for index, row in enumerate(rows[:decodes])]
        sampled = list(range(decodes))
        scored: list[int] = []
        token, pages_at = decodes, decodes * stride
        for row in rows[decodes:]:
            end = row.start + row.length
            pages = np.array(row.request.pages[: -(-end // page_size)], np.int32)
            at = np.arange(row.start, end, dtype=np.int32)
            input_ids.append(np.array(row.request.token_ids[row.start : end], np.int32))
            positions.append(at)
            slots.append(pages[at // page_size] * page_size + at % page_size)
            table.append(pages)
            places.append((token, row.start, row.length, pages_at))
            scored += [token + position - row.start for position in scored_positions(row)]
            token += row.length
            pages_at += len(pages)
            if row.sample:
                sampled.append(token - 1)
        sampled += scored
        padding = tokens - token
        return {
            "input_ids": np.pad(np.concatenate(input_ids), (0, padding)),
            "sources": np.pad(sources, (0, tokens - decodes), constant_values=-1),
            "positions": np.pad(np.concatenate(positions), (0, padding)),
            "slots": np.pad(np.concatenate(slots), (0, padding), constant_values=self._padding_slot),
            "sampled": np.array(sampled + [0] * (sampling - len(sampled)), np.int32),
            "tiles": np.array(self._model.tiles.table(places, tiles), np.int32),
            "page_table": np.concatenate(table),
        }

    def _fill_prefill(self, rows: list[StepRow], decodes: int, tokens: int, most_rows: int) -> None:
        tiles = self._model.tiles.most(tokens, most_rows)
        self._prefill_block.fill(self._prefill_columns(rows, decodes, tokens, most_rows, tiles))

    def _prefill_inputs(self, tokens: int, rows: int) -> PrefillInputs:
        block = self._prefill_block
        row_pages = -(-self._context_length // self._page_size)
        return PrefillInputs(
            input_ids=block.view("input_ids", tokens),
            sources=block.view("sources", tokens),
            last_tokens=self.last_tokens,
            positions=block.view("positions", tokens),
            slots=block.view("slots", tokens),
            sampled=block.view("sampled", rows),
            tiles=block.view("tiles", TABLE_FIELDS * self._model.tiles.most(tokens, rows)),
            page_table=block.view("page_table", rows * row_pages),
        )

    def _loose_prefill_inputs(self, rows: list[StepRow], decodes: int) -> PrefillInputs:
        tokens = sum(row.length for row in rows)
        sampling = max(1, sum(row.sample + len(scored_positions(row)) for row in rows))
        tiles = self._model.tiles.most(tokens, len(rows))
        columns = self._prefill_columns(rows, decodes, tokens, sampling, tiles)
        tensors = dict(zip(columns, to_device(list(columns.values()), self._device), strict=True))
        return PrefillInputs(last_tokens=self.last_tokens, **tensors)


def _parts(chunks: list[StepRow]) -> list[list[StepRow]]:
    """Cut a step's chunks into groups that fit a graph; a chunk that fits none is a group of its own."""
    parts: list[list[StepRow]] = []
    tokens = 0
    for row in chunks:
        full = not parts or tokens + row.length > PREFILL_TOKENS[-1] or len(parts[-1]) == PREFILL_ROWS[-1]
        if full:
            parts.append([])
            tokens = 0
        parts[-1].append(row)
        tokens += row.length
    return parts


def _joins(decodes: int, part: list[StepRow]) -> bool:
    """Whether decode rows are computed with a part of the chunks: the weights are then read once for both."""
    # Log probabilities of prompts take a part out of its graph.
    scores = any(scored_positions(row) for row in part)
    return not scores and decodes_join(decodes, sum(row.length for row in part), len(part))


def _first_rows(result: StepLogits, rows: int) -> StepLogits:
    return StepLogits(result.logits[:rows], result.tokens[:rows], result.finite[:rows])
