"""The one decoder of the Llama, Mistral, Qwen2 and Qwen3 families; their differences are flags of ModelConfig.

Weights are plain tensors. Query, key and value projections are one matrix, gate and up projections another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from minisgl.scheduler_proc.attention.backend import AttentionSpec, StepAttention
from minisgl.scheduler_proc.attention.kv_pool import KVShape
from minisgl.scheduler_proc.models.config import ModelConfig
from minisgl.scheduler_proc.models.forward_batch import ForwardBatch
from minisgl.scheduler_proc.models.linear import PLAIN, Linear, LinearMaker, LinearMakers
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


class LayerProducts(NamedTuple):
    """The matrix products of one layer."""

    qkv: Linear
    output: Linear
    gate_up: Linear
    down: Linear


class Decoder:
    """The model as a function of its weights.

    `linears` decides how matrices are kept. Where it copies them, `weights` has empty ones in their place from then
    on, one after the other, so that no two copies of the whole model exist at any time.
    """

    def __init__(self, config: ModelConfig, weights: DecoderWeights, rope: Rope, linears: LinearMakers = PLAIN) -> None:
        self.config = config
        self.weights = weights
        self.rope = rope
        self._products = [_layer_products(layer, linears.layer) for layer in weights.layers]
        self._head = linears.head(weights.head, None)
        if self._head.own_bytes and not config.tied_embeddings:
            weights.head = weights.head.new_empty(0)
        self._attention = [AttentionSpec(config.head_dim**-0.5, window) for window in config.windows]

    @property
    def kv_shapes(self) -> Sequence[KVShape]:
        return [KVShape(self.config.num_kv_heads, self.config.head_dim)] * self.config.num_layers

    @property
    def weight_bytes(self) -> int:
        products = [self._head, *(product for layer in self._products for product in layer)]
        copies = sum(product.own_bytes for product in products)
        return copies + sum(tensor.nbytes for _, tensor in self.weights.named_tensors())

    def with_a_layer_of_each_kind(self) -> Decoder:
        """The first layers of every attention window alone: they run the same kernels as all of them."""
        windows = self.config.windows
        indices = [windows.index(window) for window in dict.fromkeys(windows)]
        config = replace(self.config, num_layers=len(indices), windows=tuple(windows[index] for index in indices))
        weights = replace(self.weights, layers=[self.weights.layers[index] for index in indices])
        return Decoder(config, weights, self.rope)

    def forward(self, batch: ForwardBatch, attention: StepAttention) -> torch.Tensor:
        """Logits [rows that sample, vocab] in the model's dtype."""
        config, weights = self.config, self.weights
        angles = self.rope.angles(batch.positions)
        hidden = F.embedding(batch.input_ids, weights.embedding)
        last = config.num_layers - 1
        for index, (layer, products) in enumerate(zip(weights.layers, self._products, strict=True)):
            qkv = products.qkv(self._norm(hidden, layer.input_norm))
            attended = self._attend(index, layer, qkv, angles, attention)
            if index == last:
                # Only the tokens that get logits go on from here.
                attended, hidden = attended[batch.sampled], hidden[batch.sampled]
            hidden = hidden + products.output(attended)
            gate, up = products.gate_up(self._norm(hidden, layer.post_attention_norm)).chunk(2, dim=-1)
            hidden = hidden + products.down(F.silu(gate).mul_(up))
        return self._head(self._norm(hidden, weights.norm))

    def _attend(
        self,
        index: int,
        layer: LayerWeights,
        qkv: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        attention: StepAttention,
    ) -> torch.Tensor:
        """Attention's output before its projection, [tokens, heads * head_dim]."""
        heads, kv_heads, head_dim = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        tokens = len(qkv)
        qkv = qkv.view(tokens, heads + 2 * kv_heads, head_dim)
        query_key = qkv[:, : heads + kv_heads]
        if layer.qk_norm is not None:
            query_key.copy_(F.rms_norm(query_key, (head_dim,), None, self.config.rms_norm_eps).mul_(layer.qk_norm))
        rotate_(query_key, angles)
        key_value = qkv[:, heads:].view(tokens, 2, kv_heads, head_dim)
        return attention.attend(index, qkv[:, :heads], key_value, self._attention[index]).reshape(tokens, -1)

    def _norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden, weight.shape, weight, self.config.rms_norm_eps)


def _layer_products(layer: LayerWeights, make_linear: LinearMaker) -> LayerProducts:
    made = {}
    for name in ("qkv", "output", "gate_up", "down"):
        matrix = getattr(layer, name)
        made[name] = make_linear(matrix, getattr(layer, f"{name}_bias"))
        if made[name].own_bytes:
            setattr(layer, name, matrix.new_empty(0))
    return LayerProducts(**made)
