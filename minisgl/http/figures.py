"""What the requests of this process took: token counters and histograms, kept as plain numbers for GET /metrics.

Requests are measured once, at their end; a batch of deltas costs one addition. `snapshot` is what one http worker
tells the others, so that each of them can answer for all.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque

from minisgl.http.answers import Stream
from minisgl.messages import DeltaBatch, JsonObject
from minisgl.timeline import HOPS, STAMPS, now

LATENCY_BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)
HOP_BOUNDS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)
TOKEN_BOUNDS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
"""Upper bounds of the buckets, in seconds and tokens; above the last there is one more."""

RATE_SECONDS = 3.0
"""`gen_throughput` is the mean over this long."""

_SCHEDULER_IN, _SCHEDULED = STAMPS.index("scheduler_in"), STAMPS.index("scheduled")


def stamps_to_first_byte(stream: Stream) -> list[int]:
    """Its stamps; without `written` for an answer sent whole, which is written only after its last token."""
    return stream.stamps if stream.shown else stream.stamps[: len(HOPS)]


class Histogram:
    """How many observations fell into each bucket, and their sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def snapshot(self) -> list[float]:
        """The sum, then the counts."""
        return [self.sum, *self.counts]


class Figures:
    """Counters and histograms of one http worker since it started.

    Attributes:
        prompt_tokens, cached_tokens: of the prompts that have been computed.
        generation_tokens: that the detokenizer has sent here.
    """

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generation_tokens = 0
        self._ttft, self._itl = Histogram(LATENCY_BOUNDS), Histogram(LATENCY_BOUNDS)
        self._e2e, self._queue = Histogram(LATENCY_BOUNDS), Histogram(LATENCY_BOUNDS)
        self._prompt, self._generation = Histogram(TOKEN_BOUNDS), Histogram(TOKEN_BOUNDS)
        self._hops = {hop: Histogram(HOP_BOUNDS) for hop in HOPS}
        self._recent = deque([(now(), 0)])

    def take(self, batch: DeltaBatch) -> None:
        """Count a batch's tokens, and the prompts of the requests that it opens."""
        self.generation_tokens += len(batch.token_ids)
        for opening in batch.openings:
            # One that was aborted while it waited has computed nothing.
            if batch.token_counts[opening.row]:
                self.prompt_tokens += opening.prompt_tokens
                self.cached_tokens += opening.cached_tokens

    def measure(self, stream: Stream, outcome: str) -> None:
        """Add a request that is over. The gap between tokens is its mean, counted once for each of its gaps."""
        if stream.first_tokens:
            stamps = stamps_to_first_byte(stream)
            for hop, begin, end in zip(HOPS, stamps, stamps[1:], strict=False):
                self._hops[hop].observe((end - begin) / 1e9)
            self._ttft.observe((stamps[-1] - stamps[0]) / 1e9)
            self._queue.observe((stamps[_SCHEDULED] - stamps[_SCHEDULER_IN]) / 1e9)
            gaps = stream.completion_tokens - stream.first_tokens
            if gaps:
                self._itl.observe((stream.last_ns - stream.first_ns) / 1e9 / gaps, gaps)
        if outcome == "ok":
            self._e2e.observe((now() - stream.call.received_ns) / 1e9)
            self._prompt.observe(stream.prompt_tokens)
            self._generation.observe(stream.completion_tokens)

    def tick(self) -> None:
        """Call it twice a second: remembers the token count for the present rate."""
        self._recent.append((now(), self.generation_tokens))
        while self._recent[-1][0] - self._recent[1][0] > RATE_SECONDS * 1e9:
            self._recent.popleft()

    def snapshot(self) -> JsonObject:
        """The counters, the present rate, and a snapshot of every histogram."""
        (began, tokens_then), (ended, tokens_now) = self._recent[0], self._recent[-1]
        histograms = {
            "ttft": self._ttft,
            "itl": self._itl,
            "e2e": self._e2e,
            "queue": self._queue,
            "prompt": self._prompt,
            "generation": self._generation,
        }
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "generation_tokens": self.generation_tokens,
            "gen_throughput": (tokens_now - tokens_then) * 1e9 / (ended - began) if ended > began else 0.0,
            "histograms": {name: histogram.snapshot() for name, histogram in histograms.items()},
            "hops": {hop: histogram.snapshot() for hop, histogram in self._hops.items()},
        }
