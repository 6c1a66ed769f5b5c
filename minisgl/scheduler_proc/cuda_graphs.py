"""The CUDA path of the engine: steps as captured graphs that read and leave everything on the device.

decode_rows.py and prefill_rows.py bring a step's inputs there, step_results.py has what comes out of it.

A graph has fixed shapes, so decode rows are padded to the next captured batch size and prompt chunks to the next token
count; padding writes its keys and values to a page of its own. A step replays one graph for its decode rows and one or
more for its chunks, or a single one for all of them; what fits no graph (long prompts) runs the same kernels
uncaptured. A few graphs are captured before serving, the others one by one while there is nothing else to do (see
graph_sizes.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from minisgl.scheduler_proc.attention.kv_pool import KVPool
from minisgl.scheduler_proc.decode_rows import DecodeRows
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
from minisgl.scheduler_proc.kernel_compilers import KernelCompilers
from minisgl.scheduler_proc.kernels import dependent_launch
from minisgl.scheduler_proc.kernels.compile_ahead import compile_ahead
from minisgl.scheduler_proc.models.fused_decoder import FusedDecoder, StepLogits
from minisgl.scheduler_proc.prefill_rows import PrefillRows
from minisgl.scheduler_proc.request import StepPlan, StepRow, scored_positions
from minisgl.scheduler_proc.step_results import StepResults


class GraphRunner:
    """Runs decode rows and prompt chunks of a FusedDecoder, by graph where one fits.

    Args:
        pool: holds one page more than the scheduler knows; padding goes there.

    Attributes:
        results: where each step's tokens go.
        sampler: draws tokens from a step's logits.
    """

    def __init__(self, model: FusedDecoder, pool: KVPool, max_running: int, context_length: int) -> None:
        self._model = model
        self._context_length = context_length
        self._device = device = pool.layers[0].device
        self._decode_sizes = decode_sizes(max_running)
        most_rows = max_running + PREFILL_ROWS[-1]
        self.results = StepResults(most_rows, device, dependent_launch.supported(device))
        paging = (context_length, pool.page_size, (pool.num_pages - 1) * pool.page_size)
        self._decodes = DecodeRows(max_running, *paging, model.config.num_kv_heads, self.results, device)
        self._prefills = PrefillRows(model.tiles, *paging, self._decodes, self.results, device)
        head = model.weights.head
        self.sampler = DeviceSampler(
            head.shape[0], max(max_running, PREFILL_ROWS[-1]), head.dtype, device, self.results.publish_instead
        )
        self._decode_graphs: dict[int, tuple[torch.cuda.CUDAGraph, StepLogits]] = {}
        self._prefill_graphs: dict[PrefillSize, tuple[torch.cuda.CUDAGraph, StepLogits]] = {}
        self._graph_memory: Any = None
        self._uncaptured: deque[int | PrefillSize] = deque()

    # ---- capture ----

    def compile_kernels(
        self, threads: int, progress: Callable[[int, int], None], compilers: KernelCompilers | None = None
    ) -> None:
        """Compile what the graphs' kernels need, or load it from Triton's cache; nothing is computed."""

        def launch_all() -> None:
            sizes, _ = capture_order(self._decode_sizes, prefill_sizes(self._context_length))
            for size in sizes:
                # Kernels that another engine of this process has compiled do run, on what others have not written:
                # that must be no place in memory.
                self._send_padding(size)
                self._forward_of(size)()
            self.sampler.launch_all()

        compile_ahead(launch_all, self._device, threads, progress, compilers)

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
        self._send_padding(size)
        captured = self._capture(self._forward_of(size))
        if isinstance(size, int):
            self._decode_graphs[size] = captured
        else:
            self._prefill_graphs[size] = captured
        return True

    def capture_no_more(self) -> None:
        """Do without the graphs that are still missing."""
        self._uncaptured.clear()

    def _send_padding(self, size: int | PrefillSize) -> None:
        """Send the inputs of a step without rows."""
        if isinstance(size, int):
            self._decodes.send([])
        else:
            self._prefills.send([], 0, 0, size)

    def _forward_of(self, size: int | PrefillSize) -> Callable[[], StepLogits]:
        return partial(self._decode_forward, size) if isinstance(size, int) else partial(self._prefill_forward, size)

    def _decode_forward(self, size: int) -> StepLogits:
        """A whole decode step, from what DecodeRows has on the device to published tokens."""
        self._decodes.begin(size)
        result = self._model.decode(self._decodes.inputs(size))
        self.results.publish(result.tokens, result.finite, self._decodes.output())
        return result

    def _prefill_forward(self, size: PrefillSize) -> StepLogits:
        """A part of a step, from what PrefillRows has sent last to published tokens."""
        self._prefills.begin()
        result = self._model.prefill(self._prefills.inputs(size))
        self.results.publish(result.tokens, result.finite, self._prefills.output())
        return result

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
        """Compute a step and publish its greedy tokens.

        `take` is called with each part's rows and logits, in row order, before the next part overwrites them. Parts of
        which no logits are wanted are left out.
        """
        self.results.begin_step()
        decodes, chunks = plan.rows[: plan.decode_rows], plan.rows[plan.decode_rows :]
        parts = _parts(chunks)
        joining = len(decodes) if parts and _joins(len(decodes), parts[0]) else 0
        place = 0
        if joining:
            parts[0] = decodes + parts[0]
        elif decodes:
            take(decodes, self._decode(decodes))
            place = len(decodes)
        for part in parts:
            result = self._prefill(part, joining, place)
            joining = 0
            place += sum(row.sample for row in part)
            if any(row.sample or scored_positions(row) for row in part):
                take(part, result)
        self._decodes.remember([row for row in plan.rows if row.sample], not chunks)

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
        self._decodes.send(rows)
        size = self._decode_size(len(rows))
        if size not in self._decode_graphs:
            return self._decode_forward(size)
        graph, result = self._decode_graphs[size]
        graph.replay()
        return result

    def _prefill(self, rows: list[StepRow], decodes: int, place: int) -> StepLogits:
        """Logits of a part of a step, whose first `decodes` rows decode and whose results begin at `place`."""
        # Graphs give each row one token's logits.
        scores = any(scored_positions(row) for row in rows)
        size = None if scores else fitting_prefill(sum(row.length for row in rows), len(rows), self._prefill_graphs)
        if size is None:
            inputs, output = self._prefills.loose(rows, decodes, place)
            result = self._model.prefill(inputs)
            self.results.publish(result.tokens, result.finite, output)
            return result
        self._prefills.send(rows, decodes, place, size)
        graph, result = self._prefill_graphs[size]
        graph.replay()
        return result


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
