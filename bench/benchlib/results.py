"""From request records to figures: a Run is one system under one load once, a Cell all its repeated runs together.

A cell with a single failed request, empty answer or zero time to first token has no figures, only reasons: a mean over
the requests that happened to work would flatter exactly the server that broke.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchlib.bandwidth import DecodeCost
from benchlib.load import LoadResult, RequestRecord
from benchlib.stats import Summary, inter_token_gaps, summarize
from benchlib.workloads import Workload

CLIENT_BUSY_LIMIT = 0.9
LATE_LIMIT_MS = 10.0


@dataclass(frozen=True)
class Level:
    """How hard the server is pressed: `concurrency` sessions at any time, or Poisson arrivals at `rate` a second."""

    concurrency: int = 0
    rate: float = 0.0

    def __str__(self) -> str:
        return f"{self.concurrency}" if self.concurrency else f"{self.rate:g}/s"


@dataclass(frozen=True)
class Run:
    """What one run of a load on one system showed. `problems` counts each reason why it must not be believed."""

    system: str
    workload: Workload
    level: Level
    planned: int
    result: LoadResult
    death: str = ""

    @property
    def good(self) -> list[RequestRecord]:
        return [record for record in self.result.records if not record.problem]

    @property
    def problems(self) -> Counter[str]:
        found = Counter(record.problem for record in self.result.records if record.problem)
        if self.death:
            found[self.death] += 1
        missing = self.planned - len(self.result.records)
        if missing > 0:
            found["not sent, because an earlier request of the run had failed"] += missing
        if not self.result.records:
            found["no request was made"] += 1
        if any(record.ttft_ms <= 0 or record.output_tokens <= 0 for record in self.good):
            found["an answer without tokens or with a time to first token of 0 was counted"] += 1
        return found

    @property
    def wall_s(self) -> float:
        records = self.result.records
        return (max(record.finished_ns for record in records) - min(record.started_ns for record in records)) / 1e9

    @property
    def output_tokens(self) -> int:
        return sum(record.output_tokens for record in self.good)


@dataclass(frozen=True)
class Decode:
    """A decode step seen from outside: `batch` requests at a time by Little's law, its bytes over its time."""

    step_ms: float
    batch: float
    bytes_per_s: float
    copy_fraction: float


@dataclass(frozen=True)
class Cell:
    """All runs of one system at one level of one workload. Without `refused`, every figure is valid; else none is.

    Times are milliseconds. `output_tps` is output tokens per second over all runs, `output_tps_runs` each run's own.
    """

    system: str
    workload: str
    level: Level
    requests: int
    refused: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    output_tps: float = math.nan
    output_tps_runs: tuple[float, ...] = ()
    prompt_tokens: float = math.nan
    output_tokens: float = math.nan
    ttft: Summary = field(default_factory=lambda: summarize([]))
    first_text: Summary = field(default_factory=lambda: summarize([]))
    itl: Summary = field(default_factory=lambda: summarize([]))
    tpot: Summary = field(default_factory=lambda: summarize([]))
    e2e: Summary = field(default_factory=lambda: summarize([]))
    client_busy: float = math.nan
    decode: Decode | None = None


def cell_of(runs: Sequence[Run], cost: DecodeCost | None, copy_bytes_per_s: float) -> Cell:
    """One system's runs at one level of one workload as a cell."""
    first = runs[0]
    requests = sum(len(run.result.records) for run in runs)
    problems: Counter[str] = sum((run.problems for run in runs), Counter())
    if problems:
        reasons = tuple(f"{count} x {problem}" for problem, count in problems.most_common(5))
        return Cell(first.system, first.workload.name, first.level, requests, refused=reasons)
    records = [record for run in runs for record in run.good]
    wall = math.fsum(run.wall_s for run in runs)
    tokens = sum(run.output_tokens for run in runs)
    busy = max(run.result.client_busy for run in runs)
    late = summarize([record.late_ms for record in records])
    warnings = []
    if busy > CLIENT_BUSY_LIMIT:
        warnings.append(
            f"a client process used {busy:.0%} of a core: add --client-processes, the client may be the limit"
        )
    if late.p99 > LATE_LIMIT_MS:
        warnings.append(f"the client sent 1 % of its requests more than {late.p99:.0f} ms late")
    tpot = summarize([record.tpot_ms for record in records if not math.isnan(record.tpot_ms)])
    prompt_tokens = _mean([record.prompt_tokens for record in records])
    output_tokens = tokens / len(records)
    return Cell(
        system=first.system,
        workload=first.workload.name,
        level=first.level,
        requests=requests,
        warnings=tuple(warnings),
        output_tps=tokens / wall,
        output_tps_runs=tuple(run.output_tokens / run.wall_s for run in runs),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        ttft=summarize([record.ttft_ms for record in records]),
        first_text=summarize([record.first_text_ms for record in records]),
        itl=summarize([gap for record in records for gap in inter_token_gaps(record.arrivals)]),
        tpot=tpot,
        e2e=summarize([record.e2e_ms for record in records]),
        client_busy=busy,
        decode=decode_of(tpot, tokens / wall, prompt_tokens + output_tokens / 2, cost, copy_bytes_per_s),
    )


def decode_of(
    tpot: Summary, output_tps: float, context: float, cost: DecodeCost | None, copy_bytes_per_s: float
) -> Decode | None:
    """The achieved memory bandwidth of decoding; None when the model's cost is unknown or nothing was decoded.

    The mean number of requests decoding at a time is throughput times time per token (Little's law), so a server that
    queues requests instead of batching them is not credited with a batch.
    """
    if cost is None or not tpot.count or tpot.p50 <= 0:
        return None
    batch = max(1.0, output_tps * tpot.mean / 1e3)
    bytes_per_s = cost.step_bytes(batch, context) / (tpot.p50 / 1e3)
    return Decode(tpot.p50, batch, bytes_per_s, bytes_per_s / copy_bytes_per_s)


def agreement(ids: Sequence[int], reference: Sequence[int]) -> int:
    """How many leading tokens two greedy answers share."""
    for index, (one, other) in enumerate(zip(ids, reference, strict=False)):
        if one != other:
            return index
    return min(len(ids), len(reference))


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)


def record_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every request as a plain row, so that a reader can compute the percentiles again."""
    return [
        {
            "system": run.system,
            "workload": run.workload.name,
            "level": str(run.level),
            "problem": record.problem,
            "ttft_ms": round(record.ttft_ms, 4),
            "first_text_ms": round(record.first_text_ms, 4),
            "e2e_ms": round(record.e2e_ms, 4),
            "tpot_ms": round(record.tpot_ms, 5),
            "prompt_tokens": record.prompt_tokens,
            "output_tokens": record.output_tokens,
            "gaps_ms": [round(gap, 4) for gap in inter_token_gaps(record.arrivals)],
        }
        for run in runs
        for record in run.result.records
    ]
