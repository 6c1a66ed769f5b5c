"""/v1/chat/completions and /v1/completions: what goes to the ring, and every form of the answer, byte by byte."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from http_rig import Rig, running
from wire_client import frames, post, refused, whole

from minisgl.messages import AbortRequest, FinishReason, GenerateRequest, RequestError

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]
TEXTS = ["Hel", "lo\n", "\u2028", "世界", "👩‍👩‍👧", '"\\', " end"]


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with running() as rig:
        yield rig


# ---- answers --------------------------------------------------------------------------------------------------------


def test_a_chat_answered_whole(rig: Rig) -> None:
    answer = whole(rig, CHAT, {"model": "demo", "messages": HELLO}, [TEXTS])
    assert answer["id"].startswith("chatcmpl-")
    assert (answer["object"], answer["model"]) == ("chat.completion", "demo")
    assert isinstance(answer["created"], int)
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "".join(TEXTS)}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    assert answer["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": len(TEXTS),
        "total_tokens": 7 + len(TEXTS),
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_a_chat_streams_role_then_text_then_one_finish(rig: Rig) -> None:
    connection, (request,) = post(rig, CHAT, {"messages": HELLO, "stream": True})
    for index, text in enumerate(TEXTS):
        rig.delta(request, text, [index], opens=index == 0)
    rig.delta(request, "", [2], FinishReason.STOP, matched=2)
    chunks = frames(connection.getresponse())
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert not any("usage" in chunk for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert [choice["delta"] for choice in choices[1:-1]] == [{"content": text} for text in TEXTS]
    assert choices[-1]["delta"] == {}
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(TEXTS) + 1) + ["stop"]
    # EOS is what ended it: sglang names that token, vLLM does not.
    assert (choices[-1]["matched_stop"], choices[-1]["stop_reason"]) == (2, None)


def test_a_usage_chunk_only_for_those_who_ask(rig: Rig) -> None:
    body = {"messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}
    connection, (request,) = post(rig, CHAT, body)
    rig.answer(request, "a", "b")
    *chunks, last = frames(connection.getresponse())
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 9
    assert {"time_to_first_token_ms", "queue_time_ms"} <= set(last["metrics"])


def test_an_empty_answer_still_has_role_and_finish(rig: Rig) -> None:
    connection, (request,) = post(rig, CHAT, {"messages": HELLO, "stream": True})
    rig.delta(request, "", [2], FinishReason.STOP, opens=True, matched=2)
    role, finish = (chunk["choices"][0] for chunk in frames(connection.getresponse()))
    assert role["delta"]["role"] == "assistant"
    assert (finish["delta"], finish["finish_reason"]) == ({}, "stop")


def test_n_answers_have_an_index_a_role_and_a_finish_each(rig: Rig) -> None:
    body = {"messages": HELLO, "stream": True, "n": 3, "seed": 2**63 - 1, "stream_options": {"include_usage": True}}
    connection, requests = post(rig, CHAT, body, answers=3)
    seeds = [request.sampling.seed for request in requests]
    assert seeds[0] == 2**63 - 1
    assert len(set(seeds)) == 3
    for turn in range(2):
        for index in (1, 0, 2):
            finish = FinishReason.LENGTH if turn else FinishReason.NONE
            rig.delta(requests[index], f"<{index}.{turn}>", [1], finish, opens=not turn)
    *chunks, last = frames(connection.getresponse())
    for index in range(3):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert [choice["delta"] for choice in own] == [
            {"role": "assistant", "content": ""},
            {"content": f"<{index}.0>"},
            {"content": f"<{index}.1>"},
            {},
        ]
        assert [choice["finish_reason"] for choice in own] == [None, None, None, "length"]
    assert last["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 6,
        "total_tokens": 13,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_completions_of_several_prompts(rig: Rig) -> None:
    texts = [["a", "b"], ["c"], ["d"], ["e"]]
    answer = whole(rig, TEXT, {"prompt": ["one", "two"], "n": 2, "echo": True}, texts)
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "oneab"),
        (1, "onec"),
        (2, "twod"),
        (3, "twoe"),
    ]
    # Each prompt counts once, however many answers it gets.
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (14, 5)


def test_completions_of_token_ids(rig: Rig) -> None:
    connection, (one,) = post(rig, TEXT, {"prompt": [5, 6, 7]})
    assert (one.prompt, one.sampling.max_new_tokens, one.sampling.temperature) == ([5, 6, 7], 16, 1.0)
    rig.answer(one, "x")
    assert connection.getresponse().status == 200
    connection, two = post(rig, TEXT, {"prompt": [[5], [6, 7]], "stream": True}, answers=2)
    assert [request.prompt for request in two] == [[5], [6, 7]]
    rig.answer(two[1], "y")
    rig.answer(two[0], "x", "z")
    choices = [chunk["choices"][0] for chunk in frames(connection.getresponse())]
    by_index = {index: [c for c in choices if c["index"] == index] for index in (0, 1)}
    assert ["".join(choice["text"] for choice in own) for own in by_index.values()] == ["xz", "y"]
    assert all([c["finish_reason"] for c in own][-1] == "length" for own in by_index.values())


def test_echo_streams_the_prompt_first(rig: Rig) -> None:
    connection, (request,) = post(rig, TEXT, {"prompt": "Once ", "echo": True, "stream": True})
    rig.answer(request, "upon", " a")
    choices = [chunk["choices"][0] for chunk in frames(connection.getresponse())]
    assert [choice["text"] for choice in choices] == ["Once ", "upon", " a", ""]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "length"]


# ---- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_refusal_by_the_ring_is_a_status_and_ends_the_other_answers(rig: Rig, stream: bool) -> None:
    connection, (one, other) = post(rig, CHAT, {"messages": HELLO, "stream": stream, "n": 2}, answers=2)
    rig.ring.send(RequestError(one.rid, 400, "prompt_too_long", "max_new_tokens is 9: too much"))
    response = connection.getresponse()
    assert response.status == 400
    error = json.loads(response.read())["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["message"] == "This model's maximum context length is 2048 tokens: max_tokens is 9: too much"
    assert rig.from_http(AbortRequest).rid == other.rid
    rig.delta(other, "late", opens=True)
    rig.delta(other, "", [], FinishReason.ABORT)
    rig.stats(streams=0, in_flight=0)


def test_a_failure_in_the_middle_ends_the_stream_with_an_error(rig: Rig) -> None:
    connection, (one, other) = post(rig, CHAT, {"messages": HELLO, "stream": True, "n": 2}, answers=2)
    rig.delta(one, "some text", opens=True)
    rig.ring.send(RequestError(other.rid, 500, "boom", "it broke"))
    *chunks, error = frames(connection.getresponse())
    assert error["error"]["message"] == "it broke"
    assert not any(choice["finish_reason"] for chunk in chunks for choice in chunk["choices"])
    assert rig.from_http(AbortRequest).rid == one.rid
    rig.delta(one, "", [], FinishReason.ABORT)
    rig.stats(streams=0, in_flight=0)


def test_a_client_that_leaves_frees_all_its_answers(rig: Rig) -> None:
    connection, requests = post(rig, CHAT, {"messages": HELLO, "stream": True, "n": 3}, answers=3)
    rig.delta(requests[0], "a", opens=True)
    connection.getresponse().readline()
    connection.close()
    assert {rig.from_http(AbortRequest).rid for _ in requests} == {request.rid for request in requests}
    for request in requests:
        rig.delta(request, "", [], FinishReason.ABORT)
    rig.stats(streams=0, in_flight=0)


def test_an_unseen_answer_is_replayed_beside_one_that_is_seen() -> None:
    with running() as rig:
        connection, (seen, unseen) = post(rig, CHAT, {"messages": HELLO, "stream": True, "n": 2}, answers=2)
        rig.dispatched(seen, replica=0)
        rig.dispatched(unseen, replica=1)
        rig.delta(seen, "a", opens=True)
        response = connection.getresponse()
        response.readline()
        rig.down("scheduler-1")
        again = rig.from_http(GenerateRequest)
        assert (again.prompt, again.sampling) == (unseen.prompt, unseen.sampling)
        rig.answer(again, "b")
        rig.delta(seen, "", [2], FinishReason.STOP, matched=2)
        finishes = [
            json.loads(line.removeprefix(b"data: "))["choices"][0]["finish_reason"]
            for line in response.read().splitlines()
            if line.startswith(b"data: {")
        ]
        assert sorted(filter(None, finishes)) == ["length", "stop"]


# ---- requests -------------------------------------------------------------------------------------------------------


def sampling_of(rig: Rig, path: str, body: Any) -> GenerateRequest:
    connection, (request,) = post(rig, path, body)
    rig.answer(request, "x")
    assert connection.getresponse().status == 200
    return request


def test_every_sampling_field_reaches_the_ring(rig: Rig) -> None:
    body = {
        "messages": HELLO,
        "max_completion_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "seed": -3,
        "stop": ["END", "\n"],
        "stop_token_ids": [4],
        "ignore_eos": True,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "frequency_penalty": 0.5,
        "presence_penalty": -1,
        "repetition_penalty": 1.1,
        "logit_bias": {"5": -100, "999": 2.5},
    }
    sampling = sampling_of(rig, CHAT, body).sampling
    assert (sampling.max_new_tokens, sampling.min_new_tokens, sampling.seed) == (9, 2, -3)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 5, 0.1)
    assert (sampling.stop, sampling.stop_token_ids) == (("END", "\n"), (4,))
    assert (sampling.ignore_eos, sampling.skip_special_tokens, sampling.no_stop_trim) == (True, False, True)
    penalties = (sampling.frequency_penalty, sampling.presence_penalty, sampling.repetition_penalty)
    assert penalties == (0.5, -1, 1.1)
    assert sampling.logit_bias == ((5, -100.0), (999, 2.5))


def test_chat_takes_the_models_own_sampling_and_completions_do_not() -> None:
    with running(sampling_defaults={"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1}) as rig:
        silent = sampling_of(rig, CHAT, {"messages": HELLO}).sampling
        assert silent.repetition_penalty == 1.1
        assert (silent.temperature, silent.top_k, silent.top_p, silent.max_new_tokens) == (0.7, 20, 0.8, None)
        spoken = sampling_of(rig, CHAT, {"messages": HELLO, "temperature": 0, "top_p": None}).sampling
        assert (spoken.temperature, spoken.top_k, spoken.top_p) == (0, 20, 0.8)
        text = sampling_of(rig, TEXT, {"prompt": "x"}).sampling
        assert (text.temperature, text.top_k, text.top_p, text.repetition_penalty) == (1.0, -1, 1.0, 1.0)


def test_messages_reach_the_template_as_they_are(rig: Rig) -> None:
    messages = [
        {"role": "system", "content": "Be brief.", "name": None},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "audio": None, "annotations": []},
        {"role": "tool", "content": "d", "tool_call_id": "call_1"},
    ]
    assert sampling_of(rig, CHAT, {"messages": messages}).prompt == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
        {"role": "assistant", "content": "c"},
        {"role": "tool", "content": "d", "tool_call_id": "call_1"},
    ]


ASKS_FOR_NOTHING = {
    "model": "default",
    "frequency_penalty": 0.0,
    "presence_penalty": 0,
    "repetition_penalty": 1.0,
    "logit_bias": {},
    "best_of": 1,
    "logprobs": None,
    "response_format": {"type": "text"},
    "user": "ann",
    "metadata": {"a": "b"},
    "service_tier": "auto",
    "n": 1,
    "stop": None,
    "seed": None,
    "temperature": None,
    "max_tokens": None,
}


@pytest.mark.parametrize(("path", "prompt"), [(CHAT, {"messages": HELLO}), (TEXT, {"prompt": "x"})])
def test_values_that_ask_for_nothing_are_taken(rig: Rig, path: str, prompt: dict[str, Any]) -> None:
    sampling_of(rig, path, {**prompt, **ASKS_FOR_NOTHING})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("best_of", 2),
        ("reasoning_effort", "high"),
        ("store", True),
        ("chat_template", "{{ 1 }}"),
        ("lora_path", "x"),
        ("cache_salt", "s"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(rig: Rig, field: str, value: Any) -> None:
    status, error = refused(rig, CHAT, {"messages": HELLO, field: value})
    assert (status, error["code"], error["param"]) == (400, "unsupported_field", field)
    assert field in error["message"]


PART = {"type": "text", "text": "x"}
WRONG = [
    # path, body, status, param, what the message names
    (CHAT, {}, 400, "messages", "at least one"),
    (CHAT, {"messages": []}, 400, "messages", "at least one"),
    (CHAT, {"messages": ["hi"]}, 400, "messages", "messages[0]"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages", "messages[0].content"),
    (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, 400, "messages", "role"),
    (CHAT, {"messages": [{"role": "user", "content": "x", "mood": 1}]}, 400, "messages", "mood"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", "text only"),
    (CHAT, {"messages": [{"role": "user", "content": [{**PART, "a": 1}]}]}, 400, "messages", "'a'"),
    (CHAT, {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, 400, "messages", "tool_calls"),
    (CHAT, {"messages": HELLO, "model": "other"}, 404, "model", "demo"),
    (CHAT, {"messages": HELLO, "temprature": 1}, 400, "temprature", "temperature"),
    (CHAT, {"messages": HELLO, "bogus": None}, 400, "bogus", "bogus"),
    (CHAT, {"messages": HELLO, "temperature": -1}, 400, "temperature", "temperature"),
    (CHAT, {"messages": HELLO, "temperature": "hot"}, 400, "temperature", "number"),
    (CHAT, {"messages": HELLO, "max_tokens": 0}, 400, "max_tokens", "max_tokens"),
    (CHAT, {"messages": HELLO, "max_tokens": 3, "max_completion_tokens": 4}, 400, "max_tokens", "differ"),
    (CHAT, {"messages": HELLO, "max_tokens": 3, "min_tokens": 4}, 400, "min_tokens", "max_tokens (3)"),
    (CHAT, {"messages": HELLO, "frequency_penalty": 3}, 400, "frequency_penalty", "between -2 and 2"),
    (CHAT, {"messages": HELLO, "repetition_penalty": True}, 400, "repetition_penalty", "number"),
    (CHAT, {"messages": HELLO, "logit_bias": {"1000": 1}}, 400, "logit_bias", "999"),
    (CHAT, {"messages": HELLO, "logit_bias": {"-1": 1}}, 400, "logit_bias", "token ids"),
    (CHAT, {"messages": HELLO, "logit_bias": {"9" * 5000: 1}}, 400, "logit_bias", "token ids"),
    (CHAT, {"messages": HELLO, "logit_bias": {"5": "x"}}, 400, "logit_bias", "numbers"),
    (CHAT, {"messages": HELLO, "logit_bias": {"5": 101}}, 400, "logit_bias", "100"),
    (CHAT, {"messages": HELLO, "logit_bias": [5]}, 400, "logit_bias", "object"),
    (CHAT, {"messages": HELLO, "n": 0}, 400, "n", "128"),
    (CHAT, {"messages": HELLO, "n": 129}, 400, "n", "128"),
    (CHAT, {"messages": HELLO, "n": 1.0}, 400, "n", "integer"),
    (CHAT, {"messages": HELLO, "stream_options": {"include_usage": True}}, 400, "stream_options", "stream=true"),
    (CHAT, {"messages": HELLO, "stream": True, "stream_options": {"x": True}}, 400, "stream_options", "include_usage"),
    (CHAT, {"messages": HELLO, "rid": ""}, 400, "rid", "empty"),
    (TEXT, {}, 400, "prompt", "prompt"),
    (TEXT, {"prompt": ""}, 400, "prompt", "empty"),
    (TEXT, {"prompt": []}, 400, "prompt", "empty"),
    (TEXT, {"prompt": ["a", ""]}, 400, "prompt", "empty"),
    (TEXT, {"prompt": [[1], []]}, 400, "prompt", "empty"),
    (TEXT, {"prompt": [1, "a"]}, 400, "prompt", "list of"),
    (TEXT, {"prompt": [1000]}, 400, "prompt", "999"),
    (TEXT, {"prompt": [[1], [-1]]}, 400, "prompt", "999"),
    (TEXT, {"prompt": [[True]]}, 400, "prompt", "list of"),
    (TEXT, {"prompt": "x", "suffix": "y"}, 400, "suffix", "suffix"),
    (TEXT, {"prompt": "x", "best_of": 2}, 400, "best_of", "best_of"),
    (TEXT, {"prompt": "x", "messages": HELLO}, 400, "messages", "messages"),
]


@pytest.mark.parametrize(("path", "body", "status", "param", "words"), WRONG)
def test_wrong_bodies_are_refused_with_a_reason(
    rig: Rig, path: str, body: Any, status: int, param: str, words: str
) -> None:
    got, error = refused(rig, path, body)
    assert (got, error["param"]) == (status, param), error
    assert words in error["message"], error


def test_more_answers_than_the_server_ever_takes_are_refused() -> None:
    with running(max_queued_requests=4) as rig:
        status, error = refused(rig, CHAT, {"messages": HELLO, "n": 5})
        assert (status, error["code"]) == (400, "too_many_answers")
        connection, _ = post(rig, CHAT, {"messages": HELLO, "n": 3}, answers=3)
        status, error = refused(rig, CHAT, {"messages": HELLO, "n": 2})
        assert (status, error["code"]) == (503, "queue_full")
        connection.close()


def test_copies_of_a_large_prompt_are_bounded(rig: Rig) -> None:
    status, error = refused(rig, TEXT, {"prompt": "x" * 2**20, "n": 100})
    assert (status, error["param"]) == (400, "n")


# ---- models ---------------------------------------------------------------------------------------------------------


def test_models(rig: Rig) -> None:
    status, listed = rig.get("/v1/models")
    assert (status, listed["object"]) == (200, "list")
    (card,) = listed["data"]
    assert (card["id"], card["root"], card["object"], card["max_model_len"]) == ("demo", "demo", "model", 2048)
    assert rig.get("/v1/models/demo") == (200, card)
    status, answer = rig.get("/v1/models/some/other")
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
