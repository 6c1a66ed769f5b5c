"""The fields of OpenAI's request bodies, with those that sglang and vLLM add: which are served, which are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from minisgl.http.native import SAMPLING_FIELDS
from minisgl.http.schemas import (
    BOOLEAN,
    INTEGER,
    LIST,
    NULL,
    OBJECT,
    STRING,
    STRINGS,
    TOKEN_ID_LISTS,
    TOKEN_IDS,
    Field,
    field,
)

MAX_CHOICES = 128

INTERNAL_NAMES = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}
_SAME_NAMES = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "ignore_eos",
    "stop",
    "stop_token_ids",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "logit_bias",
    "skip_special_tokens",
    "no_stop_trim",
)


def _nullable(fields: Mapping[str, Field]) -> dict[str, Field]:
    """OpenAI's clients send null for what was not set."""
    return {
        name: spec if NULL in spec.kinds else replace(spec, kinds=(*spec.kinds, NULL)) for name, spec in fields.items()
    }


_COMMON = {
    "model": field(STRING, default=None, description="the served model's name; may be left out"),
    "stream": field(BOOLEAN, default=False, description="send the text as it is generated"),
    "stream_options": field(
        OBJECT, default=None, description="include_usage: close the stream with a chunk that has the token counts"
    ),
    "n": field(INTEGER, default=1, description="answers per prompt", minimum=1, maximum=MAX_CHOICES),
    "max_tokens": SAMPLING_FIELDS["max_new_tokens"],
    "min_tokens": SAMPLING_FIELDS["min_new_tokens"],
    **{name: SAMPLING_FIELDS[name] for name in _SAME_NAMES},
    "include_stop_str_in_output": field(BOOLEAN, default=False, description="vLLM's name for no_stop_trim"),
    "rid": field(STRING, default=None, description="id of the request, for /abort_request", minLength=1),
    "user": field(STRING, default=None, description="no effect: this server keeps no accounts"),
    "safety_identifier": field(STRING, default=None, description="no effect: this server keeps no accounts"),
    "prompt_cache_key": field(STRING, default=None, description="no effect: it only helps to route between servers"),
    "metadata": field(OBJECT, default=None, description="no effect: this server stores no requests"),
}
CHAT_FIELDS = _nullable(
    {
        "messages": field(LIST, default=None, description="the chat so far", minItems=1),
        **_COMMON,
        "max_tokens": replace(SAMPLING_FIELDS["max_new_tokens"], default=None),
        "max_completion_tokens": replace(SAMPLING_FIELDS["max_new_tokens"], default=None),
    }
)
COMPLETION_FIELDS = _nullable(
    {
        "prompt": field(
            STRING, STRINGS, TOKEN_IDS, TOKEN_ID_LISTS, default=None, description="one or several texts or lists of ids"
        ),
        **_COMMON,
        "max_tokens": replace(SAMPLING_FIELDS["max_new_tokens"], default=16),
        "best_of": field(INTEGER, default=None, description="only the number of answers itself, n, or 1"),
        "echo": field(BOOLEAN, default=False, description="begin each answer with its prompt, which must be text"),
    }
)

_ONLY_NULL: Sequence[Any] = ()
_HARMLESS: dict[str, Sequence[Any]] = {
    "response_format": ({"type": "text"},),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "priority": (0,),
    "bad_words": ([],),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "spaces_between_special_tokens": (True,),
    "return_token_ids": (False,),
    "return_prompt_token_ids": (False,),
    "return_hidden_states": (False,),
    "return_routed_experts": (False,),
    "return_meta_info": (False,),
    "return_cached_tokens_details": (False,),
    **dict.fromkeys(
        (
            "allowed_token_ids",
            "cache_salt",
            "custom_logit_processor",
            "custom_params",
            "data_parallel_rank",
            "ebnf",
            "extra_key",
            "guided_choice",
            "guided_grammar",
            "guided_json",
            "guided_regex",
            "json_schema",
            "kv_transfer_params",
            "lora_path",
            "prompt_logprobs",
            "regex",
            "routed_dp_rank",
            "session_id",
            "session_params",
            "stop_regex",
            "stream_interval",
            "structural_tag",
            "structured_outputs",
            "truncate_prompt_tokens",
            "vllm_xargs",
        ),
        _ONLY_NULL,
    ),
}
CHAT_HARMLESS: dict[str, Sequence[Any]] = {
    **_HARMLESS,
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "documents": ([],),
    "echo": (False,),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "chat_template_kwargs": ({},),
    "separate_reasoning": (False,),
    **dict.fromkeys(
        (
            "audio",
            "chat_template",
            "include_reasoning",
            "input_ids",
            "prediction",
            "reasoning_effort",
            "stream_reasoning",
            "verbosity",
            "web_search_options",
        ),
        _ONLY_NULL,
    ),
}
COMPLETION_HARMLESS: dict[str, Sequence[Any]] = {
    **_HARMLESS,
    "logprobs": _ONLY_NULL,
    "suffix": ("",),
    "add_special_tokens": (True,),
}
"""Fields that exist and are not served, with the values that ask for nothing; null always does."""
