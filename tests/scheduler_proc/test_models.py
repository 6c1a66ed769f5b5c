"""config.json in its old and new forms, and the rotary frequencies that come of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CONTEXT_LENGTH, NATIVE_FAMILIES, CheckpointMaker, make_module

from minisgl.scheduler_proc.models.config import ModelError, parse_config, read_config
from minisgl.scheduler_proc.models.rope import make_rope

QWEN25_05B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def parsed(**changes: Any) -> Any:
    config = {**QWEN25_05B, **changes}
    return parse_config({name: value for name, value in config.items() if value is not ...})


def test_a_hub_config_of_the_old_form() -> None:
    config = parsed()
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (14, 2, 64)
    assert config.qkv_bias and not config.output_bias and not config.qk_norm and config.tied_embeddings
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1000000.0}
    assert config.windows == (None,) * 24


def test_old_and_new_rope_fields_mean_the_same() -> None:
    old = parsed(rope_scaling={"type": "linear", "factor": 4.0})
    new = parsed(rope_theta=..., rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1000000.0})
    assert old == new


def test_window_rules_of_the_families() -> None:
    assert parsed(use_sliding_window=True).windows == (None,) * 21 + (32768,) * 3
    mistral = {"architectures": ["MistralForCausalLM"]}
    assert parsed(**mistral, sliding_window=64).windows == (64,) * 24
    assert parsed(**mistral, sliding_window=None).windows == (None,) * 24
    assert parsed(**mistral, sliding_window=...).windows == (4096,) * 24
    assert parsed(architectures=["LlamaForCausalLM"], sliding_window=64).windows == (None,) * 24


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["GPT2LMHeadModel"]},
        {"architectures": None},
        {"hidden_act": "gelu"},
        {"rope_scaling": {"rope_type": "longrope"}},
        {"partial_rotary_factor": 0.5},
    ],
)
def test_what_the_decoder_does_not_cover_is_left_to_transformers(changes: dict[str, Any]) -> None:
    assert parsed(**changes) is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": ...}, "hidden_size"),
        ({"num_hidden_layers": "24"}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types"),
    ],
)
def test_a_contradictory_config_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        parsed(**changes)


def test_unreadable_and_quantised_configs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    with pytest.raises(ModelError, match="awq"):
        read_config(tmp_path)


@pytest.mark.parametrize("family", ["llama", "llama-linear", "llama-yarn", "qwen2"])
def test_rotary_angles_equal_transformers(family: str, checkpoint: CheckpointMaker) -> None:
    model = checkpoint(family)
    config = parse_config(read_config(model.directory))
    assert config is not None
    rope = make_rope(config, model.directory, CONTEXT_LENGTH, torch.float32, torch.device("cpu"))
    positions = torch.arange(CONTEXT_LENGTH)
    cos, sin = rope.angles(positions)
    expected_cos, expected_sin = model.module.model.rotary_emb(torch.zeros(1), positions[None])
    half = config.head_dim // 2
    torch.testing.assert_close(cos[:, 0], expected_cos[0])
    torch.testing.assert_close(sin[:, 0, half:], expected_sin[0, :, half:])
    torch.testing.assert_close(sin[:, 0, :half], -expected_sin[0, :, :half])


def test_dynamic_rope_is_fixed_at_the_served_length(tmp_path: Path) -> None:
    scaling = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
    module = make_module("llama", {"rope_parameters": scaling})
    module.config.architectures = ["LlamaForCausalLM"]
    module.config.save_pretrained(tmp_path)
    config = parse_config(read_config(tmp_path))
    plain = parse_config({**read_config(tmp_path), "rope_parameters": {"rope_theta": 100.0}})
    assert config is not None and plain is not None
    cpu, positions = torch.device("cpu"), torch.arange(8)

    def cosines(which: Any, context_length: int) -> torch.Tensor:
        return make_rope(which, tmp_path, context_length, torch.float32, cpu).angles(positions)[0]

    torch.testing.assert_close(cosines(config, CONTEXT_LENGTH), cosines(plain, CONTEXT_LENGTH))
    assert not torch.allclose(cosines(config, 2 * CONTEXT_LENGTH), cosines(plain, CONTEXT_LENGTH))


def test_every_native_family_is_native(checkpoint: CheckpointMaker) -> None:
    for family in NATIVE_FAMILIES:
        assert parse_config(read_config(checkpoint(family).directory)) is not None, family
