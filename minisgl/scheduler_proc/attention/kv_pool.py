"""The memory that keeps keys and values, in pages; which page belongs to whom is the scheduler's business."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class KVShape:
    """The key-value heads of one layer."""

    heads: int
    head_dim: int


class KVPool:
    """Keys and values of every layer.

    Attributes:
        layers: per layer [num_pages * page_size, 2, heads, head_dim]; slot s is page s // page_size, index 0 of the
            second dimension is the key, 1 the value.
    """

    def __init__(
        self, shapes: Sequence[KVShape], num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        slots = num_pages * page_size
        self.layers = [_zeros((slots, 2, shape.heads, shape.head_dim), dtype, device) for shape in shapes]

    def store(self, layer: int, slots: torch.Tensor, key_value: torch.Tensor) -> None:
        """Write keys and values [tokens, 2, heads, head_dim] to their slots (int64 [tokens]); changes `key_value`."""
        # A request whose values overflow must not leave NaN in pages that another request gets later: hidden slots
        # are multiplied by zero, and zero times NaN is NaN.
        torch.nan_to_num_(key_value, 0.0, 0.0, 0.0)
        if key_value.device.type == "mps":
            # index_copy_ is a hundred times slower there up to torch 2.13 (PyTorch's pull request 185750).
            self.layers[layer][slots] = key_value
        else:
            self.layers[layer].index_copy_(0, slots, key_value)


def bytes_per_token(shapes: Sequence[KVShape], dtype: torch.dtype) -> int:
    """KV memory of one token over all layers."""
    return sum(2 * shape.heads * shape.head_dim for shape in shapes) * dtype.itemsize


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # Zeros, because slots that a mask hides are still multiplied, and garbage may be NaN.
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy takes zero pages from the system, which cost memory only once they are written; torch.zeros writes them all.
    count = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(count, np.uint8)).view(dtype).view(shape)
