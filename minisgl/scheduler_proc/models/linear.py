"""Ways to keep the weight of a linear layer and to multiply by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
import torch.nn.functional as F


class Linear(Protocol):
    """One linear layer, as a function of hidden states."""

    own_bytes: int
    """Memory beside the weight it was made from; above 0, that weight is not needed any more."""

    def __call__(self, hidden: torch.Tensor, /) -> torch.Tensor:
        """[tokens, in] to [tokens, out], in the dtype of `hidden`; exact ones take any leading dimensions."""


LinearMaker: TypeAlias = Callable[[torch.Tensor, torch.Tensor | None], Linear]
"""From a weight [out, in] and a bias [out] or None."""


class LinearMakers(NamedTuple):
    """How a model's matrices are kept: those of its layers, and its head. `exact` ones keep the values, too."""

    layer: LinearMaker
    head: LinearMaker
    exact: bool = True


class PlainLinear:
    """torch's own product with the weight as it is."""

    own_bytes = 0

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, hidden: torch.Tensor, /) -> torch.Tensor:
        return F.linear(hidden, self._weight, self._bias)


class PackedLinear:
    """A weight kept in the layout that oneDNN's kernels read, which F.linear makes anew in every call.

    Without a bias the results are F.linear's to the bit; with one, both round the exact sum once.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        # These operators have no Python wrapper; torch's own compiler makes the same calls.
        ops: Any = torch.ops.mkldnn
        # Without a number of rows the layout suits all of them; made for one row, it is slow for one, too.
        self._weight = ops._reorder_linear_weight(weight, None)
        self._multiply = ops._linear_pointwise.default
        self._bias = bias
        self.own_bytes = self._weight.nbytes

    def __call__(self, hidden: torch.Tensor, /) -> torch.Tensor:
        product: torch.Tensor = self._multiply(hidden, self._weight, self._bias, "none", [], "")
        return product


FIXED_ROWS = 32
"""Rows of every product of a FixedRowsLinear."""


class FixedRowsLinear:
    """Another way's products, always of as many rows, so that a row's result depends on nothing but the row.

    Libraries choose kernels by shape, and different kernels add in different orders.
    """

    def __init__(self, linear: Linear) -> None:
        self._linear = linear
        self.own_bytes = linear.own_bytes

    def __call__(self, hidden: torch.Tensor, /) -> torch.Tensor:
        rows = len(hidden)
        padded = F.pad(hidden, (0, 0, 0, -rows % FIXED_ROWS))
        products = [self._linear(block) for block in torch.split(padded, FIXED_ROWS)]
        return (products[0] if len(products) == 1 else torch.cat(products))[:rows]


def with_fixed_rows(linears: LinearMakers) -> LinearMakers:
    """The same linear layers, with results that do not depend on the batch."""

    def layer(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        return FixedRowsLinear(linears.layer(weight, bias))

    def head(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        return FixedRowsLinear(linears.head(weight, bias))

    return LinearMakers(layer, head, linears.exact)


PLAIN = LinearMakers(PlainLinear, PlainLinear)
PACKED = LinearMakers(PackedLinear, PackedLinear)


def exact_linears(device: torch.device, dtype: torch.dtype) -> LinearMakers:
    """The fastest way that keeps the weights as they are."""
    mkldnn: Any = torch.backends.mkldnn
    if device.type != "cpu" or not mkldnn.is_available():
        return PLAIN
    ops: Any = torch.ops.mkldnn
    packs = (dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported()) or (
        dtype == torch.float16 and ops._is_mkldnn_fp16_supported()
    )
    # In float32 torch multiplies by MKL, which reads plain weights at full speed.
    return PACKED if packs else PLAIN
