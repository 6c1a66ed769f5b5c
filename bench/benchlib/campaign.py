"""A whole comparison: which server is up when, warm-up, the order of the runs, and the report of what was seen."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchlib import bandwidth
from benchlib.load import Load, LoadGenerator
from benchlib.progress import progress_bar, say
from benchlib.report import Report
from benchlib.results import Level, Run, cell_of, record_rows
from benchlib.servers import TITLES, Server, ServerError, Setup
from benchlib.workloads import Lengths, Session, Turn, Workload, poisson_arrivals

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PROBE_TOKENS = 32
WARMUP_TOKENS = 16


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        order: `interleaved` keeps all servers up and measures them in turn, A B A B; `alone` has one up at a time.
        waves, min_requests: sessions of a closed-loop run: `waves` per concurrent one, `min_requests` at least.
        seconds: length of the arrivals of an open-loop run.
        hf_max_concurrency, hf_max_requests: bounds for the baseline, which answers one request at a time; more would
            only measure its queue.
        time_limit: seconds after which no further run is begun.
    """

    workloads: list[Workload]
    levels: list[Level]
    rounds: int
    order: str
    waves: int
    min_requests: int
    seconds: float
    seed: int
    request_timeout: float
    hf_max_concurrency: int
    hf_max_requests: int
    time_limit: float

    def suits(self, system: str, level: Level) -> bool:
        return system != "hf" or level.concurrency <= self.hf_max_concurrency

    def session_count(self, system: str, level: Level) -> int:
        if level.rate:
            return max(1, round(self.seconds * level.rate))
        count = max(self.min_requests, self.waves * level.concurrency)
        return max(level.concurrency, min(count, self.hf_max_requests)) if system == "hf" else count

    def facts(self) -> dict[str, Any]:
        """The method, as the report states it."""
        interleaved = "all servers up, measured in turn (A B A B), never two at once"
        facts: dict[str, Any] = {
            "order": interleaved if self.order == "interleaved" else "each server alone on the machine",
            "rounds": self.rounds,
            "sampling": "greedy, EOS ignored, exact output lengths",
            "warm-up": f"before every run one wave of other prompts with {WARMUP_TOKENS} new tokens, not counted",
            "seed": self.seed,
        }
        if any(level.rate for level in self.levels):
            facts["open-loop runs"] = f"{self.seconds:g} s of Poisson arrivals"
        if any(level.concurrency for level in self.levels):
            facts["closed-loop runs"] = f"{self.waves} sessions per concurrent one, at least {self.min_requests}"
        return facts


