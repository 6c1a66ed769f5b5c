"""What the server says of itself: the model under sglang's and OpenAI's keys, and its settings."""

from __future__ import annotations

import minisgl
from minisgl.config import DEMO_MODEL, WorkerSpec
from minisgl.http.health import HealthView
from minisgl.http.openai import check_model
from minisgl.messages import JsonObject


def model_info(spec: WorkerSpec) -> JsonObject:
    """sglang's keys. Clients load a tokenizer from `tokenizer_path`, so it is a name or path that can be loaded."""
    model = spec.model
    path = model.directory if model.source == DEMO_MODEL else model.source
    return {
        "model_path": path,
        "served_model_name": model.name,
        "tokenizer_path": path,
        "is_generation": True,
        "preferred_sampling_params": None,
        "weight_version": "default",
        "load_format": spec.config.load_format,
        "reasoning_parser": model.chat_formats.reasoning_parser,
        "tool_call_parser": model.chat_formats.tool_call_parser,
        "disaggregation_mode": "null",
        "has_image_understanding": False,
        "has_audio_understanding": False,
        "architectures": [model.architecture],
        "context_length": model.context_length,
        "vocab_size": model.vocab_size,
        "eos_token_ids": list(model.eos_token_ids),
    }


def model_card(spec: WorkerSpec, started: int, name: str | None = None) -> JsonObject:
    """OpenAI's model object; raises ApiError 404 when `name` is another model's."""
    return {
        "id": check_model(name, spec.model),
        "object": "model",
        "created": started,
        "owned_by": "minisgl",
        "root": spec.model.source,
        "parent": None,
        "max_model_len": spec.model.context_length,
    }


def server_info(spec: WorkerSpec, health: HealthView) -> JsonObject:
    """Every setting but the secret ones, the model's facts, and the state of each scheduler in `internal_states`."""
    schedulers = {name: entry for name, entry in health.workers().items() if name.startswith("scheduler-")}
    kv_tokens = [entry.get("info", {}).get("kv_tokens") for entry in schedulers.values()]
    return {
        **spec.config.public(),
        **model_info(spec),
        "version": minisgl.__version__,
        "dp_size": spec.replicas,
        "max_total_num_tokens": kv_tokens[0] if kv_tokens else None,
        "max_req_input_len": spec.model.context_length - 1,
        "internal_states": [{"worker": name, **entry} for name, entry in schedulers.items()],
    }
