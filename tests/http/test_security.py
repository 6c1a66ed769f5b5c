"""The API key, CORS, and what they must not get in the way of, through a real http worker."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from http_rig import Rig, lines, running

from minisgl.client import Client, RequestFailed
from minisgl.config import ServerConfig
from minisgl.http import page
from minisgl.messages import GenerateRequest

KEY = "s3cret-key_!"
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with running(api_key=KEY, max_body_bytes=20_000) as rig:
        rig.healthy()
        yield rig


def fetch(rig: Rig, method: str, path: str, body: bytes | None = None, **headers: str) -> http.client.HTTPResponse:
    """The response to a request whose path and headers are sent exactly as given."""
    connection = http.client.HTTPConnection("127.0.0.1", rig.port, timeout=10)
    connection.putrequest(method, path, skip_accept_encoding=True)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    return connection.getresponse()


# ---- the API key ----------------------------------------------------------------------------------------------------


def routes(rig: Rig) -> list[tuple[str, str]]:
    """Every route of the server's own document, and those that it leaves out."""
    document = json.loads(fetch(rig, "GET", "/openapi.json", **AUTHORIZED).read())
    assert "401" in document["paths"]["/generate"]["post"]["responses"]
    described = [(method.upper(), path) for path, item in document["paths"].items() for method in item]
    hidden = (*page.PATHS, "/web/", "/web/nowhere", "/docs", "/openapi.json", "/nowhere")
    return [*described, *(("GET", path) for path in hidden)]


def test_every_route_but_health_metrics_and_the_page_needs_the_key(rig: Rig) -> None:
    known = routes(rig)
    assert ("POST", "/generate") in known
    for method, path in known:
        response = fetch(rig, method, path, b"{}", X_Request_Id="mine")
        body = response.read()
        if path in ("/health", "/health_generate", "/metrics", *page.PATHS):
            assert response.status != 401, path
            continue
        assert response.status == 401, (method, path)
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert response.headers["X-Request-Id"] == "mine"
        error = json.loads(body)["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
        assert "Authorization: Bearer" in error["message"]
        assert KEY not in body.decode()
    rig.nothing_from_http()


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        "Bearer ",
        KEY,
        f"Basic {KEY}",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        f"Bearer {KEY.upper()}",
        f"Bearer x {KEY}",
        f"Bearer {KEY}, {KEY}",
        "Bearer \xff\xfe",
        f"Bearer {'k' * 60_000}",
    ],
)
def test_nothing_but_the_key_opens(rig: Rig, authorization: str) -> None:
    response = fetch(rig, "POST", "/generate", b'{"prompt": "Hi"}', Authorization=authorization)
    assert response.status == 401
    rig.nothing_from_http(0.02)


@pytest.mark.parametrize(
    "path",
    [
        "/health/../generate",
        "/metrics/../generate",
        "/%67enerate",
        "//generate",
        "/health%2f..%2fgenerate",
        "/web/../generate",
    ],
)
def test_no_spelling_of_a_path_gets_past_the_key(rig: Rig, path: str) -> None:
    assert fetch(rig, "POST", path, b'{"prompt": "Hi"}').status in (401, 404)
    rig.nothing_from_http(0.02)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_key_opens(rig: Rig, scheme: str) -> None:
    connection = rig.post({"prompt": "Hi"}, Authorization=f"{scheme} {KEY}")
    rig.answer(rig.from_http(GenerateRequest), "a", "b")
    response = connection.getresponse()
    assert response.status == 200
    assert [line.get("text_delta") for line in lines(response)] == ["a", "b", None]


ADMIN_KEY = "0perator"


