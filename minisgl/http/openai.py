"""OpenAI's API: POST /v1/chat/completions and /v1/completions (requests here, answers in openai_wire.py)."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from minisgl.config import ModelSpec
from minisgl.http.answers import Prompt
from minisgl.http.errors import ApiError
from minisgl.http.generation import Ask, Caller, Generation, check_sampling, make_sink, samples, to_read_only
from minisgl.http.message_wire import MessageWire
from minisgl.http.openai_fields import (
    CHAT_FIELDS,
    CHAT_HARMLESS,
    COMPLETION_FIELDS,
    COMPLETION_HARMLESS,
    INTERNAL_NAMES,
    MAX_CHOICES,
    MAX_TOP_LOGPROBS,
)
from minisgl.http.openai_wire import ChatWire, CompletionWire, Reply
from minisgl.http.schemas import check_token_ids, read_fields, without_unsupported
from minisgl.http.structured import read_grammar
from minisgl.http.tools import read_answer_format, read_earlier_calls
from minisgl.messages import JsonObject
from minisgl.sampling_params import SamplingParams

_SAMPLING_NAMES = frozenset(SamplingParams.__dataclass_fields__)
_STREAM_OPTIONS = ("include_usage", "continuous_usage_stats", "include_obfuscation")
_TEMPLATE_FIELDS = frozenset(("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"))
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_MESSAGE_TEXTS = ("name", "tool_call_id", "reasoning_content")
"""Fields of a message that the model's template may use."""
_MESSAGE_UNSUPPORTED = ("function_call", "audio", "refusal", "annotations")


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
    top = _top_logprobs(values["top_logprobs"], "top_logprobs")
    if top and not values["logprobs"]:
        raise ApiError(400, "invalid_value", "top_logprobs needs logprobs=true", param="top_logprobs")
    given["logprobs"] = top if values["logprobs"] else None
    sampling, grammar_field = _sampling(given, caller.model, caller.model.sampling_defaults)
    template = _template(values, messages)
    sampling, answers = read_answer_format(values, messages, template, sampling, caller.model.chat_formats)
    reply, name = _reply("chatcmpl-", values, sampling, caller)
    wire = ChatWire(reply) if answers.is_plain else MessageWire(reply, answers)
    template, grammar_field = {**template, **answers.template}, answers.grammar_field or grammar_field
    asks = [
        Ask(name, messages, params, template=template, grammar_field=grammar_field)
        for params in samples(sampling, reply.choices)
    ]
    return Generation(asks, make_sink(wire, values["stream"], len(asks)))


def read_completion(body: JsonObject, caller: Caller) -> Generation:
    """Validate a completion request; raises ApiError with a sentence that says what to change."""
    given = without_unsupported(body, COMPLETION_FIELDS, COMPLETION_HARMLESS)
    values = read_fields(given, COMPLETION_FIELDS)
    prompts = _prompts(values["prompt"], caller.model)
    if values["best_of"] not in (None, 1, values["n"]):
        raise ApiError(400, "unsupported_field", "best_of above n is not supported yet by this server", param="best_of")
    given |= {"max_tokens": values["max_tokens"], "logprobs": _top_logprobs(values["logprobs"], "logprobs")}
    given, reads_only = to_read_only(given, "max_tokens")
    sampling, grammar_field = _sampling(given, caller.model, {})
    reply, name = _reply("cmpl-", values, sampling, caller)
    asks, echoes = [], []
    for prompt in prompts:
        echo = "" if not values["echo"] else prompt if isinstance(prompt, str) else None
        # The text of token ids comes with the prompt's log probabilities.
        from_start = echo is None or (values["echo"] and sampling.logprobs is not None)
        own = replace(sampling, prompt_logprobs_from=0) if from_start else sampling
        for params in samples(own, reply.choices):
            asks.append(Ask(name, prompt, params, grammar_field=grammar_field, reads_only=reads_only))
            echoes.append(echo)
    wire = CompletionWire(reply, echoes)
    return Generation(asks, make_sink(wire, values["stream"], len(asks)))


def _top_logprobs(count: int | None, field: str) -> int | None:
    if count is not None and not 0 <= count <= MAX_TOP_LOGPROBS:
        raise ApiError(400, "invalid_value", f"{field} must be from 0 to {MAX_TOP_LOGPROBS}, got {count}", param=field)
    return count


