"""The time stamps a request collects on its way round the ring, and the hops computed from them.

Each process appends its own `now()` readings to the request's stamp list, so the list is always a prefix of
STAMPS. All readings are CLOCK_MONOTONIC nanoseconds, one clock for every process of a host, so differences
between processes are meaningful and the hops add up to the total exactly.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

STAMPS = (
    "received",  # http: the request's head has arrived (its body may still be on the way)
    "sent",  # http: validated and pushed to the tokenizer
    "tokenizer_in",  # tokenizer: read from its inbox
    "tokenized",  # tokenizer: pushed to a scheduler
    "scheduler_in",  # scheduler: read from its inbox
    "scheduled",  # scheduler: first step that computes this request is planned
    "first_token",  # scheduler: first token is on the host, pushed to the detokenizer
    "detokenizer_in",  # detokenizer: read from its inbox
    "detokenized",  # detokenizer: pushed to http
    "http_in",  # http: read from its inbox
    "written",  # http: first byte of the answer handed to the socket
)

HOPS = (
    "http_parse",
    "pipe_to_tokenizer",
    "tokenize",
    "pipe_to_scheduler",
    "queue",
    "prefill",
    "pipe_to_detokenizer",
    "detokenize",
    "pipe_to_http",
    "write",
)
"""HOPS[i] is the time between STAMPS[i] and STAMPS[i + 1]."""

now = time.monotonic_ns


def hops_us(stamps: Sequence[int]) -> dict[str, float]:
    """Microseconds of every hop that the stamps cover, in ring order; they sum to the stamps' whole span."""
    return {name: (after - before) / 1000 for name, before, after in zip(HOPS, stamps, stamps[1:], strict=False)}


def total_us(stamps: Sequence[int]) -> float:
    """Microseconds from the first to the last stamp (0 when there are fewer than two)."""
    return (stamps[-1] - stamps[0]) / 1000 if len(stamps) > 1 else 0.0


def server_timing_header(stamps: Sequence[int]) -> str:
    """The hops as a Server-Timing header value (durations in milliseconds)."""
    parts = [f"{name};dur={us / 1000:.3f}" for name, us in hops_us(stamps).items()]
    return ", ".join([*parts, f"total;dur={total_us(stamps) / 1000:.3f}"])
