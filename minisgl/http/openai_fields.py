"""The fields of OpenAI's request bodies, with those that sglang and vLLM add: which are served, which are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from minisgl.http import tools
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
from minisgl.http.structured import OPENAI_FIELDS

MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20

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
        OBJECT,
        default=None,
        description="include_usage: close the stream with a chunk that has the token counts; continuous_usage_stats: "
        "every chunk has the counts so far",
        properties={
            "include_usage": {"type": ["boolean", "null"]},
            "continuous_usage_stats": {"type": ["boolean", "null"]},
            "include_obfuscation": {"enum": [False, None]},
        },
        additionalProperties=False,
    ),
    "n": field(INTEGER, default=1, description="answers per prompt", minimum=1, maximum=MAX_CHOICES),
    "max_tokens": SAMPLING_FIELDS["max_new_tokens"],
    "min_tokens": SAMPLING_FIELDS["min_new_tokens"],
    **{name: SAMPLING_FIELDS[name] for name in _SAME_NAMES},
    **OPENAI_FIELDS,
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
        "logprobs": field(BOOLEAN, default=False, description="also give the log probability of each token"),
        "top_logprobs": field(
            INTEGER,
            default=0,
            description="with logprobs: and those of this many likeliest tokens at its place",
            minimum=0,
            maximum=MAX_TOP_LOGPROBS,
        ),
        "add_generation_prompt": field(
            BOOLEAN,
            default=None,
            description="let the chat template begin the answer; true unless the last message is continued",
        ),
        "continue_final_message": field(
            BOOLEAN, default=False, description="continue the last message, which is the assistant's"
        ),
        "chat_template_kwargs": field(OBJECT, default=None, description="variables for the model's chat template"),
        **tools.FIELDS,
    }
)
COMPLETION_FIELDS = _nullable(
    {
        "prompt": field(
            STRING, STRINGS, TOKEN_IDS, TOKEN_ID_LISTS, default=None, description="one or several texts or lists of ids"
        ),
        **_COMMON,
        "max_tokens": field(
            INTEGER,
            default=16,
            description="tokens to generate at most; 0 only reads the prompt",
            minimum=0,
        ),
        "logprobs": field(
            INTEGER,
            default=None,
            description="also give the log probabilities of each token and of this many likeliest ones at its place; "
            "with echo, those of the prompt too",
            minimum=0,
            maximum=MAX_TOP_LOGPROBS,
        ),
        "best_of": field(INTEGER, default=None, description="only the number of answers itself, n, or 1"),
        "echo": field(BOOLEAN, default=False, description="begin each answer with its prompt"),
    }
)

_ONLY_NULL: Sequence[Any] = ()
_HARMLESS: dict[str, Sequence[Any]] = {
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
            "extra_key",
            "kv_transfer_params",
            "lora_path",
            "prompt_logprobs",
            "routed_dp_rank",
            "session_id",
            "session_params",
            "stop_regex",
            "stream_interval",
            "truncate_prompt_tokens",
            "vllm_xargs",
        ),
        _ONLY_NULL,
    ),
}
CHAT_HARMLESS: dict[str, Sequence[Any]] = {
    **_HARMLESS,
    "best_of": (1,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "echo": (False,),
    "add_special_tokens": (False,),
    "include_reasoning": (True,),
    "stream_reasoning": (True,),
    **dict.fromkeys(
        (
            "audio",
            "chat_template",
            "input_ids",
            "prediction",
            "verbosity",
            "web_search_options",
        ),
        _ONLY_NULL,
    ),
}
COMPLETION_HARMLESS: dict[str, Sequence[Any]] = {
    **_HARMLESS,
    "suffix": ("",),
    "add_special_tokens": (True,),
}
"""Fields that exist and are not served, with the values that ask for nothing; null always does."""