def _template(values: JsonObject, messages: list[JsonObject]) -> JsonObject:
    """The chat template's variables beside the messages, where they are not what it has anyway."""
    variables: JsonObject = dict(values["chat_template_kwargs"] or {})
    if reserved := sorted(variables.keys() & _TEMPLATE_FIELDS):
        own_field = f"chat_template_kwargs must not have {reserved[0]!r}, which has a field of its own"
        raise ApiError(400, "invalid_value", own_field, param="chat_template_kwargs")
    if values["continue_final_message"]:
        if values["add_generation_prompt"]:
            both = "continue_final_message goes on with the last message, and add_generation_prompt begins a new one"
            raise ApiError(400, "invalid_value", f"{both}; send one of them", param="continue_final_message")
        if messages[-1]["role"] != "assistant":
            last = "continue_final_message needs a last message with the role assistant"
            raise ApiError(400, "invalid_value", last, param="continue_final_message")
        variables |= {"continue_final_message": True, "add_generation_prompt": False}
    elif values["add_generation_prompt"] is False:
        variables["add_generation_prompt"] = False
    return variables


def _reply(prefix: str, values: JsonObject, sampling: SamplingParams, caller: Caller) -> tuple[Reply, str]:
    """What all chunks of the response say of it, and the id of its requests."""
    choices: int = values["n"]
    if not 1 <= choices <= MAX_CHOICES:
        raise ApiError(400, "invalid_value", f"n must be from 1 to {MAX_CHOICES}, got {choices}", param="n")
    options: JsonObject = values["stream_options"] or {}
    if options and not values["stream"]:
        raise ApiError(400, "invalid_value", "stream_options needs stream=true", param="stream_options")
    for name, value in options.items():
        if not isinstance(value, bool | None) or name not in _STREAM_OPTIONS:
            takes = f"stream_options takes {' and '.join(_STREAM_OPTIONS[:2])}, true or false"
            raise ApiError(400, "invalid_value", takes, param="stream_options")
    if options.get("include_obfuscation"):
        unsupported = "stream_options.include_obfuscation is not supported yet by this server; leave it out"
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
        include_usage=options.get("include_usage") or False,
        eos_token_ids=caller.model.eos_token_ids,
        context_length=caller.model.context_length,
        continuous_usage=options.get("continuous_usage_stats") or False,
        logprobs=sampling.logprobs is not None,
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


def _sampling(given: JsonObject, model: ModelSpec, defaults: JsonObject) -> tuple[SamplingParams, str | None]:
    """The sampling parameters, and the field that holds their grammar.

    Args:
        given: the fields that the client has set; `logprobs` as SamplingParams has it.
    """
    values = {INTERNAL_NAMES.get(name, name): value for name, value in given.items()}
    own = {name: value for name, value in values.items() if name in _SAMPLING_NAMES}
    if values.get("include_stop_str_in_output"):
        own["no_stop_trim"] = True
    grammar_field, grammar = read_grammar(given)
    names = {internal: name for name, internal in INTERNAL_NAMES.items()}
    if grammar_field is not None:
        names["grammar"] = grammar_field
    return check_sampling({**defaults, **own, "grammar": grammar}, model, names), grammar_field


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
        if name not in ("role", "content", "tool_calls", *_MESSAGE_TEXTS, *_MESSAGE_UNSUPPORTED):
            raise refuse(f" has an unknown field {name[:64]!r}", "unknown_field")
    kept = {name: message[name] for name in _MESSAGE_TEXTS if message.get(name) is not None}
    if message.get("tool_calls") not in (None, []):
        if role != "assistant":
            raise refuse(".tool_calls are the assistant's; this message has another role")
        kept["tool_calls"] = read_earlier_calls(f"{place}.tool_calls", message["tool_calls"])
        if content is None:
            return {"role": role, **kept}
    if type(content) is list:
        for index, part in enumerate(content):
            if type(part) is not dict or part.get("type") != "text" or type(part.get("text")) is not str:
                takes = f'.content[{index}] must be {{"type": "text", "text": ...}}: this model takes text only'
                raise refuse(takes, "unsupported_content")
            if unknown := part.keys() - {"type", "text"}:
                raise refuse(f".content[{index}] has an unknown field {min(unknown)[:64]!r}", "unknown_field")
    elif type(content) is not str:
        raise refuse(".content must be a string or a list of text parts")
    # OpenAI renamed the role; the templates of other models know the old name alone.
    return {"role": "system" if role == "developer" else role, "content": content, **kept}
