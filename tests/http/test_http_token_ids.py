"""What a stream says when asked: token ids of its pieces, absolute stamps, the times of its steps."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
from http_rig import Rig, lines, running

from minisgl.messages import DeltaBatch, FinishReason
from minisgl.timeline import HOPS


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with running() as rig:
        yield rig


def test_every_token_is_named_once_even_without_text(rig: Rig) -> None:
    connection, request = rig.ask({"prompt": "Hi", "return_token_ids": True})
    rig.delta(request, "a", [1], opens=True)
    rig.delta(request, "é", [2, 3])
    rig.delta(request, "", [4], FinishReason.STOP, matched=4)
    *deltas, done = lines(connection.getresponse())
    assert deltas == [
        {"text_delta": "a", "token_ids": [1]},
        {"text_delta": "é", "token_ids": [2, 3]},
        {"text_delta": "", "token_ids": [4]},
    ]
    assert done["usage"]["completion_tokens"] == 4


def test_text_that_took_no_token_is_not_lost(rig: Rig) -> None:
    connection, request = rig.ask({"prompt": "Hi", "return_token_ids": True})
    rig.delta(request, "a", [1], opens=True)
    rig.delta(request, "tail", [], FinishReason.LENGTH)
    assert [line.get("text_delta") for line in lines(connection.getresponse())] == ["a", "tail", None]


def test_without_being_asked_no_id_is_sent_and_no_empty_piece(rig: Rig) -> None:
    connection, request = rig.ask({"prompt": "Hi"})
    rig.delta(request, "a", [1], opens=True)
    rig.delta(request, "", [4], FinishReason.STOP, matched=4)
    assert lines(connection.getresponse())[:-1] == [{"text_delta": "a"}]


def test_stamps_are_the_borders_of_the_hops(rig: Rig) -> None:
    connection, request = rig.ask({"prompt": "Hi"})
    rig.delta(request, "a", [1], opens=True)
    rig.delta(request, "", [4], FinishReason.STOP, matched=4)
    timing = lines(connection.getresponse())[-1]["timing"]
    stamps = timing["stamps_ns"]
    assert [(after - before) / 1000 for before, after in pairwise(stamps)] == list(timing["hops_us"].values())
    assert len(stamps) == len(HOPS) + 1


def test_steps_are_reported_to_those_who_ask(rig: Rig) -> None:
    asked, request = rig.ask({"prompt": "Hi", "return_steps": True})
    rig.ring.send(DeltaBatch([request.rid], ["a"], [1], [1], [FinishReason.NONE], steps_ns=[10, 20]))
    rig.ring.send(DeltaBatch([request.rid], ["b"], [2], [2, 3], [FinishReason.LENGTH], steps_ns=[20, 35, 35, 50]))
    assert lines(asked.getresponse())[-1]["timing"]["steps_ns"] == [10, 20, 20, 35, 35, 50]
    unasked, request = rig.ask({"prompt": "Hi"})
    rig.ring.send(DeltaBatch([request.rid], ["a"], [1], [1], [FinishReason.LENGTH], steps_ns=[10, 20]))
    assert "steps_ns" not in lines(unasked.getresponse())[-1]["timing"]
