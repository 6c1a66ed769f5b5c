"""What a step on CUDA needs to know and what it leaves behind, brought up to date on the device itself.

A step that only goes on with the rows of the last one needs nothing from the host: `begin_decode` counts its inputs on,
and `publish` leaves the tokens where the next step and the host find them. What the host does send, `pull` fetches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from minisgl.scheduler_proc.kernels.dependent_launch import launch_options


@triton.jit(do_not_specialize=["size", "padding_slot"])
def _begin_decode(
    control,
    sources,
    next_pages,
    positions,
    slots,
    lengths,
    page_table,
    size,
    padding_slot,
    PAGE_SIZE: tl.constexpr,
    TURNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    going_on = tl.load(control)
    rows = tl.load(control + 1)
    stride = tl.load(control + 2)
    turn = tl.load(control + 4)
    row = tl.arange(0, BLOCK)
    real = row < rows
    position = tl.load(positions + row, mask=real, other=0) + going_on
    # Replays that no host has prepared stay within the table.
    position = tl.where(real, tl.minimum(position, stride * PAGE_SIZE - 1), 0)
    place = page_table + row.to(tl.int64) * stride + position // PAGE_SIZE
    goes_on = row < rows * going_on
    opens = goes_on & (position % PAGE_SIZE == 0)
    page = tl.load(place, mask=real, other=0)
    page = tl.where(opens, tl.load(next_pages + row, mask=opens, other=0), page)
    # Every thread has read by now what others overwrite.
    tl.debug_barrier()
    tl.store(place, page, mask=opens)
    inside = row < size
    tl.store(positions + row, position, mask=inside)
    tl.store(lengths + row, position + 1, mask=inside)
    tl.store(slots + row, tl.where(real, page * PAGE_SIZE + position % PAGE_SIZE, padding_slot), mask=inside)
    tl.store(sources + row, row, mask=goes_on)
    tl.store(control + 4, (turn + going_on) % TURNS)
    tl.store(control, 1)


def begin_decode(
    control: torch.Tensor,
    sources: torch.Tensor,
    next_pages: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    page_table: torch.Tensor,
    *,
    most: int,
    page_size: int,
    padding_slot: int,
    turns: int,
) -> None:
    """Make the inputs of a decode step out of what the host has sent, or out of those of the step before.

    All are int32 on the device and changed in place. Rows that do not exist see one position and write to the padding
    slot.

    Args:
        control: [6]: whether the rows of the step before go on (0: the host has sent all of them; 1 from then on), how
            many rows there are, page ids from one row of page_table to the next; from its fifth on `publish`'s output.
        sources: [size], see DecodeInputs; rows that go on take the token of their own row.
        next_pages: [rows], for rows that go on and come to a new page, the page.
        positions, slots, lengths: [size], as in DecodeInputs; the host sends positions alone.
        page_table: flat.
        most: rows of any step.
        turns: of the results, see publish.
    """
    _begin_decode[(1,)](
        control,
        sources,
        next_pages,
        positions,
        slots,
        lengths,
        page_table,
        len(positions),
        padding_slot,
        PAGE_SIZE=page_size,
        TURNS=turns,
        BLOCK=triton.next_power_of_2(most),
        num_warps=4,
    )


@triton.jit(do_not_specialize=["rows", "capacity"])
def _publish(
    tokens,
    finite,
    output,
    last_tokens,
    results,
    last_output,
    rows,
    capacity,
    HAS_FINITE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.arange(0, BLOCK)
    turn = tl.load(output)
    place = tl.load(output + 1)
    at = place + row
    inside = (row < rows) & (at < capacity)
    if PDL:
        gdc_wait()
    token = tl.load(tokens + row, mask=inside, other=0)
    tl.store(last_tokens + at, token, mask=inside)
    result = results + turn * 2 * capacity + at
    tl.store(result, token.to(tl.int32), mask=inside)
    if HAS_FINITE:
        tl.store(result + capacity, tl.load(finite + row, mask=inside, other=0).to(tl.int32), mask=inside)
        tl.store(last_output, turn)
        tl.store(last_output + 1, place)


def publish(
    tokens: torch.Tensor,
    finite: torch.Tensor | None,
    output: torch.Tensor,
    last_tokens: torch.Tensor,
    results: torch.Tensor,
    last_output: torch.Tensor,
    pdl: bool,
) -> None:
    """Leave the tokens of a part of a step for the next step and for the host.

    Args:
        tokens: int64 [rows], perhaps with rows that mean nothing at the end.
        finite: bool [rows], whether their logits were; None when only other tokens are chosen for rows published last.
        output: int32 [2]: which of `results`, and where in it and in last_tokens.
        last_tokens: int64 [capacity], on the device.
        results: int32 [turns, 2, capacity], in pinned host memory: tokens, and whether their logits were finite.
        last_output: int32 [2], gets `output` where `finite` is given.
    """
    _publish[(1,)](
        tokens,
        finite if finite is not None else tokens,
        output,
        last_tokens,
        results,
        last_output,
        len(tokens),
        len(last_tokens),
        HAS_FINITE=finite is not None,
        BLOCK=triton.next_power_of_2(len(last_tokens)),
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )


@triton.jit(do_not_specialize=["stride"])
def _pull(headers, staging, block, pulled, arrival, stride, BUFFERS: tl.constexpr, BLOCK: tl.constexpr):
    buffer = tl.arange(0, BUFFERS)
    # Both numbers at once, and none from a cache: each look into the host's memory takes a microsecond.
    number = tl.load(headers + 2 * buffer, cache_modifier=".cv")
    length = tl.load(headers + 2 * buffer + 1, cache_modifier=".cv")
    last = tl.load(pulled)
    following = tl.min(tl.where(number > last, number, 1 << 62), axis=0)
    if following < 1 << 62:
        words = tl.sum(tl.where(number == following, length, 0), axis=0)
        source = staging + following % BUFFERS * stride
        for start in range(0, words, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < words
            tl.store(block + at, tl.load(source + at, mask=inside, cache_modifier=".cv"), mask=inside)
        # By now every thread has read what the host may then overwrite.
        tl.debug_barrier()
        tl.store(pulled, following)
        tl.store(arrival, following)


def pull(
    headers: torch.Tensor, staging: torch.Tensor, block: torch.Tensor, pulled: torch.Tensor, arrival: torch.Tensor
) -> None:
    """Copy the buffer that was filled first, of those that were not pulled yet, to the device; if there is one.

    Args:
        headers: int64 [buffers, 2], in pinned host memory as `staging` is: the number of what lies in a buffer, counted
            from 1, and its length. Number n lies in buffer n % buffers; these are a power of two.
        staging: int32 [buffers, capacity].
        block: int32 [capacity], on the device.
        pulled, arrival: int64 [1], get the number of what has been copied; on the device, and for the host.
    """
    _pull[(1,)](
        headers,
        staging,
        block,
        pulled,
        arrival,
        staging.stride(0),
        BUFFERS=len(headers),
        BLOCK=2048,
        num_warps=8,
    )
