"""Matrix products of compiled steps against float32, by all instructions that this CPU has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import cpu_instructions

pytest.importorskip("numba", reason="steps are compiled by numba, which is installed on x86 Linux")

from numba import njit

from minisgl.scheduler_proc.cpu import products
from minisgl.scheduler_proc.cpu.instructions import HAVE_NARROW, NAMES
from minisgl.scheduler_proc.cpu.memory import Keeper
from minisgl.scheduler_proc.cpu.narrow import narrow
from minisgl.scheduler_proc.cpu.team import Team, counters
from minisgl.scheduler_proc.cpu.tiled_decoder import make_scratch
from minisgl.scheduler_proc.cpu.tiles import BLOCK, DEPTH, PAIR, pack

NARROW = [name for name in cpu_instructions() if NAMES[name] in HAVE_NARROW]
INSTRUCTIONS = [*((name, False) for name in cpu_instructions()), *((name, True) for name in NARROW)]
"""With what follows: whether the weight is narrow."""
MANY_ROWS = [*range(1, 34), 47, 64, 100]


@njit(nogil=True)  # type: ignore[untyped-decorator]
def multiply(counts: Any, kind: Any, depths: Any, rows: Any, places: Any, columns: Any, scratch: Any) -> None:
    source, matrix, bias, target = places
    products.multiply_rows(counts, 0, 1, kind, source, depths, rows, matrix, columns, bias, target, scratch)


def matrix_of(weight: torch.Tensor, narrowed: bool, keeper: Keeper, halves: int = 1) -> np.ndarray:
    """An entry of Weights.matrices."""
    if not narrowed:
        return np.array([keeper.address(pack(weight, halves)), 0, 0], np.int64)
    found = narrow(weight, halves, Team(1))
    assert found is not None
    return np.array([keeper.address(part) for part in found], np.int64)


def in_tiles(rows: torch.Tensor) -> torch.Tensor:
    """bfloat16 [rows, columns] as the step keeps it; rows are filled up to a multiple of 32 with NaN."""
    count, columns = rows.shape
    filled = torch.full((-(-count // PAIR) * PAIR, columns), float("nan"), dtype=torch.bfloat16)
    filled[:count] = rows
    return filled.view(-1, BLOCK, columns // DEPTH, DEPTH).transpose(1, 2).contiguous()


def out_of_tiles(tiles: torch.Tensor, count: int) -> torch.Tensor:
    return tiles.transpose(1, 2).reshape(-1, tiles.shape[1] * DEPTH)[:count]


def run(
    instructions: str,
    narrowed: bool,
    kind: int,
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: Any,
    target: torch.Tensor,
) -> None:
    keeper = Keeper()
    counts = counters(1)
    halves = 2 if kind == products.ACTIVATE else 1
    matrix = matrix_of(weight, narrowed, keeper, halves)
    places = tuple(keeper.address(value) for value in (in_tiles(rows), matrix, bias, target))
    scratch = make_scratch(0, NAMES[instructions], 64, rows.shape[1], keeper)
    columns = len(weight) // halves
    multiply(keeper.address(counts), kind, rows.shape[1] // DEPTH, len(rows), places, columns, scratch)


@pytest.mark.parametrize("instructions", cpu_instructions())
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 32), (480, 70), (928, 160)])
def test_products_of_any_number_of_rows(inputs: int, outputs: int, instructions: str) -> None:
    """A row is the same to the bit beside any others and with a narrow weight.

    It is as near to float32 as its rounded operands allow.
    """
    seed = torch.seed()
    print(f"seed {seed}")
    weight = torch.randn(outputs, inputs, dtype=torch.bfloat16)
    # Far from all others: patches at the very first place and side by side at the last.
    weight[0, 0], weight[-1, -2:] = 1e-20, 0.0
    rows = torch.randn(max(MANY_ROWS), inputs, dtype=torch.bfloat16)
    bias = torch.randn(outputs)
    expected = rows.double() @ weight.double().T + bias
    alone = torch.empty(1, outputs)
    run(instructions, False, products.STORE, rows[:1], weight, bias, alone)
    for count in MANY_ROWS:
        found = torch.full((count, outputs), float("nan"))
        run(instructions, False, products.STORE, rows[:count], weight, bias, found)
        torch.testing.assert_close(found.double(), expected[:count], rtol=1e-5, atol=1e-6 * inputs)
        assert torch.equal(found[:1], alone)
        if instructions in NARROW:
            from_narrow = torch.full((count, outputs), float("nan"))
            run(instructions, True, products.STORE, rows[:count], weight, bias, from_narrow)
            assert torch.equal(found, from_narrow)


@pytest.mark.parametrize(("instructions", "narrowed"), INSTRUCTIONS)
@pytest.mark.parametrize("count", [1, 9, 40])
def test_what_becomes_of_products(narrowed: bool, count: int, instructions: str) -> None:
    rows, weight = torch.randn(count, 96, dtype=torch.bfloat16), torch.randn(128, 96, dtype=torch.bfloat16)
    bias = torch.randn(128)
    expected = rows.float() @ weight.float().T + bias
    added = torch.randn(count, 128)
    sums = added + expected
    run(instructions, narrowed, products.ADD, rows, weight, bias, added)
    torch.testing.assert_close(added, sums, rtol=1e-4, atol=1e-4)
    gate, up = expected.chunk(2, dim=1)
    activated = in_tiles(torch.zeros(count, 64, dtype=torch.bfloat16))
    run(instructions, narrowed, products.ACTIVATE, rows, weight, bias, activated)
    swiglu = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(out_of_tiles(activated, count).float(), swiglu, rtol=0.01, atol=1e-3)
