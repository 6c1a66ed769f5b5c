"""Weights of linear layers in 8 or 4 bits, multiplied by torch's own CPU kernels; activations stay as they are.

int8: one scale for each output. int4: one scale and one offset for each output and 64 inputs (32 where 64 do not divide
them). The kernels read a fraction of the memory, which makes decode steps of few rows fast, but they compute slowly:
for many rows a matrix is expanded and multiplied as a whole.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

from minisgl.scheduler_proc.models.config import ModelError
from minisgl.scheduler_proc.models.linear import LinearMaker, LinearMakers

INT8_MANY_ROWS = 24
INT4_MANY_ROWS = 96
"""From how many rows on expanding a matrix takes less time than the kernel."""
INT4_GROUPS = (64, 32)
ROWS_AT_ONCE = 4096
INT4_BLOCK = 64
"""Outputs that torch's kernel packs together on CPUs with AVX-512."""


class ExpandedWeights:
    """Memory for one expanded matrix at a time: taking it from the system anew costs more than the expansion itself."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def take(self, outputs: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised [outputs, inputs], valid until the next call."""
        count = outputs * inputs
        if self._memory.dtype != dtype or self._memory.numel() < count:
            self._memory = torch.empty(count, dtype=dtype)
        return self._memory[:count].view(outputs, inputs)


class Int8Linear:
    """Weights as int8 [out, in], the largest of each output at 127."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, expanded: ExpandedWeights) -> None:
        largest = weight.abs().amax(dim=1).float()
        self._scales = (largest / 127).clamp_(min=torch.finfo(torch.float32).tiny).to(weight.dtype)
        self._weight = torch.empty(weight.shape, dtype=torch.int8)
        # Some rows at a time: a whole head in float32 would take four times its memory.
        for first in range(0, len(weight), ROWS_AT_ONCE):
            rows = slice(first, first + ROWS_AT_ONCE)
            steps = weight[rows].float() / self._scales[rows, None].float()
            self._weight[rows] = steps.round_().clamp_(-127, 127).to(torch.int8)
        self._bias = bias
        self._expanded = expanded
        self.own_bytes = self._weight.nbytes + self._scales.nbytes

    def __call__(self, hidden: torch.Tensor, /) -> torch.Tensor:
        if len(hidden) < INT8_MANY_ROWS:
            product = torch._weight_int8pack_mm(hidden, self._weight, self._scales)
        else:
            outputs, inputs = self._weight.shape
            weight = self._expanded.take(outputs, inputs, hidden.dtype).copy_(self._weight)
            product = F.linear(hidden, weight).mul_(self._scales)
        return product if self._bias is None else product.add_(self._bias)


class Int4Linear:
    """Weights as 4-bit steps between the least and the largest of each group of inputs."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, expanded: ExpandedWeights) -> None:
        outputs, inputs = weight.shape
        self._group = int4_group(outputs, inputs)
        groups = weight.float().view(outputs, -1, self._group)
        least, largest = groups.amin(dim=-1), groups.amax(dim=-1)
        # Rounded to the model's precision first, so that the steps are counted with the scale that will be used.
        scales = ((largest - least) / 15).clamp_(min=torch.finfo(torch.float32).tiny).to(weight.dtype)
        # The kernel computes (step - 8) * scale + offset.
        offsets = (least + 8 * scales.float()).to(weight.dtype)
        steps = ((groups - offsets.float()[..., None]) / scales.float()[..., None] + 8).round_().clamp_(0, 15)
        self._weight = _pack_int4(steps.to(torch.int32).view(outputs, inputs))
        self._scales_and_offsets = torch.stack((scales, offsets), dim=-1).transpose(0, 1).contiguous()
        self._bias = bias
        self._expanded = expanded
        self._expands = outputs % INT4_BLOCK == 0 and _knows_int4_layout()
        self.own_bytes = self._weight.nbytes + self._scales_and_offsets.nbytes

    def __call__(self, hidden: torch.Tensor, /) -> torch.Tensor:
        if len(hidden) < INT4_MANY_ROWS or not self._expands:
            product: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
                hidden, self._weight, self._group, self._scales_and_offsets
            )
        else:
            product = F.linear(hidden, self._expand(hidden.dtype))
        return product if self._bias is None else product.add_(self._bias)

    def _expand(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix [out, in] that the kernel multiplies by."""
        outputs, inputs = len(self._weight), self._weight.shape[1] * 2
        steps = _unpack_int4(self._weight)
        weight = self._expanded.take(outputs, inputs, dtype)
        by_block = weight.view(-1, INT4_BLOCK, inputs // self._group, self._group)
        by_block.copy_(steps.view(-1, inputs // self._group, self._group, INT4_BLOCK).permute(0, 3, 1, 2))
        scales, offsets = (
            self._scales_and_offsets.transpose(0, 1).view(-1, INT4_BLOCK, inputs // self._group, 2).unbind(-1)
        )
        by_block.sub_(8).mul_(scales[..., None]).add_(offsets[..., None])
        return weight


def int4_group(outputs: int, inputs: int) -> int:
    """How many inputs share a scale; raises ModelError for a matrix that torch's kernel does not take."""
    fitting = [group for group in INT4_GROUPS if inputs % group == 0]
    if outputs % 16 or not fitting:
        raise ModelError(
            f"--quantization int4 needs matrices whose outputs are a multiple of 16 and whose inputs one of "
            f"{INT4_GROUPS[-1]}, but this model has one of {outputs} x {inputs}; use --quantization int8"
        )
    return fitting[0]


def _pack_int4(steps: torch.Tensor) -> torch.Tensor:
    # The second argument means something on CUDA only.
    packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(steps, 1)
    return packed


def _unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Undo _pack_int4 for CPUs with AVX-512: uint8 [out / 64, in, 64], the outputs of each block last."""
    blocks = packed.view(-1, packed.shape[1] * 2, INT4_BLOCK // 2)
    return torch.cat((blocks & 15, blocks >> 4), dim=-1)


@cache
def _knows_int4_layout() -> bool:
    """Whether torch packs on this CPU as _unpack_int4 expects: the layout is its private business."""
    steps = torch.randint(0, 16, (2 * INT4_BLOCK, 64), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    unpacked = _unpack_int4(_pack_int4(steps)).transpose(1, 2).reshape(steps.shape)
    return torch.equal(unpacked.to(torch.int32), steps)


def quantized_linears(bits: int) -> LinearMakers:
    """The linear layers of --quantization int8 (8) and int4 (4).

    The head stays at 8 bits with int4, too: its errors go straight into the choice of the token.
    """
    expanded = ExpandedWeights()

    def int8(weight: torch.Tensor, bias: torch.Tensor | None) -> Int8Linear:
        return Int8Linear(weight, bias, expanded)

    def int4(weight: torch.Tensor, bias: torch.Tensor | None) -> Int4Linear:
        return Int4Linear(weight, bias, expanded)

    layer: LinearMaker = int4 if bits == 4 else int8
    return LinearMakers(layer, int8, exact=False)
