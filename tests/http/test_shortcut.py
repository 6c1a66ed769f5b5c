"""The shortcut takes POSTs of its paths and nothing else, and answers as the application would when one fails."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from minisgl.http.errors import ApiError
from minisgl.http.shortcut import Shortcut


async def endpoint(request: Request) -> Response:
    body = await request.body()
    if body == b"refuse":
        raise ApiError(400, "no", "change it")
    if body == b"fail":
        raise ZeroDivisionError
    return PlainTextResponse(b"short " + body)


def ask(method: str, path: str, body: bytes = b"", raises: bool = False) -> httpx.Response:
    async def send() -> httpx.Response:
        app = Shortcut(PlainTextResponse("application"), {"/here": endpoint})
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=raises)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, content=body)

    return asyncio.run(send())


@pytest.mark.parametrize(
    ("method", "path", "text"),
    [
        ("POST", "/here", "short x"),
        ("GET", "/here", "application"),
        ("POST", "/here/", "application"),
        ("POST", "/there", "application"),
    ],
)
def test_which_requests_it_takes(method: str, path: str, text: str) -> None:
    assert ask(method, path, b"x").text == text


def test_a_refusal_is_answered_in_the_apis_shape() -> None:
    refusal = ask("POST", "/here", b"refuse")
    assert (refusal.status_code, refusal.json()["error"]["code"]) == (400, "no")


def test_a_bug_is_answered_and_still_reaches_the_servers_log() -> None:
    answer = ask("POST", "/here", b"fail")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    with pytest.raises(ZeroDivisionError):
        ask("POST", "/here", b"fail", raises=True)
