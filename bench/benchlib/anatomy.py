"""Where the time to the first byte goes: a request's hops from the client's connect to its first byte.

The server's stamps (minisgl/timeline.py) come back in the done event. They are readings of CLOCK_MONOTONIC, as the
client's are, so client and server must share a host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchlib.load import RequestRecord
from benchlib.stats import percentile

HOPS = (
    ("connect", "client", "TCP connection, from the client's side"),
    ("send", "client", "request on its way until http has read it"),
    ("http_parse", "http", "parse, validate, push to the tokenizer"),
    ("pipe_to_tokenizer", "pipe", "http to tokenizer"),
    ("tokenize", "tokenizer", "text to token ids"),
    ("pipe_to_scheduler", "pipe", "tokenizer to scheduler"),
    ("queue", "scheduler", "waiting for the first step that computes it"),
    ("prefill", "scheduler", "prompt to first token, on the host"),
    ("pipe_to_detokenizer", "pipe", "scheduler to detokenizer"),
    ("detokenize", "detokenizer", "token id to text"),
    ("pipe_to_http", "pipe", "detokenizer to http"),
    ("write", "http", "render and hand to the socket"),
    ("receive", "client", "until the client has read the first byte; below 0 when it was faster than http's stamp"),
)
"""(name, who spends the time, what it is), in the order of a request's way."""

SERVER_HOPS = tuple(name for name, _, _ in HOPS[2:-1])
TOLERANCE = 0.02


class NoAnatomy(ValueError):
    """The server did not say how long its hops took; the message says what to do."""


@dataclass(frozen=True)
class Anatomy:
    """One request's hops in microseconds, by name in the order of HOPS, and the client's own time to first byte."""

    record: RequestRecord
    hops_us: dict[str, float]
    stamps_ns: tuple[int, ...]
    ttfb_us: float

    @property
    def sum_us(self) -> float:
        return sum(self.hops_us.values())

    @property
    def deviation(self) -> float:
        """How far the sum of the hops is from the client's own figure, as a share of the latter."""
        return abs(self.sum_us - self.ttfb_us) / self.ttfb_us


def anatomy_of(record: RequestRecord) -> Anatomy:
    """The hops of a good record; raises NoAnatomy.

    The middle hops are the durations that the server reports; only the way there and back is taken from its absolute
    stamps. So a hop that the server leaves out or counts twice shows as a deviation of the sum.
    """
    stamps = tuple(record.timing.get("stamps_ns") or ())
    reported = record.timing.get("hops_us") or {}
    if len(stamps) != len(SERVER_HOPS) + 1 or set(reported) != set(SERVER_HOPS):
        raise NoAnatomy(
            "the server's done event has no complete `timing` with hops_us and stamps_ns: only minisgl reports its hops"
        )
    if not record.started_ns < stamps[0] < record.finished_ns:
        raise NoAnatomy("the server's clock is not the client's: run this on the server's own host")
    hops = {
        "connect": (record.connected_ns - record.started_ns) / 1e3,
        "send": (stamps[0] - record.connected_ns) / 1e3,
        **{name: float(reported[name]) for name in SERVER_HOPS},
        "receive": (record.first_byte_ns - stamps[-1]) / 1e3,
    }
    return Anatomy(record, hops, stamps, (record.first_byte_ns - record.started_ns) / 1e3)


@dataclass(frozen=True)
class HopSummary:
    name: str
    process: str
    what: str
    mean_us: float
    p50_us: float
    p99_us: float


def summarize_hops(anatomies: Sequence[Anatomy]) -> list[HopSummary]:
    """Every hop over all requests; the means add up to the mean time to first byte."""
    summaries = []
    for name, process, what in HOPS:
        values = [anatomy.hops_us[name] for anatomy in anatomies]
        mean = sum(values) / len(values)
        summaries.append(HopSummary(name, process, what, mean, percentile(values, 50), percentile(values, 99)))
    return summaries


def spoiled(anatomies: Sequence[Anatomy]) -> int:
    """How many requests' hops miss the client's own figure by more than TOLERANCE."""
    return sum(anatomy.deviation > TOLERANCE for anatomy in anatomies)


# ---- Perfetto -------------------------------------------------------------------------------------------------------

_TRACKS = ("client", "http", "tokenizer", "scheduler", "detokenizer")
_STEP_LANE = 0


