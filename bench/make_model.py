"""Write a model directory at the exact shape of a named model: random weights, and a tokenizer of the right size.

    python bench/make_model.py Qwen/Qwen2.5-0.5B-Instruct OUT_DIR [--no-weights] [--dtype bfloat16] [--seed 0]

Speed depends on shapes, not on what the weights say, so a machine that reaches no hub can measure the real shape. Only
facts of the published configs are used. The tokenizer is the demo model's, padded with made-up words so that every id
of the vocabulary decodes to text; answers are gibberish.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

DEMO_MODEL = Path(__file__).resolve().parents[1] / "minisgl" / "demo_model"
SHARD_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Shape:
    """The facts of a published config that fix a decoder's shape and its special token ids."""

    architecture: str
    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool
    rope_theta: float
    context: int
    rms_eps: float
    special_tokens: dict[str, int]


QWEN_SPECIAL = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
LLAMA_SPECIAL = {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|im_start|>": 128006, "<|im_end|>": 128009}

SHAPES = {
    "Qwen/Qwen2.5-0.5B-Instruct": Shape(
        "Qwen2ForCausalLM", "qwen2", 896, 24, 14, 2, 64, 4864, 151936, True, 1e6, 32768, 1e-6, QWEN_SPECIAL
    ),
    "Qwen/Qwen2.5-1.5B-Instruct": Shape(
        "Qwen2ForCausalLM", "qwen2", 1536, 28, 12, 2, 128, 8960, 151936, True, 1e6, 32768, 1e-6, QWEN_SPECIAL
    ),
    "Qwen/Qwen3-0.6B": Shape(
        "Qwen3ForCausalLM", "qwen3", 1024, 28, 16, 8, 128, 3072, 151936, True, 1e6, 40960, 1e-6, QWEN_SPECIAL
    ),
    "meta-llama/Llama-3.2-1B-Instruct": Shape(
        "LlamaForCausalLM", "llama", 2048, 16, 32, 8, 64, 8192, 128256, True, 5e5, 131072, 1e-5, LLAMA_SPECIAL
    ),
}


def config_json(shape: Shape, dtype: str) -> dict[str, object]:
    """The config.json of this shape, in the field names transformers reads."""
    eos = shape.special_tokens["<|im_end|>"]
    return {
        "architectures": [shape.architecture],
        "model_type": shape.model_type,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "rope_theta": shape.rope_theta,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.rms_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "eos_token_id": eos,
        "torch_dtype": dtype,
    }


def weight_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, in the names Hugging Face checkpoints use."""
    q_size, kv_size = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab, shape.hidden)}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        for name, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = (size, shape.hidden)
            if shape.model_type == "qwen2":
                tensors[f"{prefix}self_attn.{name}_proj.bias"] = (size,)
        if shape.model_type == "qwen3":
            tensors[f"{prefix}self_attn.q_norm.weight"] = (shape.head_dim,)
            tensors[f"{prefix}self_attn.k_norm.weight"] = (shape.head_dim,)
        tensors[f"{prefix}self_attn.o_proj.weight"] = (shape.hidden, q_size)
        tensors[f"{prefix}mlp.gate_proj.weight"] = (shape.ffn, shape.hidden)
        tensors[f"{prefix}mlp.up_proj.weight"] = (shape.ffn, shape.hidden)
        tensors[f"{prefix}mlp.down_proj.weight"] = (shape.hidden, shape.ffn)
        tensors[f"{prefix}input_layernorm.weight"] = (shape.hidden,)
        tensors[f"{prefix}post_attention_layernorm.weight"] = (shape.hidden,)
    tensors["model.norm.weight"] = (shape.hidden,)
    if not shape.tied:
        tensors["lm_head.weight"] = (shape.vocab, shape.hidden)
    return tensors


def write_weights(shape: Shape, out: Path, dtype: str, seed: int) -> None:
    """Random weights (normal, std 0.02; norms 1) as safetensors shards of at most SHARD_BYTES, with their index."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    torch_dtype = getattr(torch, dtype)
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    shard_number = 0

    def flush() -> None:
        nonlocal shard_number
        file_name = f"model-{shard_number:05d}.safetensors"
        save_file(shard, out / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file_name))
        shard_number += 1
        shard.clear()

    held = 0
    for name, size in weight_shapes(shape).items():
        norm = name.endswith("norm.weight")
        tensor = torch.ones(size) if norm else torch.empty(size).normal_(std=0.02, generator=generator)
        shard[name] = tensor.to(torch_dtype)
        held += shard[name].nbytes
        if held >= SHARD_BYTES:
            flush()
            held = 0
    if shard:
        flush()
    index = {"metadata": {}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))


