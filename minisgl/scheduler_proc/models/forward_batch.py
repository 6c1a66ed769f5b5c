"""The tensors of one step, made from a StepPlan with a single copy to the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from minisgl.scheduler_proc.request import StepPlan, StepRow, scored_positions

Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """A row that computes several positions: tokens begin .. end - 1 of the step, at positions start and up.

    `pages` is int32 [pages], the pages of positions 0 .. start + (end - begin) - 1.
    """

    begin: int
    end: int
    start: int
    pages: torch.Tensor


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """What a model's forward needs. Tokens are the decode rows (one each), then the prefill chunks, end to end.

    Attributes:
        input_ids: int32 [tokens].
        positions: int32 [tokens].
        slots: int64 [tokens], where the KV pool keeps each token's key and value (page * page_size + offset).
        decode_pages: int32 [decode rows, longest row's pages], padded with page 0.
        decode_lengths: int32 [decode rows], positions each row sees, its own included.
        host_decode_lengths: the same on the host.
        prefill: the other rows.
        sampled: int32 [rows that sample + scored positions], the tokens whose logits are wanted: first those that give
            rows their next token, then those that give log probabilities of prompt tokens.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    decode_pages: torch.Tensor
    decode_lengths: torch.Tensor
    host_decode_lengths: list[int]
    prefill: list[PrefillChunk]
    sampled: torch.Tensor


def make_forward_batch(
    plan: StepPlan, page_size: int, device: torch.device, extra: Sequence[Array] = ()
) -> tuple[ForwardBatch, list[torch.Tensor]]:
    """Gather a plan's token ids, positions and pages; one copy takes them to the device, and `extra` with them.

    `extra` are int32 and float32 arrays; they come back as tensors of the same shapes.
    """
    rows, decodes = plan.rows, plan.decode_rows
    lengths = np.fromiter((row.length for row in rows), np.int32, len(rows))
    ends = np.cumsum(lengths, dtype=np.int32)
    token_ids = [token for row in rows for token in row.request.token_ids[row.start : row.start + row.length]]
    row_positions = [np.arange(row.start, row.start + row.length, dtype=np.int32) for row in rows]
    row_pages = [_pages_used(row, page_size) for row in rows]
    token_pages = np.concatenate([pages[at // page_size] for pages, at in zip(row_pages, row_positions, strict=True)])
    positions = np.concatenate(row_positions)
    decode_pages = np.zeros((decodes, max((len(pages) for pages in row_pages[:decodes]), default=0)), np.int32)
    for index, pages in enumerate(row_pages[:decodes]):
        decode_pages[index, : len(pages)] = pages
    host_decode_lengths = [row.start + 1 for row in rows[:decodes]]
    columns = [
        np.array(token_ids, np.int32),
        positions,
        token_pages * page_size + positions % page_size,
        decode_pages,
        np.array(host_decode_lengths, np.int32),
        np.concatenate([ends[[row.sample for row in rows]] - 1, *_scored_tokens(rows, ends, decodes)]),
        *row_pages[decodes:],
    ]
    tensors = to_device([*columns, *extra], device)
    chunk_rows = zip(rows[decodes:], ends[decodes:].tolist(), tensors[6 : len(columns)], strict=True)
    batch = ForwardBatch(
        input_ids=tensors[0],
        positions=tensors[1],
        slots=tensors[2].long(),
        decode_pages=tensors[3],
        decode_lengths=tensors[4],
        host_decode_lengths=host_decode_lengths,
        sampled=tensors[5],
        prefill=[PrefillChunk(end - row.length, end, row.start, pages) for row, end, pages in chunk_rows],
    )
    return batch, tensors[len(columns) :]


def _scored_tokens(rows: Sequence[StepRow], ends: Array, decodes: int) -> list[Array]:
    """The step's tokens at the rows' scored positions; decode rows have none."""
    shifts = [end - row.start - row.length for row, end in zip(rows[decodes:], ends[decodes:].tolist(), strict=True)]
    scored = [(scored_positions(row), shift) for row, shift in zip(rows[decodes:], shifts, strict=True)]
    return [np.arange(at.start + shift, at.stop + shift, dtype=np.int32) for at, shift in scored if at]


def _pages_used(row: StepRow, page_size: int) -> Array:
    count = -(-(row.start + row.length) // page_size)
    return np.array(row.request.pages[:count], np.int32)


def to_device(arrays: Sequence[Array], device: torch.device) -> list[torch.Tensor]:
    """Copy int32 and float32 arrays to the device as one block; tensors of their shapes and types.

    Each begins at a multiple of 16 bytes, since Triton compiles a kernel anew for pointers that do not.
    """
    places, end = [], 0
    for array in arrays:
        places.append(end)
        end += -(-array.size // 4) * 4
    block = torch.empty(end, dtype=torch.int32, pin_memory=device.type == "cuda")
    values = block.numpy()
    for place, array in zip(places, arrays, strict=True):
        values[place : place + array.size] = array.reshape(-1).view(np.int32)
    # MPS would read host memory that is gone by then (PyTorch's issue 189690); pinned memory waits for CUDA's copies.
    block = block.to(device, non_blocking=device.type == "cuda")
    return [
        block[place : place + array.size]
        .view(torch.float32 if array.dtype == np.float32 else torch.int32)
        .view(array.shape)
        for place, array in zip(places, arrays, strict=True)
    ]


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in host memory: pinned and still on its way when this returns, if it is on a CUDA device."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return on_host.copy_(tensor, non_blocking=True)