def chrome_trace(anatomies: Sequence[Anatomy]) -> dict[str, Any]:
    """A trace in Chrome's JSON format (ui.perfetto.dev opens it): one process a track, one flow a request.

    Every request has a lane of its own inside each process, so that concurrent requests do not overlap. The
    scheduler's steps, prefill and decode, are shared by the requests computed together and have a lane of their own
    ("step of 3" brought tokens to three of these requests); on the client's track every arrival is one slice.
    """
    origin = min(anatomy.record.started_ns for anatomy in anatomies)
    events: list[dict[str, Any]] = []
    for pid, track in enumerate(_TRACKS, 1):
        events.append({"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": track}})
        events.append({"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}})
    pids = {track: pid for pid, track in enumerate(_TRACKS, 1)}

    def piece(track: str, lane: int, name: str, begin_ns: int, end_ns: int, **arguments: Any) -> dict[str, Any]:
        return {
            "ph": "X",
            "name": name,
            "pid": pids[track],
            "tid": lane,
            "ts": (begin_ns - origin) / 1e3,
            "dur": max(end_ns - begin_ns, 0) / 1e3,
            "args": arguments,
        }

    steps: dict[tuple[int, int], int] = {}
    for anatomy, lane in zip(anatomies, _lanes(anatomies), strict=True):
        record, stamps = anatomy.record, anatomy.stamps_ns
        number = len(events)
        events.append(
            piece(
                "client",
                lane,
                f"request, {record.prompt_tokens} in, {record.output_tokens} out",
                record.started_ns,
                record.finished_ns,
                ttfb_us=anatomy.ttfb_us,
            )
        )
        # (received, sent) is spent in http, (sent, tokenizer_in) in a pipe, and so on: every second gap is a process.
        stops = (
            ("http", "http_parse", stamps[0], stamps[1]),
            ("tokenizer", "tokenize", stamps[2], stamps[3]),
            ("scheduler", "queue", stamps[4], stamps[5]),
            ("scheduler", "prefill", stamps[5], stamps[6]),
            ("detokenizer", "detokenize", stamps[7], stamps[8]),
            ("http", "write", stamps[9], stamps[10]),
        )
        events += [piece(track, lane, name, begin, end) for track, name, begin, end in stops]
        events.append(piece("client", lane, "first byte", record.first_byte_ns, record.first_byte_ns + 1000))
        before = record.arrivals[0][0]
        for index, (at, tokens) in enumerate(record.arrivals[1:], 1):
            events.append(piece("client", lane, f"arrival {index}", before, at, tokens=tokens))
            before = at
        flow = [("client", record.started_ns), *((track, begin) for track, _, begin, _ in stops)]
        flow.append(("client", record.first_byte_ns))
        for index, (track, at) in enumerate(flow):
            phase = "s" if index == 0 else "f" if index == len(flow) - 1 else "t"
            event = {"ph": phase, "name": "request", "cat": "request", "id": number, "pid": pids[track], "tid": lane}
            events.append({**event, "ts": (at - origin) / 1e3, **({"bp": "e"} if phase != "s" else {})})
        steps_ns = record.timing.get("steps_ns") or ()
        for step in zip(steps_ns[::2], steps_ns[1::2], strict=True):
            steps[step] = steps.get(step, 0) + 1
    free_ns = 0
    for (launched_ns, retired_ns), requests in sorted(steps.items()):
        # A step launched while the one before it ran began when that one ended; slices of a lane must not overlap.
        begin_ns = max(launched_ns, free_ns)
        launched_us = (launched_ns - origin) / 1e3
        name = f"step of {requests}"
        events.append(piece("scheduler", _STEP_LANE, name, begin_ns, retired_ns, launched_us=launched_us))
        free_ns = retired_ns
    for pid, lane in sorted({(event["pid"], event["tid"]) for event in events if event["ph"] == "X"}):
        name = "steps" if lane == _STEP_LANE else f"requests, lane {lane}"
        events.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": lane, "args": {"name": name}})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _lanes(anatomies: Sequence[Anatomy]) -> list[int]:
    """For every request, the lowest lane (from 1) that no earlier request still uses."""
    free_at: list[int] = []
    lanes = []
    for anatomy in anatomies:
        record = anatomy.record
        lane = next((index for index, free in enumerate(free_at) if free <= record.started_ns), len(free_at))
        free_at[lane : lane + 1] = [record.finished_ns]
        lanes.append(lane + 1)
    return lanes
