"""Paged attention with nothing but torch: gathers a row's pages, then calls scaled_dot_product_attention.

Runs on CPU, CUDA and MPS. Decode rows of like length are computed together, their query heads folded onto the key
heads; each prefill chunk is computed by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minisgl.scheduler_proc.attention.backend import AttentionSpec
from minisgl.scheduler_proc.attention.kv_pool import KVPool
from minisgl.scheduler_proc.models.forward_batch import ForwardBatch, PrefillChunk

FEW_QUERIES = 64
"""Chunks up to which a CPU spends more on each head's keys than on its queries, so that heads are folded, too."""


class TorchSdpaAttention:
    """The backend; keeps the pool, and a buffer for gathered pages that grows to the largest use."""

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool
        self._gathered = torch.empty(0, dtype=pool.layers[0].dtype, device=pool.layers[0].device)

    def begin_step(self, batch: ForwardBatch) -> TorchSdpaStep:
        return TorchSdpaStep(self, batch)

    def gather(self, layer: int, pages: torch.Tensor) -> torch.Tensor:
        """A copy of pages (int32 [...]) of a layer: [..., page_size, 2, heads, head_dim], valid until the next call."""
        by_page = self.pool.layers[layer].view(self.pool.num_pages, -1)
        count = pages.numel() * by_page.shape[1]
        if self._gathered.numel() < count:
            self._gathered = self._gathered.new_empty(count)
        target = self._gathered[:count].view(-1, by_page.shape[1])
        torch.index_select(by_page, 0, pages.reshape(-1), out=target)
        return target.view(*pages.shape, self.pool.page_size, *self.pool.layers[layer].shape[1:])


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Decode rows of like length: `rows` of the step (None: all), pages [rows, pages], lengths [rows], the longest."""

    rows: torch.Tensor | None
    pages: torch.Tensor
    lengths: torch.Tensor
    longest: int


class TorchSdpaStep:
    """Attention of one step. Masks depend on the window alone, so layers share them."""

    def __init__(self, backend: TorchSdpaAttention, batch: ForwardBatch) -> None:
        self._backend = backend
        self._batch = batch
        self._groups = _group_decode_rows(batch, backend.pool.page_size)
        self._decode_masks: dict[tuple[int, int | None], torch.Tensor | None] = {}
        self._prefill_masks: dict[tuple[int, int | None], torch.Tensor] = {}

    def attend(self, layer: int, query: torch.Tensor, key_value: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
        self._backend.pool.store(layer, self._batch.slots, key_value)
        if len(self._groups) == 1 and not self._batch.prefill:
            return self._decode(0, self._groups[0], layer, query, spec)
        output = torch.empty_like(query)
        for index, group in enumerate(self._groups):
            if group.rows is None:
                rows = slice(0, len(group.lengths))
                output[rows] = self._decode(index, group, layer, query[rows], spec)
            else:
                output[group.rows] = self._decode(index, group, layer, query[group.rows], spec)
        for index, chunk in enumerate(self._batch.prefill):
            tokens = slice(chunk.begin, chunk.end)
            output[tokens] = self._prefill(index, chunk, layer, query[tokens], key_value[tokens], spec)
        return output

    def _decode(
        self, index: int, group: _DecodeGroup, layer: int, query: torch.Tensor, spec: AttentionSpec
    ) -> torch.Tensor:
        rows, heads, head_dim = query.shape
        pages = self._backend.gather(layer, group.pages).flatten(1, 2)[:, : group.longest]
        key, value = pages[:, :, 0].transpose(1, 2), pages[:, :, 1].transpose(1, 2)
        # Heads that share a key head become its queries, so nothing is copied per query head.
        folded = query.view(rows, key.shape[1], -1, head_dim)
        if (index, spec.window) not in self._decode_masks:
            self._decode_masks[index, spec.window] = _decode_mask(group, spec.window, query.dtype)
        mask = self._decode_masks[index, spec.window]
        if spec.softcap is not None or spec.sinks is not None:
            attended = _plain_attention(folded, key, value, mask, spec)
        else:
            attended = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=spec.scale)
        return attended.reshape(rows, heads, head_dim)

    def _prefill(
        self,
        index: int,
        chunk: PrefillChunk,
        layer: int,
        query: torch.Tensor,
        key_value: torch.Tensor,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        count, _, head_dim = query.shape
        length = chunk.start + count
        if chunk.start:
            key_value = self._backend.gather(layer, chunk.pages).flatten(0, 1)[:length]
        key, value = key_value[:, 0].transpose(0, 1)[None], key_value[:, 1].transpose(0, 1)[None]
        by_head = query.transpose(0, 1)[None]
        window = spec.window if spec.window is not None and spec.window < length else None
        if spec.softcap is not None or spec.sinks is not None:
            folded = by_head.reshape(1, key.shape[1], -1, head_dim)
            group_mask = self._prefill_mask(index, chunk, window, query).repeat(folded.shape[2] // count, 1)
            attended = _plain_attention(folded, key, value, group_mask, spec)
            return attended.view(-1, count, head_dim).transpose(0, 1)
        mask: torch.Tensor | None = None
        if window is None and chunk.start and query.is_cuda:
            mask = _lower_right_mask(count, length)
        elif window is not None or chunk.start:
            mask = self._prefill_mask(index, chunk, window, query)
        if mask is not None and query.device.type == "cpu" and count <= FEW_QUERIES:
            folded = by_head.reshape(1, key.shape[1], -1, head_dim)
            group_mask = mask.repeat(folded.shape[2] // count, 1)
            attended = F.scaled_dot_product_attention(folded, key, value, attn_mask=group_mask, scale=spec.scale)
            return attended.view(-1, count, head_dim).transpose(0, 1)
        shares_heads = query.device.type == "cpu" or (query.is_cuda and window is None)
        if not shares_heads:
            # Here the kernels that know shared key heads are slow with a mask, or missing.
            shared_by = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(shared_by, 1), value.repeat_interleave(shared_by, 1)
        attended = F.scaled_dot_product_attention(
            by_head, key, value, attn_mask=mask, is_causal=mask is None, scale=spec.scale, enable_gqa=shares_heads
        )
        return attended[0].transpose(0, 1)

    def _prefill_mask(self, index: int, chunk: PrefillChunk, window: int | None, query: torch.Tensor) -> torch.Tensor:
        """What to add to the scores of a chunk's queries: [count, start + count], 0 or -inf."""
        if (index, window) not in self._prefill_masks:
            length = chunk.start + len(query)
            at = torch.arange(chunk.start, length, device=query.device)[:, None]
            seen = torch.arange(length, device=query.device)
            hidden = seen > at
            if window is not None:
                hidden |= seen <= at - window
            mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
            self._prefill_masks[index, window] = mask.masked_fill_(hidden, float("-inf"))
        return self._prefill_masks[index, window]


