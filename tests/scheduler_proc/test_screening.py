"""A head of bytes that rules columns out: its bounds hold for all kinds of numbers, and what they leave is right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_cpu_products import INSTRUCTIONS, in_tiles, matrix_of
from tiny_models import cpu_instructions

pytest.importorskip("numba", reason="steps are compiled by numba, which is installed on x86 Linux")

from numba import njit

from minisgl.scheduler_proc.cpu import screening
from minisgl.scheduler_proc.cpu.instructions import NAMES
from minisgl.scheduler_proc.cpu.memory import Batch, Buffers, Keeper, Shape
from minisgl.scheduler_proc.cpu.products import LARGEST_BYTES, choose_tokens
from minisgl.scheduler_proc.cpu.team import counters
from minisgl.scheduler_proc.cpu.tiled_decoder import make_scratch
from minisgl.scheduler_proc.cpu.tiles import BLOCK, PAIR, aligned_zeros


def only(kind: Any, **fields: int) -> Any:
    """What a step reads, with nothing but these fields."""
    return kind(**{**dict.fromkeys(kind._fields, 0), **fields})


@njit(nogil=True)  # type: ignore[untyped-decorator]
def choose(
    counts: Any, shape: Any, batch: Any, source: Any, head: Any, screen: Any, buffers: Any, scratch: Any
) -> None:
    rows = batch.sampled_tokens
    screening.split_rows(counts, 0, rows, shape.hidden, source, buffers)
    screening.bound_logits(counts, 1, 1, shape, rows, screen, buffers, scratch)
    screening.multiply_the_rest(counts, 2, 1, shape, rows, source, head, buffers, scratch)
    choose_tokens(counts, 3, 1, batch, buffers)


class Screened:
    """The likeliest tokens of rows, with all that has led to them."""

    def __init__(self, instructions: str, rows: torch.Tensor, head: torch.Tensor, narrowed: bool = False) -> None:
        keeper = Keeper()
        count, hidden = rows.shape
        pairs = -(-len(head) // PAIR)
        screen, self.taken = screening.make_screen(head, keeper)
        counts = counters(4)
        self.highs, self.lows = np.zeros((pairs, count), np.int32), np.zeros((count, BLOCK), np.float32)
        self.computed, self.likeliest = np.zeros(1, np.int64), np.zeros((2, count), np.int64)
        buffers = only(
            Buffers,
            digits=keeper.address(aligned_zeros(2 * -(-count // BLOCK) * BLOCK * (hidden + 32), np.uint8)),
            facts=keeper.address(np.zeros((count, screening.FACTS), np.float32)),
            highs=keeper.address(self.highs),
            lows=keeper.address(self.lows),
            thresholds=keeper.address(np.zeros(count, np.int32)),
            computed=keeper.address(self.computed),
            largest=keeper.address(np.zeros(count * LARGEST_BYTES, np.uint8)),
            largest_bytes=0,
            likeliest=keeper.address(self.likeliest),
        )
        choose(
            keeper.address(counts),
            only(Shape, hidden=hidden, vocab=len(head)),
            only(Batch, sampled_tokens=count),
            keeper.address(in_tiles(rows)),
            keeper.address(matrix_of(head, narrowed, keeper)),
            screen,
            buffers,
            make_scratch(0, NAMES[instructions], 64, hidden, keeper),
        )
        self._keeper = keeper


def floats(ordered: np.ndarray) -> torch.Tensor:
    """The float32 that `screening.ordered` has made whole numbers of."""
    bits = np.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).astype(np.int32)
    return torch.from_numpy(bits.view(np.float32).astype(np.float64))


def make(kind: str, count: int, columns: int) -> torch.Tensor:
    """Vectors [count, columns], bfloat16."""
    values = torch.randn(count, columns)
    if kind == "outliers":
        values[:, :: max(columns // 3, 1)] *= 300
    elif kind == "heavy":
        values = values / torch.randn(count, columns).abs().clamp(min=1e-3)
    elif kind == "sizes":
        values *= 10 ** torch.empty(count, 1).uniform_(-12, 6)
    elif kind == "few":
        values *= torch.rand(count, columns) < 0.05
    elif kind == "positive":
        values = values.abs() + 5
    return values.bfloat16()


KINDS = ("plain", "outliers", "heavy", "sizes", "few", "positive")


@pytest.mark.parametrize("instructions", cpu_instructions())
@pytest.mark.parametrize("rows_kind", KINDS)
@pytest.mark.parametrize("head_kind", KINDS)
def test_logits_lie_between_their_bounds(head_kind: str, rows_kind: str, instructions: str) -> None:
    torch.manual_seed(seed := torch.seed() % 2**31)
    print(f"seed {seed}")
    for count, hidden, vocab in ((1, 64, 32), (5, 96, 300), (16, 928, 333), (17, 160, 1000), (32, 512, 700)):
        rows, head = make(rows_kind, count, hidden), make(head_kind, vocab, hidden)
        rows[0] *= 0 if count == 17 else 1
        exact = rows.double() @ head.double().T
        found = Screened(instructions, rows, head)
        padded = torch.nn.functional.pad(exact, (0, -vocab % PAIR), value=-torch.inf)
        of_pairs = padded.view(count, -1, PAIR).amax(dim=2)
        assert (of_pairs <= floats(found.highs).T).all()
        assert (torch.from_numpy(found.lows).double() <= exact.amax(dim=1, keepdim=True)).all()
        tokens, finite = torch.from_numpy(found.likeliest)
        assert finite.all()
        # Nothing is likelier but by the rounding of a sum in float32.
        size = rows.double().norm(dim=1) * head.double().norm(dim=1).amax()
        assert (exact.gather(1, tokens[:, None])[:, 0] >= exact.amax(dim=1) - 1e-5 * size).all()


@pytest.mark.parametrize(("instructions", "narrowed"), INSTRUCTIONS)
def test_most_columns_are_ruled_out(narrowed: bool, instructions: str) -> None:
    torch.manual_seed(1)
    rows, head = make("plain", 4, 896), make("plain", 6400, 896)
    found = Screened(instructions, rows, head, narrowed)
    assert 1 <= found.computed[0] < 20
    assert 6400 * 896 < found.taken < 6400 * 896 * 1.03
    logits = rows.float() @ head.float().T
    assert found.likeliest[0].tolist() == logits.argmax(dim=1).tolist()


@pytest.mark.parametrize("instructions", cpu_instructions())
def test_bounds_are_no_wider_than_they_must_be(instructions: str) -> None:
    """For rows that are as far off as can be: along a column's rounding error, and with values that lose all digits."""
    torch.manual_seed(3)
    head = make("plain", PAIR, 896)
    scale = head[0].float().abs().amax() / 127
    error = head[0].float() - (head[0].float() / scale).round() * scale
    # What is left of the column where the error is taken out: their product is the error's alone.
    along = (error * 1e4).bfloat16()[None]
    exact = (along.double() @ head.double().T).amax()
    highest = floats(Screened(instructions, along, head).highs).amax()
    assert exact <= highest
    off = along.double().norm() * error.double().norm()
    of_bytes = along.double()[0] @ (head[0].double() - error.double())
    assert abs(exact - of_bytes) > 0.99 * off, "the product is as far off as it can be"
    others = Screened(instructions, along, torch.cat((head[:1], torch.zeros(PAIR - 1, 896, dtype=torch.bfloat16))))
    assert of_bytes + 0.99 * off < floats(others.highs)[0, 0] < of_bytes + 1.02 * off

    level = torch.zeros(PAIR, 896, dtype=torch.bfloat16)
    level[0] = 3.0
    row = torch.full((1, 896), 0.49 / 32767).bfloat16()
    row[0, 0] = 1.0
    exact = (row.double() @ level.double().T).amax()
    highest = floats(Screened(instructions, row, level).highs)[0, 0]
    # Its last digits are worth 0.040; rounding may be worth 0.010.
    assert exact <= highest < exact + 0.013


@pytest.mark.parametrize("instructions", cpu_instructions())
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_ruled_out(number: float, instructions: str) -> None:
    torch.manual_seed(2)
    rows, head = make("plain", 3, 128), make("plain", 400, 128)
    head[77, 5] = number
    rows[:, 5] = 2.0
    assert Screened(instructions, rows, head).likeliest.tolist() == [[77] * 3, [0] * 3]
    head[77] = 0.0
    rows[1, 9] = float("nan")
    found = Screened(instructions, rows, head)
    assert found.likeliest[1].tolist() == [1, 0, 1]
    assert found.computed[0] == -(-400 // PAIR)
    head[77, 5] = -float("inf")
    rows[1, 9] = 0.0
    assert Screened(instructions, rows, head).likeliest[1].tolist() == [1] * 3
