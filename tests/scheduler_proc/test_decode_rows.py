"""The decode steps' inputs that stay on the device; without CUDA in Triton's interpreter."""

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
from minisgl.scheduler_proc.decode_rows import SPARE_PAGES, DecodeRows  # noqa: E402
from minisgl.scheduler_proc.request import Request, StepRow  # noqa: E402
from minisgl.scheduler_proc.step_results import TURNS, StepResults  # noqa: E402

PAGE_SIZE, CONTEXT, MOST, PADDING_SLOT = 4, 400, 6, 4000


class Rig:
    """DecodeRows whose requests get random tokens, with what a step must find on the device."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.results = StepResults(MOST, DEVICE, pdl=False)
        self.rows = DecodeRows(MOST, CONTEXT, PAGE_SIZE, PADDING_SLOT, 1, self.results, DEVICE)
        self.free = self.random.permutation(PADDING_SLOT // PAGE_SIZE).tolist()
        self.last: set[Request] = set()
        self.sent = 0
        send_all = self.rows._send_all

        def counted(rows: list[StepRow]) -> None:
            self.sent += 1
            send_all(rows)

        self.rows._send_all = counted  # type: ignore[method-assign, assignment]

    def request(self, length: int) -> Request:
        rid = int(self.random.integers(1 << 40))
        token_ids = self.random.integers(0, 1000, length).tolist()
        params = SamplingParams(temperature=0.0)
        pages = [self.free.pop() for _ in range(-(-length // PAGE_SIZE))]
        return Request(rid, token_ids, length, params, 100, frozenset(), [], pages=pages)

    def step(self, requests: list[Request], seen: bool) -> None:
        """Decode the requests' last tokens; `seen` tells whether the host has them already."""
        rows = [StepRow(request, len(request.token_ids) - 1, 1, True) for request in requests]
        for row in rows:
            if row.start == len(row.request.pages) * PAGE_SIZE:
                row.request.pages.append(self.free.pop())
        expected = [row.request.token_ids[-1] for row in rows]
        size = int(self.random.integers(len(rows), MOST + 1))
        hidden = [] if seen else [row for row in rows if row.request in self.last]
        unseen = [row.request.token_ids.pop() for row in hidden]
        self.results.begin_step()
        self.rows.send(rows)
        self.rows.begin(size)
        for row, token in zip(hidden, unseen, strict=True):
            row.request.token_ids.append(token)
        self.last = {row.request for row in rows}
        self.check(rows, expected, size)
        tokens = self.random.integers(0, 1000, size)
        finite = torch.ones(size, dtype=torch.bool, device=DEVICE)
        self.results.publish(torch.from_numpy(tokens).to(DEVICE), finite, self.rows.output())
        self.rows.remember(rows, True)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        chosen = tokens[: len(rows)].tolist()
        assert self.results.of_this_step(len(rows)).tolist() == [chosen, [1] * len(rows)]
        for row, token in zip(rows, chosen, strict=True):
            row.request.token_ids.append(token)

    def check(self, rows: list[StepRow], tokens: list[int], size: int) -> None:
        inputs, count = self.rows.inputs(size), len(rows)
        sources = inputs.sources.tolist()
        last, ids = self.results.last_tokens.tolist(), inputs.input_ids.tolist()
        found = [last[source] if source >= 0 else ids[index] for index, source in enumerate(sources)]
        assert found[:count] == tokens
        assert inputs.positions.tolist() == [row.start for row in rows] + [0] * (size - count)
        assert inputs.lengths.tolist() == [row.start + 1 for row in rows] + [1] * (size - count)
        pages = [row.request.pages for row in rows]
        slots = [
            own[row.start // PAGE_SIZE] * PAGE_SIZE + row.start % PAGE_SIZE
            for own, row in zip(pages, rows, strict=True)
        ]
        assert inputs.slots.tolist() == slots + [PADDING_SLOT] * (size - count)
        stride = int(inputs.table_stride)
        table = inputs.page_table[: count * stride].reshape(count, stride).tolist()
        for own, row, ids in zip(pages, rows, table, strict=True):
            assert ids[: row.start // PAGE_SIZE + 1] == own[: row.start // PAGE_SIZE + 1]


@pytest.mark.parametrize("seed", range(3))
def test_inputs_are_right_whoever_comes_and_goes(seed: int) -> None:
    rig = Rig(seed)
    company = [rig.request(int(length)) for length in rig.random.integers(1, 30, 3)]
    for _ in range(60):
        event = rig.random.random()
        if event < 0.1 and len(company) < MOST:
            company.append(rig.request(int(rig.random.integers(1, 30))))
        elif event < 0.2 and len(company) > 1:
            company.pop(int(rig.random.integers(len(company))))
        elif event < 0.25:
            company.reverse()
        elif event < 0.3:
            # The scheduler lets a request use other pages with the same contents.
            changed = company[int(rig.random.integers(len(company)))]
            changed.pages = [rig.free.pop() for _ in changed.pages]
        rig.step(company, seen=bool(rig.random.random() < 0.3))


def test_rows_that_go_on_are_not_sent_again() -> None:
    rig = Rig(9)
    company = [rig.request(5), rig.request(2)]
    for _ in range(SPARE_PAGES * PAGE_SIZE - 5):
        rig.step(company, seen=False)
    assert rig.sent == 1
    # The table has no room for more pages of the longer one.
    for _ in range(3 * PAGE_SIZE):
        rig.step(company, seen=False)
    assert rig.sent == 2
    # A step of other rows in between: what the last step has chosen is theirs.
    rig.rows.remember([], False)
    rig.step(company, seen=True)
    assert rig.sent == 3


def test_replays_without_the_host_stay_within_their_pages() -> None:
    rig = Rig(3)
    request = rig.request(7)
    rig.step([request], seen=True)
    stride = int(rig.rows.inputs(1).table_stride)
    for _ in range(stride * PAGE_SIZE + 10):
        rig.rows.begin(1)
    inputs = rig.rows.inputs(1)
    assert inputs.positions.tolist() == [stride * PAGE_SIZE - 1]
    assert 0 <= int(rig.rows.output()[0]) < TURNS
