"""Where a replica's steps on CUDA leave the tokens they choose: for the next step, and for the host."""

from __future__ import annotations

import torch

from minisgl.scheduler_proc.kernels.step_state import publish

TURNS = 4
"""Steps whose results the host can still read; two are in flight at most."""


class StepResults:
    """Each step's tokens in memory that both the device and the host see, and the last step's on the device.

    Args:
        capacity: tokens of a step at most, and what graphs may add to them as padding.

    Attributes:
        last_tokens: int64 [capacity] on the device, what the last step has chosen.
        turn: which of the TURNS places this step's results go to.
    """

    def __init__(self, capacity: int, device: torch.device, pdl: bool) -> None:
        self.last_tokens = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.turn = 0
        self._pdl = pdl
        self._last_output = torch.zeros(2, dtype=torch.int32, device=device)
        # The device writes here directly: a copy would be one more operation that each step waits for.
        self._on_host = torch.zeros((TURNS, 2, capacity), dtype=torch.int32, pin_memory=device.type == "cuda")

    def begin_step(self) -> None:
        """From here on results are another step's."""
        self.turn = (self.turn + 1) % TURNS

    def publish(self, tokens: torch.Tensor, finite: torch.Tensor, output: torch.Tensor) -> None:
        """Leave what a part of a step has chosen (int64 and bool [rows]) where `output` says: the turn and the row."""
        publish(tokens, finite, output, self.last_tokens, self._on_host, self._last_output, self._pdl)

    def publish_instead(self, tokens: torch.Tensor) -> None:
        """Replace the tokens of the part that was published last."""
        publish(tokens, None, self._last_output, self.last_tokens, self._on_host, self._last_output, False)

    def of_this_step(self, rows: int) -> torch.Tensor:
        """int32 [2, rows] on the host, valid once the step is done: tokens, and whether their logits were finite."""
        if rows > self._on_host.shape[2]:
            raise ValueError(f"{rows} tokens are chosen in a step, at most {self._on_host.shape[2]} can be kept")
        return self._on_host[self.turn, :, :rows]
