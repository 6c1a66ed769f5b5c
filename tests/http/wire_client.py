"""A client that asks a rig and plays the ring at once: post, take the ring's requests, answer them, read the reply."""

from __future__ import annotations

import http.client
import json
from collections.abc import Sequence
from typing import Any

from http_rig import Rig

from minisgl.messages import GenerateRequest


def post(rig: Rig, path: str, body: Any, answers: int = 1) -> tuple[http.client.HTTPConnection, list[GenerateRequest]]:
    """Post a valid request and take all that it sends round the ring."""
    connection = rig.post(body, path)
    return connection, [rig.from_http(GenerateRequest) for _ in range(answers)]


def whole(rig: Rig, path: str, body: Any, texts: Sequence[Sequence[str]]) -> Any:
    """The JSON that answers a body; answer i comes from the ring as the pieces `texts[i]`, in token 0, 1, ..."""
    connection, requests = post(rig, path, body, len(texts))
    for request, pieces in zip(requests, texts, strict=True):
        rig.answer(request, *pieces)
    response = connection.getresponse()
    assert response.status == 200
    assert response.headers.get_content_type() == "application/json"
    return json.loads(response.read())


def frames(response: http.client.HTTPResponse) -> list[Any]:
    """The objects of a stream of server-sent events, which must end with [DONE]."""
    assert response.status == 200
    assert response.headers.get_content_type() == "text/event-stream"
    *events, done, rest = response.read().decode("ascii").split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(event.startswith("data: ") for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


def refused(rig: Rig, path: str, body: Any) -> tuple[int, dict[str, Any]]:
    """The status and error object that answer this body; nothing may go round the ring."""
    connection = rig.post(body, path)
    response = connection.getresponse()
    error = json.loads(response.read())["error"]
    assert set(error) == {"message", "type", "code", "param"}
    rig.nothing_from_http(0)
    return response.status, error
