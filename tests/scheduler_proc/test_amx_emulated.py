"""The products on AMX tiles with the tiles played by numpy, so that they are tested on CPUs that have none."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("numba", reason="steps are compiled by numba, which is installed on x86 Linux")

from numba import njit

from minisgl.scheduler_proc.cpu import amx
from minisgl.scheduler_proc.cpu.narrow import narrow, put_patches, widen
from minisgl.scheduler_proc.cpu.team import Team
from minisgl.scheduler_proc.cpu.tiles import (
    BLOCK,
    BLOCKS_AT_ONCE,
    BYTES_DEPTH,
    DEPTH,
    PAIR,
    TILE_BYTES,
    aligned_zeros,
    pack,
    pack_bytes,
)

SUMS, ROWS, COLUMNS = range(4), (4, 5), (6, 7)


class Tiles:
    """Eight tiles, which refuse what the instructions refuse (see amx.py for the manual)."""

    def __init__(self) -> None:
        self.data = np.zeros((8, 16, 64), np.uint8)
        self.rows, self.row_bytes = [0] * 8, [0] * 8

    def configure(self, shapes: np.ndarray) -> None:
        assert shapes.shape == (64,) and shapes[0] == 1
        self.data[:] = 0
        self.rows, self.row_bytes = shapes[48:56].tolist(), shapes[16:32].view(np.uint16).tolist()

    def zero(self, tile: int) -> Callable[[], None]:
        return lambda: self.data[tile].fill(0)

    def load(self, tile: int) -> Callable[[int, int], None]:
        def load(address: int, stride: int) -> None:
            self.data[tile] = 0
            for row in range(self.rows[tile]):
                ctypes.memmove(self.data[tile, row].ctypes.data, address + row * stride, self.row_bytes[tile])

        return load

    def store(self, tile: int) -> Callable[[int, int], None]:
        def store(address: int, stride: int) -> None:
            for row in range(self.rows[tile]):
                ctypes.memmove(address + row * stride, self.data[tile, row].ctypes.data, self.row_bytes[tile])

        return store

    def multiply(self, c: int, a: int, b: int) -> Callable[[], None]:
        return lambda: self._add(c, np.float32, a, self._halves(a), b, self._halves(b))

    def multiply_bytes(self, c: int, a: int, b: int) -> Callable[[], None]:
        def multiply() -> None:
            left, right = self.data[a].reshape(16, 16, 4), self.data[b].view(np.int8).reshape(16, 16, 4)
            self._add(c, np.int32, a, left.astype(np.int32), b, right.astype(np.int32))

        return multiply

    def _add(self, c: int, kind: type[np.generic], a: int, left: np.ndarray, b: int, right: np.ndarray) -> None:
        assert self.row_bytes[c] == self.row_bytes[b] and self.rows[c] == self.rows[a]
        assert self.row_bytes[a] // 4 == self.rows[b]
        products = np.einsum("mkp,knp->mn", left[:, : self.rows[b]], right[: self.rows[b]])
        self.data[c].view(kind)[: self.rows[c]] += products[: self.rows[c]]

    def _halves(self, tile: int) -> np.ndarray:
        """A tile's pairs of bfloat16, float32 [16, 16, 2]."""
        bits = self.data[tile].view(np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(16, 16, 2)


@njit  # type: ignore[untyped-decorator]
def compiled_widen(source: Any, lowest: Any, target: Any) -> None:
    widen(source, lowest, target)


@njit  # type: ignore[untyped-decorator]
def compiled_put_patches(patch: Any, depth: Any, target: Any) -> Any:
    return put_patches(patch, depth, target)


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> Tiles:
    tiles = Tiles()
    for tile in SUMS:
        monkeypatch.setattr(amx, f"zero_{tile}", tiles.zero(tile))
        monkeypatch.setattr(amx, f"store_{tile}", tiles.store(tile))
        monkeypatch.setattr(amx, f"score_{tile}", tiles.multiply(tile, 4, 6))
        monkeypatch.setattr(amx, f"sum_{tile}", tiles.multiply(tile, 5, 7))
    for tile, name in ((4, "keys"), (5, "values"), (6, "queries"), (7, "weights")):
        monkeypatch.setattr(amx, f"load_{tile}", tiles.load(tile))
        monkeypatch.setattr(amx, f"load_{name}", tiles.load(tile))
    for c, a, b in ((0, 4, 6), (1, 4, 7), (2, 5, 6), (3, 5, 7)):
        monkeypatch.setattr(amx, f"multiply_{c}{a}{b}", tiles.multiply(c, a, b))
        monkeypatch.setattr(amx, f"bytes_{c}{a}{b}", tiles.multiply_bytes(c, a, b))
    for name in ("prefetch", "prefetch_far"):
        monkeypatch.setattr(amx, name, lambda address: None)
    for name in ("zero", "load", "multiply", "store"):
        monkeypatch.setattr(amx, f"_{name}", uncompiled(getattr(amx, f"_{name}")))
    monkeypatch.setattr(amx, "widen", compiled_widen)
    monkeypatch.setattr(amx, "put_patches", compiled_put_patches)
    monkeypatch.setattr(amx, "get_long", lambda address, index: ctypes.c_int64.from_address(address + 8 * index).value)
    return tiles


def uncompiled(function: Any) -> Callable[..., None]:
    """What numba was given: it calls the tiles that the test has put in place."""
    return function.py_func  # type: ignore[no-any-return]


@pytest.mark.parametrize("count", range(1, PAIR + 1))
def test_products_of_rows_with_a_pair_of_blocks(count: int, tiles: Tiles) -> None:
    depths = 3
    weight = torch.randn(PAIR, depths * DEPTH, dtype=torch.bfloat16)
    rows = torch.randn(PAIR, depths * DEPTH, dtype=torch.bfloat16)
    in_tiles = rows.view(-1, BLOCK, depths, DEPTH).transpose(1, 2).contiguous()
    packed = pack(weight)
    sums = torch.full((PAIR, PAIR), float("nan"))
    tiles.configure(amx.shapes_of_rows(count))
    place = packed.data_ptr()
    for part in range(3):
        arguments = (False, place, place, packed.nbytes, part, depths, in_tiles.data_ptr(), count, sums.data_ptr())
        uncompiled(amx.multiply)(*arguments)
        torch.testing.assert_close(sums[:count], rows[:count].float() @ weight.float().T, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("count", range(1, PAIR + 1))
@pytest.mark.parametrize("keep", [False, True])
def test_products_of_rows_with_a_narrow_pair(keep: bool, count: int, tiles: Tiles) -> None:
    """Of more depths than the ring has, the last ones with patches."""
    depths = amx.RING + 3
    weight = torch.randn(PAIR, depths * DEPTH, dtype=torch.bfloat16)
    weight[3, -3:] = torch.tensor([0.0, 1e-30, 1e30])
    rows = torch.randn(PAIR, depths * DEPTH, dtype=torch.bfloat16)
    rows[:, -1] = 0.0
    in_tiles = rows.view(-1, BLOCK, depths, DEPTH).transpose(1, 2).contiguous()
    packed = pack(weight)
    narrowed = narrow(weight, 1, Team(1))
    assert narrowed is not None
    fact = int(narrowed.pairs[0])
    wide = aligned_zeros((depths if keep else amx.RING) * 2 * TILE_BYTES, np.uint8)
    sums = torch.full((PAIR, PAIR), float("nan"))
    tiles.configure(amx.shapes_of_rows(count))
    places = narrowed.data.ctypes.data, fact & 0xFF, narrowed.patches.ctypes.data + 8 * (fact >> 8)
    arguments = (*places, keep, depths, in_tiles.data_ptr(), count, sums.data_ptr(), wide.ctypes.data)
    uncompiled(amx.multiply_narrow)(*arguments)
    torch.testing.assert_close(sums[:count], rows[:count].float() @ weight.float().T, rtol=1e-5, atol=1e-3)
    if keep:
        assert wide.tobytes() == packed.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("count", range(2, PAIR + 1, 2))
def test_products_of_bytes_with_a_pair_of_blocks(count: int, tiles: Tiles) -> None:
    depths = 2
    weight = torch.randint(-127, 128, (PAIR, depths * BYTES_DEPTH), dtype=torch.int8)
    rows = torch.randint(0, 256, (PAIR, depths * BYTES_DEPTH), dtype=torch.uint8)
    in_tiles = rows.view(-1, BLOCK, depths, BYTES_DEPTH).transpose(1, 2).contiguous()
    packed = pack_bytes(weight)
    sums = torch.full((PAIR, PAIR), -1, dtype=torch.int32)
    tiles.configure(amx.shapes_of_rows(count))
    place = packed.data_ptr()
    uncompiled(amx.multiply)(True, place, place, 0, 0, depths, in_tiles.data_ptr(), count, sums.data_ptr())
    assert torch.equal(sums[:count].long(), rows[:count].long() @ weight.long().T)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_scores_and_sums_of_values(head_dim: int, tiles: Tiles) -> None:
    blocks = 3
    keys = torch.randn(blocks, BLOCK, head_dim, dtype=torch.bfloat16)
    values = torch.randn(blocks, BLOCK, head_dim, dtype=torch.bfloat16)
    queries, others = torch.randn(2, BLOCK, head_dim, dtype=torch.bfloat16)
    pool = torch.cat(
        (
            keys.view(blocks, BLOCK, -1, DEPTH).transpose(1, 2).reshape(blocks, -1),
            values.transpose(1, 2).reshape(blocks, -1),
        ),
        dim=1,
    ).contiguous()
    places = [pool.data_ptr() + index * pool.stride(0) * 2 for index in range(blocks)]
    places += places[-1:] * (-blocks % BLOCKS_AT_ONCE)
    addresses = np.array(places, np.int64)
    query_tile, other_tile = (
        rows.view(BLOCK, head_dim // 2, 2).transpose(0, 1).contiguous() for rows in (queries, others)
    )
    scores, one, other = torch.empty(3, len(places) * BLOCK, BLOCK)
    tiles.configure(amx.ATTENTION_SHAPES)
    segment = (addresses.ctypes.data, blocks, head_dim // DEPTH)
    uncompiled(amx.score)(*segment, query_tile.data_ptr(), scores.data_ptr())
    uncompiled(amx.score_two)(*segment, query_tile.data_ptr(), other_tile.data_ptr(), one.data_ptr(), other.data_ptr())
    for found, rows in ((scores, queries), (one, queries), (other, others)):
        expected = keys.reshape(-1, head_dim).float() @ rows.float().T
        torch.testing.assert_close(found[: blocks * BLOCK], expected, rtol=1e-5, atol=1e-3)

    weights, other_weights = torch.rand(2, blocks * BLOCK, BLOCK).bfloat16()
    in_pairs, others_in_pairs = (
        rows.view(-1, 2, BLOCK).transpose(1, 2).contiguous() for rows in (weights, other_weights)
    )
    offset = BLOCK * head_dim * 2
    for columns in (32, 64):
        sums = torch.empty(columns, BLOCK)
        uncompiled(amx.sum_values)(addresses.ctypes.data, blocks, offset, columns, in_pairs.data_ptr(), sums.data_ptr())
        expected = values.reshape(-1, head_dim)[:, :columns].float().T @ weights.float()
        torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-3)
    both = torch.empty(2, 32, BLOCK)
    uncompiled(amx.sum_values_two)(
        addresses.ctypes.data,
        blocks,
        offset,
        in_pairs.data_ptr(),
        others_in_pairs.data_ptr(),
        both[0].data_ptr(),
        both[1].data_ptr(),
    )
    for found, rows in zip(both, (weights, other_weights), strict=True):
        expected = values.reshape(-1, head_dim)[:, :32].float().T @ rows.float()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)