def made_up_words(count: int, taken: set[str]) -> list[str]:
    """`count` distinct pronounceable words (with the byte-level mark of a leading space), none of them in `taken`."""
    onsets = "b c d f g h j k l m n p r s t v w z br cl dr fl gr pl st tr".split()  # noqa: SIM905
    vowels = ["a", "e", "i", "o", "u", "ai", "ea", "ou"]
    codas = ["", "n", "r", "s", "t", "l", "m", "nd", "st"]
    syllables = [onset + vowel for onset in onsets for vowel in vowels]
    words: list[str] = []
    for first in syllables:
        for second in syllables:
            for coda in codas:
                word = "Ġ" + first + second + coda
                if word not in taken:
                    words.append(word)
                    taken.add(word)
                if len(words) == count:
                    return words
    raise ValueError(f"only {len(words)} words can be made, {count} are needed")


def write_tokenizer(shape: Shape, out: Path) -> None:
    """The demo model's merges in a vocabulary of exactly shape.vocab ids, special tokens at the model's own ids."""
    tokenizer = json.loads((DEMO_MODEL / "tokenizer.json").read_text())
    config = json.loads((DEMO_MODEL / "tokenizer_config.json").read_text())
    demo_special = {token["content"] for token in tokenizer["added_tokens"]}
    learned = [token for token in tokenizer["model"]["vocab"] if token not in demo_special]
    learned.sort(key=tokenizer["model"]["vocab"].__getitem__)

    special_by_id = {token_id: token for token, token_id in shape.special_tokens.items()}
    filler = iter(made_up_words(shape.vocab - len(learned) - len(special_by_id), set(learned)))
    ordinary = iter([*learned, *filler])
    vocab = {special_by_id.get(token_id) or next(ordinary): token_id for token_id in range(shape.vocab)}

    tokenizer["model"]["vocab"] = vocab
    tokenizer["added_tokens"] = [
        {
            "id": token_id,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token, token_id in sorted(shape.special_tokens.items(), key=lambda item: item[1])
    ]
    # A special token that is named here but has no id would be added beyond the vocabulary.
    specials = shape.special_tokens
    config.pop("added_tokens_decoder", None)
    config["additional_special_tokens"] = list(specials)
    config["eos_token"] = "<|im_end|>"
    config["pad_token"] = next(token for token in specials if "end" in token)
    config["model_max_length"] = shape.context
    (out / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    (out / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2))
    if (DEMO_MODEL / "chat_template.jinja").exists():
        (out / "chat_template.jinja").write_text((DEMO_MODEL / "chat_template.jinja").read_text())


def make_model(name: str, out: Path, weights: bool = True, dtype: str = "bfloat16", seed: int = 0) -> None:
    """Write the whole directory; raises FileExistsError rather than touch one that holds anything."""
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; name a directory that does not exist yet")
    shape = SHAPES[name]
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config_json(shape, dtype), indent=2))
    eos_ids = sorted(shape.special_tokens[token] for token in shape.special_tokens if token != "<|im_start|>")
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_ids, "do_sample": False}, indent=2))
    write_tokenizer(shape, out)
    if weights:
        write_weights(shape, out, dtype, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(SHAPES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--no-weights", action="store_true", help="config and tokenizer only (for --load-format dummy)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        make_model(arguments.name, arguments.out, not arguments.no_weights, arguments.dtype, arguments.seed)
    except FileExistsError as error:
        parser.error(str(error))
    print(f"wrote {arguments.name}'s shape to {arguments.out}")


if __name__ == "__main__":
    main()
