"""The border between models and attention implementations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from minisgl.scheduler_proc.attention.kv_pool import KVPool
from minisgl.scheduler_proc.models.forward_batch import ForwardBatch


@dataclass(frozen=True, slots=True, eq=False)
class AttentionSpec:
    """How one layer attends.

    Attributes:
        scale: factor of the query-key products.
        window: positions a query sees, its own included; None is all before it.
        softcap: scores become softcap * tanh(score / softcap) (Gemma 2).
        sinks: float [query heads], the logit of a column without a value that takes part in the softmax (gpt-oss).
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


class StepAttention(Protocol):
    """Attention of one step, over all its rows."""

    def attend(self, layer: int, query: torch.Tensor, key_value: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
        """Store this step's keys and values, and attend to them and everything before.

        Args:
            query: [tokens, query heads, head_dim].
            key_value: [tokens, 2, kv heads, head_dim], keys then values; may be changed in place.

        Returns:
            [tokens, query heads, head_dim].
        """


class AttentionBackend(Protocol):
    """One way to compute attention over the pool."""

    def begin_step(self, batch: ForwardBatch) -> StepAttention:
        """Prepare what all layers of a step share."""


def make_attention(name: str, pool: KVPool) -> AttentionBackend:
    """The backend of that name ("auto" is the best one for the pool's device)."""
    if name == "fixed_tiles":
        from minisgl.scheduler_proc.attention.fixed_tiles import FixedTileAttention

        return FixedTileAttention(pool)
    if name not in ("auto", "torch_sdpa"):
        raise ValueError(f"unknown attention backend {name!r}")
    from minisgl.scheduler_proc.attention.torch_sdpa import TorchSdpaAttention

    return TorchSdpaAttention(pool)
