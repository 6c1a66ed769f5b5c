"""Runs steps: a StepPlan becomes one copy to the device, one forward pass, and one token per sampling row."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minisgl.config import ModelSpec, ServerConfig
from minisgl.sampling_params import SamplingParams
from minisgl.scheduler_proc.attention.backend import AttentionBackend, make_attention
from minisgl.scheduler_proc.attention.kv_pool import KVPool, bytes_per_token
from minisgl.scheduler_proc.compute_path import (
    be_deterministic,
    compile_kernels,
    cpu_instructions,
    cut_into_tiles,
    make_graphs,
    use_fused_kernels,
)
from minisgl.scheduler_proc.core import scheduler_limits
from minisgl.scheduler_proc.device import (
    choose_device,
    choose_dtype,
    choose_linears,
    describe,
    set_cpu_threads,
    usable_cores,
)
from minisgl.scheduler_proc.kernel_compilers import KernelCompilers
from minisgl.scheduler_proc.kv_sizing import choose_num_pages
from minisgl.scheduler_proc.limits import SchedulerLimits
from minisgl.scheduler_proc.logprobs import PendingLogprobs, score_rows
from minisgl.scheduler_proc.models.forward_batch import ForwardBatch, make_forward_batch, to_device, to_host
from minisgl.scheduler_proc.models.linear import PLAIN
from minisgl.scheduler_proc.models.loader import Model, load_model
from minisgl.scheduler_proc.request import Request, RowLogprobs, StepPlan, StepRow
from minisgl.scheduler_proc.sampler import SamplingBatch, always_greedy, sample, sampling_columns

if TYPE_CHECKING:
    from minisgl.scheduler_proc.cpu.tiled_decoder import TiledDecoder, TiledForward
    from minisgl.scheduler_proc.cuda_graphs import GraphRunner
    from minisgl.scheduler_proc.models.fused_decoder import StepLogits

logger = logging.getLogger(__name__)

DEFAULT_PAGE_SIZE = 16
WARM_UP_TOKENS = 64


@dataclass(frozen=True, slots=True)
class InFlightStep:
    """A launched step. `result` is int64 or int32 [2, rows that sample]: token ids, and whether the logits were finite.

    `logprobs` are for the rows that ask. On CUDA both lie in pinned host memory and are valid once `done` has happened.
    """

    result: torch.Tensor
    logprobs: list[PendingLogprobs]
    done: torch.cuda.Event | None


class StepEngine:
    """One replica's model, KV pool and sampler.

    Attributes:
        page_size: tokens per KV page.
        num_pages: KV pages; their ids are 0 .. num_pages - 1.
        device_name: torch's name of the device first, then what it is.
        dtype_name: precision of weights and KV, such as bfloat16.
        weight_bytes, kv_bytes_per_token: memory of the weights, and of one token's keys and values in all layers.
        model: the weights, and where no CUDA graph does it, what computes with them.
        graphs: the CUDA path; None where it does not apply.
        runs_ahead: whether a step may be launched before the one before it is retired.
    """

    def __init__(
        self,
        model: Model | TiledDecoder,
        forward: Callable[[ForwardBatch], torch.Tensor],
        tiles: TiledForward | None,
        graphs: GraphRunner | None,
        pool: KVPool,
        num_pages: int,
        limits: SchedulerLimits,
        device: torch.device,
        threads: int,
    ) -> None:
        self.page_size = pool.page_size
        self.num_pages = num_pages
        self.device_name = describe(device, threads)
        self.dtype_name = str(pool.layers[0].dtype).removeprefix("torch.")
        self.weight_bytes = model.weight_bytes
        self.kv_bytes_per_token = bytes_per_token(model.kv_shapes, pool.layers[0].dtype)
        self.runs_ahead = graphs is not None
        self.model = model
        self._forward = forward
        self._tiles = tiles
        self.graphs = graphs
        self._pool = pool
        self._limits = limits
        self._device = device
        self._warned = False

    @classmethod
    def load(
        cls,
        config: ServerConfig,
        model: ModelSpec,
        replica: int,
        progress: Callable[[str, int, int], None],
        compilers: KernelCompilers | None = None,
    ) -> StepEngine:
        """Load weights and take KV memory.

        Args:
            progress: called with a stage, and how much of it is done of how much (0 of 0: unknown).
            compilers: for kernels on CUDA, if there are any.

        Raises:
            ConfigError: the device is not there, or its memory does not hold one KV page.
            ModelError: the model's files are missing, broken, or of an unsupported kind.
        """
        device = choose_device(config, replica)
        dtype = choose_dtype(config, device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        page_size = config.page_size or DEFAULT_PAGE_SIZE
        instructions = cpu_instructions(config, Path(model.directory), device, dtype, page_size)
        progress("loading weights", 0, 0)
        with torch.inference_mode():
            loaded = load_model(
                Path(model.directory),
                dtype=dtype,
                device=device,
                context_length=config.context_length or model.context_length,
                dummy_seed=config.random_seed if config.load_format == "dummy" else None,
                trust_remote_code=config.trust_remote_code,
                progress=lambda done, total: progress("loading weights", done, total),
                linears=PLAIN if instructions else choose_linears(config, device, dtype),
            )
            threads = set_cpu_threads(config, loaded.weight_bytes) if device.type == "cpu" else torch.get_num_threads()
            tiles = None
            if instructions is not None:
                tiles = cut_into_tiles(loaded, config, instructions, partial(progress, "packing weights"))
                threads = tiles.threads

            def make_engine(num_pages: int) -> StepEngine:
                # One page more than the scheduler may use: the graphs' padding rows write there.
                pool = KVPool(loaded.kv_shapes, num_pages + 1, page_size, dtype, device)
                plain = partial(
                    _forward, loaded, make_attention("fixed_tiles" if deterministic else "torch_sdpa", pool)
                )
                on_tiles = tiles.over(pool) if tiles is not None else None
                graphs = make_graphs(loaded, pool, limits) if fused else None
                return cls(tiles or loaded, plain, on_tiles, graphs, pool, num_pages, limits, device, threads)

            deterministic = be_deterministic(config, loaded)
            fused = not deterministic and use_fused_kernels(config, loaded, device)

            limits = scheduler_limits(config, model, str(device))
            if fused:
                progress("compiling kernels", 0, 0)
                compile_threads = max(1, usable_cores() // (config.dp_size or 1))
                say = partial(progress, "compiling kernels")
                compile_kernels(loaded, page_size, limits, device, compile_threads, say, compilers)
            progress("sizing KV memory", 0, 0)
            activation_bytes = 0
            if device.type == "cuda":
                trial = make_engine(-(-limits.step_tokens // page_size))
                activation_bytes = trial.peak_memory_of_largest_step()
                del trial
                torch.cuda.empty_cache()
            num_pages = choose_num_pages(
                config,
                limits,
                device,
                page_size=page_size,
                page_bytes=bytes_per_token(loaded.kv_shapes, dtype) * page_size,
                activation_bytes=activation_bytes,
            )
            if tiles is not None:
                tiles.reserve(limits.step_tokens, limits.max_running)
                progress("compiling kernels", 0, 0)
                make_engine(1).launch(_trial_plan([(0, 1)], 1, [0]))
            engine = make_engine(num_pages)
            if engine.graphs is not None and not config.disable_cuda_graph:
                engine.graphs.capture_first(partial(progress, "capturing CUDA graphs"))
            return engine

    def warm_up(self) -> None:
        """Run a prefill, a chunk after it, and decode steps of one and several rows; KV pages are free afterwards."""
        tokens = min(WARM_UP_TOKENS, self._limits.context_length // 2, self.page_size * self.num_pages // 2)
        if not tokens:
            return
        pages = list(range(-(-2 * tokens // self.page_size)))
        for rows, decode_rows in (
            ([(0, tokens)], 0),
            ([(tokens, 1), (tokens, 1), (tokens, 1), (tokens, tokens)], 3),
            ([(tokens, 1)], 1),
        ):
            self.retire(self.launch(_trial_plan(rows, decode_rows, pages)))

    def prepare_next(self, pages_used: int = 0) -> bool:
        """Use an idle moment (some 50 ms) for what makes later steps faster; False when there is nothing left.

        Args:
            pages_used: KV pages that may have been in use so far, those with the lowest ids.
        """
        if self.graphs is None:
            return self._pool.touch_next(pages_used * self.page_size)
        try:
            with torch.inference_mode():
                return self.graphs.capture_next()
        except torch.OutOfMemoryError:
            logger.warning("no memory is left for more CUDA graphs: some steps are padded to larger ones")
            self.graphs.capture_no_more()
            return False

    def stay_ahead(self, pages_used: int) -> None:
        """Between two steps: a few milliseconds' part of `prepare_next`, if the steps would soon wait for it."""
        if self.graphs is None:
            self._pool.stay_ahead(pages_used * self.page_size)

    def peak_memory_of_largest_step(self) -> int:
        """CUDA memory in bytes that a step takes beside weights and KV, by running one on the pool's first pages."""
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        whole, rest = divmod(self._limits.step_tokens, self._limits.context_length)
        prompts = [(0, self._limits.context_length)] * whole + [(0, rest)] * (rest > 0)
        decodes = [(0, 1)] * self._limits.max_running
        self.retire(self.launch(_trial_plan(decodes + prompts, len(decodes), list(range(self.num_pages)))))
        return torch.cuda.max_memory_allocated(self._device) - before

    def launch(self, plan: StepPlan) -> InFlightStep:
        """Start a step; returns before it is computed where the device allows that (CUDA)."""
        with torch.inference_mode():
            if self.graphs is not None:
                result, logprobs = self._launch_fused(plan, self.graphs)
            elif self._tiles is not None:
                result, logprobs = self._run_tiled(plan, self._tiles)
            else:
                result, logprobs = self._launch_plain(plan)
            done = torch.cuda.current_stream().record_event() if self._device.type == "cuda" else None
            return InFlightStep(result, logprobs, done)

    def _launch_plain(self, plan: StepPlan) -> tuple[torch.Tensor, list[PendingLogprobs]]:
        """Start a step on any model; its results as in InFlightStep."""
        sampling = [row for row in plan.rows if row.sample]
        columns = sampling_columns(sampling, self._limits.vocab_size)
        batch, tensors = make_forward_batch(plan, self.page_size, self._device, columns)
        logits = self._forward(batch)
        tokens, finite = sample(logits[: len(sampling)], SamplingBatch(*tensors))
        return to_host(torch.stack((tokens, finite.long()))), score_rows(plan.rows, logits, tokens)

    def _run_tiled(self, plan: StepPlan, tiles: TiledForward) -> tuple[torch.Tensor, list[PendingLogprobs]]:
        """Compute a step compiled for the CPU; its results as in InFlightStep."""
        sampling = [row for row in plan.rows if row.sample]
        if always_greedy(sampling) and not any(row.request.asks_logprobs for row in plan.rows):
            return tiles.likeliest(plan), []
        columns = to_device(sampling_columns(sampling, self._limits.vocab_size), self._device)
        logits = tiles.logits(plan)
        tokens, finite = sample(logits[: len(sampling)], SamplingBatch(*columns))
        return torch.stack((tokens, finite.long())), score_rows(plan.rows, logits, tokens)

    def _launch_fused(self, plan: StepPlan, graphs: GraphRunner) -> tuple[torch.Tensor, list[PendingLogprobs]]:
        """Start a step on the fused kernels; its results as in InFlightStep."""
        logprobs: list[PendingLogprobs] = []

        def take(rows: list[StepRow], step: StepLogits) -> None:
            sampling = [row for row in rows if row.sample]
            tokens = step.tokens
            if not always_greedy(sampling):
                tokens = graphs.sampler.sample(sampling, step.logits, step.tokens)
            logprobs.extend(score_rows(rows, step.logits, tokens))

        graphs.run(plan, take)
        return graphs.results.of_this_step(sum(row.sample for row in plan.rows)), logprobs

    def retire(self, step: InFlightStep) -> list[int]:
        """Wait for a step; one token id for each of its rows with `sample`, in row order."""
        if step.done is not None:
            step.done.synchronize()
        token_ids, finite = step.result.tolist()
        if not all(finite) and not self._warned:
            self._warned = True
            logger.warning(
                "the model's logits are not finite, so its tokens mean nothing: the weights are broken, "
                "or %s overflows (try --dtype bfloat16 or float32)",
                self.dtype_name,
            )
        return list(token_ids)

    def logprobs(self, step: InFlightStep) -> list[RowLogprobs]:
        """What rows of a retired step asked for."""
        return [found for pending in step.logprobs for found in pending.arrived()]


def _forward(model: Model, attention: AttentionBackend, batch: ForwardBatch) -> torch.Tensor:
    return model.forward(batch, attention.begin_step(batch))


def _trial_plan(rows: list[tuple[int, int]], decode_rows: int, pages: list[int]) -> StepPlan:
    """A step that computes (start, length) rows, all on the same pages; every row samples in the most costly way."""
    longest = max(start + length for start, length in rows)
    sampling = SamplingParams(temperature=1.0, top_k=1000, top_p=0.9, min_p=0.01, seed=0, logit_bias=((0, 1.0),))
    request = Request(0, [0] * longest, longest, sampling, 1, frozenset(), [], pages=pages)
    return StepPlan(0, [StepRow(request, start, length, True) for start, length in rows], decode_rows)