@pytest.mark.parametrize(
    ("keys", "opens_admin", "opens_others"),
    [
        ({"api_key": KEY, "admin_api_key": ADMIN_KEY}, [ADMIN_KEY], [KEY, ADMIN_KEY]),
        ({"admin_api_key": ADMIN_KEY}, [ADMIN_KEY], ["", KEY, ADMIN_KEY]),
        ({"api_key": KEY}, [KEY], [KEY]),
        ({}, ["", KEY, ADMIN_KEY], ["", KEY, ADMIN_KEY]),
    ],
)
def test_what_acts_on_the_whole_server_takes_the_admin_key_alone(
    keys: dict[str, str], opens_admin: list[str], opens_others: list[str]
) -> None:
    with running(disable_radix_cache=True, **keys) as rig:
        for key in ("", KEY, ADMIN_KEY):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            for path, opens in (
                ("/flush_cache", opens_admin),
                ("/reset_prefix_cache", opens_admin),
                ("/abort_request", opens_admin),
                ("/detokenize", opens_others),
            ):
                response = fetch(rig, "POST", path, b'{"rid": "x"}', **headers)
                body = response.read()
                assert (response.status != 401) == (key in opens), (path, key)
                if response.status == 401 and opens is opens_admin and "admin_api_key" in keys:
                    assert b"needs the server's admin key" in body
                if response.status == 401:
                    assert response.headers["WWW-Authenticate"] == "Bearer"
        described = json.loads(fetch(rig, "GET", "/openapi.json", Authorization=f"Bearer {KEY}").read())
        assert ("401" in described["paths"]["/flush_cache"]["get"]["responses"]) == bool(keys)


def test_no_setting_that_is_secret_is_told() -> None:
    secrets = {spec.name: f"tell-nobody-{spec.name}" for spec in fields(ServerConfig) if spec.metadata["secret"]}
    assert {"api_key", "admin_api_key"} <= secrets.keys()
    with running(**secrets) as rig:
        rig.healthy()
        key = {"Authorization": f"Bearer {secrets['admin_api_key']}"}
        for path in ("/server_info", "/model_info", "/v1/models", "/health", "/metrics", "/openapi.json", "/docs", "/"):
            response = fetch(rig, "GET", path, **key)
            body = response.read().decode()
            assert response.status in (200, 503)
            assert "tell-nobody" not in body
            if path == "/server_info":
                told = json.loads(body)
                assert told["max_body_bytes"] == rig.config.max_body_bytes
                assert not told.keys() & secrets.keys()


