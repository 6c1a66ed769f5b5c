"""Reading checkpoints, refusing broken ones by name, and dummy weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import NATIVE_FAMILIES, CheckpointMaker, make_module
from transformers import AutoConfig

from minisgl.scheduler_proc.models.config import ModelError
from minisgl.scheduler_proc.models.decoder import Decoder
from minisgl.scheduler_proc.models.loader import load_model


def load(directory: Path, dummy_seed: int | None = None, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "dtype": dtype,
        "device": torch.device("cpu"),
        "context_length": 128,
        "dummy_seed": dummy_seed,
        "trust_remote_code": False,
        "progress": lambda done, total: None,
    }
    return load_model(directory, **{**settings, **options})


def tensors(model: Decoder) -> list[tuple[str, torch.Tensor]]:
    return list(model.weights.named_tensors())


def assert_same_weights(one: Decoder, other: Decoder) -> None:
    for (name, tensor), (_, expected) in zip(tensors(one), tensors(other), strict=True):
        assert torch.equal(tensor, expected), name


@pytest.fixture
def copy(tmp_path: Path, checkpoint: CheckpointMaker) -> Path:
    """A copy of a tiny Qwen3 checkpoint that a test may spoil."""
    return Path(shutil.copytree(checkpoint("qwen3-untied").directory, tmp_path / "model"))


def change_tensors(directory: Path, **changes: torch.Tensor | None) -> None:
    path = directory / "model.safetensors"
    stored: dict[str, Any] = {**load_file(path), **{name.replace("__", "."): value for name, value in changes.items()}}
    save_file({name: value for name, value in stored.items() if value is not None}, path, {"format": "pt"})


@pytest.mark.parametrize("family", NATIVE_FAMILIES)
def test_sharded_and_single_files_load_equal(family: str, tmp_path: Path, checkpoint: CheckpointMaker) -> None:
    model = checkpoint(family)
    model.module.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_weights(load(tmp_path), load(model.directory))


def test_progress_counts_to_its_total(copy: Path) -> None:
    seen: list[tuple[int, int]] = []
    load(copy, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert {total for _, total in seen} == {len(seen)}


def test_weights_are_converted_to_the_asked_precision(copy: Path) -> None:
    full, half = load(copy), load(copy, dtype=torch.bfloat16)
    for (name, tensor), (_, expected) in zip(tensors(half), tensors(full), strict=True):
        assert torch.equal(tensor, expected.bfloat16()), name


def test_a_missing_tensor_is_named(copy: Path) -> None:
    change_tensors(copy, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(ModelError, match=r"lacks 1 of \d+ tensors, such as model\.layers\.1\.mlp\.up_proj\.weight"):
        load(copy)


def test_a_tensor_of_the_wrong_shape_is_named(copy: Path) -> None:
    change_tensors(copy, model__layers__0__self_attn__k_norm__weight=torch.ones(9))
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.k_norm\.weight has shape \[9\].*asks for \[8\]"):
        load(copy)


def test_unused_tensors_are_mentioned(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    change_tensors(copy, model__extra=torch.ones(2), model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(2))
    with caplog.at_level("WARNING"):
        load(copy)
    assert "1 tensors of the checkpoint are not used, such as model.extra" in caplog.text


def test_an_absent_shard_is_named(tmp_path: Path, checkpoint: CheckpointMaker) -> None:
    checkpoint("qwen2").module.save_pretrained(tmp_path, max_shard_size="20KB")
    gone = max(tmp_path.glob("*.safetensors"))
    gone.unlink()
    with pytest.raises(ModelError, match=f"{gone.name} is missing"):
        load(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}'])
def test_a_broken_index_is_refused(copy: Path, content: str) -> None:
    (copy / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match="not a safetensors index"):
        load(copy)


def test_a_cut_file_is_refused(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        load(copy)


def test_pickled_weights_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin, a pickle"):
        load(copy)
    (copy / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors weights"):
        load(copy)


def test_dummy_weights_need_the_config_alone_and_follow_the_seed(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    model = load(copy, dummy_seed=1)
    assert_same_weights(model, load(copy, dummy_seed=1))
    other = load(copy, dummy_seed=2)
    for (name, tensor), (_, different) in zip(tensors(model), tensors(other), strict=True):
        assert torch.isfinite(tensor).all()
        assert torch.equal(tensor, different) == ("norm" in name), name


def test_transformers_checkpoints_with_missing_tensors_are_refused(tmp_path: Path, checkpoint: CheckpointMaker) -> None:
    directory = Path(shutil.copytree(checkpoint("gpt_neox").directory, tmp_path / "model"))
    change_tensors(directory, gpt_neox__layers__0__attention__dense__weight=None)
    with pytest.raises(ModelError, match=r"lacks 1 tensors of GPTNeoXForCausalLM.*attention\.dense\.weight"):
        load(directory)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load(directory)


def test_transformers_models_take_dummy_weights(tmp_path: Path) -> None:
    make_module("gpt2", {}).config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))
    model = load(tmp_path, dummy_seed=3)
    assert [(shape.heads, shape.head_dim) for shape in model.kv_shapes] == [(4, 8)] * 3


@pytest.mark.parametrize(
    ("model_type", "architecture", "reason"),
    [
        ("bloom", "BloomForCausalLM", "does not support transformers' attention interface"),
        ("mamba", "MambaForCausalLM", "linear_attention layers"),
        ("bert", "BertLMHeadModel", "not causal"),
        ("t5", "T5ForConditionalGeneration", "encoder-decoder"),
        ("vit", "ViTModel", "not a causal language model"),
    ],
)
def test_what_cannot_run_on_paged_kv_is_refused_by_name(
    model_type: str, architecture: str, reason: str, tmp_path: Path
) -> None:
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(model_type, **small, architectures=[architecture])
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"{architecture} .*{reason}"):
        load(tmp_path, dummy_seed=0)


def test_an_unknown_model_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model", "architectures": ["NoSuchModel"]}')
    with pytest.raises(ModelError, match="no-such-model"):
        load(tmp_path)


@pytest.mark.parametrize(("context_length", "warned"), [(64, False), (128, True)])
def test_a_position_encoding_that_grows_with_the_batch_is_mentioned(
    context_length: int, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    module = make_module("phi3", {"rope_parameters": rope, "original_max_position_embeddings": 64})
    module.save_pretrained(tmp_path)
    with caplog.at_level("WARNING", logger="minisgl"):
        load(tmp_path, context_length=context_length)
    assert ("--context-length 64 avoids that" in caplog.text) == warned
