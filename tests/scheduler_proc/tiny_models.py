"""Tiny random checkpoints of many families, and what runs requests on them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minisgl.config import ModelSpec, ServerConfig
from minisgl.messages import TokenizedRequest
from minisgl.sampling_params import SamplingParams
from minisgl.scheduler_proc.core import ReplicaCore
from minisgl.scheduler_proc.engine import StepEngine
from minisgl.scheduler_proc.models.decoder import Decoder
from minisgl.scheduler_proc.models.loader import load_model

VOCAB_SIZE = 97
CONTEXT_LENGTH = 128
PROMPT_LENGTHS = (3, 17, 30, 9)
NEW_TOKENS = 10

_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_LENGTH,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LOCAL_AND_GLOBAL = ["sliding_attention", "full_attention", "sliding_attention"]

NATIVE_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": False}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16, "tie_word_embeddings": True}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}}),
    "llama-yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-windowed": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "qwen3-untied": ("qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": False}),
}
"""Name -> transformers' model type and what differs from the small default."""

GENERIC_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt_neox": ("gpt_neox", {}),
    "phi": ("phi", {"partial_rotary_factor": 0.5}),
    "phi3": ("phi3", {"sliding_window": 8}),
    "starcoder2": ("starcoder2", {"sliding_window": 8}),
    "olmo2": ("olmo2", {}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": _LOCAL_AND_GLOBAL,
            "attn_logit_softcapping": 2.0,
            "tie_word_embeddings": False,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 8, "sliding_window": 8, "layer_types": _LOCAL_AND_GLOBAL, "tie_word_embeddings": False},
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": _LOCAL_AND_GLOBAL,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": (
        "deepseek_v3",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
    ),
}


@dataclass(frozen=True)
class Checkpoint:
    """A tiny model on disk, as transformers saved it, and the same model in memory."""

    directory: Path
    module: Any

    @property
    def spec(self) -> ModelSpec:
        architecture = self.module.config.architectures[0]
        return ModelSpec(str(self.directory), "tiny", "tiny", CONTEXT_LENGTH, VOCAB_SIZE, (), architecture)

    def generate(self, prompt: Sequence[int], max_new_tokens: int = NEW_TOKENS, **options: Any) -> list[int]:
        """transformers' own greedy continuation of a prompt."""
        ids = torch.tensor([list(prompt)])
        output = self.module.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False, **options
        )
        return [int(token) for token in output[0, len(prompt) :]]


CheckpointMaker = Callable[[str], Checkpoint]


def make_module(model_type: str, overrides: dict[str, Any]) -> Any:
    """A random transformers model whose logits lie far enough apart that rounding does not decide the largest."""
    torch.manual_seed(sum(model_type.encode()))
    config = AutoConfig.for_model(model_type, **{**_SMALL, **overrides})
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if (parameter.ndim == 1 and "norm" in name.lower()) or ".ln_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.normal_(0.0, 0.25)
    return module


def prompts(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCAB_SIZE, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


def load_engine(spec: ModelSpec, **settings: Any) -> StepEngine:
    """An engine in float32 on the CPU, unless the settings say otherwise."""
    config = server_config(**settings)
    return StepEngine.load(config, spec, 0, lambda stage, done, total: None)


def random_decoder(directory: Path, shape: dict[str, Any], device: torch.device, context_length: int) -> Decoder:
    """A float32 decoder of random weights, whose config.json is written to the directory."""
    (directory / "config.json").write_text(json.dumps(shape))
    model = load_model(
        directory,
        dtype=torch.float32,
        device=device,
        context_length=context_length,
        dummy_seed=1,
        trust_remote_code=False,
        progress=lambda done, total: None,
    )
    assert isinstance(model, Decoder)
    return model


def server_config(**settings: Any) -> ServerConfig:
    defaults = {"device": "cpu", "dtype": "float32", "page_size": 4, "max_total_tokens": 512, "cpu_threads": 1}
    return ServerConfig(**{**defaults, **settings})


def serve(
    engine: StepEngine, spec: ModelSpec, requests: Sequence[tuple[Sequence[int], SamplingParams]], **settings: Any
) -> tuple[list[list[int]], ReplicaCore]:
    """Run requests together under the real scheduler; the new tokens of each, and the core that ran them."""
    core = ReplicaCore(engine, server_config(**settings), spec)
    for rid, (prompt, sampling) in enumerate(requests):
        refusal = core.submit(TokenizedRequest(rid, list(prompt), sampling, [0]))
        assert refusal is None, refusal
    outputs: list[list[int]] = [[] for _ in requests]
    while core.busy:
        batch = core.step()
        for rid, token in zip(batch.rids, batch.token_ids, strict=True) if batch else ():
            outputs[rid].append(token)
    return outputs, core


def cpu_instructions() -> list[str]:
    """By which instructions this machine can run compiled steps."""
    if find_spec("numba") is None:
        return []
    from minisgl.scheduler_proc.cpu.instructions import available

    return available()
