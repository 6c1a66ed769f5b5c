"""Compiles Triton kernels side by side before they are needed, instead of one after the other when first launched."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import torch
import triton

from minisgl.scheduler_proc.kernel_compilers import KernelCompilers

MOST_THREADS = 8
"""More of them wait for the interpreter's lock longer than they gain (bench/ENGINE_LOG.md, entry S1)."""


def compile_ahead(
    launch_all: Callable[[], None],
    device: torch.device,
    threads: int,
    progress: Callable[[int, int], None],
    compilers: KernelCompilers | None = None,
) -> None:
    """Compile every kernel that `launch_all` launches, or take it from Triton's cache on disk, and load it.

    Kernels that are not there yet are not run by `launch_all`: what it computes means nothing.

    Args:
        progress: called with the kernels done and their number.
        compilers: whoever compiles first what this then loads.
    """
    wanted = _missing_kernels(launch_all)
    if compilers is not None:
        # Long ones take longest, and are not to be the last.
        wanted.sort(key=lambda one: -len(inspect.getsource(one[0].fn)))
        names = [(kernel.fn.__module__, kernel.fn.__name__, specialization) for kernel, specialization in wanted]
        compilers.compile(names, progress)

    def enter_thread() -> None:
        # The current device is each thread's own, and so is its context, which only a real call makes current.
        torch.cuda.set_device(device)
        torch.cuda.synchronize(device)

    # Most of a compilation is C++, ptxas and the C compiler, which run without the interpreter's lock.
    with ThreadPoolExecutor(min(threads, MOST_THREADS), "compile", enter_thread) as pool:
        waited = [pool.submit(_load, *one) for one in wanted]
        for done, future in enumerate(as_completed(waited), 1):
            future.result()
            progress(done, len(waited))
    if compilers is not None:
        compilers.all_compiled()


def _load(kernel: Any, specialization: str) -> None:
    compiled = kernel.preload(specialization)
    # Asking for the launcher builds it, and loads the kernel into the context.
    _ = compiled.run


def _missing_kernels(launch_all: Callable[[], None]) -> list[tuple[Any, str]]:
    """Each kernel that would have been compiled: its function, and Triton's description of the specialization."""
    wanted: dict[tuple[str, str], tuple[Any, str]] = {}

    def note(*, key: str, fn: Any, compile: dict[str, Any], **others: Any) -> bool:
        wanted[f"{fn.module}.{fn.name}", key] = fn.jit_function, compile["specialization_data"]
        # True: neither compile nor run it now.
        return True

    runtime: Any = triton.knobs.runtime
    before = runtime.jit_cache_hook
    runtime.jit_cache_hook = note
    try:
        launch_all()
    finally:
        runtime.jit_cache_hook = before
    return list(wanted.values())
