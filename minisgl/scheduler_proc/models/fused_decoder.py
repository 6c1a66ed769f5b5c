"""The decoder's forward on CUDA: decoder.py's weights and meaning, with everything between the matrix products fused.

One function of static shapes, so that it can be captured in a CUDA graph: what changes from step to step is read from
one block of integers on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F

from minisgl.scheduler_proc.attention.kv_pool import KVPool
from minisgl.scheduler_proc.kernels import dependent_launch
from minisgl.scheduler_proc.kernels.elementwise import add_rms_norm, embed, rotate_and_store, silu_and_multiply
from minisgl.scheduler_proc.kernels.paged_attention import decode_attention
from minisgl.scheduler_proc.kernels.prefill_attention import MOST_ARRIVALS, PrefillTiles, prefill_attention
from minisgl.scheduler_proc.kernels.small_attention import MAX_GROUP, rotate_attend
from minisgl.scheduler_proc.kernels.small_head import logits_and_best
from minisgl.scheduler_proc.kernels.small_linear import MAX_ROWS, MAX_WIDTH, linear_add, norm_gate_up, norm_linear
from minisgl.scheduler_proc.kernels.small_output import add_attention
from minisgl.scheduler_proc.models.config import ModelConfig
from minisgl.scheduler_proc.models.decoder import Decoder, LayerWeights
from minisgl.scheduler_proc.models.rope import Rope

Attend: TypeAlias = Callable[[int, torch.Tensor], torch.Tensor]
"""From a layer's index and its rotated qkv [tokens, heads + 2 * kv heads, head_dim] to [tokens, heads, head_dim]."""

SmallAttend: TypeAlias = Callable[[int, torch.Tensor, torch.Tensor], None]
"""The same, not yet rotated; adds what the output projection makes of it to the residual [tokens, hidden]."""


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """Rows of one new token each; all int32 on the device, but last_tokens.

    Attributes:
        sources: [rows], where in last_tokens (int64) a row's input id is; negative where input_ids has it.
        table_stride: [1]; row r's page ids are page_table[r * table_stride :].
        lengths: [rows], positions each row sees, its own included.
        splits: over how many programs a row's keys are split at most.
    """

    input_ids: torch.Tensor
    sources: torch.Tensor
    last_tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    lengths: torch.Tensor
    table_stride: torch.Tensor
    page_table: torch.Tensor
    splits: int


@dataclass(frozen=True, slots=True)
class PrefillInputs:
    """Decode rows, as chunks of one token, and prompt chunks, end to end; all int32 on the device, but last_tokens.

    Attributes:
        sources: [tokens], as in DecodeInputs.
        sampled: [rows], the token whose logits are wanted.
        tiles: see PrefillTiles.table.
        page_table: flat; the tiles say where each chunk's page ids begin.
    """

    input_ids: torch.Tensor
    sources: torch.Tensor
    last_tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    sampled: torch.Tensor
    tiles: torch.Tensor
    page_table: torch.Tensor


@dataclass(frozen=True, slots=True)
class StepLogits:
    """Logits of some rows of a step, valid until the next replay, and the greedy choice of those that sample.

    Attributes:
        logits: [rows that sample + scored positions, vocab] in the model's dtype, in the order of ForwardBatch.sampled.
        tokens: int64 [rows that sample], the lowest id of the largest logit.
        finite: bool [rows that sample], whether that logit is finite.
    """

    logits: torch.Tensor
    tokens: torch.Tensor
    finite: torch.Tensor


