"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the half-split layout of Llama and its kin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from minisgl.scheduler_proc.models.config import ModelConfig


class Rope:
    """Rotates queries and keys by their positions.

    Sines and cosines are computed once a step for all layers, from the positions themselves: no table, so no limit.
    """

    def __init__(self, inverse_frequencies: torch.Tensor, scaling: float, dtype: torch.dtype) -> None:
        """`inverse_frequencies` is float32 [head_dim / 2]; `scaling` multiplies sines and cosines (yarn)."""
        self.inverse_frequencies = inverse_frequencies
        self.scaling = scaling
        self._dtype = dtype

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors for `rotate_` at int positions [tokens]: two tensors [tokens, 1, head_dim] in the model's dtype."""
        angles = positions[:, None].float() * self.inverse_frequencies
        cos = torch.cos(angles) * self.scaling
        sin = torch.sin(angles) * self.scaling
        cos = torch.cat((cos, cos), dim=-1)
        # The sign of the half that is negated sits in the factor, so that a plain roll swaps the halves.
        sin = torch.cat((-sin, sin), dim=-1)
        return cos[:, None].to(self._dtype), sin[:, None].to(self._dtype)


def rotate_(heads: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Rotate `heads` [tokens, heads, head_dim] in place."""
    cos, sin = angles
    swapped = heads.roll(heads.shape[-1] // 2, dims=-1)
    heads.mul_(cos).addcmul_(swapped, sin)


def make_rope(
    config: ModelConfig, directory: Path, context_length: int, dtype: torch.dtype, device: torch.device
) -> Rope:
    """The rotation that a model's config asks for.

    "dynamic" scaling is fixed at the context length served, because keys in the cache cannot be rotated again; up to
    the length that the model was trained for it is no scaling at all.
    """
    if config.rope_parameters["rope_type"] == "default":
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        frequencies, scaling = 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0
    else:
        frequencies, scaling = _scaled_frequencies(config.rope_parameters["rope_type"], directory, context_length)
    return Rope(frequencies.to(device), scaling, dtype)


def _scaled_frequencies(rope_type: str, directory: Path, context_length: int) -> tuple[torch.Tensor, float]:
    # Imported only for models that need it: transformers takes more than a second.
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    hf_config: Any = AutoConfig.from_pretrained(directory, local_files_only=True)
    frequencies, scaling = ROPE_INIT_FUNCTIONS[rope_type](hf_config, torch.device("cpu"), seq_len=context_length)
    return frequencies.float(), float(scaling)
