"""What the decoder needs to know about a model, read from its config.json; torch is not needed for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NATIVE_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""What decoder.py computes itself; everything else goes through transformers_model.py."""

NATIVE_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic")


class ModelError(Exception):
    """The model cannot be loaded; the message says what is wrong with which file."""


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama-like decoder.

    Attributes:
        rope_parameters: `rope_theta`, `rope_type` and what that type needs, in transformers 5's names.
        qkv_bias, output_bias, mlp_bias: which linear layers have a bias.
        qk_norm: whether queries and keys are RMS-normalised per head before the rotation.
        windows: per layer, how many positions a query sees including its own; None is all.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_parameters: Mapping[str, Any]
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    windows: tuple[int | None, ...]


def read_config(directory: Path) -> dict[str, Any]:
    """The parsed config.json of a model directory; raises ModelError."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{directory} holds no config.json, so it is not a Hugging Face model directory") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object")
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown method")
        raise ModelError(f"quantised checkpoints ({method}) are not supported; use the model's unquantised weights")
    return config


def parse_config(config: Mapping[str, Any]) -> ModelConfig | None:
    """The ModelConfig of a parsed config.json, or None when decoder.py does not cover what it asks for.

    Raises ModelError when a needed field is missing or contradicts another.
    """
    architecture = (config.get("architectures") or ["none named"])[0]
    rope = _rope_parameters(config)
    if (
        architecture not in NATIVE_ARCHITECTURES
        or config.get("hidden_act", "silu") != "silu"
        or rope["rope_type"] not in NATIVE_ROPE_TYPES
        or rope.get("partial_rotary_factor", 1.0) != 1.0
    ):
        return None
    num_heads, num_layers = _int(config, "num_attention_heads"), _int(config, "num_hidden_layers")
    hidden_size = _int(config, "hidden_size")
    # Fields that a config.json leaves out have the defaults of its own family.
    family = architecture.removesuffix("ForCausalLM").lower()
    kv_heads_default = 8 if family == "mistral" else num_heads
    head_dim_default = 128 if family == "qwen3" else hidden_size // num_heads
    # Llama and Qwen3 put the bias on the output projection too, Qwen2 has it on q, k, v alone.
    attention_bias = family in ("llama", "qwen3") and bool(config.get("attention_bias", False))
    parsed = ModelConfig(
        vocab_size=_int(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_int(config, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or kv_heads_default,
        head_dim=config.get("head_dim") or head_dim_default,
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_parameters=rope,
        qkv_bias=family == "qwen2" or attention_bias,
        output_bias=attention_bias,
        mlp_bias=family == "llama" and bool(config.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        windows=_windows(config, family, num_layers),
    )
    if parsed.num_heads % parsed.num_kv_heads:
        raise ModelError(
            f"config.json: num_attention_heads ({parsed.num_heads}) is not a multiple of "
            f"num_key_value_heads ({parsed.num_kv_heads})"
        )
    if len(parsed.windows) != num_layers:
        raise ModelError(f"config.json: layer_types names {len(parsed.windows)} layers, the model has {num_layers}")
    return parsed


def _int(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise ModelError(f"config.json: {name} must be a positive integer, got {value!r}")
    return value


def _rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding's settings from transformers 5's `rope_parameters` or the older separate fields."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    # The oldest configs say "type", and some say nothing but the base.
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    rope.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    if "partial_rotary_factor" in config:
        rope.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    return rope


def _windows(config: Mapping[str, Any], family: str, num_layers: int) -> tuple[int | None, ...]:
    window = config.get("sliding_window")
    if family == "mistral":
        # An absent field means 4096 here, and only an explicit null means no window.
        return (config.get("sliding_window", 4096),) * num_layers
    if family == "llama" or not config.get("use_sliding_window") or window is None:
        return (None,) * num_layers
    first_windowed = config.get("max_window_layers", 28)
    layer_types = config.get("layer_types") or [
        "sliding_attention" if layer >= first_windowed else "full_attention" for layer in range(num_layers)
    ]
    return tuple(window if layer_type == "sliding_attention" else None for layer_type in layer_types)
