"""A Decoder on a CPU: its weights packed into tiles, its steps compiled and run by a team of threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from minisgl.scheduler_proc.attention.kv_pool import KVPool
from minisgl.scheduler_proc.cpu.amx import ATTENTION_SHAPES, RING, shapes_of_rows
from minisgl.scheduler_proc.cpu.attention import TILES_AT_ONCE, state_bytes
from minisgl.scheduler_proc.cpu.instructions import HAVE_NARROW, NAMES
from minisgl.scheduler_proc.cpu.memory import Buffers, Keeper, Pool, Scratch, Screen, Shape, Weights
from minisgl.scheduler_proc.cpu.narrow import narrow
from minisgl.scheduler_proc.cpu.products import LARGEST_BYTES
from minisgl.scheduler_proc.cpu.screening import FACTS, LARGEST_HIDDEN, MOST_ROWS, ROWS, make_screen
from minisgl.scheduler_proc.cpu.step import OTHER_PHASES, PHASES_PER_LAYER, run_step
from minisgl.scheduler_proc.cpu.step_batch import make_batch
from minisgl.scheduler_proc.cpu.team import Team, counters
from minisgl.scheduler_proc.cpu.tiles import BLOCK, BYTES_DEPTH, DEPTH, PAIR, SEGMENT, TILE_BYTES, aligned_zeros, pack
from minisgl.scheduler_proc.models.config import ModelConfig
from minisgl.scheduler_proc.models.decoder import Decoder
from minisgl.scheduler_proc.request import StepPlan, scored_positions

KEPT_LOGITS = 256
"""Rows of logits up to which their memory is kept for the next step."""
CACHED_BYTES = 2**26
"""Weights of more are taken to be read from memory by every step."""
STEPS_WITHOUT = 64
"""Steps that follow without a screen when it has ruled out too little to be worth its time."""


def tiles_fit(config: ModelConfig, page_size: int) -> bool:
    """Whether a model's matrices and pages can be cut into whole tiles."""
    sizes = (config.hidden_size, config.intermediate_size, config.head_dim)
    return all(size % DEPTH == 0 for size in sizes) and page_size % BLOCK == 0


