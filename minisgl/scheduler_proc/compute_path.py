"""Which code computes a replica's steps: CUDA graphs of Triton kernels, a CPU's compiled steps, or plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minisgl.config import ConfigError, ServerConfig
from minisgl.scheduler_proc.attention.kv_pool import KVPool
from minisgl.scheduler_proc.device import busy_threads, cpu_flags, share_of_cores
from minisgl.scheduler_proc.kernel_compilers import KernelCompilers
from minisgl.scheduler_proc.limits import SchedulerLimits
from minisgl.scheduler_proc.models.config import parse_config, read_config
from minisgl.scheduler_proc.models.decoder import Decoder
from minisgl.scheduler_proc.models.loader import Model

if TYPE_CHECKING:
    from minisgl.scheduler_proc.cpu.tiled_decoder import TiledDecoder
    from minisgl.scheduler_proc.cuda_graphs import GraphRunner

TOKENS_PER_READ = 64
"""Tokens of a CPU's compiled step that are worth as many threads as reading the weights once is. With 16, and so two
threads for 32 streams of the demo model, two busy cores served between 20 % less and 15 % more than with one thread."""


def cpu_instructions(
    config: ServerConfig, directory: Path, device: torch.device, dtype: torch.dtype, page_size: int
) -> str | None:
    """By which instructions the CPU's compiled steps run this model, amx or avx512_bf16; None if they do not.

    Raises ConfigError when one was asked for and cannot be.
    """
    wanted = config.attention_backend
    found = None
    if (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and config.quantization is None
        and not config.enable_deterministic_inference
        and wanted in ("auto", "amx", "avx512_bf16")
        and "avx512_bf16" in cpu_flags()
        and find_spec("numba") is not None
    ):
        found = _instructions_for(directory, page_size, wanted)
    if found is None and wanted in ("amx", "avx512_bf16"):
        raise ConfigError(
            f"--attention-backend {wanted} needs an x86 CPU with {wanted.replace('_', '-').upper()}, Linux, the numba "
            "package, bfloat16, a page size that is a multiple of 16 and a Llama, Mistral, Qwen2 or Qwen3 model; leave "
            "the flag out to use what works here"
        )
    return found


def _instructions_for(directory: Path, page_size: int, wanted: str) -> str | None:
    # Imported here because numba and its compiler are needed for nothing else.
    from minisgl.scheduler_proc.cpu.instructions import available
    from minisgl.scheduler_proc.cpu.tiled_decoder import tiles_fit

    model_config = parse_config(read_config(directory))
    if model_config is None or not tiles_fit(model_config, page_size):
        return None
    return next((name for name in available() if wanted in ("auto", name)), None)


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


def cut_into_tiles(
    model: Model, config: ServerConfig, instructions: str, progress: Callable[[int, int], None]
) -> TiledDecoder:
    """Pack a model's matrices into tiles; `progress` is called with the layers that are done and their number."""
    from minisgl.scheduler_proc.cpu.tiled_decoder import TiledDecoder

    assert isinstance(model, Decoder)
    wanted = config.cpu_threads
    if wanted:
        return TiledDecoder(model, wanted, lambda tokens: wanted, instructions, progress)
    most = share_of_cores(config)
    return TiledDecoder(model, most, partial(_threads_for, most, model.weight_bytes), instructions, progress)


def _threads_for(most: int, weight_bytes: int, tokens: int) -> int:
    """How many threads a step of so many tokens keeps busy; few tokens take as long as reading the weights does."""
    return busy_threads(most, weight_bytes + weight_bytes * tokens // TOKENS_PER_READ)


def make_graphs(model: Model, pool: KVPool, limits: SchedulerLimits) -> GraphRunner:
    """What runs a model's steps over a pool on CUDA."""
    # Imported here because Triton exists on CUDA machines only.
    from minisgl.scheduler_proc.cuda_graphs import GraphRunner
    from minisgl.scheduler_proc.models.fused_decoder import FusedDecoder

    assert isinstance(model, Decoder)
    fused = FusedDecoder(model, pool, limits.context_length)
    return GraphRunner(fused, pool, limits.max_running, limits.context_length)


def compile_kernels(
    model: Model,
    page_size: int,
    limits: SchedulerLimits,
    device: torch.device,
    threads: int,
    progress: Callable[[int, int], None],
    compilers: KernelCompilers | None,
) -> None:
    """Compile all that a model's steps on CUDA need, in so many threads, or load it from the disk."""
    assert isinstance(model, Decoder)
    # Layers of a kind run the same kernels.
    part = model.with_a_layer_of_each_kind()
    pool = KVPool(part.kv_shapes, 1, page_size, part.weights.norm.dtype, device)
    make_graphs(part, pool, limits).compile_kernels(threads, progress, compilers)
