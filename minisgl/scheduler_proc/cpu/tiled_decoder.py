"""A Decoder on a CPU with AMX: its weights packed into tiles, its steps run by a team of threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from minisgl.scheduler_proc.attention.kv_pool import KVPool
from minisgl.scheduler_proc.cpu.attention import SEGMENT, SHAPES
from minisgl.scheduler_proc.cpu.memory import Batch, Buffers, Pool, Scratch, Shape, Weights
from minisgl.scheduler_proc.cpu.step import OTHER_PHASES, PHASES_PER_LAYER, run_step
from minisgl.scheduler_proc.cpu.team import Team, counters
from minisgl.scheduler_proc.cpu.tiles import BLOCK, DEPTH, PAIR, pack, permitted, shapes_of_rows
from minisgl.scheduler_proc.models.config import ModelConfig
from minisgl.scheduler_proc.models.decoder import Decoder, DecoderWeights
from minisgl.scheduler_proc.models.forward_batch import ForwardBatch

KEPT_LOGITS = 256
"""Rows of logits up to which their memory is kept for the next step."""


def tiles_fit(config: ModelConfig, page_size: int) -> bool:
    """Whether a model's matrices and pages can be cut into whole tiles, and this machine has tiles."""
    sizes = (config.hidden_size, config.intermediate_size, config.head_dim)
    return all(size % DEPTH == 0 for size in sizes) and page_size % BLOCK == 0 and permitted()


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


