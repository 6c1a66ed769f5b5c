"""Weights in twelve bits: every bit comes back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("numba", reason="steps are compiled by numba, which is installed on x86 Linux")

from numba import njit

from minisgl.scheduler_proc.cpu.memory import get_long
from minisgl.scheduler_proc.cpu.narrow import MOST_PATCHES, NARROW_BYTES, Narrow, narrow, put_patches, widen
from minisgl.scheduler_proc.cpu.team import Team
from minisgl.scheduler_proc.cpu.tiles import DEPTH, PAIR, TILE_BYTES, aligned_zeros, pack


@njit(nogil=True)  # type: ignore[untyped-decorator]
def widen_all(data: Any, facts: Any, patches: Any, pairs: Any, depths: Any, target: Any) -> None:
    for pair in range(pairs):
        fact = get_long(facts, pair)
        patch = patches + 8 * (fact >> 8)
        for depth in range(depths):
            number = pair * depths + depth
            widen(data + number * NARROW_BYTES, fact & 0xFF, target + number * 2 * TILE_BYTES)
            patch = put_patches(patch, depth, target + number * 2 * TILE_BYTES)


def widened(narrowed: Narrow, packed: torch.Tensor) -> torch.Tensor:
    pairs, depths = packed.shape[0], packed[0].numel() // (DEPTH * PAIR)
    target = aligned_zeros(packed.nbytes, np.uint8)
    widen_all(*(part.ctypes.data for part in narrowed), pairs, depths, target.ctypes.data)
    return torch.from_numpy(target).view(torch.int16).view(packed.shape)


def check(weight: torch.Tensor, halves: int = 1, threads: int = 2) -> Narrow:
    """Make a weight narrow, and compare every bit with that of the packed weight."""
    packed = pack(weight, halves)
    narrowed = narrow(weight, halves, Team(threads))
    assert narrowed is not None
    assert torch.equal(widened(narrowed, packed), packed.view(torch.int16))
    return narrowed


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("outputs", "inputs"), [(32, 32), (96, 64), (70, 480), (320, 896), (64, 4864)])
def test_every_bit_comes_back(outputs: int, inputs: int, threads: int) -> None:
    weight = torch.randn(outputs, inputs).bfloat16() * 0.02
    narrowed = check(weight, 2 if outputs % 32 == 0 else 1, threads)
    packed = pack(weight)
    assert 0.75 * packed.nbytes <= narrowed.nbytes < 0.76 * packed.nbytes + 1000


def test_a_weight_may_be_a_view() -> None:
    check(torch.randn(64, 96).bfloat16().T)
    check(torch.randn(64, 96).bfloat16()[:, 32:])


def test_every_bfloat16_there_is_comes_back() -> None:
    """Each among enough ordinary weights, so that the matrix is worth it."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    weight = torch.randn(2**13, 2**12).bfloat16()
    weight.flatten()[:: weight.numel() // len(every)] = every
    narrowed = check(weight)
    assert len(narrowed.patches) - len(narrowed.pairs) >= 240 / 256 * len(every)


@pytest.mark.parametrize("lowest", [0, 1, 100, 240])
def test_sixteen_neighbouring_exponents_need_no_patch(lowest: int) -> None:
    exponents = torch.randint(lowest, lowest + 16, (64, 128))
    signs_and_mantissas = torch.randint(0, 2, (64, 128)) * 2**15 + torch.randint(0, 2**7, (64, 128))
    bits = (signs_and_mantissas + exponents * 2**7).to(torch.uint16)
    narrowed = check(bits.view(torch.bfloat16))
    assert len(narrowed.patches) == len(narrowed.pairs), "nothing but the marks of each pair's end"


def test_patches_at_the_edges_of_depths_and_pairs() -> None:
    weight = torch.full((96, 32 * 40), 1.5).bfloat16()
    # The corners of the first and the last depth of each pair, and of depths next to each other.
    rows, columns = [0, 0, 0, 31, 31, 32, 63, 64, 95, 95], [0, 31, 32, 63, 1279, 0, 1279, 0, 1278, 1279]
    weight.view(torch.int16)[rows, columns] = torch.arange(len(rows), dtype=torch.int16)
    assert len(check(weight).patches) == len(rows) + 3


@pytest.mark.parametrize("share", [0.5, 2])
def test_a_matrix_with_many_other_exponents_stays_as_it_is(share: float) -> None:
    weight = torch.full((64, 1024), 1.0).bfloat16()
    zeros = torch.randperm(weight.numel())[: int(share * MOST_PATCHES * weight.numel())]
    weight.flatten()[zeros] = 0.0
    assert (narrow(weight, 1, Team(1)) is None) == (share > 1)