@dataclass
class Campaign:
    """Runs a Plan and keeps what was seen; `report_into` may be called at any time."""

    plan: Plan
    setup: Setup
    tokenizer: Tokenizer
    generator: LoadGenerator
    runs: dict[tuple[str, str, Level], list[Run]] = field(default_factory=dict)
    servers: dict[str, Any] = field(default_factory=dict)
    probes: dict[str, list[int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    skipped: int = 0
    began: float = field(default_factory=time.monotonic)

    def measure(self, systems: Sequence[str]) -> Iterator[Run]:
        """Have these systems' servers up together and measure them in turn, one at a time; yields after every run."""
        plan = self.plan
        with contextlib.ExitStack() as stack:
            running = [server for system in systems if (server := self._start(stack, system))]
            for round_number in range(plan.rounds):
                for workload in plan.workloads:
                    for level in plan.levels:
                        for server in list(running):
                            if not plan.suits(server.system, level):
                                continue
                            if time.monotonic() - self.began > plan.time_limit:
                                self.skipped += 1
                                continue
                            run = self._run(server, workload, level, round_number)
                            self.runs.setdefault((server.system, workload.name, level), []).append(run)
                            yield run
                            if run.death:
                                running.remove(server)

    def _start(self, stack: contextlib.ExitStack, system: str) -> Server | None:
        say(f"starting {TITLES[system]} ...")
        try:
            server = stack.enter_context(Server(system, self.setup))
        except ServerError as error:
            self.problems.append(str(error))
            say(f"PROBLEM: {error}")
            return None
        self.servers[system] = server.describe()
        say(f"{TITLES[system]} is ready after {server.ready_seconds:.1f} s")
        self._probe(server)
        return server

    def _probe(self, server: Server) -> None:
        """The first request of every server: not measured, and its greedy ids are compared between systems."""
        session = Workload("random", Lengths("16"), Lengths(str(PROBE_TOKENS))).sessions(1, self.tokenizer, seed=-1)
        record = self.generator.run(Load(server.target, session, concurrency=1)).records[0]
        if record.problem:
            self.problems.append(f"{TITLES[server.system]} failed at its first request: {record.problem}")
        self.probes[server.system] = list(record.token_ids)

    def _run(self, server: Server, workload: Workload, level: Level, round_number: int) -> Run:
        plan = self.plan
        # Every round asks anew, so that no prefix cache remembers the last one; every system is asked the same.
        seed = plan.seed + 1000 * round_number
        count = plan.session_count(server.system, level)
        sessions = workload.sessions(count, self.tokenizer, seed)
        self._warm_up(server, workload, level, seed + 500)
        planned = sum(len(session.turns) for session in sessions)
        arrivals = poisson_arrivals(count, level.rate, seed) if level.rate else ()
        load = Load(server.target, sessions, level.concurrency, arrivals, plan.request_timeout)
        with progress_bar() as bar:
            task = bar.add_task(f"{TITLES[server.system]}: {workload.name}, load {level}", total=planned)
            result = self.generator.run(load, lambda ended: bar.advance(task, ended))
        run = Run(server.system, workload, level, planned, result, server.death())
        say(_line(run))
        return run

    def _warm_up(self, server: Server, workload: Workload, level: Level, seed: int) -> None:
        wave = 1 if server.system == "hf" else max(2, level.concurrency)
        asked = workload.sessions(wave, self.tokenizer, seed)
        short = [Session((Turn(session.turns[0].text, WARMUP_TOKENS),)) for session in asked]
        self.generator.run(Load(server.target, short, concurrency=wave, request_timeout=self.plan.request_timeout))

    def report_into(self, report: Report, finished: bool) -> None:
        """Put everything seen so far into the report; unless `finished`, it says that more was planned."""
        cost = bandwidth.DecodeCost.of_config(bandwidth.model_config(self.setup.model_dir), self.setup.dtype)
        copy_bytes_per_s = report.machine["copy_bandwidth_gb_s"] * 1e9
        report.cells = [cell_of(runs, cost, copy_bytes_per_s) for runs in self.runs.values()]
        report.servers = dict(self.servers)
        report.probes = dict(self.probes)
        report.problems = self.problems + self._unequal_prompts()
        report.remarks = [f"{self.skipped} runs were not made: the time limit was reached"] if self.skipped else []
        if not finished:
            report.remarks.append("cut short: what follows is what had been measured by then")

    def _unequal_prompts(self) -> list[str]:
        """Systems that saw other prompt lengths than the rest did not do the same work."""
        seen: dict[tuple[str, Level], dict[str, set[int]]] = {}
        for (system, name, level), runs in self.runs.items():
            # Answers are part of a conversation's prompts, and the baseline answers fewer requests.
            if runs[0].workload.kind != "multi-turn" and not any(run.problems for run in runs):
                lengths = {record.prompt_tokens for run in runs for record in run.good[: self.plan.hf_max_requests]}
                seen.setdefault((name, level), {})[system] = lengths
        return [
            f"{name}, load {level}: the systems report different prompt lengths, {by_system}"
            for (name, level), by_system in seen.items()
            if len({frozenset(lengths) for lengths in by_system.values()}) > 1
        ]

    def write_records(self, path: Path) -> None:
        """Every request as a JSON line."""
        rows = [json.dumps(row) for runs in self.runs.values() for row in record_rows(runs)]
        path.write_text("".join(row + "\n" for row in rows))


def _line(run: Run) -> str:
    where = f"{TITLES[run.system]:>12}  {run.workload.name}, load {run.level}"
    if run.problems:
        problem, count = run.problems.most_common(1)[0]
        return f"{where}: REFUSED, {count} x {problem}"
    cell = cell_of([run], None, 1.0)
    return f"{where}: {cell.output_tps:,.1f} tokens/s, TTFT p50 {cell.ttft.p50:.1f} ms, p99 {cell.ttft.p99:.1f} ms"
