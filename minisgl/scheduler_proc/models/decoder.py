"""The one decoder of the Llama, Mistral, Qwen2 and Qwen3 families; their differences are flags of ModelConfig.

Weights are plain tensors. Query, key and value projections are one matrix, gate and up projections another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from minisgl.scheduler_proc.attention.backend import AttentionSpec, StepAttention
from minisgl.scheduler_proc.attention.kv_pool import KVShape
from minisgl.scheduler_proc.models.config import ModelConfig
from minisgl.scheduler_proc.models.forward_batch import ForwardBatch
from minisgl.scheduler_proc.models.rope import Rope, rotate_


@dataclass(slots=True)
class LayerWeights:
    """One layer; matrices are [out, in], as torch.nn.functional.linear takes them.

    Attributes:
        qkv: [(heads + 2 * kv heads) * head_dim, hidden], rows in the order q, k, v.
        qk_norm: [heads + kv heads, head_dim], the norm weight of each query and key head.
        gate_up: [2 * intermediate, hidden], gate's rows first.
    """

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    qk_norm: torch.Tensor | None
    output: torch.Tensor
    output_bias: torch.Tensor | None
    post_attention_norm: torch.Tensor
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


@dataclass(slots=True)
class DecoderWeights:
    """All weights; `head` [vocab, hidden] is the embedding itself when the two are tied."""

    embedding: torch.Tensor
    layers: list[LayerWeights]
    norm: torch.Tensor
    head: torch.Tensor

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor once, under its attribute's name."""
        yield "embedding", self.embedding
        yield "norm", self.norm
        if self.head is not self.embedding:
            yield "head", self.head
        for layer in self.layers:
            for field in fields(layer):
                tensor = getattr(layer, field.name)
                if tensor is not None:
                    yield field.name, tensor


class Decoder:
    """The model as a function of its weights."""

    def __init__(self, config: ModelConfig, weights: DecoderWeights, rope: Rope) -> None:
        self.config = config
        self.weights = weights
        self.rope = rope
        self._attention = [AttentionSpec(config.head_dim**-0.5, window) for window in config.windows]

    @property
    def kv_shapes(self) -> Sequence[KVShape]:
        return [KVShape(self.config.num_kv_heads, self.config.head_dim)] * self.config.num_layers

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in self.weights.named_tensors())

    def forward(self, batch: ForwardBatch, attention: StepAttention) -> torch.Tensor:
        """Logits [rows that sample, vocab] in the model's dtype."""
        config, weights = self.config, self.weights
        angles = self.rope.angles(batch.positions)
        hidden = F.embedding(batch.input_ids, weights.embedding)
        last = config.num_layers - 1
        for index, layer in enumerate(weights.layers):
            attended = self._attend(index, layer, self._norm(hidden, layer.input_norm), angles, attention)
            if index == last:
                # Only the tokens that get logits go on from here.
                attended, hidden = attended[batch.sampled], hidden[batch.sampled]
            hidden = hidden + F.linear(attended, layer.output, layer.output_bias)
            hidden = hidden + _feed_forward(layer, self._norm(hidden, layer.post_attention_norm))
        return F.linear(self._norm(hidden, weights.norm), weights.head)

    def _attend(
        self,
        index: int,
        layer: LayerWeights,
        hidden: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        attention: StepAttention,
    ) -> torch.Tensor:
        """Attention's output before its projection, [tokens, heads * head_dim]."""
        heads, kv_heads, head_dim = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        tokens = len(hidden)
        qkv = F.linear(hidden, layer.qkv, layer.qkv_bias).view(tokens, heads + 2 * kv_heads, head_dim)
        query_key = qkv[:, : heads + kv_heads]
        if layer.qk_norm is not None:
            query_key.copy_(F.rms_norm(query_key, (head_dim,), None, self.config.rms_norm_eps).mul_(layer.qk_norm))
        rotate_(query_key, angles)
        key_value = qkv[:, heads:].view(tokens, 2, kv_heads, head_dim)
        return attention.attend(index, qkv[:, :heads], key_value, self._attention[index]).reshape(tokens, -1)

    def _norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden, weight.shape, weight, self.config.rms_norm_eps)


def _feed_forward(layer: LayerWeights, hidden: torch.Tensor) -> torch.Tensor:
    gate, up = F.linear(hidden, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
    return F.linear(F.silu(gate).mul_(up), layer.down, layer.down_bias)
