"""The real stack through every API: one question, one text, whatever wire it comes by."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from real_server import RealServer, starting

QUESTION = [{"role": "user", "content": "Tell me a short story."}]
TOKENS = 24


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    for server in starting(tmp_path_factory.mktemp("apis") / "log"):
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


def test_a_text_is_continued_alike_by_every_api(server: RealServer) -> None:
    own = post(server, "/generate", {"prompt": "Once", "max_new_tokens": TOKENS, "temperature": 0, "stream": False})
    completion = {"prompt": "Once", "max_tokens": TOKENS, "temperature": 0}
    sglang = {"text": "Once", "sampling_params": {"max_new_tokens": TOKENS, "temperature": 0}}
    whole = post(server, "/v1/completions", completion)
    assert whole["choices"][0]["text"] == own["text"]
    assert whole["usage"]["completion_tokens"] == own["usage"]["completion_tokens"]
    chunks = events(server, "/v1/completions", completion)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == own["text"]
    answer = post(server, "/generate", sglang)
    assert (answer["text"], answer["output_ids"]) == (own["text"], own["token_ids"])
    *_, last = events(server, "/generate", sglang)
    assert (last["text"], last["output_ids"]) == (own["text"], own["token_ids"])
    assert last["meta_info"]["completion_tokens"] == len(own["token_ids"])


def test_a_chat_is_answered_alike_whole_and_in_chunks(server: RealServer) -> None:
    own = post(server, "/generate", {"messages": QUESTION, "max_new_tokens": TOKENS, "temperature": 0, "stream": False})
    body = {"messages": QUESTION, "max_tokens": TOKENS, "temperature": 0, "n": 2}
    whole = post(server, "/v1/chat/completions", body)
    assert [choice["message"]["content"] for choice in whole["choices"]] == [own["text"]] * 2
    chunks = events(server, "/v1/chat/completions", body)
    for index in range(2):
        deltas = [c["choices"][0]["delta"] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(delta.get("content", "") for delta in deltas) == own["text"]


def test_samples_differ_and_a_seed_repeats_them(server: RealServer) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 16, "temperature": 1.5, "n": 4, "seed": 7}
    first, again = ([choice["text"] for choice in post(server, "/v1/completions", body)["choices"]] for _ in range(2))
    assert first == again
    assert len(set(first)) > 1


def test_a_stop_string_ends_an_answer_with_its_reason(server: RealServer) -> None:
    body = {"prompt": "Once upon a", "max_tokens": 64, "temperature": 0, "stop": [" time"]}
    choice = post(server, "/v1/completions", body)["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", " time")


def test_too_long_a_chat_is_refused_by_the_code_that_clients_know(server: RealServer) -> None:
    body = {"messages": QUESTION, "max_tokens": 10**6, "stream": True}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_an_abort_by_name_ends_a_long_answer(server: RealServer) -> None:
    answered = threading.Event()

    def abort() -> None:
        while not answered.wait(0.2):
            response = httpx.post(f"{server.url}/abort_request", json={"rid": "long-one"}, timeout=10)
            assert response.status_code == 200

    thread = threading.Thread(target=abort)
    thread.start()
    params = {"max_new_tokens": 4000, "ignore_eos": True}
    answer = post(server, "/generate", {"text": "Once", "rid": "long-one", "sampling_params": params})
    answered.set()
    thread.join()
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert answer["meta_info"]["completion_tokens"] < 4000
