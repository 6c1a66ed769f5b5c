"""Log probabilities: on every API's wire, streamed and whole, for answers and prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from http_rig import Rig, lines, running
from hypothesis import given
from hypothesis import strategies as st
from logprob_ring import Place, part, send
from wire_client import frames, post, refused

from minisgl.http.logprobs import LEAST, TextOffsets, distinct_text_of, each_token
from minisgl.messages import FinishReason, GenerateRequest

CHAT, TEXT, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"
HELLO = [{"role": "user", "content": "Hello"}]
NAN = math.nan

# "世" takes two tokens; token 2 ends the text.
SHI = "世".encode()
PLACES: list[Place] = [
    ((10, b"Hi", -0.5), [(10, b"Hi", -0.5), (11, b"Yo", -1.5)]),
    ((20, SHI[:2], -1.0), [(21, SHI[:1], -0.75), (20, SHI[:2], -1.0)]),
    ((22, SHI[2:], -0.25), [(22, SHI[2:], -0.25), (23, b"\xff", -math.inf)]),
    ((2, b"<eos>", -2.0), [(30, b"!", -0.125), (2, b"<eos>", -2.0)]),
]
PROMPT: list[Place] = [
    ((5, b"On", NAN), [(0, b"a", NAN), (1, b"b", NAN)]),
    ((6, b"ce", -3.0), [(7, b"ly", -1.0), (8, b"e", -2.0)]),
]


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with running() as rig:
        yield rig


def play(rig: Rig, request: GenerateRequest, prompt: list[Place] | None = None) -> None:
    """ "Hi", then "世" with both of its tokens, then the end, in three rows."""
    send(rig, request, "Hi", PLACES[:1], prompt=prompt or [])
    rig.settle()
    send(rig, request, "世", PLACES[1:3])
    rig.settle()
    send(rig, request, "", PLACES[3:], FinishReason.STOP, matched=2)


def whole(rig: Rig, path: str, body: Any, prompt: list[Place] | None = None) -> tuple[GenerateRequest, Any]:
    connection, (request,) = post(rig, path, body)
    play(rig, request, prompt)
    response = connection.getresponse()
    assert response.status == 200
    return request, json.loads(response.read())


def streamed(rig: Rig, path: str, body: Any, prompt: list[Place] | None = None) -> list[Any]:
    connection, (request,) = post(rig, path, {**body, "stream": True})
    play(rig, request, prompt)
    return frames(connection.getresponse())


# ---- chat -----------------------------------------------------------------------------------------------------------

CHAT_TOKENS = [
    {
        "token": "Hi",
        "logprob": -0.5,
        "bytes": [72, 105],
        "top_logprobs": [
            {"token": "Hi", "logprob": -0.5, "bytes": [72, 105]},
            {"token": "Yo", "logprob": -1.5, "bytes": [89, 111]},
        ],
    },
    {
        "token": "\ufffd",
        "logprob": -1.0,
        "bytes": [228, 184],
        "top_logprobs": [
            {"token": "\ufffd", "logprob": -0.75, "bytes": [228]},
            {"token": "\ufffd", "logprob": -1.0, "bytes": [228, 184]},
        ],
    },
    {
        "token": "\ufffd",
        "logprob": -0.25,
        "bytes": [150],
        "top_logprobs": [
            {"token": "\ufffd", "logprob": -0.25, "bytes": [150]},
            {"token": "\ufffd", "logprob": LEAST, "bytes": [255]},
        ],
    },
    {
        "token": "<eos>",
        "logprob": -2.0,
        "bytes": list(b"<eos>"),
        "top_logprobs": [
            {"token": "!", "logprob": -0.125, "bytes": [33]},
            {"token": "<eos>", "logprob": -2.0, "bytes": list(b"<eos>")},
        ],
    },
]


def test_a_chat_whole(rig: Rig) -> None:
    request, answer = whole(rig, CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 2})
    assert (request.sampling.logprobs, request.sampling.prompt_logprobs_from) == (2, None)
    assert answer["choices"][0]["logprobs"] == {"content": CHAT_TOKENS, "refusal": None}


def test_a_chat_streamed(rig: Rig) -> None:
    chunks = streamed(rig, CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 2})
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"]["role"] == "assistant"
    assert choices[0]["logprobs"] is None
    shown = [choice["logprobs"]["content"] for choice in choices[1:]]
    assert shown == [CHAT_TOKENS[:1], CHAT_TOKENS[1:3], CHAT_TOKENS[3:]]
    assert [choice["delta"] for choice in choices[1:]] == [{"content": "Hi"}, {"content": "世"}, {}]


def test_a_chat_may_ask_for_its_own_tokens_alone(rig: Rig) -> None:
    connection, (request,) = post(rig, CHAT, {"messages": HELLO, "logprobs": True})
    assert request.sampling.logprobs == 0
    send(rig, request, "Hi", [((10, b"Hi", -0.5), [])], FinishReason.LENGTH, prompt=[])
    (token,) = json.loads(connection.getresponse().read())["choices"][0]["logprobs"]["content"]
    assert (token["token"], token["top_logprobs"]) == ("Hi", [])


# ---- completions ----------------------------------------------------------------------------------------------------

COMPLETION = {
    "tokens": ["Hi", "bytes:\\xe4\\xb8", "bytes:\\x96", "<eos>"],
    "token_logprobs": [-0.5, -1.0, -0.25, -2.0],
    "top_logprobs": [
        {"Hi": -0.5, "Yo": -1.5},
        {"bytes:\\xe4": -0.75, "bytes:\\xe4\\xb8": -1.0},
        {"bytes:\\x96": -0.25, "bytes:\\xff": LEAST},
        {"!": -0.125, "<eos>": -2.0},
    ],
    "text_offset": [0, 2, 2, 3],
}
ECHO = {
    "tokens": ["On", "ce"],
    "token_logprobs": [None, -3.0],
    # The token that came is among them even when it is not one of the likeliest.
    "top_logprobs": [None, {"ly": -1.0, "e": -2.0, "ce": -3.0}],
    "text_offset": [0, 2],
}
ECHOED = {
    **{name: ECHO[name] + COMPLETION[name] for name in ("tokens", "token_logprobs", "top_logprobs")},
    "text_offset": [0, 2, 4, 6, 6, 7],
}


def joined(choices: list[Any]) -> dict[str, list[Any]]:
    shown = [choice["logprobs"] for choice in choices if choice["logprobs"] is not None]
    return {name: [value for one in shown for value in one[name]] for name in COMPLETION}


def test_a_completion_whole_and_streamed(rig: Rig) -> None:
    body = {"prompt": "Once", "logprobs": 2}
    request, answer = whole(rig, TEXT, body)
    assert (request.sampling.logprobs, request.sampling.prompt_logprobs_from) == (2, None)
    assert answer["choices"][0]["logprobs"] == COMPLETION
    choices = [chunk["choices"][0] for chunk in streamed(rig, TEXT, body)]
    assert [choice["text"] for choice in choices] == ["Hi", "世", ""]
    assert joined(choices) == COMPLETION


@pytest.mark.parametrize("prompt", ["Once", [5, 6]])
def test_an_echo_begins_with_the_prompt_and_its_own(rig: Rig, prompt: Any) -> None:
    body = {"prompt": prompt, "logprobs": 2, "echo": True}
    request, answer = whole(rig, TEXT, body, PROMPT)
    assert (request.sampling.logprobs, request.sampling.prompt_logprobs_from) == (2, 0)
    assert answer["choices"][0]["text"] == "OnceHi世"
    assert answer["choices"][0]["logprobs"] == ECHOED
    choices = [chunk["choices"][0] for chunk in streamed(rig, TEXT, body, PROMPT)]
    assert [choice["text"] for choice in choices] == ["Once", "Hi", "世", ""]
    assert choices[0]["logprobs"] == ECHO
    assert joined(choices) == ECHOED


@pytest.mark.parametrize("stream", [True, False])
def test_an_echo_of_token_ids_needs_no_logprobs(rig: Rig, stream: bool) -> None:
    body = {"prompt": [[5, 6], [6, 5]], "echo": True, "n": 2, "stream": stream}
    connection, requests = post(rig, TEXT, body, answers=4)
    for request in requests:
        assert (request.sampling.logprobs, request.sampling.prompt_logprobs_from) == (None, 0)
        places = PROMPT if request.prompt == [5, 6] else PROMPT[::-1]
        send(rig, request, "Hi", PLACES[:1], FinishReason.LENGTH, prompt=places)
    response = connection.getresponse()
    chunks = frames(response) if stream else [json.loads(response.read())]
    texts = [""] * 4
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        texts[choice["index"]] += choice["text"]
        assert choice["logprobs"] is None
    assert texts == ["OnceHi", "OnceHi", "ceOnHi", "ceOnHi"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_completion_of_no_token_scores_its_prompt(rig: Rig, stream: bool) -> None:
    body = {"prompt": "Once", "logprobs": 2, "echo": True, "max_tokens": 0, "stop": "O", "stream": stream}
    connection, (request,) = post(
        rig, TEXT, {**body, **({"stream_options": {"include_usage": True}} if stream else {})}
    )
    assert (request.sampling.max_new_tokens, request.sampling.stop) == (1, ())
    send(rig, request, "Hi", PLACES[:1], FinishReason.LENGTH, prompt=PROMPT)
    response = connection.getresponse()
    chunks = frames(response) if stream else [json.loads(response.read())]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert "".join(choice["text"] for choice in choices) == "Once"
    assert joined(choices) == ECHO
    assert choices[-1]["finish_reason"] == "length"
    assert (chunks[-1]["usage"]["prompt_tokens"], chunks[-1]["usage"]["completion_tokens"]) == (2, 0)


# ---- sglang ---------------------------------------------------------------------------------------------------------

OUTPUT = [[-0.5, 10, "Hi"], [-1.0, 20, "\ufffd"], [-0.25, 22, "\ufffd"], [-2.0, 2, "<eos>"]]
OUTPUT_TOP = [
    [[-0.5, 10, "Hi"], [-1.5, 11, "Yo"]],
    [[-0.75, 21, "\ufffd"], [-1.0, 20, "\ufffd"]],
    [[-0.25, 22, "\ufffd"], [LEAST, 23, "\ufffd"]],
    [[-0.125, 30, "!"], [-2.0, 2, "<eos>"]],
]
INPUT = [[None, 5, "On"], [-3.0, 6, "ce"]]
INPUT_TOP = [None, [[-1.0, 7, "ly"], [-2.0, 8, "e"]]]
ASK = {"text": "Once", "return_logprob": True, "return_text_in_logprobs": True, "top_logprobs_num": 2}


def test_sglangs_triples_whole(rig: Rig) -> None:
    request, answer = whole(rig, GENERATE, {**ASK, "logprob_start_len": 0}, PROMPT)
    assert (request.sampling.logprobs, request.sampling.prompt_logprobs_from) == (2, 0)
    meta = answer["meta_info"]
    assert (meta["input_token_logprobs"], meta["input_top_logprobs"]) == (INPUT, INPUT_TOP)
    assert (meta["output_token_logprobs"], meta["output_top_logprobs"]) == (OUTPUT, OUTPUT_TOP)
    assert meta["output_token_logprobs_length"] == 4
    assert answer["output_ids"] == [10, 20, 22, 2]


def test_sglangs_stream_repeats_them(rig: Rig) -> None:
    events = streamed(rig, GENERATE, {**ASK, "logprob_start_len": 0}, PROMPT)
    for event, count in zip(events, (1, 3, 4), strict=True):
        meta = event["meta_info"]
        assert meta["input_token_logprobs"] == INPUT
        assert meta["output_token_logprobs"] == OUTPUT[:count]
        assert meta["output_top_logprobs"] == OUTPUT_TOP[:count]
        assert meta["output_token_logprobs_length"] == meta["completion_tokens"] == count


def test_sglangs_tokens_have_no_text_unless_asked(rig: Rig) -> None:
    request, answer = whole(rig, GENERATE, {"text": "Once", "return_logprob": True})
    assert (request.sampling.logprobs, request.sampling.prompt_logprobs_from) == (0, None)
    meta = answer["meta_info"]
    assert meta["output_token_logprobs"] == [[value, token_id, None] for value, token_id, _ in OUTPUT]
    assert meta["input_token_logprobs"] == []
    assert "output_top_logprobs" not in meta


def test_each_text_of_a_list_has_its_own_wishes(rig: Rig) -> None:
    body = {
        "text": ["a", "b", "c"],
        "return_logprob": [True, False, True],
        "logprob_start_len": [-1, -1, 0],
        "top_logprobs_num": [2, 0, 0],
        "sampling_params": {"max_new_tokens": 0},
    }
    connection, requests = post(rig, GENERATE, body, answers=3)
    asked = [(request.sampling.logprobs, request.sampling.prompt_logprobs_from) for request in requests]
    assert asked == [(2, None), (None, None), (0, 0)]
    for request in requests:
        prompt = [(token, []) for token, _ in PROMPT] if request.prompt == "c" else []
        send(rig, request, "never shown", PLACES[:1], FinishReason.LENGTH, prompt=prompt)
    first, second, third = (answer["meta_info"] for answer in json.loads(connection.getresponse().read()))
    assert (first["output_token_logprobs"], first["output_top_logprobs"]) == ([], [])
    assert "output_token_logprobs" not in second
    assert third["input_token_logprobs"] == [[None, 5, None], [-3.0, 6, None]]
    assert "input_top_logprobs" not in third


# ---- this project's own ---------------------------------------------------------------------------------------------

OWN = [
    {"id": 10, "text": "Hi", "logprob": -0.5, "top": [{"id": 10, "text": "Hi", "logprob": -0.5}]},
    {"id": 2, "text": "<eos>", "logprob": -2.0, "top": [{"id": 30, "text": "!", "logprob": -0.125}]},
]
OWN_PROMPT = [
    {"id": 5, "text": "On", "logprob": None, "top": []},
    {"id": 6, "text": "ce", "logprob": -3.0, "top": [{"id": 7, "text": "ly", "logprob": -1.0}]},
]


@pytest.mark.parametrize("stream", [True, False])
def test_the_own_api(rig: Rig, stream: bool) -> None:
    body = {"prompt": "Once", "logprobs": 1, "prompt_logprobs_from": 0, "stream": stream}
    connection, request = rig.ask(body)
    assert (request.sampling.logprobs, request.sampling.prompt_logprobs_from) == (1, 0)
    ones = [(token, top[:1]) for token, top in PLACES]
    send(rig, request, "Hi", ones[:1], prompt=[(token, top[:1]) for token, top in PROMPT])
    rig.settle()
    send(rig, request, "", ones[3:], FinishReason.STOP, matched=2)
    response = connection.getresponse()
    if stream:
        *deltas, last = lines(response)
        assert deltas == [{"text_delta": "Hi", "logprobs": OWN[:1]}, {"text_delta": "", "logprobs": OWN[1:]}]
    else:
        last = json.loads(response.read())
        assert (last["text"], last["logprobs"]) == ("Hi", OWN)
    assert last["prompt_logprobs"] == OWN_PROMPT


def test_the_own_api_gives_those_of_the_prompt_alone(rig: Rig) -> None:
    connection, request = rig.ask({"prompt": "Once", "prompt_logprobs_from": 1})
    assert (request.sampling.logprobs, request.sampling.prompt_logprobs_from) == (None, 1)
    send(rig, request, "Hi", PLACES[:1], FinishReason.LENGTH, prompt=[(PROMPT[1][0], [])])
    delta, done = lines(connection.getresponse())
    assert delta == {"text_delta": "Hi"}
    assert done["prompt_logprobs"] == [{"id": 6, "text": "ce", "logprob": -3.0, "top": []}]


# ---- what is refused, and what is lost ------------------------------------------------------------------------------

WRONG = [
    (CHAT, {"messages": HELLO, "top_logprobs": 2}, "top_logprobs", "logprobs=true"),
    (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
    (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": -1}, "top_logprobs", "20"),
    (CHAT, {"messages": HELLO, "logprobs": 5}, "logprobs", "true or false"),
    (TEXT, {"prompt": "x", "logprobs": 21}, "logprobs", "20"),
    (TEXT, {"prompt": "x", "logprobs": True}, "logprobs", "integer"),
    (TEXT, {"prompt": "x", "max_tokens": -1}, "max_tokens", "at least"),
    (GENERATE, {"text": "x", "top_logprobs_num": 2}, "top_logprobs_num", "return_logprob"),
    (GENERATE, {"text": "x", "logprob_start_len": 2}, "logprob_start_len", "return_logprob"),
    (GENERATE, {"text": "x", "return_logprob": True, "logprob_start_len": -2}, "logprob_start_len", "-1"),
    (GENERATE, {"input_ids": [1], "return_logprob": True, "logprob_start_len": 2}, "logprob_start_len", "place"),
    (GENERATE, {"text": "x", "return_logprob": True, "top_logprobs_num": 129}, "top_logprobs_num", "128"),
    (GENERATE, {"text": ["x"], "return_logprob": [True, True]}, "return_logprob", "one for each"),
    (GENERATE, {"text": "x", "return_logprob": True, "token_ids_logprob": [1]}, "token_ids_logprob", "not supported"),
    (GENERATE, {"prompt": "x", "logprobs": 129}, "logprobs", "128"),
    (GENERATE, {"prompt": "x", "logprobs": -1}, "logprobs", "between"),
    (GENERATE, {"prompt": "x", "logprobs": 1, "prompt_logprobs_from": -1}, "prompt_logprobs_from", "position"),
]


@pytest.mark.parametrize(("path", "body", "param", "words"), WRONG)
def test_wrong_wishes_are_refused(rig: Rig, path: str, body: Any, param: str, words: str) -> None:
    status, error = refused(rig, path, body)
    assert (status, error["param"]) == (400, param), error
    assert words in error["message"], error


def test_a_replayed_request_shows_its_last_run_alone() -> None:
    with running() as rig:
        connection, request = rig.ask({"prompt": "Once", "logprobs": 0, "prompt_logprobs_from": 0, "stream": False})
        rig.dispatched(request)
        send(rig, request, "lost", PLACES[:1], prompt=PROMPT)
        rig.down("scheduler-0")
        again = rig.from_http(GenerateRequest)
        send(rig, again, "kept", PLACES[3:], FinishReason.STOP, prompt=PROMPT[1:], matched=2)
        answer = json.loads(connection.getresponse().read())
        assert [token["id"] for token in answer["logprobs"]] == [2]
        assert [token["id"] for token in answer["prompt_logprobs"]] == [6]


# ---- the parts ------------------------------------------------------------------------------------------------------


def test_tokens_of_several_parts_follow_each_other() -> None:
    tokens = list(each_token([part(PLACES[:2]), part(PLACES[2:])]))
    assert [token.token_id for token in tokens] == [10, 20, 22, 2]
    assert [[rival.token_id for rival in token.top] for token in tokens] == [[10, 11], [21, 20], [22, 23], [30, 2]]


@given(st.binary(max_size=6), st.binary(max_size=6))
def test_different_bytes_have_different_names(one: bytes, other: bytes) -> None:
    assert (distinct_text_of(one) == distinct_text_of(other)) == (one == other)


@given(st.text(min_size=1), st.lists(st.integers(0, 60)), st.lists(st.integers(0, 60)))
def test_offsets_are_the_characters_before_a_token(text: str, token_cuts: list[int], row_cuts: list[int]) -> None:
    raw = text.encode("utf-8", "replace")
    text = raw.decode()
    borders = sorted({0, len(raw), *(cut for cut in token_cuts if cut < len(raw))})
    pieces = [raw[begin:end] for begin, end in pairwise(borders)]
    expected = [len(raw[:begin].decode("utf-8", "ignore")) for begin in borders[:-1]]
    # A row brings whole tokens, and the characters that are complete by then.
    rows = sorted({0, len(pieces), *(cut for cut in row_cuts if cut < len(pieces))})
    offsets, found, shown = TextOffsets(), [], 0
    for begin, end in pairwise(rows):
        complete = len(b"".join(pieces[:end]).decode("utf-8", "ignore"))
        found += offsets.take(text[shown:complete], pieces[begin:end])
        shown = complete
    assert found == expected


def test_offsets_pass_over_what_is_not_shown() -> None:
    special = b"<tool>"
    assert TextOffsets().take("ab", [b"a", special, b"b", special]) == [0, 1, 1, 2]
    # A stop string holds "c" back, then shows it.
    held = TextOffsets()
    assert held.take("ab", [b"ab", b"c"]) == [0, 2]
    assert held.take("cd", [b"d"]) == [3]
    # Bytes that are no UTF-8 show as U+FFFD.
    assert TextOffsets().take("a\ufffdbc", [b"a", b"\xff", b"bc"]) == [0, 1, 2]
