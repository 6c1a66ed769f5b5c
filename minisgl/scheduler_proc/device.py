"""Where the model runs, in which precision, with how many threads and how much memory."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from minisgl.config import ConfigError, ServerConfig
from minisgl.scheduler_proc.models.linear import LinearMakers, exact_linears, with_fixed_rows
from minisgl.scheduler_proc.models.quantized import quantized_linears

WEIGHT_BYTES_PER_THREAD = 16 * 2**20
"""Weights that a thread multiplies in about the time that it takes to wake and await it a few hundred times."""


def choose_device(config: ServerConfig, replica: int) -> torch.device:
    """The device of one replica; "auto" takes CUDA before MPS before the CPU. Raises ConfigError if it is not there."""
    kind = config.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("--device mps: this torch or this machine has no MPS; use --device cpu")
    if kind != "cuda":
        return torch.device(kind)
    if not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device; use --device cpu, or install torch for CUDA")
    index, count = config.base_gpu_id + replica, torch.cuda.device_count()
    if index >= count:
        raise ConfigError(f"replica {replica} needs CUDA device {index}, but there are {count}; lower --dp-size")
    return torch.device("cuda", index)


def choose_dtype(config: ServerConfig, device: torch.device) -> torch.dtype:
    """The precision of weights and KV cache; "auto" is bfloat16 where the hardware multiplies it, else float32.

    Half precision is never chosen by itself: models trained in bfloat16 overflow in it.
    """
    if config.dtype != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[config.dtype]
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = device.type == "cpu" and _cpu_multiplies_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def choose_linears(config: ServerConfig, device: torch.device, dtype: torch.dtype) -> LinearMakers:
    """How the weights are kept and multiplied; raises ConfigError where --quantization has no kernels."""
    linears = exact_linears(device, dtype)
    if config.quantization is not None:
        if device.type != "cpu":
            raise ConfigError(
                f"--quantization {config.quantization} runs on the CPU only, and this replica runs on {device}; "
                f"leave it out or add --device cpu"
            )
        linears = quantized_linears({"int8": 8, "int4": 4}[config.quantization])
    return with_fixed_rows(linears) if config.enable_deterministic_inference else linears


def _cpu_multiplies_bfloat16() -> bool:
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(cpu_flags())


def cpu_flags() -> set[str]:
    """What the processor can do, in Linux's words; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def set_cpu_threads(config: ServerConfig, weight_bytes: int) -> int:
    """Give this process its share of the cores, and return it.

    It takes no more threads than the weights keep busy, since the threads of a tiny model mostly wait for each other.
    """
    threads = config.cpu_threads or busy_threads(share_of_cores(config), weight_bytes)
    torch.set_num_threads(threads)
    return threads


def share_of_cores(config: ServerConfig) -> int:
    """The usable cores divided among the replicas, leaving one to the other processes from 4 cores on."""
    cores = usable_cores()
    return max(1, (cores - (cores >= 4)) // (config.dp_size or 1))


def busy_threads(most: int, weight_bytes: int) -> int:
    """How many of `most` threads a step keeps busy that reads so many bytes of weights, or computes as long."""
    return max(1, min(most, weight_bytes // WEIGHT_BYTES_PER_THREAD))


def usable_cores() -> int:
    """Physical cores this process may use, within its affinity mask and its container's quota."""
    cores = os.cpu_count() or 1
    if sys.platform == "linux":
        cores = len(os.sched_getaffinity(0))
        if _kernel_value("/sys/devices/system/cpu/smt/active") == "1":
            cores -= cores // 2
        quota = _kernel_value("/sys/fs/cgroup/cpu.max").split()
        if len(quota) == 2 and quota[0].isdigit():
            cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


def available_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if sys.platform != "linux":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    free = _meminfo_available()
    limit, used = _kernel_value("/sys/fs/cgroup/memory.max"), _kernel_value("/sys/fs/cgroup/memory.current")
    if limit.isdigit() and used.isdigit():
        free = min(free, int(limit) - int(used))
    return max(free, 0)


def _meminfo_available() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _kernel_value(path: str) -> str:
    """What a file of the kernel or of this process's container says; empty where there is none."""
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return ""


def describe(device: torch.device, threads: int) -> str:
    """The device in words, its torch name first."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({threads} threads)" if device.type == "cpu" else str(device)
