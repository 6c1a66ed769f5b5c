"""What a CUDA graph reads that changes from step to step: named arrays in one block on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from minisgl.scheduler_proc.kernels.step_state import pull
from minisgl.scheduler_proc.models.forward_batch import Array

STAGING_BUFFERS = 8
"""Parts of steps whose inputs may be on their way to the device at once; one more waits for the oldest to arrive."""


class InputBlock:
    """Named int32 arrays in one block on the device, filled by one asynchronous copy.

    The last array may be filled in part; only what a step uses is copied.
    """

    def __init__(self, sizes: dict[str, int], device: torch.device) -> None:
        self._offsets: dict[str, int] = {}
        total = 0
        for name, size in sizes.items():
            self._offsets[name] = total
            # Triton compiles a kernel anew for pointers to other than multiples of 16 bytes.
            total += -(-size // 4) * 4
        self._last = next(reversed(sizes))
        self._device = torch.zeros(total, dtype=torch.int32, device=device)
        self._host = torch.zeros((STAGING_BUFFERS, total), dtype=torch.int32, pin_memory=device.type == "cuda")
        self._arrays = [
            {name: host[offset : offset + sizes[name]] for name, offset in self._offsets.items()}
            for host in self._host.numpy()
        ]
        self._arrived: list[torch.cuda.Event | None] = [None] * STAGING_BUFFERS
        self._turn = 0

    def view(self, name: str, size: int) -> torch.Tensor:
        """The first `size` elements of an array on the device."""
        offset = self._offsets[name]
        return self._device[offset : offset + size]

    def open(self) -> Mapping[str, Array]:
        """The arrays to write new values to, on the host; they have arbitrary old ones."""
        self._turn = (self._turn + 1) % STAGING_BUFFERS
        arrived = self._arrived[self._turn]
        if arrived is not None:
            # The copy from this buffer may still be queued behind earlier parts of the step.
            arrived.synchronize()
        return self._arrays[self._turn]

    def send(self, last: int) -> None:
        """Copy what was written since `open` to the device, of the last array its first `last` elements."""
        used = self._offsets[self._last] + last
        self._device[:used].copy_(self._host[self._turn][:used], non_blocking=True)
        if self._device.is_cuda:
            self._arrived[self._turn] = torch.cuda.current_stream().record_event()

    def fill(self, values: Mapping[str, Array | Sequence[int]]) -> None:
        """Send new values; an array's elements beyond those given keep arbitrary old ones."""
        arrays = self.open()
        for name, column in values.items():
            arrays[name][: len(column)] = column
        self.send(len(values[self._last]))


class PulledBlock(InputBlock):
    """The same, fetched by a kernel: the host calls nothing of CUDA's, whose copies take it up to 0.2 ms.

    For graphs that each begin with `pull`, one for every `send`.
    """

    def __init__(self, sizes: dict[str, int], device: torch.device) -> None:
        super().__init__(sizes, device)
        pinned = device.type == "cuda"
        self._sent = 0
        self._headers = torch.zeros((STAGING_BUFFERS, 2), dtype=torch.int64, pin_memory=pinned)
        self._pulled = torch.zeros(1, dtype=torch.int64, device=device)
        self._arrival = torch.zeros(1, dtype=torch.int64, pin_memory=pinned)
        self._written, self._arrived_number = self._headers.numpy(), self._arrival.numpy()

    def open(self) -> Mapping[str, Array]:
        self._turn = (self._sent + 1) % STAGING_BUFFERS
        # On an idle device nothing is on its way; kernels that were only compiled have pulled nothing.
        while self._sent - self._arrived_number[0] >= STAGING_BUFFERS and self._is_busy():
            pass
        return self._arrays[self._turn]

    def send(self, last: int) -> None:
        """Leave what was written since `open` to be pulled, of the last array its first `last` elements."""
        self._sent += 1
        self._written[self._turn] = (self._sent, self._offsets[self._last] + last)

    def pull(self) -> None:
        """Bring what was sent first, of all that has not been pulled yet, to the device."""
        pull(self._headers, self._host, self._device, self._pulled, self._arrival)

    def _is_busy(self) -> bool:
        return self._device.is_cuda and not torch.cuda.current_stream().query()
