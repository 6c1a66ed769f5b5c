"""The real stack with several of everything: token ids and texts, a flushed prefix cache, aborts of any request."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from real_server import RealServer, starting, until

from minisgl.demo_model import demo_model_dir
from minisgl.tokenizer_proc.tokenizer_files import load_tokenizer

TEXT = "Once upon a time, 你好 👋"
LONG = {"text": "Once", "sampling_params": {"max_new_tokens": 4000, "ignore_eos": True, "temperature": 0}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    several = ("--http-workers", "2", "--tokenizer-workers", "2", "--detokenizer-workers", "2", "--dp-size", "2")
    for server in starting(tmp_path_factory.mktemp("admin") / "log", *several):
        server.wait_ready()
        yield server


def post(server: RealServer, path: str, body: dict[str, Any]) -> Any:
    """By a connection of its own, so that any http worker may take it."""
    response = httpx.post(server.url + path, json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response.json() if response.content else None


def test_token_ids_and_texts_are_the_tokenizers_own(server: RealServer) -> None:
    tokenizer = load_tokenizer(demo_model_dir(), trust_remote_code=False)
    ids = tokenizer.encode(TEXT).ids
    for _ in range(4):
        answer = post(server, "/tokenize", {"prompt": [TEXT, "x"]})
        assert answer["tokens"] == [ids, tokenizer.encode("x").ids]
        assert answer["count"] == [len(ids), 1]
        assert post(server, "/detokenize", {"tokens": ids})["text"] == TEXT
    chat = post(server, "/tokenize", {"messages": [{"role": "user", "content": "Hi"}]})
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    assert chat["count"] == post(server, "/v1/chat/completions", body)["usage"]["prompt_tokens"]


def test_a_flushed_prefix_is_not_found_again(server: RealServer) -> None:
    prompt = {"text": "word " * 200, "sampling_params": {"max_new_tokens": 1}}

    def cached() -> int:
        tokens: int = post(server, "/generate", prompt)["meta_info"]["cached_tokens"]
        return tokens

    for _ in range(4):
        # Whichever replica the next request goes to, it has seen the prompt before.
        for index in range(2):
            until(lambda index=index: cached() > 100 and server.stats(f"scheduler-{index}")["kv_pages_evictable"])
        assert httpx.post(f"{server.url}/flush_cache?timeout=10").text == "Cache flushed.\n"
        assert cached() == 0


def test_every_http_worker_aborts_what_any_of_them_serves(server: RealServer) -> None:
    answers: list[Any] = []
    rids = [f"long-{index}" for index in range(8)]
    clients = [
        threading.Thread(target=lambda rid=rid: answers.append(post(server, "/generate", {**LONG, "rid": rid})))
        for rid in rids
    ]
    for client in clients:
        client.start()
    until(lambda: sum(server.stats(f"scheduler-{index}")["running"] for index in range(2)) == 8)
    until(lambda: sum(server.stats(f"http-{index}")["streams"] for index in range(2)) == 8)
    assert httpx.get(f"{server.url}/flush_cache").status_code == 400
    # Several times, so that either worker is asked for requests of the other.
    for rid in rids[:4]:
        post(server, "/abort_request", {"rid": rid})
    until(lambda: len(answers) == 4)
    assert sorted(answer["meta_info"]["id"] for answer in answers) == rids[:4]
    post(server, "/abort_request", {"abort_all": True})
    for client in clients:
        client.join(60)
    assert {answer["meta_info"]["finish_reason"]["type"] for answer in answers} == {"abort"}
    assert len(answers) == 8
