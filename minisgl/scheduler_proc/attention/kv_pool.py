"""The memory that keeps keys and values, in pages; which page belongs to whom is the scheduler's business."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

AHEAD_BYTES = 2**28
"""Of a pool on the host, touched before they are needed."""
BYTES_AT_ONCE = 2**23
BYTES_BETWEEN_STEPS = 2**21
"""One huge page. 100 tokens of all layers need no more if a layer's take 20 KB, and many models take less."""
SMALL_PAGE = 4096
"""Bytes of the least that a system gives memory by."""


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
        self._touched = [0 if device.type == "cpu" else slots] * len(self.layers)

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

    def touch_next(self, used: int) -> bool:
        """Touch some of the memory behind the first `used` slots; False when enough of it is touched.

        A system gives memory when it is first written to, and a virtual machine takes up to 6 ms for 2 MB: too long in
        the middle of a step, where all layers may want some at once.
        """
        enough = self._slots_ahead(used, AHEAD_BYTES)
        for index in range(len(self.layers)):
            if max(self._touched[index], used) < enough:
                self._touch(index, used, BYTES_AT_ONCE, enough)
                return True
        return False

    def stay_ahead(self, used: int) -> None:
        """The same between two steps, if little of what was touched is left: a little of one layer."""
        index = self._touched.index(min(self._touched))
        if max(self._touched[index], used) < self._slots_ahead(used, AHEAD_BYTES // 2):
            self._touch(index, used, BYTES_BETWEEN_STEPS, self.num_pages * self.page_size)

    def _slots_ahead(self, used: int, size: int) -> int:
        """The end of so many bytes of all layers behind the used slots."""
        return min(used + size // sum(layer[0].nbytes for layer in self.layers), self.num_pages * self.page_size)

    def _touch(self, index: int, used: int, size: int, enough: int) -> None:
        """Touch so many bytes of a layer behind what is used or touched, to the slot `enough` at most."""
        layer, begin = self.layers[index], max(self._touched[index], used)
        end = min(begin + max(size // layer[0].nbytes, 1), enough)
        layer[begin:end].view(torch.uint8).view(-1)[::SMALL_PAGE].zero_()
        self._touched[index] = end


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