class TiledDecoder:
    """A decoder whose forward runs over a KV pool that has the layout of cpu/attention.py.

    The decoder's own matrices are emptied as they are packed, so that no two copies of the whole model exist at any
    time; its plain forward does not work any more. `progress` is called with the layers packed and their number.
    """

    def __init__(self, decoder: Decoder, threads: int, progress: Callable[[int, int], None]) -> None:
        config = decoder.config
        self._config = config
        self._rope = decoder.rope
        self.kv_shapes = decoder.kv_shapes
        self.weight_bytes = 0
        self._keeper = Keeper()
        self._weights = self._pack(config, decoder.weights, progress)
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
            has_head_norms=config.qk_norm,
        )
        self._team = Team(threads)
        self._counts = counters(config.num_layers * PHASES_PER_LAYER + OTHER_PHASES)
        self._rest_shapes, self._sampled_shapes = shapes_of_rows(PAIR), shapes_of_rows(PAIR)
        self._scratch = [self._make_scratch() for _ in range(threads)]
        self._rows = self._sampled_rows = 0
        self._kept_logits = torch.empty((0, config.vocab_size))

    def over(self, pool: KVPool) -> Callable[[ForwardBatch], torch.Tensor]:
        """The forward over this pool, in whose memory nothing else may read or write keys and values."""
        keeper = Keeper()
        addresses = np.array([keeper.address(layer) for layer in pool.layers], np.int64)
        view = Pool(keeper.address(addresses), pool.page_size)

        def forward(batch: ForwardBatch) -> torch.Tensor:
            return self._forward(batch, view, keeper)

        return forward

    def _forward(self, batch: ForwardBatch, pool: Pool, _pool_keeper: Keeper) -> torch.Tensor:
        """Logits float32 [rows that sample, vocab]; valid until the next call."""
        sampled = len(batch.sampled)
        keeper = Keeper()
        parts = self._batch(batch, keeper)
        self._reserve(parts.tokens, sampled)
        self._rest_shapes[:] = shapes_of_rows(parts.tokens % PAIR or PAIR)
        self._sampled_shapes[:] = shapes_of_rows(sampled % PAIR or PAIR)
        self._counts.fill(0)
        logits = self._logits(sampled)
        buffers = self._buffers._replace(logits=logits.data_ptr())
        counts, threads = self._counts.ctypes.data, self._team.threads

        def share(thread: int) -> None:
            run_step(counts, threads, self._shape, self._weights, parts, pool, buffers, self._scratch[thread])

        self._team.run(share)
        return logits

    def _pack(self, config: ModelConfig, weights: DecoderWeights, progress: Callable[[int, int], None]) -> Weights:
        packed: list[list[int]] = []
        for layer in weights.layers:
            progress(len(packed), config.num_layers)
            packed.append([])
            for name in ("qkv", "output", "gate_up", "down"):
                packed[-1].append(self._pack_matrix(getattr(layer, name)))
                setattr(layer, name, getattr(layer, name).new_empty(0))
        head = self._pack_matrix(weights.head)
        self.weight_bytes += weights.embedding.nbytes
        if not config.tied_embeddings:
            weights.head = weights.head.new_empty(0)
        hidden, layers = config.hidden_size, weights.layers
        qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        windows = [window or np.iinfo(np.int32).max for window in config.windows]
        return Weights(
            embedding=self._keeper.address(weights.embedding),
            matrices=self._keeper.address(np.array(packed, np.int64)),
            head=head,
            norms=self._floats([norm for layer in layers for norm in (layer.input_norm, layer.post_attention_norm)]),
            last_norm=self._floats([weights.norm]),
            qkv_bias=self._floats([layer.qkv_bias for layer in layers], qkv),
            head_norms=self._floats([layer.qk_norm for layer in layers], 0),
            output_bias=self._floats([layer.output_bias for layer in layers], hidden),
            gate_up_bias=self._floats([layer.gate_up_bias for layer in layers], 2 * config.intermediate_size),
            down_bias=self._floats([layer.down_bias for layer in layers], hidden),
            windows=self._keeper.address(np.array(windows, np.int32)),
        )

    def _pack_matrix(self, matrix: torch.Tensor) -> int:
        packed = pack(matrix)
        self.weight_bytes += packed.nbytes
        return self._keeper.address(packed)

    def _floats(self, tensors: Sequence[torch.Tensor | None], zeros: int = 0) -> int:
        """The address of the tensors as float32, one after the other; of so many zeros where one is None."""
        filled = [torch.zeros(zeros) if tensor is None else tensor.float().flatten() for tensor in tensors]
        return self._keeper.address(torch.cat(filled))

    def _batch(self, batch: ForwardBatch, keeper: Keeper) -> Batch:
        decodes, chunks = len(batch.host_decode_lengths), batch.prefill
        angles = batch.positions[:, None].float() * self._rope.inverse_frequencies
        counts = np.array([1] * decodes + [chunk.end - chunk.begin for chunk in chunks], np.int32)
        pages = [*batch.decode_pages, *(chunk.pages for chunk in chunks)]
        page_begins = np.cumsum([0, *(len(ids) for ids in pages)], dtype=np.int32)
        in_tiles = -(-counts * self._shape.group // BLOCK)
        first_tiles = np.cumsum(in_tiles) - in_tiles
        starts = [length - 1 for length in batch.host_decode_lengths] + [chunk.start for chunk in chunks]
        tile_parts = np.repeat(np.arange(len(counts), dtype=np.int32), in_tiles)
        tile_numbers = (np.arange(len(tile_parts)) - np.repeat(first_tiles, in_tiles)).astype(np.int32)
        return Batch(
            tokens=len(batch.input_ids),
            sampled_tokens=len(batch.sampled),
            tiles=len(tile_parts),
            input_ids=keeper.address(batch.input_ids),
            slots=keeper.address(batch.slots),
            cos=keeper.address(torch.cos(angles).mul_(self._rope.scaling)),
            sin=keeper.address(torch.sin(angles).mul_(self._rope.scaling)),
            sampled=keeper.address(batch.sampled),
            begins=keeper.address(np.array([*range(decodes), *(chunk.begin for chunk in chunks)], np.int32)),
            starts=keeper.address(np.array(starts, np.int32)),
            counts=keeper.address(counts),
            page_begins=keeper.address(page_begins),
            pages=keeper.address(torch.cat(pages)),
            tile_parts=keeper.address(tile_parts),
            tile_numbers=keeper.address(tile_numbers),
        )

    def _reserve(self, tokens: int, sampled: int) -> None:
        """Make room for a step."""
        if tokens > self._rows or sampled > self._sampled_rows:
            self._rows = _up(max(tokens, self._rows), PAIR)
            self._sampled_rows = _up(max(sampled, self._sampled_rows), PAIR)
            self._buffer_keeper = Keeper()
            self._buffers = self._make_buffers(self._rows, self._sampled_rows)

    def _logits(self, rows: int) -> torch.Tensor:
        if rows > KEPT_LOGITS:
            return torch.empty((rows, self._config.vocab_size))
        if rows > len(self._kept_logits):
            self._kept_logits = torch.empty((_up(rows, BLOCK), self._config.vocab_size))
        return self._kept_logits[:rows]

    def _make_buffers(self, rows: int, sampled: int) -> Buffers:
        config = self._config
        width = config.num_heads * config.head_dim

        def room(rows: int, columns: int, dtype: type[np.generic]) -> int:
            return self._buffer_keeper.address(np.zeros((rows, columns), dtype))

        return Buffers(
            hidden=room(rows, config.hidden_size, np.float32),
            normed=room(rows, config.hidden_size, np.uint16),
            qkv=room(rows, width + 2 * config.num_kv_heads * config.head_dim, np.float32),
            query=room(rows, width, np.uint16),
            attended=room(rows, width, np.uint16),
            activated=room(rows, config.intermediate_size, np.uint16),
            last_hidden=room(sampled, config.hidden_size, np.float32),
            last_attended=room(sampled, width, np.uint16),
            logits=0,
        )

    def _make_scratch(self) -> Scratch:
        head_dim = self._config.head_dim

        def room(size: int, dtype: type[np.generic]) -> int:
            return self._keeper.address(np.zeros(size, dtype))

        return Scratch(
            # Attention's sums, [64, 16] at most, take as much.
            sums=room(PAIR * PAIR, np.float32),
            whole_shapes=self._keeper.address(shapes_of_rows(PAIR)),
            rest_shapes=self._keeper.address(self._rest_shapes),
            sampled_shapes=self._keeper.address(self._sampled_shapes),
            attention_shapes=self._keeper.address(SHAPES),
            query_tile=room(head_dim // 2 * BLOCK, np.uint32),
            lows=room(BLOCK, np.int32),
            limits=room(BLOCK, np.int32),
            blocks=room(SEGMENT // BLOCK, np.int64),
            scores=room(SEGMENT * BLOCK, np.float32),
            weights=room(SEGMENT // 2 * BLOCK, np.uint32),
            highest=room(BLOCK, np.float32),
            totals=room(BLOCK, np.float32),
            shrink=room(BLOCK, np.float32),
            output=room(head_dim * BLOCK, np.float32),
        )


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
