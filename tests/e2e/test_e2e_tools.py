"""Tool calls on the real stack with the real openai client. The model's weights are random, so calls are required."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from model_templates import QWEN25
from real_server import RealServer, starting
from sample_tokenizers import byte_level, save

openai = pytest.importorskip("openai")
pytest.importorskip("xgrammar")

ASK: list[Any] = [{"role": "user", "content": "What is the weather in the city?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Köln", "Paris"]}, "days": {"enum": [1, 2, 3]}},
            "required": ["city", "days"],
        },
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


def make_model(directory: Path) -> Path:
    """A model directory with a tokenizer, Qwen's chat template, and no weights."""
    tokenizer = byte_level()
    save(directory, tokenizer, chat_template=QWEN25, eos_token="<|im_end|>")
    shape = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }
    (directory / "config.json").write_text(json.dumps(shape))
    return directory


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    directory = tmp_path_factory.mktemp("tools")
    model = make_model(directory / "model")
    for server in starting(directory / "log", "--model-local-dir", str(model), "--load-format", "dummy"):
        server.wait_ready()
        yield server


@pytest.fixture(scope="module")
def client(server: RealServer) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client.chat.completions


def check_weather(arguments: str) -> None:
    values = json.loads(arguments)
    assert set(values) == {"city", "days"}
    assert values["city"] in ("Köln", "Paris")
    assert values["days"] in (1, 2, 3)


def test_a_call_its_result_and_the_answer(client: Any) -> None:
    asked = {"model": "demo", "tools": [WEATHER, CLOCK], "parallel_tool_calls": False, "max_tokens": 200}
    named = {"type": "function", "function": {"name": "get_weather"}}
    first = client.create(messages=ASK, tool_choice=named, **asked)
    choice = first.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_weather"
    check_weather(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    answer = client.create(
        messages=[*ASK, choice.message, result], model="demo", max_tokens=50, extra_body={"regex": r"It will rain\."}
    )
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("It will rain.", "stop")
    # The template has shown the call and its result to the model.
    assert answer.usage.prompt_tokens > client.create(model="demo", messages=ASK, max_tokens=1).usage.prompt_tokens + 50


def test_streamed_calls(client: Any) -> None:
    fields = {"model": "demo", "messages": ASK, "tools": [WEATHER, CLOCK], "tool_choice": "required", "n": 3}
    chunks = client.create(**fields, parallel_tool_calls=False, max_tokens=200, stream=True)
    names, arguments, finishes = {}, dict.fromkeys(range(3), ""), {}
    for chunk in chunks:
        for choice in chunk.choices:
            if choice.finish_reason:
                finishes[choice.index] = choice.finish_reason
            for call in choice.delta.tool_calls or []:
                assert call.index == 0
                arguments[choice.index] += call.function.arguments
                if call.function.name:
                    names[choice.index] = call.function.name
                    assert call.id.startswith("call_")
    assert finishes == dict.fromkeys(range(3), "tool_calls")
    for index, name in names.items():
        if name == "get_weather":
            check_weather(arguments[index])
        else:
            assert (name, json.loads(arguments[index])) == ("clock", {})


def test_free_answers_are_text(client: Any) -> None:
    """Random weights call nothing, and what they say comes out whole."""
    fields = {"model": "demo", "messages": ASK, "max_tokens": 40, "seed": 5, "temperature": 1}
    plain = client.create(**fields, tools=[WEATHER], tool_choice="auto")
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    assert client.create(**fields, tools=[strict]).choices[0].message.content
    streamed = client.create(**fields, tools=[WEATHER], stream=True)
    assert plain.choices[0].message.tool_calls is None
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert text == plain.choices[0].message.content


def test_what_the_template_does_not_read_is_refused(client: Any) -> None:
    kwargs = {"chat_template_kwargs": {"enable_thinking": False}}
    with pytest.raises(openai.BadRequestError, match="no variable 'enable_thinking'; it reads tools") as refusal:
        client.create(model="demo", messages=ASK, extra_body=kwargs)
    assert refusal.value.param == "chat_template_kwargs"


def test_the_server_says_how_it_parses(server: RealServer) -> None:
    info = httpx.get(f"{server.url}/model_info").json()
    assert (info["tool_call_parser"], info["reasoning_parser"]) == ("hermes", None)
