"""Attention of a token that depends on its own past alone, to the bit: for --enable-deterministic-inference.

Every position belongs to one tile of 32, and a tile is always computed in the same shape: 32 queries, against all
positions up to its end. Whichever of its positions a step has, in whatever company, each stands at its own place in its
tile, so it goes through the same instructions. The rest of the tile is padding that nobody reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minisgl.scheduler_proc.attention.backend import AttentionSpec
from minisgl.scheduler_proc.attention.kv_pool import KVPool
from minisgl.scheduler_proc.attention.torch_sdpa import TorchSdpaAttention
from minisgl.scheduler_proc.models.forward_batch import ForwardBatch

TILE = 32


class FixedTileAttention:
    """The backend; decode rows and prompt chunks are one and the same to it."""

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool
        # Only for its buffer of gathered pages.
        self._gatherer = TorchSdpaAttention(pool)

    def begin_step(self, batch: ForwardBatch) -> FixedTileStep:
        return FixedTileStep(self, batch)

    def gather(self, layer: int, pages: torch.Tensor, length: int) -> torch.Tensor:
        """Keys and values [tiles, length, 2, heads, head_dim] of each tile's pages (int32 [tiles, pages])."""
        return self._gatherer.gather(layer, pages).flatten(1, 2)[:, :length]


@dataclass(frozen=True, slots=True)
class _Tile:
    """Tokens first .. first + count - 1 of a step, at positions start and up inside tile number `index`."""

    index: int
    first: int
    start: int
    count: int
    pages: torch.Tensor


@dataclass(frozen=True, slots=True)
class _TileGroup:
    """Tiles of one number, computed together: their shapes are the same, and each has its own place in the batch.

    Attributes:
        length: positions that the tiles see.
        tokens: int64 [tokens], the step's tokens that the group computes.
        places: int64 [tokens], each token's row in the group's queries [tiles * TILE].
        pages: int32 [tiles, pages], padded with page 0.
    """

    length: int
    tokens: torch.Tensor
    places: torch.Tensor
    pages: torch.Tensor


class FixedTileStep:
    """Attention of one step."""

    def __init__(self, backend: FixedTileAttention, batch: ForwardBatch) -> None:
        self._backend = backend
        self._batch = batch
        by_index: dict[int, list[_Tile]] = {}
        for tile in _tiles(batch):
            by_index.setdefault(tile.index, []).append(tile)
        self._groups = [_group(tiles, backend.pool.page_size) for tiles in by_index.values()]
        self._masks: dict[tuple[int, int | None], torch.Tensor] = {}

    def attend(self, layer: int, query: torch.Tensor, key_value: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
        self._backend.pool.store(layer, self._batch.slots, key_value)
        output = torch.empty_like(query)
        heads, head_dim = query.shape[1:]
        for group in self._groups:
            tiles = len(group.pages)
            queries = query.new_zeros(tiles * TILE, heads, head_dim)
            queries[group.places] = query[group.tokens]
            past = self._backend.gather(layer, group.pages, group.length)
            attended = F.scaled_dot_product_attention(
                queries.view(tiles, TILE, heads, head_dim).transpose(1, 2),
                past[:, :, 0].transpose(1, 2),
                past[:, :, 1].transpose(1, 2),
                attn_mask=self._mask(group.length, spec.window, query),
                scale=spec.scale,
                enable_gqa=True,
            )
            output[group.tokens] = attended.transpose(1, 2).reshape(tiles * TILE, heads, head_dim)[group.places]
        return output

    def _mask(self, length: int, window: int | None, query: torch.Tensor) -> torch.Tensor:
        """What to add to the scores of a tile's queries: [TILE, length], 0 or -inf."""
        if (length, window) not in self._masks:
            at = torch.arange(length - TILE, length, device=query.device)[:, None]
            seen = torch.arange(length, device=query.device)
            hidden = seen > at
            if window is not None:
                hidden |= seen <= at - window
            mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
            self._masks[length, window] = mask.masked_fill_(hidden, float("-inf"))
        return self._masks[length, window]


def _tiles(batch: ForwardBatch) -> Iterator[_Tile]:
    """Cut every row of a step at the tiles' borders."""
    for row, length in enumerate(batch.host_decode_lengths):
        index, start = divmod(length - 1, TILE)
        yield _Tile(index, row, start, 1, batch.decode_pages[row])
    for chunk in batch.prefill:
        token, position = chunk.begin, chunk.start
        while token < chunk.end:
            index, start = divmod(position, TILE)
            count = min(TILE - start, chunk.end - token)
            yield _Tile(index, token, start, count, chunk.pages)
            token, position = token + count, position + count


def _group(tiles: list[_Tile], page_size: int) -> _TileGroup:
    device = tiles[0].pages.device
    length = (tiles[0].index + 1) * TILE
    tokens = [token for tile in tiles for token in range(tile.first, tile.first + tile.count)]
    places = [
        number * TILE + place
        for number, tile in enumerate(tiles)
        for place in range(tile.start, tile.start + tile.count)
    ]
    # The tile's end may lie beyond the pages that a request has so far.
    count = -(-length // page_size)
    pages = [F.pad(tile.pages[:count], (0, max(0, count - len(tile.pages)))) for tile in tiles]
    return _TileGroup(
        length, torch.tensor(tokens, device=device), torch.tensor(places, device=device), torch.stack(pages)
    )
