"""POST /tokenize, /detokenize and /flush_cache through a real http worker: asked, answered, lost and refused."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest
from http_rig import VOCAB_SIZE, Rig, running
from wire_client import refused

from minisgl.channels import Inbox, ipc_address
from minisgl.messages import (
    AbortNamed,
    AbortRequest,
    CacheFlushed,
    DetokenizeRequest,
    FinishReason,
    FlushCache,
    GenerateRequest,
    RequestError,
    TextAnswer,
    TokenizeRequest,
)

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with running() as rig:
        yield rig


def json_of(connection: http.client.HTTPConnection, status: int = 200) -> Any:
    response = connection.getresponse()
    body = response.read()
    assert response.status == status, body
    return json.loads(body)


def text_of(connection: http.client.HTTPConnection) -> tuple[int, str]:
    response = connection.getresponse()
    assert response.headers.get_content_type() == "text/plain"
    return response.status, response.read().decode()


# ---- texts and token ids --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_a_text_is_answered_with_its_token_ids(rig: Rig, prefix: str) -> None:
    connection = rig.post({"model": "demo", "prompt": "Hi"}, f"{prefix}/tokenize")
    asked = rig.from_http(TokenizeRequest)
    assert (asked.prompt, asked.add_special_tokens) == ("Hi", True)
    rig.ring.send(TextAnswer(asked.rid, "Hi", [5, 6]))
    assert json_of(connection) == {"tokens": [5, 6], "count": 2, "max_model_len": 2048, "token_strs": None}


def test_several_texts_are_answered_in_their_order(rig: Rig) -> None:
    connection = rig.post({"prompt": ["a", "b", "c"], "add_special_tokens": False}, "/tokenize")
    asked = [rig.from_http(TokenizeRequest) for _ in range(3)]
    assert [(one.prompt, one.add_special_tokens) for one in asked] == [("a", False), ("b", False), ("c", False)]
    for index in (2, 0, 1):
        rig.ring.send(TextAnswer(asked[index].rid, "", [index] * index))
    answer = json_of(connection)
    assert (answer["tokens"], answer["count"]) == ([[], [1], [2, 2]], [0, 1, 2])


def test_a_chat_is_rendered_before_it_is_tokenized(rig: Rig) -> None:
    for given, add in ((None, False), (True, True)):
        connection = rig.post({"messages": MESSAGES, "add_special_tokens": given}, "/tokenize")
        asked = rig.from_http(TokenizeRequest)
        assert (asked.prompt, asked.add_special_tokens) == (MESSAGES, add)
        rig.ring.send(TextAnswer(asked.rid, "<user>Hi", [1, 2, 3]))
        assert json_of(connection)["count"] == 3
    connection = rig.post({"messages": MESSAGES, "add_generation_prompt": False}, "/tokenize")
    asked = rig.from_http(TokenizeRequest)
    assert asked.template == {"add_generation_prompt": False}
    rig.ring.send(TextAnswer(asked.rid, "<user>Hi", [1]))
    assert json_of(connection)["count"] == 1


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_token_ids_are_answered_with_their_text_under_both_names(rig: Rig, prefix: str) -> None:
    connection = rig.post({"tokens": [5, 6], "skip_special_tokens": False}, f"{prefix}/detokenize")
    asked = rig.from_http(DetokenizeRequest)
    assert (asked.token_ids, asked.skip_special_tokens) == ([5, 6], False)
    rig.ring.send(TextAnswer(asked.rid, "Hi", [5, 6]))
    assert json_of(connection) == {"text": "Hi", "prompt": "Hi"}


def test_several_lists_of_token_ids_are_answered_by_a_list(rig: Rig) -> None:
    connection = rig.post({"tokens": [[5], []]}, "/detokenize")
    for text in ("x", ""):
        asked = rig.from_http(DetokenizeRequest)
        assert asked.skip_special_tokens
        rig.ring.send(TextAnswer(asked.rid, text, asked.token_ids))
    assert json_of(connection)["text"] == ["x", ""]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, None),
        ("/tokenize", {"prompt": "Hi", "messages": MESSAGES}, 400, None),
        ("/tokenize", {"prompt": 5}, 400, "prompt"),
        ("/tokenize", {"prompt": ["a", 5]}, 400, "prompt"),
        ("/tokenize", {"prompt": []}, 400, "prompt"),
        ("/tokenize", {"prompt": ["a"] * 1025}, 400, "prompt"),
        ("/tokenize", {"prompt": "Hi", "model": "other"}, 404, "model"),
        ("/tokenize", {"prompt": "Hi", "add_special_tokens": "no"}, 400, "add_special_tokens"),
        ("/tokenize", {"prompt": "Hi", "return_token_strs": True}, 400, "return_token_strs"),
        ("/tokenize", {"prompt": "Hi", "tokens": [1]}, 400, "tokens"),
        ("/tokenize", {"prompt": "Hi", "continue_final_message": True}, 400, "continue_final_message"),
        ("/tokenize", {"messages": MESSAGES, "continue_final_message": True}, 400, "continue_final_message"),
        ("/tokenize", {"messages": MESSAGES, "max_tokens": 5}, 400, "max_tokens"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"messages": [{"role": "user"}]}, 400, "messages"),
        ("/tokenize", {"messages": MESSAGES, "chat_template": "{{ 1 }}"}, 400, "chat_template"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": "5"}, 400, "tokens"),
        ("/detokenize", {"tokens": [True]}, 400, "tokens"),
        ("/detokenize", {"tokens": [5, [6]]}, 400, "tokens"),
        ("/detokenize", {"tokens": [VOCAB_SIZE]}, 400, "tokens"),
        ("/detokenize", {"tokens": [[1], [-1]]}, 400, "tokens"),
        ("/detokenize", {"tokens": [2**70]}, 400, "tokens"),
        ("/detokenize", {"tokens": [1], "model": "other"}, 404, "model"),
    ],
)
def test_wrong_questions_are_refused_with_the_field(rig: Rig, path: str, body: Any, status: int, param: Any) -> None:
    found, error = refused(rig, path, body)
    assert (found, error["param"]) == (status, param), error


def test_what_the_tokenizer_refuses_is_refused(rig: Rig) -> None:
    connection = rig.post({"messages": MESSAGES}, "/tokenize")
    rig.ring.send(RequestError(rig.from_http(TokenizeRequest).rid, 400, "no_chat_template", "send prompt instead"))
    assert json_of(connection, 400)["error"]["code"] == "no_chat_template"


def test_late_and_unknown_answers_are_ignored(rig: Rig) -> None:
    rig.ring.send(TextAnswer(7, "", []))
    rig.ring.send(CacheFlushed(7, 0, True))
    rig.settle()


# ---- deaths ---------------------------------------------------------------------------------------------------------


def test_a_question_lost_with_the_tokenizer_is_asked_once_more_and_then_given_up() -> None:
    with running() as rig:
        connection = rig.post({"prompt": "Hi"}, "/tokenize")
        first = rig.from_http(TokenizeRequest)
        rig.down("tokenizer-0")
        rig.start_tokenizer()
        again = rig.from_http(TokenizeRequest)
        assert again.prompt == "Hi" and again.rid != first.rid
        rig.ring.send(TextAnswer(first.rid, "late", [9]))
        rig.ring.send(TextAnswer(again.rid, "Hi", [5]))
        assert json_of(connection)["tokens"] == [5]

        connection = rig.post({"prompt": "Hi"}, "/tokenize")
        for _ in range(2):
            rig.from_http(TokenizeRequest)
            rig.down("tokenizer-0")
            rig.start_tokenizer()
        assert json_of(connection, 503)["error"]["code"] == "worker_lost"


def test_questions_are_answered_at_shutdown() -> None:
    with running() as rig:
        connection = rig.post({"prompt": "Hi"}, "/tokenize")
        rig.from_http(TokenizeRequest)
        assert rig.stop() == 0
        assert json_of(connection, 503)["error"]["code"] == "shutting_down"


# ---- the prefix cache -----------------------------------------------------------------------------------------------


def answer_flush(rig: Rig, *done: bool) -> None:
    """Every replica's answer to the flush that comes next."""
    asked = rig.from_http(FlushCache)
    for replica, one in enumerate(done):
        rig.ring.send(CacheFlushed(asked.rid, replica, one))


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/flush_cache"), ("POST", "/flush_cache"), ("POST", "/reset_prefix_cache")]
)
def test_a_flush_is_told_when_every_replica_has_done_it(rig: Rig, method: str, path: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", rig.port, timeout=10)
    connection.request(method, path)
    asked = rig.from_http(FlushCache)
    rig.ring.send(CacheFlushed(asked.rid, 0, True))
    rig.ring.send(CacheFlushed(asked.rid, 0, True))
    rig.settle()
    rig.ring.send(CacheFlushed(asked.rid, 1, True))
    assert text_of(connection) == (200, "Cache flushed.\n")


def test_one_busy_replica_is_enough_to_say_no(rig: Rig) -> None:
    connection = rig.post(b"", "/flush_cache")
    answer_flush(rig, True, False)
    status, text = text_of(connection)
    assert status == 400 and "scheduler-1 still has running or waiting requests" in text


def test_a_flush_can_wait_for_running_requests(rig: Rig) -> None:
    connection = rig.post(b"", "/flush_cache?timeout=30")
    for _ in range(3):
        answer_flush(rig, False, True)
    answer_flush(rig, True, True)
    assert text_of(connection)[0] == 200
    connection = rig.post(b"", "/flush_cache?timeout=0.5")
    asked = 0
    while rig.tokenizers[0].wait(1000):
        answer_flush(rig, False, False)
        asked += 1
    assert text_of(connection)[0] == 400
    assert 2 <= asked <= 15


@pytest.mark.parametrize("query", ["timeout=-1", "timeout=nan", "timeout=inf", "timeout=1e9", "timeout=x", "now=1"])
def test_a_wrong_flush_is_refused(rig: Rig, query: str) -> None:
    answer = json_of(rig.post(b"", f"/flush_cache?{query}"), 400)
    assert answer["error"]["param"] == query.partition("=")[0]
    rig.nothing_from_http(0)


def test_a_replica_that_dies_has_nothing_cached() -> None:
    with running() as rig:
        connection = rig.post(b"", "/flush_cache")
        asked = rig.from_http(FlushCache)
        rig.ring.send(CacheFlushed(asked.rid, 0, True))
        rig.down("scheduler-1")
        assert text_of(connection)[0] == 200
        # It is still down: the other one's answer is all there is to wait for.
        connection = rig.post(b"", "/flush_cache")
        answer_flush(rig, True)
        assert text_of(connection)[0] == 200
        # An answer may die with the detokenizer that passes it on.
        connection = rig.post(b"", "/flush_cache")
        lost = rig.from_http(FlushCache)
        rig.down("detokenizer-0")
        again = rig.from_http(FlushCache)
        assert again.rid != lost.rid
        rig.ring.send(CacheFlushed(again.rid, 0, True))
        assert text_of(connection)[0] == 200


def test_without_a_prefix_cache_there_is_nothing_to_ask() -> None:
    with running(disable_radix_cache=True) as rig:
        assert text_of(rig.post(b"", "/flush_cache"))[0] == 200
        rig.nothing_from_http(0)


# ---- several http workers -------------------------------------------------------------------------------------------


def test_an_abort_reaches_the_other_http_workers_and_comes_from_them() -> None:
    with running(http_workers=2) as rig:
        other = Inbox(ipc_address(rig.run_dir.name, "http-1", 1), {AbortNamed})
        assert rig.post({"rid": "nobody-up"}, "/abort_request").getresponse().status == 200
        rig.up("http-1", other.address)
        for body, name in (({"rid": "mine"}, "mine"), ({"abort_all": True}, "")):
            assert rig.post(body, "/abort_request").getresponse().status == 200
            assert other.wait(5000) and other.receive() == AbortNamed(name)
        rig.settle()
        assert other.receive() is None, "what was asked before it was up must not reach it"
        for name in ("mine", ""):
            connection = rig.post({"prompt": "Hi", "stream": False}, **{"X-Request-Id": "mine"})
            request = rig.from_http(GenerateRequest)
            rig.ring.send(AbortNamed("other"))
            rig.ring.send(AbortNamed(name))
            assert rig.from_http(AbortRequest).rid == request.rid
            rig.delta(request, "", [], FinishReason.ABORT, opens=True)
            assert json_of(connection)["finish_reason"] == "abort"
        other.close()
