"""From a model directory to a model that is ready to run.

Native families are read shard by shard: each tensor is mapped from its file and copied once, into its place in the
fused matrix that the decoder uses.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from minisgl.scheduler_proc.attention.backend import StepAttention
from minisgl.scheduler_proc.attention.kv_pool import KVShape
from minisgl.scheduler_proc.models.config import ModelConfig, ModelError, parse_config, read_config
from minisgl.scheduler_proc.models.decoder import Decoder, DecoderWeights, LayerWeights
from minisgl.scheduler_proc.models.forward_batch import ForwardBatch
from minisgl.scheduler_proc.models.linear import PLAIN, LinearMakers
from minisgl.scheduler_proc.models.rope import make_rope

logger = logging.getLogger(__name__)

WeightProgress = Callable[[int, int], None]
"""Called with the bytes (or tensors) done and their total."""

DUMMY_STD = 0.02
NOISE_LENGTH = 1_048_583


class Model(Protocol):
    """What the engine needs of a model."""

    @property
    def kv_shapes(self) -> Sequence[KVShape]:
        """The key-value heads of each layer."""

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights."""

    def forward(self, batch: ForwardBatch, attention: StepAttention) -> torch.Tensor:
        """Logits [rows that sample, vocab]."""


def load_model(
    directory: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    context_length: int,
    dummy_seed: int | None,
    trust_remote_code: bool,
    progress: WeightProgress,
    linears: LinearMakers = PLAIN,
) -> Model:
    """Load a model; `dummy_seed` makes random weights instead of reading any. Raises ModelError.

    `linears` says how the matrices are kept.
    """
    raw_config = read_config(directory)
    config = parse_config(raw_config)
    if config is None:
        if not linears.exact:
            raise ModelError(
                f"--quantization is for Llama, Mistral, Qwen2 and Qwen3 models, not for "
                f"{(raw_config.get('architectures') or ['this one'])[0]}; leave it out"
            )
        # Native models never pay for this import.
        from minisgl.scheduler_proc.models.transformers_model import load_transformers_model

        return load_transformers_model(
            directory,
            dtype=dtype,
            device=device,
            context_length=context_length,
            dummy_seed=dummy_seed,
            trust_remote_code=trust_remote_code,
            linears=linears,
        )
    weights = allocate_weights(config, dtype, device)
    if dummy_seed is None:
        read_weights(directory, config, weights, progress)
    else:
        fill_with_noise(weights, dummy_seed, progress)
    return Decoder(config, weights, make_rope(config, directory, context_length, dtype, device), linears)


