"""sglang's own API: POST /generate with `text` or `input_ids`, answered in its format (sglang_wire.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minisgl.config import ModelSpec
from minisgl.http.answers import Prompt, Sink, WholeAnswer
from minisgl.http.errors import ApiError
from minisgl.http.generation import Ask, Caller, Generation, check_sampling, samples, to_read_only
from minisgl.http.native import SAMPLING_FIELDS
from minisgl.http.schemas import (
    BOOLEAN,
    INTEGER,
    NULL,
    OBJECT,
    STRING,
    STRINGS,
    TOKEN_ID_LISTS,
    TOKEN_IDS,
    Kind,
    check_token_ids,
    field,
    read_fields,
    without_unsupported,
)
from minisgl.http.sglang_wire import CumulativeLogprobs, CumulativeStream, SglangWire
from minisgl.http.structured import SGLANG_FIELDS, read_grammar
from minisgl.messages import JsonObject
from minisgl.sampling_params import MAX_TOP_LOGPROBS, SamplingParams

MAX_SAMPLES = 128


def _lists(plural: str, kind: Kind) -> Kind:
    """Lists of one value for each text."""
    schema = {"type": "array", "items": kind.schema}
    return Kind(f"a list of {plural}", schema, lambda value: type(value) is list and all(map(kind.accepts, value)))


_OBJECTS = _lists("objects", OBJECT)
_INTEGERS = _lists("integers", INTEGER)
FIELDS = {
    "text": field(STRING, STRINGS, default=None, description="one or several texts to continue"),
    "input_ids": field(TOKEN_IDS, TOKEN_ID_LISTS, default=None, description="the same as token ids"),
    "sampling_params": field(OBJECT, _OBJECTS, default=None, description="for all texts, or one object for each"),
    "stream": field(BOOLEAN, default=False, description="send the text so far, again and again, as it is generated"),
    "rid": field(STRING, STRINGS, default=None, description="ids of the requests, for /abort_request"),
    "return_logprob": field(
        BOOLEAN, _lists("booleans", BOOLEAN), default=False, description="also give the log probability of each token"
    ),
    "logprob_start_len": field(
        INTEGER,
        _INTEGERS,
        default=None,
        description="with return_logprob: give those of the prompt too, from this token on; -1 for none of them, which "
        "is the default unless max_new_tokens is 0",
        minimum=-1,
    ),
    "top_logprobs_num": field(
        INTEGER,
        _INTEGERS,
        default=0,
        description="with return_logprob: and those of this many likeliest tokens at each place",
        minimum=0,
        maximum=MAX_TOP_LOGPROBS,
    ),
    "return_text_in_logprobs": field(BOOLEAN, default=False, description="with return_logprob: name the tokens"),
}
ABORT_FIELDS = {
    "rid": field(STRING, NULL, default=None, description="the request's rid or X-Request-Id"),
    "abort_all": field(BOOLEAN, default=False, description="end all requests"),
}
SAMPLING = {
    **{name: spec for name, spec in SAMPLING_FIELDS.items() if name != "seed"},
    "max_new_tokens": field(
        INTEGER,
        default=SamplingParams().max_new_tokens,
        description="tokens to generate at most; null means up to the context length, 0 only reads the prompt",
        minimum=0,
    ),
    "sampling_seed": SAMPLING_FIELDS["seed"],
    "n": field(INTEGER, default=1, description="answers per text", minimum=1, maximum=MAX_SAMPLES),
    **SGLANG_FIELDS,
}

_LOGPROB_FIELDS = ("return_logprob", "logprob_start_len", "top_logprobs_num")
_ONLY_NULL: Sequence[Any] = ()
HARMLESS: dict[str, Sequence[Any]] = {
    **dict.fromkeys(
        (
            "return_hidden_states",
            "return_routed_experts",
            "return_indexer_topk",
            "return_sampling_mask",
            "return_flat_raw_top_logprobs",
            "return_flat_raw_top_logprobs_b64",
            "return_prompt_token_ids",
            "return_bytes",
            "return_entropy",
            "use_audio_in_video",
            "background",
            "require_reasoning",
            "no_logs",
        ),
        (False,),
    ),
    "routed_experts_start_len": (0,),
    "log_metrics": (True,),
    "modalities": ([], ["text"]),
    "priority": (0,),
    **dict.fromkeys(
        (
            "audio_data",
            "bootstrap_host",
            "bootstrap_port",
            "bootstrap_room",
            "cache_salt",
            "conversation_id",
            "custom_labels",
            "custom_logit_processor",
            "extra_key",
            "image_data",
            "input_embeds",
            "lora_id",
            "lora_path",
            "max_thinking_tokens",
            "routed_dp_rank",
            "routing_key",
            "session_id",
            "session_params",
            "token_ids_logprob",
            "video_data",
        ),
        _ONLY_NULL,
    ),
}
SAMPLING_HARMLESS: dict[str, Sequence[Any]] = {
    "spaces_between_special_tokens": (True,),
    "stop_regex": ([],),
    **dict.fromkeys(("beam_width", "custom_params", "stream_interval"), _ONLY_NULL),
}
"""Fields that exist and are not served, with the values that ask for nothing; null always does."""


def read(body: JsonObject, caller: Caller) -> Generation:
    """Validate a request body; raises ApiError with a sentence that says what to change."""
    if "prompt" in body or "messages" in body:
        both = "send 'text' or 'input_ids' (sglang's API) or 'prompt' or 'messages' (this server's own), not both"
        raise ApiError(400, "prompt_or_text", both)
    values = read_fields(without_unsupported(body, FIELDS, HARMLESS), FIELDS)
    prompts, is_list = _prompts(values["text"], values["input_ids"], caller.model)
    names = _names(values["rid"] or caller.request_id, len(prompts), is_list)
    given = values["sampling_params"]
    params = _each("sampling_params", {} if given is None else given, len(prompts))
    logprobs = [_each(name, values[name], len(prompts)) for name in _LOGPROB_FIELDS]
    asks: list[Ask] = []
    shown_logprobs: dict[int, CumulativeLogprobs] = {}
    for name, prompt, param, *asked in zip(names, prompts, params, *logprobs, strict=True):
        own, count, reads_only = _sampling(param)
        grammar_field, grammar = read_grammar(param)
        own |= {"grammar": grammar, **_logprobs(prompt, reads_only, *asked)}
        called = {"seed": "sampling_seed", "logprobs": "top_logprobs_num", "grammar": grammar_field or "grammar"}
        sampling = check_sampling(own, caller.model, called)
        for sample in samples(sampling, count):
            if sampling.logprobs is not None:
                shown = CumulativeLogprobs(sampling.logprobs > 0, values["return_text_in_logprobs"])
                shown_logprobs[len(asks)] = shown
            asks.append(Ask(name, prompt, sample, grammar_field=grammar_field, reads_only=reads_only))
    wire = SglangWire(len(asks), is_list or len(asks) > 1, shown_logprobs)
    sink: Sink = CumulativeStream(wire, len(asks)) if values["stream"] else WholeAnswer(wire, len(asks))
    return Generation(asks, sink)


def _each(name: str, value: Any, count: int) -> list[Any]:
    """The value for each of `count` texts."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        each = f"send one value in {name}, or a list of one for each of the {count} texts; got {len(value)}"
        raise ApiError(400, "invalid_value", each, param=name)
    return value


