"""POST /generate with sglang's bodies, and sglang's small routes."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from http_rig import Rig, running
from wire_client import frames, post, refused, whole

from minisgl.messages import AbortRequest, FinishReason, GenerateRequest, RequestError

PATH = "/generate"
TEXTS = ["Hel", "lo\n", "\u2028", "世界", "👩‍👩‍👧", '"\\', " end"]


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with running() as rig:
        yield rig


# ---- answers --------------------------------------------------------------------------------------------------------


def test_one_text_is_answered_by_one_object(rig: Rig) -> None:
    answer = whole(rig, PATH, {"text": "Hi", "rid": "my-id"}, [TEXTS])
    assert answer["text"] == "".join(TEXTS)
    assert answer["output_ids"] == list(range(len(TEXTS)))
    meta = answer["meta_info"]
    assert (meta["id"], meta["weight_version"]) == ("my-id", "default")
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (7, len(TEXTS), 2)
    assert meta["finish_reason"] == {"type": "length", "length": len(TEXTS)}
    assert meta["e2e_latency"] > 0
    assert meta["timing"]["hops_us"]


def test_a_stream_repeats_the_text_and_ends_with_the_reason(rig: Rig) -> None:
    connection, (request,) = post(rig, PATH, {"text": "Hi", "stream": True})
    rig.dispatched(request, replica=1)
    for index, text in enumerate(TEXTS):
        rig.delta(request, text, [index], opens=index == 0)
        rig.settle()
    rig.delta(request, "", [2], FinishReason.STOP, matched=2)
    events = frames(connection.getresponse())
    assert [event["text"] for event in events] == [
        *("".join(TEXTS[:count]) for count in range(1, len(TEXTS) + 1)),
        "".join(TEXTS),
    ]
    counts = [*range(1, len(TEXTS) + 1), len(TEXTS) + 1]
    assert [event["meta_info"]["completion_tokens"] for event in events] == counts
    assert [len(event["output_ids"]) for event in events] == counts
    assert events[-1]["output_ids"] == [*range(len(TEXTS)), 2]
    assert all(event["meta_info"]["finish_reason"] is None for event in events[:-1])
    assert events[-1]["meta_info"]["finish_reason"] == {"type": "stop", "matched": 2}
    assert events[-1]["meta_info"]["dp_rank"] == 1
    assert not any("index" in event for event in events)


def test_what_arrives_together_is_one_event(rig: Rig) -> None:
    connection, (request,) = post(rig, PATH, {"text": "Hi", "stream": True})
    pieces = [f"<{index}>" for index in range(3000)]
    assert rig.process.pid is not None
    os.kill(rig.process.pid, signal.SIGSTOP)
    rig.answer(request, *pieces)
    os.kill(rig.process.pid, signal.SIGCONT)
    events = frames(connection.getresponse())
    texts = [event["text"] for event in events]
    assert texts[-1] == "".join(pieces)
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert len(events) < 1500
    assert events[-1]["meta_info"]["completion_tokens"] == 3000


def test_a_client_that_reads_late_gets_what_came_meanwhile_in_one_event(rig: Rig) -> None:
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        client.connect(("127.0.0.1", rig.port))
        body = b'{"text": "Hi", "stream": true}'
        client.sendall(b"POST /generate HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        request = rig.from_http(GenerateRequest)
        rig.delta(request, "first", opens=True)
        pieces = ["first"]
        while rig.stats()["slow_clients"] == 0:
            pieces += ["x" * 50_000] * 5
            for piece in pieces[-5:]:
                rig.delta(request, piece)
        small = [f"<{index}>" for index in range(2000)]
        rig.answer(request, *small)
        rig.stats(streams=0)
        received = bytearray()
        while part := client.recv(2**20):
            received += part
    events = [json.loads(line[6:]) for line in received.split(b"\n") if line.startswith(b"data: {")]
    assert events[-1]["text"] == "".join([*pieces, *small])
    assert events[-1]["meta_info"]["completion_tokens"] == len(events[-1]["output_ids"]) == len(pieces) + 2000
    assert len(events) <= len(pieces) + 1


def test_lists_are_answered_by_lists(rig: Rig) -> None:
    answers = whole(rig, PATH, {"input_ids": [[1], [2, 3]], "rid": ["a", "b"]}, [["x", "y"], ["z"]])
    assert [answer["text"] for answer in answers] == ["xy", "z"]
    assert [answer["meta_info"]["id"] for answer in answers] == ["a", "b"]
    (only,) = whole(rig, PATH, {"text": ["Hi"]}, [["x"]])
    assert only["text"] == "x"


def test_a_list_may_have_its_own_sampling_each_and_n(rig: Rig) -> None:
    params = [{"max_new_tokens": 5, "n": 2, "sampling_seed": 9}, {"temperature": 0}]
    connection, requests = post(rig, PATH, {"text": ["a", "b"], "sampling_params": params, "stream": True}, answers=3)
    assert [request.prompt for request in requests] == ["a", "a", "b"]
    assert [request.sampling.max_new_tokens for request in requests] == [5, 5, 128]
    assert requests[0].sampling.seed == 9 != requests[1].sampling.seed
    assert requests[2].sampling.greedy
    for index in (2, 0, 1):
        rig.answer(requests[index], f"<{index}>", "!")
    events = frames(connection.getresponse())
    for index in range(3):
        own = [event for event in events if event["index"] == index]
        assert own[-1]["text"] == f"<{index}>!"
        assert [event["meta_info"]["finish_reason"] is None for event in own][-1] is False


def test_every_sampling_key_reaches_the_ring(rig: Rig) -> None:
    params = {
        "max_new_tokens": None,
        "min_new_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 2**30,
        "min_p": 0.1,
        "stop": "END",
        "stop_token_ids": [4],
        "ignore_eos": True,
        "skip_special_tokens": False,
        "no_stop_trim": True,
        "sampling_seed": 11,
        "frequency_penalty": 0.5,
        "presence_penalty": -1,
        "repetition_penalty": 1.1,
        "logit_bias": {"7": 3},
    }
    connection, (request,) = post(rig, PATH, {"input_ids": [5, 6], "sampling_params": params})
    sampling = request.sampling
    assert request.prompt == [5, 6]
    assert (sampling.max_new_tokens, sampling.min_new_tokens, sampling.seed) == (None, 3, 11)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 2**30, 0.1)
    assert (sampling.stop, sampling.stop_token_ids) == (("END",), (4,))
    assert (sampling.ignore_eos, sampling.skip_special_tokens, sampling.no_stop_trim) == (True, False, True)
    penalties = (sampling.frequency_penalty, sampling.presence_penalty, sampling.repetition_penalty)
    assert penalties == (0.5, -1, 1.1)
    assert sampling.logit_bias == ((7, 3.0),)
    rig.answer(request, "x")
    assert connection.getresponse().status == 200


@pytest.mark.parametrize("stream", [True, False])
def test_max_new_tokens_0_reads_the_prompt_and_shows_nothing(rig: Rig, stream: bool) -> None:
    body = {"text": "Hi", "sampling_params": {"max_new_tokens": 0, "stop": "x"}, "stream": stream}
    connection, (request,) = post(rig, PATH, body)
    assert (request.sampling.max_new_tokens, request.sampling.stop) == (1, ())
    rig.answer(request, "never shown")
    response = connection.getresponse()
    answer = frames(response)[-1] if stream else json.loads(response.read())
    assert (answer["text"], answer["output_ids"]) == ("", [])
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
    assert (answer["meta_info"]["prompt_tokens"], answer["meta_info"]["completion_tokens"]) == (7, 0)


def test_errors(rig: Rig) -> None:
    connection, (request,) = post(rig, PATH, {"text": "Hi", "stream": True})
    rig.ring.send(RequestError(request.rid, 400, "prompt_too_long", "too long"))
    response = connection.getresponse()
    assert (response.status, json.loads(response.read())["error"]["message"]) == (400, "too long")
    connection, (request,) = post(rig, PATH, {"text": "Hi", "stream": True})
    rig.delta(request, "text", opens=True)
    rig.settle()
    rig.ring.send(RequestError(request.rid, 500, "boom", "it broke"))
    event, error = frames(connection.getresponse())
    assert event["text"] == "text"
    assert error["error"]["message"] == "it broke"


# What sglang's own benchmark and frontend send.
BENCH = {
    "sampling_params": {"temperature": 0.0, "max_new_tokens": 4, "ignore_eos": True},
    "lora_path": None,
    "return_logprob": False,
    "return_routed_experts": False,
    "logprob_start_len": -1,
    "image_data": None,
}
FRONTEND = {
    "sampling_params": {
        "max_new_tokens": 4,
        "min_new_tokens": 0,
        "n": 1,
        "stop": [],
        "stop_token_ids": [],
        "stop_regex": [],
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "ignore_eos": False,
        "regex": None,
        "json_schema": None,
    }
}


@pytest.mark.parametrize("body", [BENCH, FRONTEND])
def test_what_sglangs_clients_send_is_taken(rig: Rig, body: dict[str, Any]) -> None:
    assert whole(rig, PATH, {"text": "Hi", **body}, [["a"]])["text"] == "a"


WRONG = [
    # body, param, what the message names
    ({"text": "x", "prompt": "y"}, None, "not both"),
    ({"text": "x", "messages": []}, None, "not both"),
    ({"text": "x", "input_ids": [1]}, None, "not both"),
    ({"text": None}, None, "neither"),
    ({"text": ""}, "text", "empty"),
    ({"text": []}, "text", "empty"),
    ({"text": ["a", ""]}, "text", "empty"),
    ({"text": 5}, "text", "string"),
    ({"input_ids": []}, "input_ids", "empty"),
    ({"input_ids": [1000]}, "input_ids", "999"),
    ({"input_ids": [[1], [-1]]}, "input_ids", "999"),
    ({"input_ids": [[1], 2]}, "input_ids", "list of"),
    ({"text": "x", "bogus": None}, "bogus", "bogus"),
    ({"text": "x", "lora_path": "a"}, "lora_path", "not supported"),
    ({"text": "x", "image_data": "a"}, "image_data", "not supported"),
    ({"text": "x", "rid": ["a", "b"]}, "rid", "rid"),
    ({"text": "x", "sampling_params": []}, "sampling_params", "one for each"),
    ({"text": "x", "sampling_params": {"seed": 1}}, "seed", "sampling_seed"),
    ({"text": "x", "sampling_params": {"sampling_seed": 2**63}}, "sampling_seed", "64 bits"),
    ({"text": "x", "sampling_params": {"max_new_tokens": -1}}, "max_new_tokens", "at least"),
    ({"text": "x", "sampling_params": {"temperature": -1}}, "temperature", "temperature"),
    ({"text": "x", "sampling_params": {"n": 0}}, "n", "128"),
    ({"text": "x", "sampling_params": {"presence_penalty": -3}}, "presence_penalty", "between"),
    ({"text": "x", "sampling_params": {"logit_bias": {"1000": 1}}}, "logit_bias", "999"),
    ({"text": "x", "sampling_params": {"stop_regex": ["a"]}}, "stop_regex", "not supported"),
]


@pytest.mark.parametrize(("body", "param", "words"), WRONG)
def test_wrong_bodies_are_refused_with_a_reason(rig: Rig, body: Any, param: str | None, words: str) -> None:
    status, error = refused(rig, PATH, body)
    assert (status, error["param"]) == (400, param), error
    assert words in error["message"], error


# ---- aborts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mine", "chatcmpl-mine"])
def test_an_abort_by_name_ends_that_request_alone(rig: Rig, name: str) -> None:
    connection, (mine,) = post(rig, PATH, {"text": "Hi", "rid": "mine"})
    other, (untouched,) = post(rig, PATH, {"text": "Hi", "rid": "other"})
    rig.delta(mine, "so far", [1], opens=True)
    abort = rig.post({"rid": name}, "/abort_request").getresponse()
    assert (abort.status, abort.read()) == (200, b"")
    assert rig.from_http(AbortRequest).rid == mine.rid
    rig.nothing_from_http(0)
    rig.delta(mine, "", [], FinishReason.ABORT)
    answer = json.loads(connection.getresponse().read())
    assert answer["text"] == "so far"
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    rig.answer(untouched, "all")
    assert json.loads(other.getresponse().read())["text"] == "all"


def test_an_abort_of_what_was_never_scheduled_still_answers(rig: Rig) -> None:
    connection, (request,) = post(rig, "/v1/completions", {"prompt": "Hi"})
    assert rig.post({"abort_all": True}, "/abort_request").getresponse().status == 200
    assert rig.from_http(AbortRequest).rid == request.rid
    rig.delta(request, "", [], FinishReason.ABORT)
    answer = json.loads(connection.getresponse().read())
    assert answer["choices"][0]["finish_reason"] == "abort"


def test_an_abort_of_nothing_is_fine_and_one_without_a_name_is_not(rig: Rig) -> None:
    assert rig.post({"rid": "unknown"}, "/abort_request").getresponse().status == 200
    for body in ({}, {"rid": None}, {"rid": ""}, {"rid": 5}, {"abort_all": "yes"}):
        assert refused(rig, "/abort_request", body)[0] == 400


# ---- small routes ---------------------------------------------------------------------------------------------------


def test_server_info_has_settings_and_states_but_no_secrets() -> None:
    with running(api_key="very-secret", max_queued_requests=77) as rig:
        rig.healthy()
        key = {"Authorization": "Bearer very-secret"}

        def info_at(path: str) -> dict[str, Any]:
            connection = http.client.HTTPConnection("127.0.0.1", rig.port, timeout=30)
            connection.request("GET", path, headers=key)
            answer: dict[str, Any] = json.loads(connection.getresponse().read())
            return answer

        patience = time.monotonic() + 20
        while not info_at("/server_info")["internal_states"] and time.monotonic() < patience:
            time.sleep(0.02)
        for path in ("/server_info", "/get_server_info"):
            info = info_at(path)
            assert (info["max_queued_requests"], info["dp_size"], info["served_model_name"]) == (77, 2, "demo")
            assert info["version"]
            assert "very-secret" not in json.dumps(info)
            assert [state["worker"] for state in info["internal_states"]] == ["scheduler-0"]
        assert rig.get("/health_generate")[0] == 200