class FusedDecoder:
    """A Decoder's weights with the fused forward. `pool` receives the keys and values.

    Attributes:
        tiles: how `prefill` cuts chunks.
    """

    def __init__(self, decoder: Decoder, pool: KVPool, context_length: int) -> None:
        self.config = decoder.config
        self.weights = decoder.weights
        self.pool = pool
        device = pool.layers[0].device
        config = self.config
        self.tiles = PrefillTiles(config.num_heads, config.num_kv_heads, config.head_dim, pool.layers[0].dtype, device)
        self._arrivals = torch.zeros(MOST_ARRIVALS, dtype=torch.int32, device=device)
        self._tables = _rotation_tables(decoder.rope, context_length, device)
        self._small_batches = small_batch_kernels_fit(config, pool.layers[0].dtype)
        self._pdl = dependent_launch.supported(device)

    def decode(self, inputs: DecodeInputs) -> StepLogits:
        """Logits of every row."""
        if self._small_batches and len(inputs.input_ids) <= MAX_ROWS:
            return self._head(self._decode_small_batch(inputs))

        def attend(layer: int, qkv: torch.Tensor) -> torch.Tensor:
            return decode_attention(
                qkv,
                self.pool.layers[layer],
                inputs.page_table,
                inputs.table_stride,
                inputs.lengths,
                page_size=self.pool.page_size,
                scale=self.config.head_dim**-0.5,
                window=self.config.windows[layer],
                splits=inputs.splits,
            )

        return self._head(*self._layers(inputs, attend))

    def prefill(self, inputs: PrefillInputs) -> StepLogits:
        """Logits of the sampled tokens."""
        if self._small_batches and len(inputs.input_ids) <= MAX_ROWS:
            return self._head(self._prefill_small_batch(inputs).index_select(0, inputs.sampled))

        def attend(layer: int, qkv: torch.Tensor) -> torch.Tensor:
            return self._attend_prefill(layer, qkv, inputs)

        residual, delta = self._layers(inputs, attend)
        return self._head(residual.index_select(0, inputs.sampled), delta.index_select(0, inputs.sampled))

    def _attend_prefill(self, layer: int, qkv: torch.Tensor, inputs: PrefillInputs) -> torch.Tensor:
        return prefill_attention(
            qkv,
            self.pool.layers[layer],
            inputs.page_table,
            inputs.tiles,
            self._arrivals,
            self.tiles,
            page_size=self.pool.page_size,
            scale=self.config.head_dim**-0.5,
            window=self.config.windows[layer],
            pdl=self._pdl,
        )

    def _decode_small_batch(self, inputs: DecodeInputs) -> torch.Tensor:
        """Hidden states [rows, hidden] of the last layer, not yet normed, by five kernels a layer."""

        def attend(index: int, qkv: torch.Tensor, residual: torch.Tensor) -> None:
            layer, window = self.weights.layers[index], self.config.windows[index]
            parts = rotate_attend(
                qkv,
                inputs.positions,
                inputs.slots,
                self._tables,
                layer.qk_norm,
                self.config.rms_norm_eps,
                self.pool.layers[index],
                inputs.page_table,
                inputs.table_stride,
                page_size=self.pool.page_size,
                window=window,
                pdl=self._pdl,
            )
            add_attention(parts, inputs.positions, layer.output, residual, window=window, pdl=self._pdl)

        return self._small_layers(inputs, attend)

    def _prefill_small_batch(self, inputs: PrefillInputs) -> torch.Tensor:
        """The same for tokens of prompts, by six: tokens see each other, so keys are written first."""

        def attend(index: int, qkv: torch.Tensor, residual: torch.Tensor) -> None:
            self._rotate_and_store(index, qkv, inputs)
            attended = self._attend_prefill(index, qkv, inputs)
            linear_add(attended.flatten(1), self.weights.layers[index].output, residual, self._pdl)

        return self._small_layers(inputs, attend)

    def _small_layers(self, inputs: DecodeInputs | PrefillInputs, attend: SmallAttend) -> torch.Tensor:
        config, pdl = self.config, self._pdl
        eps, heads = config.rms_norm_eps, config.num_heads + 2 * config.num_kv_heads
        residual = self._embed(inputs)
        for index, layer in enumerate(self.weights.layers):
            qkv = norm_linear(residual, layer.input_norm, layer.qkv, layer.qkv_bias, eps, pdl)
            attend(index, qkv.view(-1, heads, config.head_dim), residual)
            product = norm_gate_up(residual, layer.post_attention_norm, layer.gate_up, eps, pdl)
            linear_add(product, layer.down, residual, pdl)
        return residual

    def _layers(self, inputs: DecodeInputs | PrefillInputs, attend: Attend) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [tokens, hidden] before the last addition, and what is to be added."""
        config, weights = self.config, self.weights
        heads = config.num_heads + 2 * config.num_kv_heads
        residual = self._embed(inputs)
        delta: torch.Tensor | None = None
        for index, layer in enumerate(weights.layers):
            normed = add_rms_norm(residual, delta, layer.input_norm, config.rms_norm_eps, self._pdl)
            qkv = F.linear(normed, layer.qkv, layer.qkv_bias).view(-1, heads, config.head_dim)
            self._rotate_and_store(index, qkv, inputs)
            delta = F.linear(attend(index, qkv).flatten(1), layer.output, layer.output_bias)
            normed = add_rms_norm(residual, delta, layer.post_attention_norm, config.rms_norm_eps, self._pdl)
            delta = self._feed_forward(layer, normed)
        if delta is None:
            raise ValueError("the model has no layers")
        return residual, delta

    def _rotate_and_store(self, layer: int, qkv: torch.Tensor, inputs: DecodeInputs | PrefillInputs) -> None:
        norm, eps = self.weights.layers[layer].qk_norm, self.config.rms_norm_eps
        pool = self.pool.layers[layer]
        rotate_and_store(qkv, inputs.positions, inputs.slots, self._tables, norm, eps, pool, self._pdl)

    def _embed(self, inputs: DecodeInputs | PrefillInputs) -> torch.Tensor:
        return embed(inputs.input_ids, self.weights.embedding, inputs.sources, inputs.last_tokens, self._pdl)

    def _feed_forward(self, layer: LayerWeights, normed: torch.Tensor) -> torch.Tensor:
        gate_up = F.linear(normed, layer.gate_up, layer.gate_up_bias)
        return F.linear(silu_and_multiply(gate_up, self._pdl), layer.down, layer.down_bias)

    def _head(self, residual: torch.Tensor, delta: torch.Tensor | None = None) -> StepLogits:
        weights, eps = self.weights, self.config.rms_norm_eps
        if self._small_batches and len(residual) <= MAX_ROWS:
            hidden = residual if delta is None else residual + delta
            return StepLogits(*logits_and_best(hidden, weights.norm, weights.head, eps, self._pdl))
        logits = F.linear(add_rms_norm(residual, delta, weights.norm, eps, self._pdl), weights.head)
        best, tokens = logits.max(dim=-1)
        # With NaN among the logits the index may be none.
        return StepLogits(logits, tokens.clamp_(0, logits.shape[1] - 1), torch.isfinite(best))


def small_batch_kernels_fit(config: ModelConfig, dtype: torch.dtype) -> bool:
    """Whether the kernels for few rows cover this shape."""
    return (
        config.hidden_size <= MAX_WIDTH[dtype.itemsize]
        and config.head_dim in (64, 128)
        and config.num_heads // config.num_kv_heads <= MAX_GROUP
        and not (config.output_bias or config.mlp_bias)
    )


def _rotation_tables(rope: Rope, context_length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of every position, each [context_length, head_dim / 2] in the model's dtype."""
    cos, sin = rope.angles(torch.arange(context_length, device=device))
    half = cos.shape[-1] // 2
    # `angles` repeats cosines over both halves and gives the second half of the sines their plain sign.
    return cos[:, 0, :half].contiguous(), sin[:, 0, half:].contiguous()
