"""OpenAI's API: POST /v1/chat/completions and /v1/completions (requests here, answers in openai_wire.py)."""

from __future__ import annotations

import time
from typing import Any

from minisgl.config import ModelSpec
from minisgl.http.answers import Prompt
from minisgl.http.errors import ApiError
from minisgl.http.generation import Ask, Caller, Generation, check_sampling, make_sink, samples
from minisgl.http.openai_fields import (
    CHAT_FIELDS,
    CHAT_HARMLESS,
    COMPLETION_FIELDS,
    COMPLETION_HARMLESS,
    INTERNAL_NAMES,
    MAX_CHOICES,
)
from minisgl.http.openai_wire import ChatWire, CompletionWire, Reply
from minisgl.http.schemas import check_token_ids, read_fields, without_unsupported
from minisgl.messages import JsonObject
from minisgl.sampling_params import SamplingParams

_SAMPLING_NAMES = frozenset(SamplingParams.__dataclass_fields__)
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_MESSAGE_TEXTS = ("name", "tool_call_id", "reasoning_content")
"""Fields of a message that the model's template may use."""
_MESSAGE_UNSUPPORTED = ("tool_calls", "function_call", "audio", "refusal", "annotations")


def read_chat(body: JsonObject, caller: Caller) -> Generation:
    """Validate a chat request; raises ApiError with a sentence that says what to change."""
    given = without_unsupported(body, CHAT_FIELDS, CHAT_HARMLESS)
    values = read_fields(given, CHAT_FIELDS)
    messages = _messages(values["messages"])
    limit = values["max_completion_tokens"]
    if limit is not None and given.get("max_tokens", limit) != limit:
        differ = "max_tokens and max_completion_tokens mean the same and differ here; send one of them"
        raise ApiError(400, "invalid_value", differ, param="max_tokens")
    given["max_tokens"] = values["max_tokens"] if limit is None else limit
    sampling = _sampling(given, caller.model, caller.model.sampling_defaults)
    reply, name = _reply("chatcmpl-", values, caller)
    wire = ChatWire(reply)
    asks = [Ask(name, messages, params) for params in samples(sampling, reply.choices)]
    return Generation(asks, make_sink(wire, values["stream"], len(asks)))


def read_completion(body: JsonObject, caller: Caller) -> Generation:
    """Validate a completion request; raises ApiError with a sentence that says what to change."""
    given = without_unsupported(body, COMPLETION_FIELDS, COMPLETION_HARMLESS)
    values = read_fields(given, COMPLETION_FIELDS)
    prompts = _prompts(values["prompt"], caller.model)
    if values["best_of"] not in (None, 1, values["n"]):
        raise ApiError(400, "unsupported_field", "best_of above n is not supported yet by this server", param="best_of")
    given["max_tokens"] = values["max_tokens"]
    sampling = _sampling(given, caller.model, {})
    reply, name = _reply("cmpl-", values, caller)
    echoes = [""] * len(prompts)
    if values["echo"]:
        echoes = [prompt for prompt in prompts if isinstance(prompt, str)]
        if len(echoes) < len(prompts):
            raise ApiError(400, "invalid_value", "echo needs prompts that are text, not token ids", param="echo")
    wire = CompletionWire(reply, [echo for echo in echoes for _ in range(reply.choices)])
    asks = [Ask(name, prompt, params) for prompt in prompts for params in samples(sampling, reply.choices)]
    return Generation(asks, make_sink(wire, values["stream"], len(asks)))


def _reply(prefix: str, values: JsonObject, caller: Caller) -> tuple[Reply, str]:
    """What all chunks of the response say of it, and the id of its requests."""
    choices: int = values["n"]
    if not 1 <= choices <= MAX_CHOICES:
        raise ApiError(400, "invalid_value", f"n must be from 1 to {MAX_CHOICES}, got {choices}", param="n")
    options: JsonObject = values["stream_options"] or {}
    if options and not values["stream"]:
        raise ApiError(400, "invalid_value", "stream_options needs stream=true", param="stream_options")
    for name, value in options.items():
        if type(value) is not bool or name not in ("include_usage", "continuous_usage_stats", "include_obfuscation"):
            takes = "stream_options takes 'include_usage', true or false"
            raise ApiError(400, "invalid_value", takes, param="stream_options")
        if value and name != "include_usage":
            unsupported = f"stream_options.{name} is not supported yet by this server; leave it out"
            raise ApiError(400, "unsupported_field", unsupported, param="stream_options")
    name = values["rid"] or caller.request_id
    if values["rid"] == "":
        raise ApiError(400, "invalid_value", "rid must not be empty", param="rid")
    model = check_model(values["model"], caller.model)
    reply = Reply(
        id=prefix + name,
        model=model,
        created=int(time.time()),
        choices=choices,
        include_usage=options.get("include_usage", False),
        eos_token_ids=caller.model.eos_token_ids,
        context_length=caller.model.context_length,
    )
    return reply, name


