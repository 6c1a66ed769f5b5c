"""Which code computes a replica's steps: CUDA graphs of Triton kernels, AMX tiles, fixed tiles, or plain torch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

from minisgl.config import ConfigError, ServerConfig
from minisgl.scheduler_proc.models.config import parse_config, read_config
from minisgl.scheduler_proc.models.decoder import Decoder
from minisgl.scheduler_proc.models.loader import Model


def use_tiles(config: ServerConfig, directory: Path, device: torch.device, dtype: torch.dtype, page_size: int) -> bool:
    """Whether the CPU's tiles run this model; raises ConfigError when that was asked for and cannot be."""
    possible = (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and config.quantization is None
        and not config.enable_deterministic_inference
        and config.attention_backend in ("auto", "amx")
        and torch.cpu._is_amx_tile_supported()
        and find_spec("numba") is not None
        and _shape_fits_tiles(directory, page_size)
    )
    if config.attention_backend == "amx" and not possible:
        raise ConfigError(
            "--attention-backend amx needs an x86 CPU with AMX, Linux, the numba package, bfloat16, a page size that "
            "is a multiple of 16 and a Llama, Mistral, Qwen2 or Qwen3 model; leave the flag out to use what works here"
        )
    return possible


def _shape_fits_tiles(directory: Path, page_size: int) -> bool:
    # Imported here because numba and its compiler are needed for nothing else.
    from minisgl.scheduler_proc.cpu.tiled_decoder import tiles_fit

    model_config = parse_config(read_config(directory))
    return model_config is not None and tiles_fit(model_config, page_size)


def use_fused_kernels(config: ServerConfig, model: Model, device: torch.device) -> bool:
    """Whether Triton kernels and graphs run this model; raises ConfigError when that was asked for and cannot be."""
    possible = device.type == "cuda" and isinstance(model, Decoder) and find_spec("triton") is not None
    if config.attention_backend == "triton" and not possible:
        raise ConfigError(
            "--attention-backend triton needs a CUDA device, the triton package and a Llama, Mistral, Qwen2 or Qwen3 "
            "model; leave the flag out to use what works here"
        )
    return possible and config.attention_backend != "torch_sdpa"


def be_deterministic(config: ServerConfig, model: Model) -> bool:
    """Whether results may not depend on the batch; raises ConfigError when that was asked for and cannot be."""
    if not config.enable_deterministic_inference:
        return False
    if not isinstance(model, Decoder) or config.attention_backend != "auto":
        raise ConfigError(
            "--enable-deterministic-inference is for Llama, Mistral, Qwen2 and Qwen3 models and has an attention "
            "backend of its own; leave it out, or leave out --attention-backend"
        )
    return True