def _group_decode_rows(batch: ForwardBatch, page_size: int) -> list[_DecodeGroup]:
    """Split the decode rows so that none is padded to more than twice its pages."""
    lengths = batch.host_decode_lengths
    members: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        members.setdefault((-(-length // page_size) - 1).bit_length(), []).append(row)
    if len(members) == 1:
        return [_DecodeGroup(None, batch.decode_pages, batch.decode_lengths, max(lengths))]
    groups = []
    for rows in members.values():
        longest = max(lengths[row] for row in rows)
        index = torch.tensor(rows, device=batch.decode_pages.device)
        pages = batch.decode_pages[index, : -(-longest // page_size)]
        groups.append(_DecodeGroup(index, pages, batch.decode_lengths[index], longest))
    return groups


def _decode_mask(group: _DecodeGroup, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
    """What to add to the scores of a group: [rows, 1, 1, longest], 0 or -inf; None when all is seen."""
    if len(group.lengths) == 1 and (window is None or window >= group.longest):
        return None
    seen = torch.arange(group.longest, device=group.lengths.device)
    hidden = seen >= group.lengths[:, None]
    if window is not None:
        hidden |= seen < group.lengths[:, None] - window
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return mask.masked_fill_(hidden, float("-inf"))[:, None, None, :]


def _lower_right_mask(queries: int, length: int) -> torch.Tensor:
    """The causal mask of the last `queries` positions of `length`, the only mask that CUDA's flash kernel takes."""
    # Not at the top: this imports torch's compiler, which takes seconds.
    from torch.nn.attention.bias import causal_lower_right

    return causal_lower_right(queries, length)


def _plain_attention(
    folded: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, spec: AttentionSpec
) -> torch.Tensor:
    """Attention written out, for what no fused kernel knows: softcap and sinks.

    `folded` is [rows, kv heads, queries per kv head, head_dim], where the query heads that share a key head follow each
    other; `mask` is added to the scores [rows, kv heads, queries per kv head, length].
    """
    scores = torch.matmul(folded, key.transpose(2, 3)).float() * spec.scale
    if spec.softcap is not None:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    if mask is not None:
        scores = scores + mask
    if spec.sinks is None:
        return torch.matmul(torch.softmax(scores, dim=-1).to(value.dtype), value)
    kv_heads, queries = folded.shape[1:3]
    sinks = spec.sinks.float().view(kv_heads, -1, 1)
    sinks = sinks.expand(-1, -1, queries // sinks.shape[1]).reshape(1, kv_heads, queries, 1)
    with_sink = torch.cat((scores, sinks.expand(len(scores), -1, -1, 1)), dim=-1)
    return torch.matmul(torch.softmax(with_sink, dim=-1)[..., :-1].to(value.dtype), value)
