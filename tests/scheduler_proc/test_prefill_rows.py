"""The prefill steps' inputs, fetched by a kernel; without CUDA in Triton's interpreter."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds; the interpreter needs it too")

from minisgl.sampling_params import SamplingParams  # noqa: E402
from minisgl.scheduler_proc.decode_rows import DecodeRows  # noqa: E402
from minisgl.scheduler_proc.input_block import STAGING_BUFFERS, PulledBlock  # noqa: E402
from minisgl.scheduler_proc.kernels.prefill_attention import PrefillTiles  # noqa: E402
from minisgl.scheduler_proc.prefill_rows import PrefillRows  # noqa: E402
from minisgl.scheduler_proc.request import Request, StepRow  # noqa: E402
from minisgl.scheduler_proc.step_results import StepResults  # noqa: E402

PAGE_SIZE, CONTEXT, PADDING_SLOT = 4, 400, 4000
TOKENS = ("input_ids", "sources", "positions", "slots")


def make_rows() -> PrefillRows:
    results = StepResults(16, DEVICE, pdl=False)
    tiles = PrefillTiles(4, 2, 64, torch.float32, DEVICE)
    paging = (CONTEXT, PAGE_SIZE, PADDING_SLOT)
    return PrefillRows(tiles, *paging, DecodeRows(16, *paging, 2, results, DEVICE), results, DEVICE)


def make_row(random: np.random.Generator, start: int, length: int) -> StepRow:
    token_ids = random.integers(0, 1000, start + length).tolist()
    pages = random.permutation(PADDING_SLOT // PAGE_SIZE)[: -(-(start + length) // PAGE_SIZE)].tolist()
    params = SamplingParams(temperature=0.0)
    request = Request(0, token_ids, len(token_ids), params, 100, frozenset(), [], pages=pages)
    return StepRow(request, start, length, bool(random.integers(2)))


@pytest.mark.parametrize("seed", range(4))
def test_a_graph_reads_what_its_part_of_a_step_is(seed: int) -> None:
    """Whether the host sends one part after another or far ahead, and however much padding there is."""
    random, rows = np.random.default_rng(seed), make_rows()
    for _ in range(6):
        sent = []
        for place in range(random.integers(1, STAGING_BUFFERS + 1)):
            decodes = int(random.integers(3))
            part = [make_row(random, int(random.integers(1, 90)), 1) for _ in range(decodes)]
            part += [make_row(random, int(random.integers(60)), int(random.integers(1, 40))) for _ in range(2)]
            size = (sum(row.length for row in part) + int(random.integers(30)), 8)
            rows.send(part, decodes, place, size)
            sent.append((part, decodes, place, size))
        for part, decodes, place, size in sent:
            rows.begin()
            # Nothing new has come: the same once more.
            if part is sent[-1][0]:
                rows.begin()
            check(rows, part, decodes, place, size)


def check(rows: PrefillRows, part: list[StepRow], decodes: int, place: int, size: tuple[int, int]) -> None:
    found, (expected, output) = rows.inputs(size), rows.loose(part, decodes, place)
    assert rows.output().tolist() == output.tolist() == [0, place]
    tokens, used = size[0], sum(row.length for row in part)
    ids = [row.request.token_ids[row.start : row.start + row.length] for row in part]
    assert expected.input_ids.tolist() == [token_id for of_row in ids for token_id in of_row]
    slots = [
        row.request.pages[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE
        for row in part
        for position in range(row.start, row.start + row.length)
    ]
    assert expected.slots.tolist() == slots
    for name, fill in zip(TOKENS, (0, -1, 0, PADDING_SLOT), strict=True):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist() + [fill] * (tokens - used)
    for name in ("sampled", "tiles", "page_table"):
        here, there = getattr(found, name).tolist(), getattr(expected, name).tolist()
        assert here[: len(there)] == there
    assert set(found.sampled.tolist()[len(expected.sampled) :]) <= {0}


def test_the_host_waits_for_no_idle_device() -> None:
    """Kernels that are launched only to be compiled fetch nothing."""
    block = PulledBlock({"values": 4}, DEVICE)
    for number in range(3 * STAGING_BUFFERS):
        block.open()["values"][:] = number
        block.send(4)