class TiledDecoder:
    """A decoder whose forward runs over a KV pool that has the layout of cpu/attention.py.

    The decoder's own matrices are emptied as they are packed, so that no two copies of the whole model exist at any
    time; its plain forward does not work any more.

    Args:
        threads: most that run a step; `threads_for` says how many of them are worth it for a number of tokens.
        instructions: that multiply, one of instructions.available().
        progress: called with the layers packed and their number.
        cached_bytes: what may stay in a cache. A larger head gets a screen (see screening.py), and the matrices of
            a larger model are made narrow (see narrow.py): both cost time, and save reading.

    Attributes:
        weight_bytes: all that is kept of the weights.
        narrowed: how many matrices are kept in twelve bits.
        screens: whether there is a screen.
        unscreened_steps: how many steps will not use it, since it has ruled out too little.
    """

    def __init__(
        self,
        decoder: Decoder,
        threads: int,
        threads_for: Callable[[int], int],
        instructions: str,
        progress: Callable[[int, int], None],
        cached_bytes: int = CACHED_BYTES,
    ) -> None:
        config = decoder.config
        self._config = config
        self.vocab_size = config.vocab_size
        self.kv_shapes = decoder.kv_shapes
        self.weight_bytes = self.narrowed = 0
        self._keeper = Keeper()
        head = decoder.weights.head
        self.screens = head.nbytes > cached_bytes and config.hidden_size <= LARGEST_HIDDEN
        self.unscreened_steps = 0
        self._most_screened_rows = ROWS[NAMES[instructions]]
        self._team = Team(threads)
        self._narrows = decoder.weight_bytes > cached_bytes and NAMES[instructions] in HAVE_NARROW
        self._screen = Screen(0, 0, 0, 0, 0)
        if self.screens:
            self._screen, taken = make_screen(head, self._keeper)
            self.weight_bytes += taken
        self._weights = self._pack(decoder, progress)
        self._shape = Shape(
            layers=config.num_layers,
            hidden=config.hidden_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            group=config.num_heads // config.num_kv_heads,
            half=config.head_dim // 2,
            intermediate=config.intermediate_size,
            vocab=config.vocab_size,
            epsilon=config.rms_norm_eps,
            rope_scaling=decoder.rope.scaling,
            has_head_norms=config.qk_norm,
        )
        self.threads = threads
        self._threads_for = threads_for
        self._counts = counters(config.num_layers * PHASES_PER_LAYER + OTHER_PHASES)
        self._counts_address = self._keeper.address(self._counts)
        most_inputs = max(config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim)
        self._scratch = [
            make_scratch(thread, NAMES[instructions], config.head_dim, most_inputs, self._keeper)
            for thread in range(threads)
        ]
        self._rows = self._sampled_rows = 0

    def over(self, pool: KVPool) -> TiledForward:
        """This decoder on a pool, in whose memory nothing else may read or write keys and values."""
        return TiledForward(self, pool)

    def run(self, plan: StepPlan, pool: Pool, logits: torch.Tensor | None) -> torch.Tensor:
        """Compute a step: the logits of its sampled rows, or without a place for them `TiledForward.likeliest`."""
        keeper = Keeper()
        threads = self._threads_for(sum(row.length for row in plan.rows))
        batch = make_batch(plan, pool.page_size, self._shape, threads, keeper)
        self.reserve(batch.tokens, batch.sampled_tokens)
        self._counts.fill(0)
        likeliest = torch.empty((2, batch.sampled_tokens), dtype=torch.int64)
        place = 0 if logits is None else logits.data_ptr()
        buffers = self._buffers._replace(logits=place, likeliest=likeliest.data_ptr())
        counts = self._counts_address
        fits = logits is None and 0 < batch.sampled_tokens <= self._most_screened_rows
        screens = self.screens and fits and not self.unscreened_steps
        if not screens:
            buffers = buffers._replace(digits=0)
            self.unscreened_steps = max(self.unscreened_steps - 1, 0)

        def share(thread: int) -> None:
            scratch = self._scratch[thread]
            run_step(counts, threads, self._shape, self._weights, self._screen, batch, pool, buffers, scratch)

        self._team.run(share, threads)
        if screens and 2 * self._computed[:threads].sum() > _up(self.vocab_size, PAIR) // PAIR:
            self.unscreened_steps = STEPS_WITHOUT
        return likeliest if logits is None else logits

    def _pack(self, decoder: Decoder, progress: Callable[[int, int], None]) -> Weights:
        config, weights = decoder.config, decoder.weights
        matrices: list[list[int]] = []
        for number, layer in enumerate(weights.layers):
            progress(number, config.num_layers)
            for name in ("qkv", "output", "gate_up", "down"):
                matrices.append(self._pack_matrix(getattr(layer, name), halves=2 if name == "gate_up" else 1))
                setattr(layer, name, getattr(layer, name).new_empty(0))
        matrices.append(self._pack_matrix(weights.head))
        self.weight_bytes += weights.embedding.nbytes
        if not config.tied_embeddings:
            weights.head = weights.head.new_empty(0)
        hidden, layers = config.hidden_size, weights.layers
        qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        windows = [window or np.iinfo(np.int32).max for window in config.windows]
        return Weights(
            embedding=self._keeper.address(weights.embedding),
            matrices=self._keeper.address(np.array(matrices, np.int64)),
            norms=self._floats([norm for layer in layers for norm in (layer.input_norm, layer.post_attention_norm)]),
            last_norm=self._floats([weights.norm]),
            qkv_bias=self._floats([layer.qkv_bias for layer in layers], qkv),
            head_norms=self._floats([layer.qk_norm for layer in layers], 0),
            output_bias=self._floats([layer.output_bias for layer in layers], hidden),
            gate_up_bias=self._floats([layer.gate_up_bias for layer in layers], 2 * config.intermediate_size),
            down_bias=self._floats([layer.down_bias for layer in layers], hidden),
            windows=self._keeper.address(np.array(windows, np.int32)),
            frequencies=self._floats([decoder.rope.inverse_frequencies]),
        )

    def _pack_matrix(self, matrix: torch.Tensor, halves: int = 1) -> list[int]:
        """A matrix's entry in Weights.matrices."""
        narrowed = narrow(matrix, halves, self._team) if self._narrows else None
        if narrowed is None:
            packed = pack(matrix, halves)
            self.weight_bytes += packed.nbytes
            return [self._keeper.address(packed), 0, 0]
        self.narrowed += 1
        self.weight_bytes += narrowed.nbytes
        return [self._keeper.address(part) for part in narrowed]

    def _floats(self, tensors: Sequence[torch.Tensor | None], zeros: int = 0) -> int:
        """The address of the tensors as float32, one after the other; of so many zeros where one is None."""
        filled = [torch.zeros(zeros) if tensor is None else tensor.float().flatten() for tensor in tensors]
        return self._keeper.address(torch.cat(filled))

    def reserve(self, tokens: int, sampled: int) -> None:
        """Make room for a step of so many tokens, of which so many get logits.

        A step that needs more makes it for itself, which takes time: see KVPool.touch_next.
        """
        if tokens > self._rows or sampled > self._sampled_rows:
            self._rows = _up(max(tokens, self._rows), PAIR)
            self._sampled_rows = _up(max(sampled, self._sampled_rows), PAIR)
            self._buffer_keeper = Keeper()
            self._buffers = self._make_buffers(self._rows, self._sampled_rows)

    def _make_buffers(self, rows: int, sampled: int) -> Buffers:
        config = self._config
        width = config.num_heads * config.head_dim

        def room(rows: int, columns: int, dtype: type[np.generic]) -> int:
            array = aligned_zeros(rows * columns, dtype)
            # Written to, so that the system has given the memory before a step waits for it.
            array.fill(0)
            return self._buffer_keeper.address(array)

        def screened(rows: int, columns: int, dtype: type[np.generic]) -> int:
            return room(rows, columns, dtype) if self.screens else 0

        self._computed = np.zeros(self._team.threads, np.int64)
        return Buffers(
            slots=room(rows, 1, np.int64),
            cos=room(rows, self._shape.half, np.float32),
            sin=room(rows, self._shape.half, np.float32),
            hidden=room(rows, config.hidden_size, np.float32),
            normed=room(rows, config.hidden_size, np.uint16),
            qkv=room(rows, width + 2 * config.num_kv_heads * config.head_dim, np.float32),
            query=room(rows, width, np.uint16),
            attended=room(rows, width, np.uint16),
            activated=room(rows, config.intermediate_size, np.uint16),
            last_hidden=room(sampled, config.hidden_size, np.float32),
            last_attended=room(sampled, width, np.uint16),
            logits=0,
            digits=screened(2 * sampled, _up(config.hidden_size, BYTES_DEPTH), np.uint8),
            facts=screened(sampled, FACTS, np.float32),
            highs=screened(_up(config.vocab_size, PAIR) // PAIR, MOST_ROWS, np.int32),
            lows=screened(self._team.threads * MOST_ROWS, BLOCK, np.float32),
            thresholds=screened(self._team.threads, MOST_ROWS, np.int32),
            computed=self._buffer_keeper.address(self._computed),
            largest=room(self._team.threads * sampled, LARGEST_BYTES // 4, np.float32),
            largest_bytes=sampled * LARGEST_BYTES,
            likeliest=0,
        )


class TiledForward:
    """A TiledDecoder over one KV pool."""

    def __init__(self, decoder: TiledDecoder, pool: KVPool) -> None:
        self._decoder = decoder
        self._keeper = Keeper()
        addresses = np.array([self._keeper.address(layer) for layer in pool.layers], np.int64)
        self._pool = Pool(self._keeper.address(addresses), pool.page_size)
        self._kept_logits = torch.empty((0, decoder.vocab_size))

    def logits(self, plan: StepPlan) -> torch.Tensor:
        """Compute a step; logits float32 [rows that sample + scored positions, vocab], valid until the next call."""
        rows = sum(row.sample + len(scored_positions(row)) for row in plan.rows)
        if rows > KEPT_LOGITS:
            logits = torch.empty((rows, self._decoder.vocab_size))
        else:
            if rows > len(self._kept_logits):
                self._kept_logits = torch.empty((_up(rows, BLOCK), self._decoder.vocab_size))
            logits = self._kept_logits[:rows]
        return self._decoder.run(plan, self._pool, logits)

    def likeliest(self, plan: StepPlan) -> torch.Tensor:
        """Compute a step without writing logits; int64 [2, rows that sample]: tokens, and whether they were finite."""
        return self._decoder.run(plan, self._pool, None)


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def make_scratch(thread: int, instructions: int, head_dim: int, most_inputs: int, keeper: Keeper) -> Scratch:
    """Memory for one thread, held by `keeper`; for `instructions` see instructions.py.

    Args:
        most_inputs: of any matrix.
    """

    def room(size: int, dtype: type[np.generic]) -> int:
        return keeper.address(aligned_zeros(size, dtype))

    return Scratch(
        thread=thread,
        instructions=instructions,
        # Attention's sums, [64, 16] at most or twice [32, 16], take as much.
        sums=room(PAIR * PAIR, np.float32),
        wide=room(max(most_inputs // DEPTH, RING) * 2 * TILE_BYTES, np.uint8),
        shapes=keeper.address(np.stack([shapes_of_rows(rows) for rows in range(PAIR + 1)])),
        attention_shapes=keeper.address(ATTENTION_SHAPES),
        tiles=room(TILES_AT_ONCE * state_bytes(head_dim // 2), np.uint8),
        blocks=room(2 * SEGMENT // BLOCK, np.int64),
        scores=room(2 * SEGMENT * BLOCK, np.float32),
        weights=room(2 * SEGMENT // 2 * BLOCK, np.uint32),
        shrink=room(2 * BLOCK, np.float32),
    )