def check_model(name: str | None, model: ModelSpec) -> str:
    """The model's name as the client says it; raises ApiError 404 for a model that is not served here.

    sglang's clients often say "default".
    """
    if name in (None, "", "default"):
        return model.name
    if name not in (model.name, model.source, model.directory):
        unknown = f"the model {str(name)[:200]!r} does not exist here; this server serves {model.name!r}"
        raise ApiError(404, "model_not_found", unknown, param="model")
    return name


def _sampling(given: JsonObject, model: ModelSpec, defaults: JsonObject) -> SamplingParams:
    """Args: given: the fields that the client has set."""
    values = {INTERNAL_NAMES.get(name, name): value for name, value in given.items()}
    own = {name: value for name, value in values.items() if name in _SAMPLING_NAMES}
    if values.get("include_stop_str_in_output"):
        own["no_stop_trim"] = True
    return check_sampling({**defaults, **own}, model, {internal: name for name, internal in INTERNAL_NAMES.items()})


def _prompts(prompt: Any, model: ModelSpec) -> list[Prompt]:
    if prompt is None:
        raise ApiError(400, "invalid_value", "send a 'prompt'", param="prompt")
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    if not prompt or not all(prompt):
        raise ApiError(400, "invalid_value", "prompt must not be empty", param="prompt")
    prompts: list[Prompt] = prompt
    for one in prompts:
        if isinstance(one, list):
            check_token_ids("prompt", [item for item in one if isinstance(item, int)], model.vocab_size)
    return prompts


# ---- messages -------------------------------------------------------------------------------------------------------


def _messages(messages: list[Any] | None) -> list[JsonObject]:
    """The messages as the chat template gets them: without nulls, text parts as they are."""
    if not messages:
        raise ApiError(400, "invalid_value", "messages must hold at least one message", param="messages")
    return [_message(f"messages[{index}]", message) for index, message in enumerate(messages)]


def _message(place: str, message: Any) -> JsonObject:
    def refuse(sentence: str, code: str = "invalid_value") -> ApiError:
        return ApiError(400, code, f"{place}{sentence}", param="messages")

    if type(message) is not dict:
        raise refuse(" must be an object with 'role' and 'content'")
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise refuse(f".role must be one of {', '.join(_ROLES)}")
    for name, value in message.items():
        if name in _MESSAGE_UNSUPPORTED and value not in (None, []):
            raise refuse(f".{name} is not supported yet by this server; leave it out", "unsupported_field")
        if name in _MESSAGE_TEXTS and not isinstance(value, str | None):
            raise refuse(f".{name} must be a string")
        if name not in ("role", "content", *_MESSAGE_TEXTS, *_MESSAGE_UNSUPPORTED):
            raise refuse(f" has an unknown field {name[:64]!r}", "unknown_field")
    if type(content) is list:
        for index, part in enumerate(content):
            if type(part) is not dict or part.get("type") != "text" or type(part.get("text")) is not str:
                takes = f'.content[{index}] must be {{"type": "text", "text": ...}}: this model takes text only'
                raise refuse(takes, "unsupported_content")
            if unknown := part.keys() - {"type", "text"}:
                raise refuse(f".content[{index}] has an unknown field {min(unknown)[:64]!r}", "unknown_field")
    elif type(content) is not str:
        raise refuse(".content must be a string or a list of text parts")
    kept = {name: message[name] for name in _MESSAGE_TEXTS if message.get(name) is not None}
    return {"role": role, "content": content, **kept}
