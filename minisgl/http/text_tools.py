"""POST /tokenize and /detokenize as sglang and vLLM have them: between texts and token ids, without the model."""

from __future__ import annotations

import asyncio
from functools import partial

from minisgl.http.errors import ApiError
from minisgl.http.generation import Caller
from minisgl.http.openai import check_model, read_chat
from minisgl.http.openai_fields import CHAT_FIELDS, CHAT_HARMLESS
from minisgl.http.questions import Questions
from minisgl.http.schemas import (
    BOOLEAN,
    NULL,
    STRING,
    STRINGS,
    TOKEN_ID_LISTS,
    TOKEN_IDS,
    check_token_ids,
    field,
    read_fields,
    without_unsupported,
)
from minisgl.messages import DetokenizeRequest, JsonObject, TokenizeRequest

MAX_TEXTS = 1024
"""Most texts that one request may hold."""

_CHAT_NAMES = (
    "messages",
    "tools",
    "tool_choice",
    "documents",
    "reasoning_effort",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "chat_template_kwargs",
)
"""The fields of a chat that its template turns into the prompt; they mean what they mean in /v1/chat/completions."""
_MODEL = field(STRING, NULL, default=None, description="the served model's name; may be left out")
TOKENIZE_FIELDS = {
    "model": _MODEL,
    "prompt": field(STRING, STRINGS, NULL, default=None, description="a text, or several", maxItems=MAX_TEXTS),
    **{name: CHAT_FIELDS[name] for name in _CHAT_NAMES if name in CHAT_FIELDS},
    "add_special_tokens": field(
        BOOLEAN,
        NULL,
        default=None,
        description="whether the tokenizer adds BOS and the like; true for a prompt, and false for a chat, whose "
        "template has already written them",
    ),
}
TOKENIZE_HARMLESS = {
    **{name: CHAT_HARMLESS[name] for name in _CHAT_NAMES if name in CHAT_HARMLESS},
    "return_token_strs": (False,),
    "mm_processor_kwargs": ({},),
}
DETOKENIZE_FIELDS = {
    "model": _MODEL,
    "tokens": field(
        TOKEN_IDS, TOKEN_ID_LISTS, default=None, description="the token ids of a text, or of several", maxItems=2**20
    ),
    "skip_special_tokens": field(BOOLEAN, NULL, default=True, description="leave special tokens out of the text"),
}


async def tokenize(body: JsonObject, caller: Caller, questions: Questions) -> JsonObject:
    """The answer to POST /tokenize; raises ApiError with a sentence that says what to change."""
    given = without_unsupported(body, TOKENIZE_FIELDS, TOKENIZE_HARMLESS)
    values = read_fields(given, TOKENIZE_FIELDS)
    check_model(values["model"], caller.model)
    prompt, messages = values["prompt"], values["messages"]
    if (prompt is None) == (messages is None):
        found = "neither" if prompt is None else "both"
        raise ApiError(400, "prompt_or_messages", f"send either 'prompt' or 'messages'; this request has {found}")
    add_special_tokens = messages is None if values["add_special_tokens"] is None else values["add_special_tokens"]
    misplaced = next((name for name in given if name in _CHAT_NAMES), None)
    if prompt is not None and misplaced:
        raise ApiError(400, "invalid_value", f"{misplaced} belongs to 'messages', not to 'prompt'", param=misplaced)
    prompts = prompt if isinstance(prompt, list) else [prompt]
    template: JsonObject = {}
    if messages is not None:
        chat, template = _chat(given, caller)
        prompts = [chat]
    _check_count("prompt", len(prompts))
    asked = (
        questions.text(partial(TokenizeRequest, prompt=one, template=template, add_special_tokens=add_special_tokens))
        for one in prompts
    )
    tokens = [answer.token_ids for answer in await asyncio.gather(*asked)]
    counts = [len(ids) for ids in tokens]
    several = isinstance(prompt, list)
    return {
        "tokens": tokens if several else tokens[0],
        "count": counts if several else counts[0],
        "max_model_len": caller.model.context_length,
        "token_strs": None,
    }


async def detokenize(body: JsonObject, caller: Caller, questions: Questions) -> JsonObject:
    """The answer to POST /detokenize, under both sglang's name (`text`) and vLLM's (`prompt`); raises ApiError."""
    values = read_fields(without_unsupported(body, DETOKENIZE_FIELDS, {}), DETOKENIZE_FIELDS)
    check_model(values["model"], caller.model)
    tokens = values["tokens"]
    if tokens is None:
        raise ApiError(400, "invalid_value", "send the 'tokens' of a text", param="tokens")
    several = bool(tokens) and isinstance(tokens[0], list)
    lists = tokens if several else [tokens]
    _check_count("tokens", len(lists))
    for ids in lists:
        check_token_ids("tokens", ids, caller.model.vocab_size)
    skip = values["skip_special_tokens"]
    asked = (questions.text(partial(DetokenizeRequest, token_ids=ids, skip_special_tokens=skip)) for ids in lists)
    texts = [answer.text for answer in await asyncio.gather(*asked)]
    text = texts if several else texts[0]
    return {"text": text, "prompt": text}


def _chat(given: JsonObject, caller: Caller) -> tuple[list[JsonObject], JsonObject]:
    """The messages of a chat and its template's variables, checked as those of a chat completion are."""
    chat = {name: value for name, value in given.items() if name in _CHAT_NAMES}
    ask = read_chat(chat, caller).asks[0]
    return [message for message in ask.prompt if isinstance(message, dict)], ask.template or {}


def _check_count(name: str, count: int) -> None:
    if not 1 <= count <= MAX_TEXTS:
        raise ApiError(400, "invalid_value", f"{name} must hold from 1 to {MAX_TEXTS} texts, got {count}", param=name)