def _logprobs(prompt: Prompt, reads_only: bool, asked: bool, start: int | None, top: int) -> JsonObject:
    """What SamplingParams says of log probabilities; the last arguments are the values of _LOGPROB_FIELDS."""
    if start is not None and (start < -1 or (isinstance(prompt, list) and start > len(prompt))):
        within = "logprob_start_len must be a place in the prompt, or -1 for none of it"
        raise ApiError(400, "invalid_value", f"{within}; got {start}", param="logprob_start_len")
    if not asked:
        # sglang's clients send 0 and -1 whether they want any or not.
        if top or (start or 0) > 0:
            field = "top_logprobs_num" if top else "logprob_start_len"
            raise ApiError(400, "invalid_value", f"{field} needs return_logprob=true", param=field)
        return {}
    if start is None:
        # Who generates nothing wants those of the prompt, as sglang's frontend does when it selects.
        start = 0 if reads_only else -1
    return {"logprobs": top, "prompt_logprobs_from": None if start == -1 else start}


def _prompts(text: Any, input_ids: Any, model: ModelSpec) -> tuple[list[Prompt], bool]:
    """The prompts, and whether they came as a list (which is then answered by a list)."""
    if text is None and input_ids is None:
        raise ApiError(400, "prompt_or_text", "send either 'text' or 'input_ids'; this request has neither")
    if text is not None and input_ids is not None:
        raise ApiError(400, "prompt_or_text", "send either 'text' or 'input_ids', not both")
    given = input_ids if text is None else text
    name = "input_ids" if text is None else "text"
    is_list = isinstance(given, list) and (given is text or bool(given and isinstance(given[0], list)))
    prompts: list[Prompt] = given if is_list else [given]
    if not prompts or not all(prompts):
        raise ApiError(400, "invalid_value", f"{name} must not be empty", param=name)
    for prompt in prompts:
        if isinstance(prompt, list):
            check_token_ids(name, [item for item in prompt if isinstance(item, int)], model.vocab_size)
    return prompts, is_list


def _names(rid: str | list[str], count: int, is_list: bool) -> list[str]:
    names = rid if isinstance(rid, list) else [f"{rid}_{index}" for index in range(count)] if is_list else [rid]
    if len(names) != count or not all(names):
        wanted = f"rid must be a string, or a list with one for each of the {count} texts; none may be empty"
        raise ApiError(400, "invalid_value", wanted, param="rid")
    return names


def _sampling(given: JsonObject) -> tuple[JsonObject, int, bool]:
    """The sampling of one text, how many answers it gets, and whether its prompt is only to be read."""
    values = read_fields(without_unsupported(given, SAMPLING, SAMPLING_HARMLESS), SAMPLING)
    if given.get("max_new_tokens", 0) is None:
        values["max_new_tokens"] = None
    count = values.pop("n")
    if not 1 <= count <= MAX_SAMPLES:
        raise ApiError(400, "invalid_value", f"n must be from 1 to {MAX_SAMPLES}, got {count}", param="n")
    values["seed"] = values.pop("sampling_seed")
    own, reads_only = to_read_only(values, "max_new_tokens")
    return {name: value for name, value in own.items() if name not in SGLANG_FIELDS}, count, reads_only


def read_abort(body: JsonObject) -> str | None:
    """The name of the requests that POST /abort_request is to end; None means all of them."""
    values = read_fields(body, ABORT_FIELDS)
    if values["abort_all"]:
        return None
    if not values["rid"]:
        raise ApiError(400, "invalid_value", "send the 'rid' of the request to end, or abort_all=true", param="rid")
    name: str = values["rid"]
    return name.removeprefix("chatcmpl-").removeprefix("cmpl-")