def test_a_refusal_needs_no_body_and_counts_for_nothing(rig: Rig) -> None:
    before = received(rig)
    with rig.raw_connection() as client:
        client.sendall(b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 401 ")
    assert received(rig) == before


def received(rig: Rig) -> str:
    text: str = rig.get("/metrics")[1].decode()
    return next(line for line in text.splitlines() if line.startswith("minisgl:requests_received_total"))


def test_the_limits_hold_with_the_key_and_without(rig: Rig) -> None:
    assert rig.error({"prompt": "x" * 20_000}, **AUTHORIZED)[1]["code"] == "body_too_large"
    assert rig.error({"prompt": "x" * 20_000})[1]["code"] == "invalid_api_key"
    for headers in (AUTHORIZED, {}):
        with socket.create_connection(("127.0.0.1", rig.port), timeout=10) as client:
            head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            with contextlib.suppress(ConnectionError):
                client.sendall(f"GET / HTTP/1.1\r\nHost: a\r\n{head}X: {'x' * 600_000}".encode())
            assert client.recv(65536).startswith(b"HTTP/1.1 431 ")


def test_the_terminal_client_sends_the_key(rig: Rig) -> None:
    url = f"http://127.0.0.1:{rig.port}"
    rig.healthy()
    deadline = time.monotonic() + 5
    while not Client(url).healthy():
        assert time.monotonic() < deadline
    assert Client(url, KEY).model_name() == "demo"
    with pytest.raises(RequestFailed, match="needs its API key"):
        Client(url).model_name()


def test_the_log_names_both_ids_and_never_the_key(capfd: pytest.CaptureFixture[str]) -> None:
    with running(api_key=KEY, narrate=True, start_method="spawn") as rig:
        connection = rig.post({"prompt": "Hi"}, **AUTHORIZED, **{"X-Request-Id": "my-request"})
        request = rig.from_http(GenerateRequest)
        rig.answer(request, "a", "b")
        connection.getresponse().read()
        rig.stats(ok=1)
        assert KEY.encode() not in Path(f"/proc/{rig.process.pid}/cmdline").read_bytes()
    log = capfd.readouterr().err
    assert f"my-request is request {request.rid} on the ring" in log
    assert "my-request ok 200" in log
    assert KEY not in log


# ---- CORS -----------------------------------------------------------------------------------------------------------

PAGE = "https://chat.example"
PREFLIGHT = {
    "Origin": PAGE,
    "Access_Control_Request_Method": "POST",
    "Access_Control_Request_Headers": "authorization,x-stainless-os",
}


@pytest.mark.parametrize("path", ["/health", "/model_info", "/nowhere"])
def test_no_page_may_read_anything_unless_asked_for(rig: Rig, path: str) -> None:
    response = fetch(rig, "GET", path, Origin=PAGE, **AUTHORIZED)
    assert not [name for name in response.headers if name.lower().startswith("access-control-")]
    response = fetch(rig, "OPTIONS", path, **PREFLIGHT, **AUTHORIZED)
    assert response.status in (404, 405)
    assert not [name for name in response.headers if name.lower().startswith("access-control-")]


def test_the_pages_that_were_named_may_read_every_answer() -> None:
    with running(api_key=KEY, cors_origin=f"https://other.example, {PAGE}") as rig:
        response = fetch(rig, "OPTIONS", "/generate", **PREFLIGHT)
        assert response.status == 204
        assert response.headers["Access-Control-Allow-Origin"] == PAGE
        assert response.headers["Access-Control-Allow-Headers"] == "authorization,x-stainless-os"
        assert "POST" in response.headers["Access-Control-Allow-Methods"]
        connection = rig.post({"prompt": "Hi"}, Origin=PAGE, **AUTHORIZED)
        rig.answer(rig.from_http(GenerateRequest), "a", "b")
        whole = rig.post({"prompt": "Hi", "stream": False}, Origin=PAGE, **AUTHORIZED)
        rig.answer(rig.from_http(GenerateRequest), "a", "b")
        responses = {
            200: [
                connection.getresponse(),
                whole.getresponse(),
                fetch(rig, "GET", "/model_info", Origin=PAGE, **AUTHORIZED),
            ],
            400: [fetch(rig, "POST", "/generate", b"{", Origin=PAGE, **AUTHORIZED)],
            401: [fetch(rig, "GET", "/model_info", Origin=PAGE)],
        }
        for status, found in responses.items():
            for response in found:
                assert response.status == status
                assert response.headers.get_all("Access-Control-Allow-Origin") == [PAGE]
                assert "x-request-id" in response.headers["Access-Control-Expose-Headers"]
                assert response.headers.get_all("Vary") == ["origin"]
                assert len(response.headers.get_all("X-Request-Id") or []) == 1
        for stranger in ("https://evil.example", "null", f"{PAGE}.evil.example"):
            for response in (
                fetch(rig, "GET", "/model_info", Origin=stranger, **AUTHORIZED),
                fetch(rig, "OPTIONS", "/generate", **{**PREFLIGHT, "Origin": stranger}),
            ):
                assert "Access-Control-Allow-Origin" not in response.headers
                assert response.headers["Vary"] == "origin"


def test_every_page_may_ask_when_any_origin_is_allowed() -> None:
    with running(cors_origin="*") as rig:
        assert fetch(rig, "GET", "/model_info", Origin="null").headers["Access-Control-Allow-Origin"] == "*"
        assert "Access-Control-Allow-Origin" not in fetch(rig, "GET", "/model_info").headers
        # Without what makes it a question of a browser, OPTIONS is a method that no route takes.
        assert fetch(rig, "OPTIONS", "/model_info", Origin=PAGE).status == 405
