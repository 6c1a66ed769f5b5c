"""The `openai` package against a real http worker: it understands every answer and raises its right error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from http_rig import Rig, running

openai = pytest.importorskip("openai")

HELLO: Any = [{"role": "user", "content": "Hello"}]
SHOWN = str(HELLO)
"""The rig answers each request with its own prompt."""


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with running(api_key="the-key") as rig:
        yield rig


@pytest.fixture
def client(rig: Rig) -> Iterator[Any]:
    base_url = f"http://127.0.0.1:{rig.port}/v1"
    with rig.answering(), openai.OpenAI(base_url=base_url, api_key="the-key", max_retries=0, timeout=10) as client:
        yield client


def test_chat(client: Any) -> None:
    answer = client.chat.completions.create(model="demo", messages=HELLO)
    assert answer.choices[0].message.content == SHOWN
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (1, 1)


def test_chat_stream_with_usage(client: Any) -> None:
    *chunks, last = client.chat.completions.create(
        model="demo", messages=HELLO, stream=True, n=2, stream_options={"include_usage": True}
    )
    assert last.usage.total_tokens == 3
    for index in range(2):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(choice.delta.content or "" for choice in own) == SHOWN
        assert [choice.finish_reason for choice in own] == [None, None, "stop"]
        assert own[0].delta.role == "assistant"


def test_completions(client: Any) -> None:
    answer = client.completions.create(model="demo", prompt=["a", "b"], n=2, echo=True)
    assert [choice.text for choice in answer.choices] == ["aa", "aa", "bb", "bb"]
    chunks = list(client.completions.create(model="demo", prompt=[5, 6], stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "[5, 6]"


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"


@pytest.mark.parametrize(
    ("fields", "error", "code", "param"),
    [
        ({"model": "other"}, "NotFoundError", "model_not_found", "model"),
        ({"temperature": -1}, "BadRequestError", "invalid_value", "temperature"),
        ({"store": True}, "BadRequestError", "unsupported_field", "store"),
        ({"extra_body": {"bogus": 1}}, "BadRequestError", "unknown_field", "bogus"),
        ({"messages": []}, "BadRequestError", "invalid_value", "messages"),
        ({"extra_headers": {"Authorization": "Bearer wrong"}}, "AuthenticationError", "invalid_api_key", None),
    ],
)
def test_errors_raise_their_own_class(
    client: Any, fields: dict[str, Any], error: str, code: str, param: str | None
) -> None:
    with pytest.raises(getattr(openai, error)) as caught:
        client.chat.completions.create(**{"model": "demo", "messages": HELLO, **fields})
    assert (caught.value.code, caught.value.param) == (code, param)


def test_a_full_server_raises_an_error_that_is_retried() -> None:
    with running(max_queued_requests=1) as rig:
        held = rig.post({"prompt": "x"})
        rig.stats(streams=1)
        base_url = f"http://127.0.0.1:{rig.port}/v1"
        client = openai.OpenAI(base_url=base_url, api_key="x", max_retries=0)
        with client, pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model="demo", messages=HELLO)
        assert (caught.value.status_code, caught.value.code) == (503, "queue_full")
        assert int(caught.value.response.headers["retry-after"]) >= 1
        held.close()
