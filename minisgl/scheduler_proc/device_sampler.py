"""Sampling on CUDA: rows of logits become tokens by kernels in a graph, without the host in between.

What a row needs stands in one block on the device. It is sent again only when other rows than those of the last call
come: the kernels themselves count positions, and remember each token for the penalties. Rows with a token mask or
biases go through sampler.py instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from minisgl.scheduler_proc.adjustments import has_penalties
from minisgl.scheduler_proc.input_block import InputBlock
from minisgl.scheduler_proc.kernels import sampling as kernels
from minisgl.scheduler_proc.kernels.sampling import Field, Kind
from minisgl.scheduler_proc.models.forward_batch import Array, to_device
from minisgl.scheduler_proc.request import Request, StepRow
from minisgl.scheduler_proc.sampler import SamplingBatch, mixed_seeds, sample, sampling_columns

GRAPH_SIZES = (1, 4, 16, 64, 256)
"""Numbers of rows that graphs are captured for; rows that are not there cost next to nothing."""
NO_SLOT = -1


@dataclass(slots=True)
class _Known:
    """A request whose parameters have been looked at.

    Attributes:
        fields: int32 [fields], its column of the block; position and slot are filled in when it is sent.
        phases: how many searches its filters need, see kernels.sample_rows.
        slot: its row of the marks, or NO_SLOT.
        marked: how many of its tokens the marks tell of.
    """

    request: Request
    fields: Array
    phases: int
    slot: int = NO_SLOT
    marked: int = -1


class DeviceSampler:
    """Draws tokens for the rows of one replica.

    Args:
        max_rows: rows of one call at most.
        dtype: that of the logits.
        publish: called with the tokens chosen, int64 [rows or more], also while a graph is captured.
    """

    def __init__(
        self,
        vocab_size: int,
        max_rows: int,
        dtype: torch.dtype,
        device: torch.device,
        publish: Callable[[torch.Tensor], None],
    ) -> None:
        self._vocab_size = vocab_size
        self._max_rows = max_rows
        self._dtype = dtype
        self._device = device
        self._publish = publish
        self._block = InputBlock({"addresses": 6, "fields": len(Field) * max_rows}, device)
        self._tokens = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._scratch = kernels.Scratch(max_rows, vocab_size, device)
        self._sizes = [*(size for size in GRAPH_SIZES if size < max_rows), max_rows]
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._known: dict[Request, _Known] = {}
        self._marks: torch.Tensor | None = None
        self._free_slots = list(range(max_rows))
        self._requests: list[Request] = []
        self._positions: list[int] = []
        self._addresses = (0, 0)
        self._phases = 0

    def launch_all(self) -> None:
        """Launch every kernel once, without rows."""
        self._block.fill(
            {"addresses": np.zeros(6, np.int32), "fields": np.zeros(len(Field) * self._max_rows, np.int32)}
        )
        self._requests, self._positions = [], []
        self._launch(1, 2)

    def capture(self) -> None:
        """Capture the graphs; without them the kernels are launched one by one."""
        self.launch_all()
        torch.cuda.synchronize(self._device)
        for size in self._sizes:
            for phases in range(3):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    self._launch(size, phases)
                self._graphs[size, phases] = graph

    def sample(self, rows: Sequence[StepRow], logits: torch.Tensor, likeliest: torch.Tensor) -> torch.Tensor:
        """Choose a token for every row.

        Args:
            logits: [rows or more, vocab].
            likeliest: int64 [rows or more], each row's likeliest token.

        Returns:
            Token ids int64 [rows], valid until the next call.
        """
        requests = [row.request for row in rows]
        positions = [row.start + row.length for row in rows]
        addresses = (logits.data_ptr(), likeliest.data_ptr())
        if addresses != self._addresses or positions != self._positions or requests != self._requests:
            self._send(requests, positions, addresses)
            self._addresses, self._requests = addresses, requests
        self._positions = [position + 1 for position in positions]
        size = next(size for size in self._sizes if size >= len(rows))
        if self._graphs:
            self._graphs[size, self._phases].replay()
        else:
            self._launch(size, self._phases)
        tokens = self._tokens[: len(rows)]
        others = [index for index, request in enumerate(requests) if not _fits(request)]
        if others:
            columns = sampling_columns([rows[index] for index in others], self._vocab_size)
            places, *tensors = to_device([np.array(others, np.int32), *columns], self._device)
            tokens[places] = sample(logits[places], SamplingBatch(*tensors))[0]
            self._publish(tokens)
        return tokens

    def _launch(self, rows: int, phases: int) -> None:
        addresses = self._block.view("addresses", 6).view(torch.int64)
        fields = self._block.view("fields", len(Field) * self._max_rows)
        kernels.sample_rows(rows, phases, addresses, fields, self._tokens, self._scratch, self._dtype)
        self._publish(self._tokens[:rows])

    def _send(self, requests: list[Request], positions: list[int], addresses: tuple[int, int]) -> None:
        """Send the rows' parameters."""
        for request, position in zip(self._requests, self._positions, strict=True):
            if request in self._known:
                self._known[request].marked = position
        if len(self._known) + len(requests) > 2 * self._max_rows:
            self._forget()
        known = [self._known.get(request) or self._look_at(request) for request in requests]
        unmarked = [
            (one, position)
            for one, position in zip(known, positions, strict=True)
            if one.fields[Field.KIND] and _needs_marks(one.request, position) and one.marked != position
        ]
        if unmarked:
            self._mark(unmarked)
        fields = np.zeros((len(Field), self._max_rows), np.int32)
        fields[:, : len(known)] = np.stack([one.fields for one in known], axis=1)
        fields[Field.POSITION, : len(known)] = positions
        fields[Field.SLOT, : len(known)] = [one.slot for one in known]
        marks = self._marks.data_ptr() if self._marks is not None else 0
        words = np.array([*addresses, marks], np.int64).view(np.int32)
        self._block.fill({"addresses": words, "fields": fields.reshape(-1)})
        self._phases = max(one.phases for one in known)

    def _look_at(self, request: Request) -> _Known:
        sampling = request.sampling
        has_k = 0 < sampling.top_k < self._vocab_size
        filtered = has_k or sampling.top_p < 1.0 or sampling.min_p > 0.0
        kind = Kind.FILTERED if filtered else Kind.DRAWN
        if request.greedy:
            kind = Kind.LIKELIEST_ADJUSTED if _needs_marks(request, request.prompt_len) else Kind.LIKELIEST
        fields = np.zeros(len(Field), np.int32)
        fields[Field.KIND] = kind if _fits(request) else Kind.NOTHING
        seed = sampling.seed if sampling.seed is not None else request.rid
        fields[Field.SEED_LOW : Field.SEED_HIGH + 1] = mixed_seeds([seed]).view(np.int32)
        fields[Field.EARLIEST_STOP] = request.earliest_stop
        fields[Field.TOP_K] = sampling.top_k if has_k else 0
        farthest = kernels.FARTHEST if sampling.min_p <= 0.0 else int(-math.log(sampling.min_p) * kernels.UNIT)
        fields[Field.NEAREST_DROPPED] = min(farthest, kernels.FARTHEST) + 1
        fields[Field.TEMPERATURE :].view(np.float32)[:] = (
            sampling.temperature,
            sampling.top_p,
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
        )
        phases = (filtered + (has_k and sampling.top_p < 1.0)) if fields[Field.KIND] == Kind.FILTERED else 0
        self._known[request] = known = _Known(request, fields, phases)
        return known

    def _mark(self, unmarked: Sequence[tuple[_Known, int]]) -> None:
        """Write requests' histories and stop tokens into the marks."""
        if self._marks is None:
            self._marks = torch.zeros((self._max_rows, self._vocab_size), dtype=torch.int16, device=self._device)
        places, values = [], []
        for known, position in unmarked:
            request = known.request
            if len(request.token_ids) != position:
                raise RuntimeError(f"request {request.rid} has tokens that neither the host nor the marks know")
            if known.slot == NO_SLOT:
                if not self._free_slots:
                    self._forget()
                known.slot = self._free_slots.pop()
            for token_ids, value in _marks_of(request):
                places.append(token_ids + known.slot * self._vocab_size)
                values.append(np.broadcast_to(np.asarray(value, np.int32), token_ids.shape))
        slots = np.array([known.slot for known, _ in unmarked], np.int32)
        on_device = to_device([slots, np.concatenate(places), np.concatenate(values)], self._device)
        self._marks[on_device[0]] = 0
        self._marks.view(-1).index_add_(0, on_device[1], on_device[2].to(torch.int16))

    def _forget(self) -> None:
        """Drop the requests that have ended or were preempted, and free their slots."""
        gone = [one for one in self._known.values() if one.request.finish or not one.request.pages]
        for one in gone:
            del self._known[one.request]
            if one.slot != NO_SLOT:
                self._free_slots.append(one.slot)


def _fits(request: Request) -> bool:
    """Whether the kernels can do all that a request asks for."""
    return request.token_mask is None and not request.sampling.logit_bias


def _needs_marks(request: Request, position: int) -> bool:
    """Whether a request's token at a position depends on those before it, or may not be a stop token."""
    return position < request.earliest_stop or has_penalties(request.sampling)


def _marks_of(request: Request) -> list[tuple[Array, Array | int]]:
    """Token ids (int32, distinct) and what is to be added to their marks."""
    marks: list[tuple[Array, Array | int]] = [
        (np.array(sorted(request.stop_ids), np.int32), kernels.STOP),
    ]
    adjustments = request.adjustments
    if adjustments is not None:
        counts = np.minimum(adjustments.counts, kernels.MOST_GENERATED).astype(np.int32)
        marks += [(adjustments.seen, kernels.SEEN), (adjustments.generated, kernels.GENERATED * counts)]
    return marks
