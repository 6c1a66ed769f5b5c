"""How many KV pages a replica makes."""

from __future__ import annotations

import torch

from minisgl.config import ConfigError, ServerConfig
from minisgl.scheduler_proc.device import available_memory
from minisgl.scheduler_proc.limits import SchedulerLimits

DEFAULT_CUDA_FRACTION = 0.85
"""Share of a GPU's memory for weights and KV cache together."""
DEFAULT_HOST_FRACTION = 0.4
"""Share of the memory that is still free for the KV cache of CPU and MPS replicas; the rest stays the system's."""
GIB = 2**30


def choose_num_pages(
    config: ServerConfig,
    limits: SchedulerLimits,
    device: torch.device,
    *,
    page_size: int,
    page_bytes: int,
    activation_bytes: int,
) -> int:
    """Pages for the KV pool, at least 1; call it when the weights are loaded.

    Args:
        page_size: tokens per page.
        page_bytes: memory of one page over all layers.
        activation_bytes: CUDA memory that the largest step takes beside weights and KV.

    Raises:
        ConfigError: not one page fits, or less than --max-total-tokens asks for; the message has the numbers.
    """
    free = available_memory(device)
    if config.max_total_tokens is not None:
        return _pages_asked_for(config.max_total_tokens, free - activation_bytes, device, page_size, page_bytes)
    if device.type == "cuda":
        fraction = config.mem_fraction_static or DEFAULT_CUDA_FRACTION
        total = torch.cuda.get_device_properties(device).total_memory
        budget = free - max((1 - fraction) * total, activation_bytes)
    else:
        fraction = config.mem_fraction_static or DEFAULT_HOST_FRACTION
        # More than every running request could use at its longest would never be touched.
        most_used = limits.max_running * -(-limits.context_length // page_size) * page_bytes
        budget = min(free * fraction / (config.dp_size or 1), most_used)
    if budget < page_bytes:
        raise ConfigError(
            f"no room for the KV cache on {device}: {free / GIB:.2f} GiB are free after loading the weights, "
            f"--mem-fraction-static {fraction:g} leaves {max(budget, 0) / GIB:.3f} GiB of them, and one page of "
            f"{page_size} tokens takes {page_bytes / GIB:.3f} GiB; raise --mem-fraction-static or serve a smaller model"
        )
    return int(budget // page_bytes)


def _pages_asked_for(tokens: int, free: int, device: torch.device, page_size: int, page_bytes: int) -> int:
    pages = tokens // page_size
    if not pages:
        raise ConfigError(f"--max-total-tokens {tokens} is less than one page of {page_size} tokens; raise it")
    if pages * page_bytes > free:
        raise ConfigError(
            f"--max-total-tokens {tokens} needs {pages * page_bytes / GIB:.2f} GiB of KV memory, but "
            f"{free / GIB:.2f} GiB are free on {device} after loading the weights; lower it"
        )
    return pages