def allocate_weights(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> DecoderWeights:
    """Uninitialised weights of the right shapes."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    hidden, intermediate, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    query_size, qkv_heads = config.num_heads * head_dim, config.num_heads + 2 * config.num_kv_heads
    layers = [
        LayerWeights(
            input_norm=empty(hidden),
            qkv=empty(qkv_heads * head_dim, hidden),
            qkv_bias=empty(qkv_heads * head_dim) if config.qkv_bias else None,
            qk_norm=empty(config.num_heads + config.num_kv_heads, head_dim) if config.qk_norm else None,
            output=empty(hidden, query_size),
            output_bias=empty(hidden) if config.output_bias else None,
            post_attention_norm=empty(hidden),
            gate_up=empty(2 * intermediate, hidden),
            gate_up_bias=empty(2 * intermediate) if config.mlp_bias else None,
            down=empty(hidden, intermediate),
            down_bias=empty(hidden) if config.mlp_bias else None,
        )
        for _ in range(config.num_layers)
    ]
    embedding = empty(config.vocab_size, hidden)
    head = embedding if config.tied_embeddings else empty(config.vocab_size, hidden)
    return DecoderWeights(embedding, layers, empty(hidden), head)


def checkpoint_places(config: ModelConfig, weights: DecoderWeights) -> dict[str, torch.Tensor]:
    """Where each tensor of a checkpoint belongs: its name -> a view of the weights, of the tensor's own shape.

    Norms of query and key heads are views [heads, head_dim]; the checkpoint's [head_dim] is repeated into them.
    """
    places = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.norm}
    if not config.tied_embeddings:
        places["lm_head.weight"] = weights.head
    query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}"
        places[f"{prefix}.input_layernorm.weight"] = layer.input_norm
        places[f"{prefix}.post_attention_layernorm.weight"] = layer.post_attention_norm
        if layer.qk_norm is not None:
            places[f"{prefix}.self_attn.q_norm.weight"] = layer.qk_norm[: config.num_heads]
            places[f"{prefix}.self_attn.k_norm.weight"] = layer.qk_norm[config.num_heads :]
        for kind, matrix, bias, names, sizes in (
            ("self_attn", layer.qkv, layer.qkv_bias, ("q_proj", "k_proj", "v_proj"), [query_size, kv_size, kv_size]),
            ("self_attn", layer.output, layer.output_bias, ("o_proj",), [config.hidden_size]),
            ("mlp", layer.gate_up, layer.gate_up_bias, ("gate_proj", "up_proj"), [config.intermediate_size] * 2),
            ("mlp", layer.down, layer.down_bias, ("down_proj",), [config.hidden_size]),
        ):
            for name, part in zip(names, torch.split(matrix, sizes), strict=True):
                places[f"{prefix}.{kind}.{name}.weight"] = part
            if bias is not None:
                for name, part in zip(names, torch.split(bias, sizes), strict=True):
                    places[f"{prefix}.{kind}.{name}.bias"] = part
    return places


def read_weights(directory: Path, config: ModelConfig, weights: DecoderWeights, progress: WeightProgress) -> None:
    """Copy a checkpoint into `weights`; raises ModelError that names what is missing or does not fit."""
    places = checkpoint_places(config, weights)
    missing, unused = set(places), []
    total = len(places)
    for name, tensor in checkpoint_tensors(directory):
        place = places.get(name)
        if place is None:
            unused.append(name)
            continue
        expected = place.shape[1:] if name.endswith(("q_norm.weight", "k_norm.weight")) else place.shape
        if tensor.shape != expected:
            raise ModelError(
                f"tensor {name} has shape {list(tensor.shape)}, but config.json asks for {list(expected)}: "
                f"the weights in {directory} belong to another config.json"
            )
        place.copy_(tensor)
        missing.discard(name)
        progress(total - len(missing), total)
    if missing:
        raise ModelError(
            f"the checkpoint in {directory} lacks {len(missing)} of {total} tensors, such as {min(missing)}; "
            f"the download may be incomplete"
        )
    # A tied head is stored by some, and old Llama checkpoints carry their rotary frequencies.
    unused = [name for name in unused if name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq")]
    if unused:
        logger.warning("%d tensors of the checkpoint are not used, such as %s", len(unused), unused[0])


def checkpoint_tensors(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the safetensors files, one file after the other, mapped rather than read."""
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118 - the handle is not a mapping
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} cannot be read ({error}); the download may be incomplete") from None


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, from its index or by their usual name; raises ModelError."""
    index_path = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if index_path.exists():
        try:
            shards = sorted(set(json.loads(index_path.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            raise ModelError(f"{index_path} is not a safetensors index; download the model again") from None
        files = [directory / shard for shard in shards]
    elif single.exists():
        files = [single]
    else:
        files = sorted(directory.glob("*.safetensors"))
    absent = [file.name for file in files if not file.exists()]
    if absent:
        raise ModelError(f"weight file {absent[0]} is missing in {directory}; the download is incomplete")
    if not files:
        with contextlib.suppress(StopIteration):
            pickled = next(directory.glob("*.bin"))
            raise ModelError(
                f"{directory} has its weights in {pickled.name}, a pickle that could run code when read; "
                f"use a model with safetensors files or convert it to safetensors"
            )
        raise ModelError(f"{directory} holds no *.safetensors weights; --load-format dummy runs without any")
    return files


def fill_with_noise(weights: DecoderWeights, seed: int, progress: WeightProgress) -> None:
    """Random weights, the same on every device, that keep activations finite: norms of 1, all else normal and small.

    One block of noise is repeated, since drawing every number would take a CPU 20 ns each. Its length is prime, so that
    no two rows of a matrix are alike, and it starts elsewhere in each tensor.
    """
    noise = torch.empty(NOISE_LENGTH).normal_(0.0, DUMMY_STD, generator=torch.Generator().manual_seed(seed))
    noise = noise.to(weights.embedding)
    tensors = list(weights.named_tensors())
    for index, (name, tensor) in enumerate(tensors):
        if "norm" in name:
            tensor.fill_(1.0)
        else:
            shifted = noise.roll(index * 9973)
            for part in torch.split(tensor.view(-1), NOISE_LENGTH):
                part.copy_(shifted[: len(part)])
        progress(index + 1, len(tensors))
