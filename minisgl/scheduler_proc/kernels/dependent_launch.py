"""Programmatic dependent launch: how the kernels of a step overlap (compute capability 9.0 and up).

A kernel launched so begins while its predecessor still runs, loads what does not depend on it - weights, the step's
inputs, keys and values of earlier steps - and then waits for it (`gdc_wait`). Nothing else may be read, and nothing
written, before that wait. `gdc_launch_dependents` stands at each kernel's start: the next one may begin at once.
Behind a kernel without it, such as cuBLAS's, only the launch itself overlaps, with that kernel's end.
"""

from __future__ import annotations

import torch


def supported(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(pdl: bool) -> dict[str, bool]:
    """What Triton's launch takes for it; other targets, and the interpreter, do not know the option."""
    return {"launch_pdl": True} if pdl else {}
