"""The rules after a death, each by itself, and then through a real http worker."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from http_rig import Rig, lines, running

from minisgl.http.recovery import (
    MAX_REPLAYS,
    Fate,
    Flight,
    Verdict,
    WorkerLives,
    detokenizer_died,
    scheduler_died,
    tokenizer_died,
)
from minisgl.messages import AbortRequest, FinishReason, GenerateRequest

FRESH = Flight(rid=1)
DISPATCHED = Flight(rid=1, replica=(0, 1))
SHOWN = Flight(rid=1, replica=(0, 1), shown=True)
SHOWN_UNDISPATCHED = Flight(rid=1, shown=True)
WORN_OUT = Flight(rid=1, replica=(0, 1), replays=MAX_REPLAYS)
WORN_OUT_UNDISPATCHED = Flight(rid=1, replays=MAX_REPLAYS)
ABORTING = Flight(rid=1, replica=(0, 1), aborting=True)
ABORTING_UNDISPATCHED = Flight(rid=1, aborting=True)


@pytest.mark.parametrize(
    ("flight", "scheduler", "tokenizer", "detokenizer"),
    [
        (FRESH, None, Verdict(Fate.REPLAY, abort=True), Verdict(Fate.REPLAY, abort=True)),
        (DISPATCHED, Verdict(Fate.REPLAY), Verdict(Fate.KEEP), Verdict(Fate.REPLAY, abort=True)),
        (SHOWN, Verdict(Fate.FAIL), Verdict(Fate.KEEP), Verdict(Fate.FAIL, abort=True)),
        (SHOWN_UNDISPATCHED, None, Verdict(Fate.FAIL, abort=True), Verdict(Fate.FAIL, abort=True)),
        (WORN_OUT, Verdict(Fate.FAIL), Verdict(Fate.KEEP), Verdict(Fate.FAIL, abort=True)),
        (WORN_OUT_UNDISPATCHED, None, Verdict(Fate.FAIL, abort=True), Verdict(Fate.FAIL, abort=True)),
        (ABORTING, Verdict(Fate.FORGET), Verdict(Fate.KEEP, abort=True), Verdict(Fate.FORGET)),
        (ABORTING_UNDISPATCHED, None, Verdict(Fate.FORGET, abort=True), Verdict(Fate.FORGET)),
    ],
)
def test_the_rules(flight: Flight, scheduler: Verdict | None, tokenizer: Verdict, detokenizer: Verdict) -> None:
    """One line of the table: what happens to this request when each kind of worker dies (None: cannot happen)."""
    assert scheduler is None or scheduler_died(flight) == scheduler
    assert tokenizer_died(flight) == tokenizer
    assert detokenizer_died(flight) == detokenizer


def test_only_a_life_that_was_up_can_lose_requests() -> None:
    lives = WorkerLives()
    assert not lives.down("scheduler-0", 1)
    lives.up("scheduler-0", 1)
    assert lives.is_dead("scheduler-0", 1)
    lives.up("scheduler-0", 2)
    assert not lives.is_dead("scheduler-0", 2)
    assert not lives.down("scheduler-0", 1)
    assert lives.down("scheduler-0", 2)
    assert not lives.down("scheduler-0", 2)
    assert lives.is_dead("scheduler-0", 2)
    assert not lives.is_dead("scheduler-1", 1)


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with running() as rig:
        yield rig


def again(rig: Rig, request: GenerateRequest) -> GenerateRequest:
    """The same request under a new id."""
    replay = rig.from_http(GenerateRequest)
    assert replay.rid != request.rid
    assert (replay.prompt, replay.sampling) == (request.prompt, request.sampling)
    return replay


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_without_a_byte_survives_its_scheduler(rig: Rig, stream: bool) -> None:
    before = rig.stats(in_flight=0)
    connection, request = rig.ask({"prompt": "Hi", "stream": stream})
    rig.dispatched(request, replica=0)
    if not stream:
        rig.delta(request, "kept, not shown", [1, 2, 3], opens=True)
    rig.down("scheduler-0")
    replay = again(rig, request)
    rig.dispatched(replay, replica=1)
    rig.answer(request, "from the dead run")
    rig.answer(replay, "a", "b")
    answer = lines(connection.getresponse())
    if stream:
        assert [line.get("text_delta") for line in answer] == ["a", "b", None]
    else:
        assert (answer[0]["text"], answer[0]["token_ids"]) == ("ab", [0, 1])
    assert answer[-1]["usage"]["completion_tokens"] == 2
    rig.up("scheduler-0")
    rig.stats(in_flight=0, streams=0, ok=before["ok"] + 1, replayed=before["replayed"] + 1)


def test_a_shown_request_fails_with_its_scheduler_and_the_other_replica_goes_on(rig: Rig) -> None:
    before = rig.stats(in_flight=0)
    doomed, doomed_request = rig.ask({"prompt": "doomed"})
    safe, safe_request = rig.ask({"prompt": "safe"})
    rig.dispatched(doomed_request, replica=0)
    rig.dispatched(safe_request, replica=1)
    for request in (doomed_request, safe_request):
        rig.delta(request, "a", opens=True)
    response = doomed.getresponse()
    response.readline()
    rig.down("scheduler-0")
    (error,) = lines(response)
    assert (error["event"], error["code"]) == ("error", "worker_lost")
    assert "scheduler-0" in error["message"]
    rig.delta(safe_request, "b", [], FinishReason.LENGTH)
    assert [line.get("text_delta") for line in lines(safe.getresponse())] == ["a", "b", None]
    rig.up("scheduler-0")
    rig.nothing_from_http(0.05)
    rig.stats(in_flight=0, streams=0, failed=before["failed"] + 1, ok=before["ok"] + 1)


def test_replays_are_not_endless(rig: Rig) -> None:
    connection, request = rig.ask({"prompt": "Hi"})
    for replay in range(MAX_REPLAYS + 1):
        rig.dispatched(request)
        rig.down("scheduler-0")
        rig.up("scheduler-0")
        if replay < MAX_REPLAYS:
            request = again(rig, request)
    response = connection.getresponse()
    assert response.status == 503
    assert response.headers["Retry-After"] == "1"
    assert json.loads(response.read())["error"]["code"] == "worker_lost"
    rig.nothing_from_http(0.05)


def test_a_dispatch_to_a_dead_life_counts_as_lost(rig: Rig) -> None:
    connection, request = rig.ask({"prompt": "Hi"})
    dead = rig.epochs["scheduler-0"]
    rig.down("scheduler-0")
    rig.nothing_from_http(0.05)
    rig.dispatched(request, 0, dead)
    replay = again(rig, request)
    rig.up("scheduler-0")
    rig.dispatched(replay, 0)
    rig.answer(replay, "ok")
    assert lines(connection.getresponse())[0] == {"text_delta": "ok"}


def test_an_aborted_request_is_forgotten_with_its_scheduler(rig: Rig) -> None:
    connection, request = rig.ask({"prompt": "Hi"})
    rig.dispatched(request)
    connection.close()
    rig.from_http(AbortRequest)
    rig.stats(aborting=1)
    rig.down("scheduler-0")
    rig.up("scheduler-0")
    rig.stats(aborting=0, streams=0)
    rig.nothing_from_http(0.05)


def test_a_tokenizer_takes_only_undispatched_requests_with_it(rig: Rig) -> None:
    waiting, waiting_request = rig.ask({"prompt": "waiting"})
    running_, running_request = rig.ask({"prompt": "running"})
    left, left_request = rig.ask({"prompt": "left"})
    for request in (running_request, left_request):
        rig.dispatched(request)
    left.close()
    rig.from_http(AbortRequest)
    rig.down("tokenizer-0")
    # While it is down, new requests are taken and wait.
    late = rig.post({"prompt": "late"})
    rig.delta(running_request, "a", [], FinishReason.LENGTH, opens=True)
    assert lines(running_.getresponse())[0] == {"text_delta": "a"}
    old = rig.tokenizers[0]
    rig.start_tokenizer()
    assert not old.wait(50)
    old.close()
    aborts: set[int] = set()
    requests: dict[object, GenerateRequest] = {}
    while len(aborts) < 2 or len(requests) < 2:
        assert rig.tokenizers[0].wait(5000)
        message = rig.tokenizers[0].receive()
        if isinstance(message, AbortRequest):
            aborts.add(message.rid)
        elif isinstance(message, GenerateRequest):
            requests[message.prompt] = message
    # The undispatched one may have been passed on just before the death; the unacknowledged abort is repeated.
    assert aborts == {waiting_request.rid, left_request.rid}
    assert requests["waiting"].rid != waiting_request.rid
    for prompt, connection in (("waiting", waiting), ("late", late)):
        rig.answer(requests[prompt], str(prompt))
        assert lines(connection.getresponse())[0] == {"text_delta": prompt}
    rig.delta(left_request, "", [], FinishReason.ABORT)
    rig.stats(in_flight=0, streams=0)


def test_a_tokenizer_that_keeps_dying_while_it_starts_costs_no_replay(rig: Rig) -> None:
    rig.down("tokenizer-0")
    connection = rig.post({"prompt": "patient"})
    rig.stats(in_flight=1)
    for _ in range(MAX_REPLAYS + 2):
        rig.down("tokenizer-0")
    rig.start_tokenizer()
    request = rig.from_http(GenerateRequest)
    rig.nothing_from_http(0.05)
    rig.answer(request, "ok")
    assert lines(connection.getresponse())[0] == {"text_delta": "ok"}


def test_a_detokenizer_takes_all_its_requests_with_it(rig: Rig) -> None:
    fresh, fresh_request = rig.ask({"prompt": "fresh"})
    shown, shown_request = rig.ask({"prompt": "shown"})
    left, left_request = rig.ask({"prompt": "left"})
    for request in (fresh_request, shown_request, left_request):
        rig.dispatched(request)
    rig.delta(shown_request, "a", opens=True)
    response = shown.getresponse()
    response.readline()
    left.close()
    rig.from_http(AbortRequest)
    rig.down("detokenizer-0")
    assert rig.from_http(AbortRequest).rid == fresh_request.rid
    replay = again(rig, fresh_request)
    assert rig.from_http(AbortRequest).rid == shown_request.rid
    assert lines(response)[0]["code"] == "worker_lost"
    rig.up("detokenizer-0")
    rig.answer(replay, "ok")
    assert lines(fresh.getresponse())[0] == {"text_delta": "ok"}
    rig.stats(in_flight=0, streams=0)


def test_only_the_dead_worker_of_several_loses_requests() -> None:
    with running(tokenizer_workers=2, detokenizer_workers=2) as rig:
        connections = [rig.post({"prompt": str(index)}) for index in range(4)]
        requests = [rig.from_http(GenerateRequest, tokenizer) for tokenizer in (0, 1) for _ in range(2)]
        assert sorted(request.rid % 2 for request in requests) == [0, 0, 1, 1]
        for request in requests:
            rig.dispatched(request, replica=request.rid % 2)
        rig.down("detokenizer-1")
        on_dead = {request.rid: request for request in requests if request.rid % 2 == 1}
        aborted, replayed = set(), []
        for tokenizer in (0, 1):
            while rig.tokenizers[tokenizer].wait(300):
                message = rig.tokenizers[tokenizer].receive()
                if isinstance(message, AbortRequest):
                    aborted.add(message.rid)
                elif isinstance(message, GenerateRequest):
                    replayed.append(message)
        assert aborted == set(on_dead)
        assert {request.prompt for request in replayed} == {request.prompt for request in on_dead.values()}
        rig.up("detokenizer-1")
        for request in [*replayed, *(request for request in requests if request.rid not in on_dead)]:
            rig.answer(request, f"<{request.prompt}>")
        for index, connection in enumerate(connections):
            assert lines(connection.getresponse())[0] == {"text_delta": f"<{index}>"}
