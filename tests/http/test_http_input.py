"""What comes in wrong: every bad request gets its own 4xx and one sentence, and the worker takes the next one."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from http_rig import Rig, running
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minisgl.config import ModelSpec
from minisgl.http import native
from minisgl.http.errors import ApiError
from minisgl.http.generation import Caller
from minisgl.http.schemas import parse_object
from minisgl.messages import GenerateRequest, decode, encode
from minisgl.timeline import now

MODEL = ModelSpec("models/demo", "demo", "demo", 2048, 1000, (2,), "Qwen2ForCausalLM")
CALLER = Caller(MODEL, "an-id", wants_sse=False)
MAX_BODY = 20_000


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with running(max_body_bytes=MAX_BODY) as rig:
        yield rig


WRONG_BODIES: list[tuple[Any, str, str | None, str]] = [
    # body, code, param, what the sentence must name
    (b"", "empty_body", None, '{"prompt": "Hello"}'),
    (b" \n", "empty_body", None, "no body"),
    (b"{", "invalid_json", None, "column 2"),
    (b'{"prompt": "x"', "invalid_json", None, "valid JSON"),
    (b'{"prompt": "\xff"}', "invalid_json", None, "UTF-8"),
    (b'{"prompt": "\\ud800"}', "invalid_json", None, "surrogate"),
    (b'{"prompt": "x", "stop": ["\\udfff"]}', "invalid_json", None, "valid JSON"),
    (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', "invalid_json", None, "surrogate"),
    (b'{"prompt": "\xed\xa0\x80"}', "invalid_json", None, "surrogate"),
    (b'{"prompt": "x", "temperature": NaN}', "invalid_json", None, "column 32"),
    (b'{"prompt": "x", "temperature": Infinity}', "invalid_json", None, "valid JSON"),
    (b'{"prompt": "x", "temperature": 1e999}', "invalid_json", None, "infinity"),
    (b"[" * 9000, "invalid_json", None, "depth"),
    (b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", "invalid_value", "prompt", "prompt must be a string"),
    ([1], "not_an_object", None, "got a list"),
    ("x", "not_an_object", None, "got a string"),
    (None, "not_an_object", None, "got null"),
    (3, "not_an_object", None, "got 3"),
    ({}, "prompt_or_messages", None, "neither"),
    ({"prompt": None, "messages": None}, "prompt_or_messages", None, "neither"),
    ({"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "prompt_or_messages", None, "both"),
    ({"prompt": ""}, "invalid_value", "prompt", "not be empty"),
    ({"prompt": []}, "invalid_value", "prompt", "not be empty"),
    ({"prompt": 5}, "invalid_value", "prompt", "got 5"),
    ({"prompt": {}}, "invalid_value", "prompt", "got an object"),
    ({"prompt": ["x"]}, "invalid_value", "prompt", "list of token ids"),
    ({"prompt": [1, True]}, "invalid_value", "prompt", "list of token ids"),
    ({"prompt": [1, 2.0]}, "invalid_value", "prompt", "list of token ids"),
    ({"prompt": [1000]}, "invalid_value", "prompt", "0 to 999, got 1000"),
    ({"prompt": [-1]}, "invalid_value", "prompt", "got -1"),
    ({"prompt": [2**40]}, "invalid_value", "prompt", "0 to 999"),
    ({"messages": []}, "invalid_value", "messages", "at least one"),
    ({"messages": "x"}, "invalid_value", "messages", "a list"),
    ({"messages": ["x"]}, "invalid_value", "messages", "messages[0] must be an object"),
    ({"messages": [{"content": "x"}]}, "invalid_value", "messages", "messages[0] has no 'role'"),
    ({"messages": [{"role": "user"}]}, "invalid_value", "messages", "messages[0] has no 'content'"),
    ({"messages": [{"role": "", "content": "x"}]}, "invalid_value", "messages", "messages[0].role"),
    ({"messages": [{"role": "user", "content": None}]}, "invalid_value", "messages", "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": 1, "content": "x"}]}, "invalid_value", "messages", "[1]"),
    ({"messages": [{"role": "user", "content": "x", "nme": 1}]}, "unknown_field", "messages", "'nme'"),
    ({"prompt": "x", "temprature": 1}, "unknown_field", "temprature", "did you mean 'temperature'"),
    ({"prompt": "x", "zzz\u2028": 1}, "unknown_field", "zzz\u2028", "this route takes prompt, messages"),
    ({"prompt": "x", "k" * 5000: 1}, "unknown_field", "k" * 64, "unknown field"),
    ({"prompt": "x", "stream": 1}, "invalid_value", "stream", "true or false"),
    ({"prompt": "x", "stream": None}, "invalid_value", "stream", "got null"),
    ({"prompt": "x", "max_new_tokens": 0}, "invalid_value", "max_new_tokens", "at least 1, got 0"),
    ({"prompt": "x", "max_new_tokens": "5"}, "invalid_value", "max_new_tokens", "an integer"),
    ({"prompt": "x", "max_new_tokens": 1.5}, "invalid_value", "max_new_tokens", "an integer or null, got 1.5"),
    ({"prompt": "x", "max_new_tokens": True}, "invalid_value", "max_new_tokens", "got true"),
    ({"prompt": "x", "max_new_tokens": 2**31}, "invalid_value", "max_new_tokens", "below 2147483648"),
    ({"prompt": "x", "max_new_tokens": 2**64}, "invalid_value", "max_new_tokens", "an integer"),
    ({"prompt": "x", "temperature": -0.1}, "invalid_value", "temperature", "between 0"),
    ({"prompt": "x", "temperature": 101}, "invalid_value", "temperature", "100"),
    ({"prompt": "x", "temperature": None}, "invalid_value", "temperature", "a number, got null"),
    ({"prompt": "x", "temperature": "hot"}, "invalid_value", "temperature", "got a string"),
    ({"prompt": "x", "top_k": 0}, "invalid_value", "top_k", "-1 (all tokens)"),
    ({"prompt": "x", "top_k": 2**63}, "invalid_value", "top_k", "below"),
    ({"prompt": "x", "top_p": 0}, "invalid_value", "top_p", "above 0"),
    ({"prompt": "x", "top_p": 1.1}, "invalid_value", "top_p", "at most 1"),
    ({"prompt": "x", "min_p": 2}, "invalid_value", "min_p", "between 0 and 1"),
    ({"prompt": "x", "seed": 2**63}, "invalid_value", "seed", "64 bits"),
    ({"prompt": "x", "seed": 2**64}, "invalid_value", "seed", "an integer"),
    ({"prompt": "x", "min_new_tokens": -1}, "invalid_value", "min_new_tokens", "negative"),
    ({"prompt": "x", "min_new_tokens": 129}, "invalid_value", "min_new_tokens", "max_new_tokens (128)"),
    ({"prompt": "x", "ignore_eos": "yes"}, "invalid_value", "ignore_eos", "true or false"),
    ({"prompt": "x", "stop": ""}, "invalid_value", "stop", "1 to 1024 characters"),
    ({"prompt": "x", "stop": ["a"] * 33}, "invalid_value", "stop", "at most 32"),
    ({"prompt": "x", "stop": [1]}, "invalid_value", "stop", "a list of strings"),
    ({"prompt": "x", "stop": {}}, "invalid_value", "stop", "got an object"),
    ({"prompt": "x", "stop_token_ids": [-1]}, "invalid_value", "stop_token_ids", "got -1"),
    ({"prompt": "x", "stop_token_ids": [1000]}, "invalid_value", "stop_token_ids", "0 to 999"),
    ({"prompt": "x", "stop_token_ids": [1] * 1025}, "invalid_value", "stop_token_ids", "at most 1024"),
    ({"prompt": "x", "stop_token_ids": 3}, "invalid_value", "stop_token_ids", "a list of token ids"),
    ({"prompt": "x", "skip_special_tokens": 0}, "invalid_value", "skip_special_tokens", "true or false"),
    ({"prompt": "x", "no_stop_trim": []}, "invalid_value", "no_stop_trim", "got a list"),
]


def test_every_wrong_body_gets_a_sentence(rig: Rig) -> None:
    before = rig.stats(in_flight=0)
    for body, code, param, words in WRONG_BODIES:
        status, error = rig.error(body)
        context = f"{str(body)[:80]} -> {status} {error}"
        assert status == 400, context
        assert error["code"] == code, context
        assert error.get("param") == param, context
        assert words in error["message"], context
        assert error["type"] == "invalid_request_error", context
        assert len(error["message"]) < 500, context
    rig.nothing_from_http(0.05)
    rig.stats(client_error=before["client_error"] + len(WRONG_BODIES), in_flight=0)


def test_large_bodies_are_refused_unread(rig: Rig) -> None:
    exact = json.dumps({"prompt": ""}).encode()
    fitting = exact.replace(b'""', b'"' + b"x" * (MAX_BODY - len(exact)) + b'"')
    assert len(fitting) == MAX_BODY
    connection = rig.post(fitting)
    rig.answer(rig.from_http(GenerateRequest), "ok")
    assert connection.getresponse().status == 200
    status, error = rig.error(fitting + b" ")
    assert (status, error["code"]) == (413, "body_too_large")
    assert str(MAX_BODY) in error["message"]
    # A length alone is enough for the refusal; nobody waits for the body.
    with rig.raw_connection() as sock:
        sock.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999999\r\n\r\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_bodies_without_a_length_are_counted_as_they_come(rig: Rig) -> None:
    chunk = b"1000\r\n" + b" " * 0x1000 + b"\r\n"
    with rig.raw_connection() as sock:
        sock.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk * 6)
        assert sock.recv(65536).startswith(b"HTTP/1.1 413 ")
    with rig.raw_connection() as sock:
        body = b'{"prompt": 1}'
        sock.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk)
        sock.sendall(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        response = http.client.HTTPResponse(sock)
        response.begin()
        assert response.status == 400
        assert b"prompt must be" in response.read()


def test_a_slow_upload_is_read(rig: Rig) -> None:
    with rig.raw_connection() as sock:
        sock.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 15\r\n\r\n")
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b'{"prompt":')
        rig.nothing_from_http(0.1)
        sock.sendall(b'"Hi"}')
        request = rig.from_http(GenerateRequest)
        assert request.prompt == "Hi"
        rig.answer(request, "ok")
        assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_compressed_bodies_are_refused(rig: Rig) -> None:
    status, error = rig.error(b"\x1f\x8b", **{"Content-Encoding": "gzip"})
    assert (status, error["code"]) == (415, "encoded_body")


def test_wrong_paths_and_methods_answer_in_the_same_shape(rig: Rig) -> None:
    status, answer = rig.get("/nope")
    assert (status, answer["error"]["code"]) == (404, "not_found")
    assert "/docs" in answer["error"]["message"]
    status, answer = rig.get("/generate")
    assert (status, answer["error"]["code"]) == (405, "method_not_allowed")
    assert "use POST" in answer["error"]["message"]
    connection = rig.post({"prompt": "x"}, path="/health")
    response = connection.getresponse()
    assert response.status == 405
    assert response.headers["Allow"] == "GET"


MALFORMED = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nContent-Length: x\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
    b"POST /generate HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n",
    b"POST /gen\xc3\xa9rate HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET http://[::1 HTTP/1.1\r\n\r\n",
]


@pytest.mark.parametrize("raw", MALFORMED)
def test_malformed_http_is_refused(rig: Rig, raw: bytes) -> None:
    with rig.raw_connection() as sock:
        sock.sendall(raw)
        head, _, body = _read_all(sock).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 4"), head
        assert json.loads(body)["error"]["code"] == "malformed_http"


@pytest.mark.parametrize(
    ("head", "filler"),
    [
        (b"POST /generate HTTP/1.1\r\nX: ", b"y" * 4096),
        (b"POST /generate HTTP/1.1\r\n", b"X-Some-Name: some value\r\n" * 200),
        (b"POST /", b"y" * 4096),
        (b"POST /generate HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1;", b"y" * 4096),
        (b"POST /generate HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: ", b"y" * 4096),
    ],
    ids=["header", "headers", "path", "chunk-extension", "trailer"],
)
def test_endless_heads_are_cut_off(rig: Rig, head: bytes, filler: bytes) -> None:
    with rig.raw_connection() as sock:
        sock.sendall(head)
        deadline = time.monotonic() + 5
        with pytest.raises(ConnectionError):
            while time.monotonic() < deadline:
                sock.sendall(filler)
    assert rig.get("/health")[0] in (200, 503)


def _read_all(sock: socket.socket) -> bytes:
    data = b""
    while part := sock.recv(65536):
        data += part
    return data


# ---- anything at all ------------------------------------------------------------------------------------------------

FIELD_NAMES = st.sampled_from([*native.FIELDS, "role", "content"]) | st.text(max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(FIELD_NAMES, inner, max_size=4),
    max_leaves=12,
)
NEARLY_RIGHT = st.fixed_dictionaries(
    {"prompt": JSON}, optional={name: JSON for name in native.FIELDS if name != "prompt"}
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=NEARLY_RIGHT | JSON | st.binary(max_size=40))
def test_no_body_gets_a_5xx(rig: Rig, body: Any) -> None:
    with rig.answering():
        connection = rig.post(body)
        response = connection.getresponse()
        answer = response.read()
        connection.close()
    assert response.status in (200, 400), (body, answer)
    if response.status == 400:
        assert json.loads(answer)["error"]["message"]


PROMPT = st.text(min_size=1, max_size=20) | st.lists(st.integers(0, 999), min_size=1, max_size=5)
SENSIBLE = {
    "stream": st.booleans(),
    "max_new_tokens": st.none() | st.integers(10, 2**31 - 1),
    "temperature": st.floats(0, 100) | st.integers(0, 100),
    "top_k": st.just(-1) | st.integers(1, 2**31 - 1),
    "top_p": st.floats(0, 1, exclude_min=True) | st.just(1),
    "min_p": st.floats(0, 1) | st.integers(0, 1),
    "seed": st.none() | st.integers(-(2**63), 2**63 - 1),
    "min_new_tokens": st.integers(0, 10),
    "ignore_eos": st.booleans(),
    "stop": st.none() | st.text(min_size=1, max_size=9) | st.lists(st.text(min_size=1, max_size=9), max_size=32),
    "stop_token_ids": st.none() | st.lists(st.integers(0, 999), max_size=9),
    "skip_special_tokens": st.booleans(),
    "no_stop_trim": st.booleans(),
}


@settings(max_examples=100)
@given(body=st.fixed_dictionaries({"prompt": PROMPT}, optional=SENSIBLE))
def test_whatever_is_in_range_is_taken_and_crosses_the_ring(body: dict[str, Any]) -> None:
    (ask,) = native.read(parse_object(json.dumps(body).encode()), CALLER).asks
    request = GenerateRequest(1, ask.prompt, ask.sampling, [now()])
    assert decode(encode(request)) == request
    assert ask.prompt == body["prompt"]


@settings(max_examples=100)
@given(body=NEARLY_RIGHT)
def test_whatever_is_taken_crosses_the_ring(body: dict[str, Any]) -> None:
    try:
        (ask,) = native.read(parse_object(json.dumps(body).encode()), CALLER).asks
    except ApiError as error:
        assert error.status == 400
        assert error.message
    else:
        request = GenerateRequest(1, ask.prompt, ask.sampling, [now()])
        assert decode(encode(request)) == request


# ---- the documents say the same --------------------------------------------------------------------------------------


def test_openapi_describes_what_is_checked(rig: Rig) -> None:
    status, document = rig.get("/openapi.json")
    assert status == 200
    assert set(document["paths"]) >= {"/generate", "/health", "/metrics", "/get_model_info", "/model_info"}
    operation = document["paths"]["/generate"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]["anyOf"][0]
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(native.FIELDS)
    assert {"200", "400", "413", "415", "500", "503"} <= set(operation["responses"])
    for name, spec in schema["properties"].items():
        assert spec["description"], name
        for bound, step in (("minimum", -1), ("maximum", 1)):
            if bound in spec:
                limit = int(spec[bound])
                assert _accepts(name, limit), (name, bound)
                assert not _accepts(name, limit + step), (name, bound)
        if "exclusiveMinimum" in spec:
            assert not _accepts(name, spec["exclusiveMinimum"])
        if spec.get("default") is not None:
            assert _accepts(name, spec["default"]), name


def _accepts(name: str, value: Any) -> bool:
    body = {"prompt": "x", name: value} if name != "messages" else {name: value}
    try:
        native.read(parse_object(json.dumps(body).encode()), CALLER)
    except ApiError:
        return False
    return True


def test_docs_page_exists(rig: Rig) -> None:
    status, page = rig.get("/docs")
    assert status == 200
    assert b"/web/docs.js" in page
