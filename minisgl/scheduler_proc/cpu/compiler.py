"""How the functions of this package are compiled: to run without the interpreter's lock, and kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import llvmlite.binding
import numba
from numba import njit

Compiler: TypeAlias = Callable[[Callable[..., Any]], Callable[..., Any]]

# LLVM avoids vectors of 512 bits since they lower the clock of the first CPUs that had them; those with AMX do not.
_settings: Any = numba.config
_settings.CPU_NAME = llvmlite.binding.get_host_cpu_name()
_settings.CPU_FEATURES = llvmlite.binding.get_host_cpu_features().flatten() + ",-prefer-256-bit"


def _can_keep() -> bool:
    """Whether numba finds a place on disk that it may write to: beside the source, or in the user's cache."""

    def nothing() -> None:
        pass

    try:
        njit(cache=True)(nothing)
    except RuntimeError:
        return False
    return True


_KEEP = _can_keep()

compiled: Compiler = njit(nogil=True, cache=_KEEP, error_model="numpy", fastmath={"contract"})
"""Products and sums may be fused into one instruction; nothing else changes what the source says."""
compiled_to_sum: Compiler = njit(nogil=True, cache=_KEEP, error_model="numpy", fastmath={"contract", "reassoc"})
"""Sums may also be added up in another order, so that a loop which adds one number to another can be vectorised."""
inlined: Compiler = njit(inline="always")
"""Becomes part of its caller, with the caller's rules. What calls compiled functions should be inlined itself: numba
makes machine code of a compiled function anew for each caller of its callers."""
