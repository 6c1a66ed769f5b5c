"""Log probabilities, scores of prompts, penalties and grammars on the real stack, by every API."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import pytest
from real_server import RealServer, starting

PROMPT = "Once upon a time, there was"
QUESTION = [{"role": "user", "content": "Hello!"}]
NEW = 8
CLOSE = {"rel": 0.05, "abs": 0.05}
"""bfloat16 gives slightly different values for a prompt at once and for its tokens one by one."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    for server in starting(tmp_path_factory.mktemp("logprobs") / "log"):
        server.wait_ready()
        yield server


def post(server: RealServer, path: str, body: dict[str, Any]) -> Any:
    response = httpx.post(server.url + path, json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def events(server: RealServer, path: str, body: dict[str, Any]) -> list[Any]:
    with httpx.stream("POST", server.url + path, json={**body, "stream": True}, timeout=60) as response:
        assert response.status_code == 200
        *frames, last = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert last == "[DONE]"
    return [json.loads(frame) for frame in frames]


def test_every_api_gives_the_same_values(server: RealServer) -> None:
    own = post(
        server,
        "/generate",
        {"prompt": PROMPT, "max_new_tokens": NEW, "temperature": 0, "logprobs": 2, "stream": False},
    )
    ids, values = own["token_ids"], [token["logprob"] for token in own["logprobs"]]
    assert [token["id"] for token in own["logprobs"]] == ids
    assert len(ids) == NEW
    # Greedy: each token is the likeliest, and no value is above it.
    assert all(
        token["top"][0]["logprob"] == token["logprob"] >= token["top"][1]["logprob"] for token in own["logprobs"]
    )
    completion = {"prompt": PROMPT, "max_tokens": NEW, "temperature": 0, "logprobs": 2}
    shown = post(server, "/v1/completions", completion)["choices"][0]["logprobs"]
    assert shown["token_logprobs"] == values
    chunks = [chunk["choices"][0]["logprobs"] for chunk in events(server, "/v1/completions", completion)]
    joined = {name: [value for chunk in chunks if chunk for value in chunk[name]] for name in shown}
    assert joined == shown
    body = {
        "text": PROMPT,
        "sampling_params": {"max_new_tokens": NEW, "temperature": 0},
        "return_logprob": True,
        "return_text_in_logprobs": True,
    }
    triples = post(server, "/generate", body)["meta_info"]["output_token_logprobs"]
    assert triples == [
        [value, token_id, name] for value, token_id, name in zip(values, ids, shown["tokens"], strict=True)
    ]
    assert events(server, "/generate", body)[-1]["meta_info"]["output_token_logprobs"] == triples


def test_a_prompt_scores_what_its_tokens_were_worth_when_they_were_generated(server: RealServer) -> None:
    completion = {"prompt": PROMPT, "max_tokens": NEW, "temperature": 0, "logprobs": 1, "echo": True}
    choice = post(server, "/v1/completions", completion)["choices"][0]
    text, shown = choice["text"], choice["logprobs"]
    assert text.startswith(PROMPT)
    assert shown["token_logprobs"][0] is None
    assert shown["top_logprobs"][0] is None
    borders = [*shown["text_offset"], len(text)]
    assert [text[begin:end] for begin, end in pairwise(borders)] == shown["tokens"]
    again = post(server, "/v1/completions", {**completion, "prompt": text, "max_tokens": 0})["choices"][0]
    assert again["text"] == text
    assert again["logprobs"]["tokens"] == shown["tokens"]
    for value, before in zip(again["logprobs"]["token_logprobs"][1:], shown["token_logprobs"][1:], strict=True):
        assert value == pytest.approx(before, **CLOSE)


def test_an_echo_of_token_ids_is_their_text(server: RealServer) -> None:
    body = {"text": PROMPT, "sampling_params": {"max_new_tokens": 0}, "return_logprob": True}
    triples = post(server, "/generate", body)["meta_info"]["input_token_logprobs"]
    ids = [token_id for _, token_id, _ in triples]
    answer = post(server, "/v1/completions", {"prompt": [ids, ids[:2]], "max_tokens": 1, "echo": True, "n": 2})
    texts = [choice["text"] for choice in answer["choices"]]
    assert [text.startswith(PROMPT) for text in texts] == [True, True, False, False]
    assert all(text.startswith("Once upon") for text in texts)


def test_choices_are_scored_as_sglangs_frontend_does(server: RealServer) -> None:
    body = {
        "text": [PROMPT + end for end in (" a", " quantum")],
        "sampling_params": {"max_new_tokens": 0, "temperature": 0},
        "return_logprob": True,
        "return_text_in_logprobs": True,
        "logprob_start_len": 3,
    }
    answers = [answer["meta_info"]["input_token_logprobs"] for answer in post(server, "/generate", body)]
    assert all(len(answer[0]) == 3 for answer in answers)
    means = [sum(value for value, _, _ in answer) / len(answer) for answer in answers]
    assert means[0] > means[1]


def test_a_chat_names_all_of_its_tokens(server: RealServer) -> None:
    body = {"messages": QUESTION, "max_tokens": 24, "temperature": 0, "logprobs": True, "top_logprobs": 1}
    whole = post(server, "/v1/chat/completions", body)
    choice = whole["choices"][0]
    tokens = choice["logprobs"]["content"]
    assert len(tokens) == whole["usage"]["completion_tokens"]
    said = b"".join(bytes(token["bytes"]) for token in tokens).decode()
    assert choice["finish_reason"] == "stop"
    assert said.startswith(choice["message"]["content"])
    chunks = [chunk["choices"][0]["logprobs"] for chunk in events(server, "/v1/chat/completions", body)]
    assert [token for chunk in chunks if chunk for token in chunk["content"]] == tokens


def test_a_bias_decides_on_every_api(server: RealServer) -> None:
    bias = {"100": 100}
    chat = {"messages": QUESTION, "max_tokens": 3, "temperature": 0, "logit_bias": bias, "logprobs": True}
    own = {"prompt": "x", "max_new_tokens": 3, "temperature": 0, "logit_bias": bias, "stream": False}
    params = {"max_new_tokens": 3, "temperature": 0, "logit_bias": bias}
    assert post(server, "/generate", own)["token_ids"] == [100] * 3
    assert post(server, "/generate", {"text": "x", "sampling_params": params})["output_ids"] == [100] * 3
    tokens = post(server, "/v1/chat/completions", chat)["choices"][0]["logprobs"]["content"]
    # The values are the model's own, from before the bias.
    assert all(token["logprob"] < math.log(0.5) for token in tokens)
    penalised = {**own, "frequency_penalty": 2, "logit_bias": {"100": 30}, "max_new_tokens": 40}
    assert len(set(post(server, "/generate", penalised)["token_ids"])) > 1


def test_a_choice_by_every_api(server: RealServer) -> None:
    choices = ["red", "blue"]
    own = {"prompt": "x", "grammar": {"choice": choices}, "stream": False}
    assert post(server, "/generate", own)["text"] in choices
    chat = {"messages": QUESTION, "guided_choice": choices}
    assert post(server, "/v1/chat/completions", chat)["choices"][0]["message"]["content"] in choices
    params = {"regex": "(red|blue)"}
    assert post(server, "/generate", {"text": "x", "sampling_params": params})["text"] in choices
    refused = httpx.post(server.url + "/v1/completions", json={"prompt": "x", "guided_regex": "("}, timeout=60)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "guided_regex")
