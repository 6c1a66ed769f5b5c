"""POST /generate end to end through a real http worker: what goes to the ring, and every form of the answer."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import pytest
from http_rig import Rig, lines, running

from minisgl.messages import FinishReason, GenerateRequest, RequestError
from minisgl.timeline import HOPS

# Characters at which some client splits lines, wide characters, emoji with joiners, JSON's own, and NUL.
TEXTS = ["Hel", "lo\n", "\u2028\u2029\x85", "世界", "👩‍👩‍👧", '"\\', "\x00\x1c\r\n", " end"]


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with running(max_body_bytes=20_000) as rig:
        yield rig


def test_a_prompt_streams_as_json_lines(rig: Rig) -> None:
    connection, request = rig.ask({"prompt": "Hi", "max_new_tokens": 9, "temperature": 0.5, "stop": "END"})
    assert request.prompt == "Hi"
    assert request.sampling.max_new_tokens == 9
    assert request.sampling.temperature == 0.5
    assert request.sampling.stop == ("END",)
    for index, text in enumerate(TEXTS):
        rig.delta(request, text, [index], opens=index == 0)
    rig.delta(request, "", [2], FinishReason.STOP, matched=2)
    response = connection.getresponse()
    assert response.status == 200
    assert response.headers["Content-Type"] == "application/x-ndjson"
    raw = response.read()
    # str.splitlines knows more line ends than JSON escapes; each must still see one object a line.
    *deltas, done = [json.loads(line) for line in raw.decode().splitlines()]
    assert "".join(delta["text_delta"] for delta in deltas) == "".join(TEXTS)
    assert done["event"] == "done"
    assert done["finish_reason"] == "stop"
    assert done["matched"] == 2
    tokens = len(TEXTS) + 1
    assert done["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": tokens,
        "total_tokens": 7 + tokens,
        "cached_tokens": 2,
    }


def test_every_delta_leaves_at_once(rig: Rig) -> None:
    connection, request = rig.ask({"prompt": "Hi"})
    rig.delta(request, "a", opens=True)
    response = connection.getresponse()
    for text in ("a", "b", "c"):
        assert json.loads(response.readline()) == {"text_delta": text}
        rig.delta(request, chr(ord(text) + 1))
    rig.delta(request, "", [], FinishReason.LENGTH)
    assert lines(response)[-1]["finish_reason"] == "length"


def test_deltas_that_wait_together_are_joined_in_order(rig: Rig) -> None:
    connection, request = rig.ask({"prompt": "Hi"})
    pieces = [f"<{index}>" for index in range(3000)]
    rig.answer(request, *pieces)
    *deltas, done = lines(connection.getresponse())
    assert [delta["text_delta"] for delta in deltas] == pieces
    assert done["usage"]["completion_tokens"] == 3000


def test_server_sent_events(rig: Rig) -> None:
    connection = rig.post({"prompt": "Hi"}, Accept="text/event-stream")
    request = rig.from_http(GenerateRequest)
    rig.answer(request, *TEXTS)
    response = connection.getresponse()
    assert response.headers["Content-Type"].startswith("text/event-stream")
    frames = response.read().decode().split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    *deltas, done = [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]
    assert "".join(delta["text_delta"] for delta in deltas) == "".join(TEXTS)
    assert done["event"] == "done"


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_without_streaming_one_json_object(rig: Rig, accept: str) -> None:
    connection = rig.post({"prompt": "Hi", "stream": False}, Accept=accept)
    request = rig.from_http(GenerateRequest)
    rig.answer(request, *TEXTS)
    response = connection.getresponse()
    answer = json.loads(response.read())
    assert response.headers["Content-Type"] == "application/json"
    assert answer["text"] == "".join(TEXTS)
    assert answer["token_ids"] == list(range(len(TEXTS)))
    assert answer["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == len(TEXTS)
    assert set(answer) == {"text", "token_ids", "finish_reason", "usage", "timing"}


def test_a_stop_string_is_reported(rig: Rig) -> None:
    connection, request = rig.ask({"prompt": "Hi", "stop": ["\n\n", "END"], "stream": False})
    rig.delta(request, "text", [5, 6], FinishReason.STOP, opens=True, matched="END")
    answer = json.loads(connection.getresponse().read())
    assert (answer["finish_reason"], answer["matched"]) == ("stop", "END")


def test_an_answer_without_text(rig: Rig) -> None:
    connection, request = rig.ask({"prompt": "Hi"})
    rig.delta(request, "", [2], FinishReason.STOP, opens=True, matched=2)
    (done,) = lines(connection.getresponse())
    assert done["usage"]["completion_tokens"] == 1
    assert done["timing"]["decode_tokens_per_second"] is None


def test_a_chat_goes_to_the_ring_as_messages(rig: Rig) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "世界"}]
    connection, request = rig.ask({"messages": messages})
    assert request.prompt == messages
    rig.answer(request, "ok")
    assert connection.getresponse().status == 200


def test_token_ids_go_to_the_ring_as_they_are(rig: Rig) -> None:
    connection, request = rig.ask({"prompt": [1, 0, 999], "stop_token_ids": [4], "max_new_tokens": None})
    assert request.prompt == [1, 0, 999]
    assert request.sampling.stop_token_ids == (4,)
    assert request.sampling.max_new_tokens is None
    rig.answer(request, "ok")
    assert connection.getresponse().status == 200


def test_defaults_and_a_drawn_seed(rig: Rig) -> None:
    seeds = set()
    for _ in range(3):
        connection, request = rig.ask({"prompt": "Hi"})
        sampling = request.sampling
        assert (sampling.max_new_tokens, sampling.temperature, sampling.top_k) == (128, 1.0, -1)
        seeds.add(sampling.seed)
        rig.answer(request, "ok")
        connection.getresponse().read()
    assert None not in seeds
    assert len(seeds) == 3
    connection, request = rig.ask({"prompt": "Hi", "seed": -5})
    assert request.sampling.seed == -5
    rig.answer(request, "ok")
    connection.getresponse().read()


@pytest.mark.parametrize("stream", [True, False])
def test_hops_sum_to_the_time_to_first_byte(rig: Rig, stream: bool) -> None:
    began = time.monotonic_ns()
    connection, request = rig.ask({"prompt": "Hi", "stream": stream})
    rig.answer(request, "a", "b")
    response = connection.getresponse()
    measured_us = (time.monotonic_ns() - began) / 1e3
    answer = lines(response)[-1]
    hops, ttfb = answer["timing"]["hops_us"], answer["timing"]["ttfb_us"]
    assert tuple(hops) == HOPS
    assert all(us >= 0 for us in hops.values())
    assert sum(hops.values()) == pytest.approx(ttfb, abs=0.01)
    assert 0 < ttfb < measured_us
    assert answer["timing"]["total_ms"] * 1e3 >= ttfb
    header = dict(part.split(";dur=") for part in response.headers["Server-Timing"].split(", "))
    shown = HOPS if not stream else HOPS[:-1]
    assert {name: float(ms) for name, ms in header.items() if name != "total"} == pytest.approx(
        {name: hops[name] / 1e3 for name in shown}, abs=0.001
    )


def test_the_status_waits_for_the_first_event(rig: Rig) -> None:
    connection, request = rig.ask({"prompt": "Hi"})
    assert connection.sock is not None
    connection.sock.settimeout(0.2)
    with pytest.raises(socket.timeout):
        connection.sock.recv(1)
    connection.sock.settimeout(5)
    rig.ring.send(RequestError(request.rid, 400, "prompt_too_long", "the prompt has 3000 tokens; 2048 fit"))
    response = connection.getresponse()
    assert response.status == 400
    assert json.loads(response.read()) == {
        "error": {
            "message": "the prompt has 3000 tokens; 2048 fit",
            "type": "invalid_request_error",
            "code": "prompt_too_long",
            "param": None,
        }
    }


@pytest.mark.parametrize("status", [-1, 200, 700])
def test_an_error_never_gets_an_impossible_status(rig: Rig, status: int) -> None:
    connection, request = rig.ask({"prompt": "Hi", "stream": False})
    rig.ring.send(RequestError(request.rid, status, "odd", "an odd error"))
    assert connection.getresponse().status == 500


@pytest.mark.parametrize("accept", ["application/x-ndjson", "text/event-stream"])
def test_an_error_after_the_first_byte_is_the_last_event(rig: Rig, accept: str) -> None:
    connection = rig.post({"prompt": "Hi"}, Accept=accept)
    request = rig.from_http(GenerateRequest)
    rig.delta(request, "a", opens=True)
    response = connection.getresponse()
    response.readline()
    rig.ring.send(RequestError(request.rid, 500, "step_failed", "out of memory\u2028 again"))
    rest = [line.removeprefix("data: ") for line in response.read().decode().splitlines() if line]
    if accept == "text/event-stream":
        assert rest.pop() == "[DONE]"
    assert [json.loads(line) for line in rest] == [
        {"event": "error", "code": "step_failed", "message": "out of memory\u2028 again"}
    ]


def test_request_ids(rig: Rig) -> None:
    for given, kept in (("abc-1.2:3_x", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("é", False)):
        for body in ({"prompt": ""}, {"prompt": "Hi"}):
            connection = rig.post(body, **{"X-Request-Id": given})
            if body["prompt"]:
                rig.answer(rig.from_http(GenerateRequest), "ok")
            response = connection.getresponse()
            response.read()
            seen = response.headers.get_all("X-Request-Id")
            assert seen is not None
            assert len(seen) == 1
            assert (seen[0] == given) is kept
            assert len(seen[0]) == 32 or kept


def test_one_connection_carries_many_requests(rig: Rig) -> None:
    connection = rig.post({"prompt": "0"})
    sock = connection.sock
    for index in range(5):
        if index:
            connection.request("POST", "/generate", json.dumps({"prompt": str(index)}))
        request = rig.from_http(GenerateRequest)
        rig.answer(request, str(request.prompt), "!")
        assert [line.get("text_delta") for line in lines(connection.getresponse())] == [str(index), "!", None]
        assert connection.sock is sock


def test_unknown_late_and_doubled_rows_are_ignored(rig: Rig) -> None:
    connection, request = rig.ask({"prompt": "Hi"})
    stranger = GenerateRequest(request.rid + 1, "", request.sampling, list(request.stamps))
    before = rig.stats()["late_rows"]
    rig.delta(stranger, "not for you", opens=True)
    rig.delta(request, "a", opens=True)
    rig.delta(request, "b", [], FinishReason.LENGTH)
    rig.delta(request, "late", [], FinishReason.STOP)
    rig.ring.send(RequestError(request.rid, 500, "late", "late"))
    *deltas, done = lines(connection.getresponse())
    assert [delta["text_delta"] for delta in deltas] == ["a", "b"]
    assert done["finish_reason"] == "length"
    rig.stats(late_rows=before + 3)
