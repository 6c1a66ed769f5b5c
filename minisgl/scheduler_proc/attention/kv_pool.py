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
        """Touch some of the memory up to somewhat behind the first `used` slots; False when enough of it is touched.

        Not while a step runs: what is there is read and written again.

        A system gives memory when it is first written to, and a virtual machine takes up to 6 ms for 2 MB: too long in
        the middle of a step, where all layers may want some at once.
        """
        enough = self._slots_ahead(used)
        for index in range(len(self.layers)):
            if self._touched[index] < enough:
                self._touch(index, BYTES_AT_ONCE, enough)
                return True
        return False

    def stay_ahead(self, used: int) -> None:
        """The same between two steps, and less: a long prompt takes its slots at once, and streams those behind it."""
        index = self._touched.index(min(self._touched))
        if self._touched[index] < self._slots_ahead(used):
            self._touch(index, BYTES_BETWEEN_STEPS, self.num_pages * self.page_size)

    def _slots_ahead(self, used: int) -> int:
        """The end of AHEAD_BYTES of all layers behind the used slots."""
        of_slot = sum(layer[0].nbytes for layer in self.layers)
        return min(used + AHEAD_BYTES // of_slot, self.num_pages * self.page_size)

    def _touch(self, index: int, size: int, enough: int) -> None:
        """Touch so many bytes more of a layer, to the slot `enough` at most."""
        layer, begin = self.layers[index], self._touched[index]
        end = min(begin + max(size // layer[0].nbytes, 1), enough)
        # Slots in use keep what they have: a prompt may have taken more of them at once than were touched.
        layer[begin:end].view(torch.uint8).view(-1)[::SMALL_PAGE].add_(0)
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
