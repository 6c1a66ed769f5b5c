"""How the functions of this package are compiled: to run without the interpreter's lock, and kept on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import llvmlite.binding
import numba
from numba import njit

Compiler: TypeAlias = Callable[[Callable[..., Any]], Callable[..., Any]]

_SOURCES = Path(__file__).parent

# LLVM avoids vectors of 512 bits since they lower the clock of the first CPUs that had them, which do not run this.
# Code for AMX and AVX512-BF16 is compiled on every CPU, and runs where it can.
_settings: Any = numba.config
_settings.CPU_NAME = llvmlite.binding.get_host_cpu_name()
_settings.CPU_FEATURES = llvmlite.binding.get_host_cpu_features().flatten() + (
    ",-prefer-256-bit,+amx-tile,+amx-bf16,+amx-int8,+avx512bf16,+avx512vnni"
)


def place_to_keep(sources: Path, homes: Sequence[Path]) -> Path | None:
    """A folder for what is compiled of these sources, in the first home that can be written to; None if none can.

    Its name depends on the text of all of them: numba itself looks only at the file of the function that it loads,
    not at those of the functions which became part of it.
    """
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources.glob("*.py")))).hexdigest()[:16]
    for home in homes:
        place = home / f"minisgl-{digest}"
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(place, os.W_OK):
            return place
    return None


def _homes() -> list[Path]:
    """NUMBA_CACHE_DIR if it is set; beside the source, where all users share it; then the user's own cache."""
    try:
        user_cache = [Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")]
    except RuntimeError:
        user_cache = []
    wanted = [Path(_settings.CACHE_DIR)] if _settings.CACHE_DIR else []
    return [*wanted, _SOURCES / "__pycache__", *user_cache]


_place = place_to_keep(_SOURCES, _homes())
_settings.CACHE_DIR = str(_place or "")
_KEEP = _place is not None

compiled: Compiler = njit(nogil=True, cache=_KEEP, error_model="numpy", fastmath={"contract"})
"""Products and sums may be fused into one instruction; nothing else changes what the source says."""
compiled_to_sum: Compiler = njit(nogil=True, cache=_KEEP, error_model="numpy", fastmath={"contract", "reassoc"})
"""Sums may also be added up in another order, so that a loop which adds one number to another can be vectorised."""
inlined: Compiler = njit(inline="always")
"""Becomes part of its caller, with the caller's rules. What calls compiled functions should be inlined itself: numba
makes machine code of a compiled function anew for each caller of its callers."""
