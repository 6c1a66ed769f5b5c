"""The products around attention in a decode step of few rows: row_linear.py's for one, batch_linear.py's for more."""

from __future__ import annotations

import torch

from minisgl.scheduler_proc.kernels import batch_linear, row_linear

MAX_ROWS = 16
MAX_WIDTH = 2048
"""Widest hidden state whose weight tiles still fit in registers."""


def norm_linear(
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    pdl: bool,
) -> torch.Tensor:
    """linear(rms_norm(residual)): float32 [rows <= 16, hidden] to [rows, width] in the weight's dtype."""
    run = row_linear.norm_linear if len(residual) == 1 else batch_linear.norm_linear
    return run(residual, norm_weight, weight, bias, eps, pdl)


def norm_gate_up(
    residual: torch.Tensor, norm_weight: torch.Tensor, weight: torch.Tensor, eps: float, pdl: bool
) -> torch.Tensor:
    """silu(gate) * up of linear(rms_norm(residual)); weight [2 * width, hidden], gate first; [rows <= 16, width]."""
    run = row_linear.norm_gate_up if len(residual) == 1 else batch_linear.norm_gate_up
    return run(residual, norm_weight, weight, eps, pdl)


def linear_add(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, pdl: bool) -> None:
    """Add linear(x), x [rows <= 16, K], to the float32 residual [rows, width] in place."""
    run = row_linear.linear_add if len(x) == 1 else batch_linear.linear_add
    run(x, weight, residual, pdl)
