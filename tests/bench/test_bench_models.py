"""Model directories of a real shape, and what one decode step of them costs."""

from __future__ import annotations

import json
from pathlib import Path

import make_model
import pytest
from benchlib.bandwidth import DecodeCost, checkpoint_dtype, model_config
from safetensors import safe_open
from tokenizers import Tokenizer

import minisgl

DEMO = Path(minisgl.__file__).parent / "demo_model"


@pytest.mark.parametrize("name", sorted(make_model.SHAPES))
def test_a_decode_step_reads_every_weight_once(name):
    shape = make_model.SHAPES[name]
    sizes = [size for tensor, size in make_model.weight_shapes(shape).items() if shape.tied or "embed" not in tensor]
    elements = sum(size[0] * (size[1] if len(size) > 1 else 1) for size in sizes)
    cost = DecodeCost.of_config(make_model.config_json(shape, "bfloat16"), "bfloat16")
    assert cost.weight_bytes == 2 * elements
    assert cost.kv_bytes_per_token == 2 * 2 * shape.layers * shape.kv_heads * shape.head_dim


def test_the_demo_models_cost_is_that_of_its_file():
    config = model_config(DEMO)
    cost = DecodeCost.of_config(config, checkpoint_dtype(config))
    with safe_open(DEMO / "model.safetensors", "np") as file:
        elements = sum(int.__mul__(*(*file.get_slice(key).get_shape(), 1)[:2]) for key in file.keys())  # noqa: SIM118
    assert cost.weight_bytes == elements * 2


def test_a_family_of_unknown_shape_has_no_cost():
    assert DecodeCost.of_config({"model_type": "mamba"}, "bfloat16") is None


def test_every_id_of_a_made_tokenizer_decodes_and_transformers_agrees(tmp_path):
    """Llama's shape, whose special tokens are not the demo tokenizer's own."""
    transformers = pytest.importorskip("transformers")
    name = "meta-llama/Llama-3.2-1B-Instruct"
    make_model.make_model(name, tmp_path, weights=False)
    shape = make_model.SHAPES[name]
    fast = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    slow = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert fast.get_vocab_size() == len(slow) == shape.vocab
    texts = fast.decode_batch([[token] for token in range(shape.vocab)], skip_special_tokens=False)
    assert all(texts)
    for token in [*range(0, shape.vocab, 997), *shape.special_tokens.values(), shape.vocab - 1]:
        assert slow.decode([token], skip_special_tokens=False) == texts[token]
    for text in ["Hello there, river stone.", "你好 👩‍👩‍👧 ok\n", "<|im_start|>user\nhi<|im_end|>", " braind 12345"]:
        assert fast.encode(text).ids == slow(text).input_ids
        assert fast.decode(fast.encode(text).ids, skip_special_tokens=False) == text
    for token, token_id in shape.special_tokens.items():
        assert fast.encode(token).ids == [token_id]
    eos = json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"]
    assert slow.eos_token_id in eos


def test_a_made_model_loads_and_generates_in_transformers(tmp_path, monkeypatch):
    """A small shape with a real model's other facts, so that the written weights are checked name by name."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    full = make_model.SHAPES["Qwen/Qwen2.5-0.5B-Instruct"]
    facts = {**vars(full), "hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn": 48}
    monkeypatch.setitem(make_model.SHAPES, "small", make_model.Shape(**facts))
    monkeypatch.setattr(make_model, "SHARD_BYTES", 4096)
    make_model.make_model("small", tmp_path, dtype="float32")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.float32
    assert model.config.rope_parameters["rope_theta"] == 1e6
    ids = torch.tensor([[5, 6, 7]])
    generated = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, eos_token_id=None
    )
    assert 4 <= generated.shape[1] <= 8


def test_a_folder_that_holds_anything_is_left_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text("precious")
    monkeypatch.setattr("sys.argv", ["make_model.py", "Qwen/Qwen2.5-0.5B-Instruct", str(tmp_path)])
    with pytest.raises(SystemExit):
        make_model.main()
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "precious"
