"""The report of a server benchmark: one JSON file for machines, one Markdown file for people."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchlib.bandwidth import cpu_name
from benchlib.results import Cell, Decode, Level, agreement
from benchlib.servers import SYSTEMS, TITLES
from benchlib.stats import Summary

SCHEMA = 1


@dataclass
class Report:
    """Everything a reader needs to believe the figures, or to see why there are none.

    Attributes:
        machine: processor, device, its measured copy bandwidth, operating system, Python.
        model: name, dtype, bytes of weights one decode step reads.
        method: order, rounds, warm-up, client processes, seed, sampling; anything that shapes the figures.
        servers: by system, what servers.Server.describe says.
        missing: by system, why it was not measured.
        probes: by system, the ids of its greedy answer to one and the same prompt.
        problems: what spoils the whole run, beyond the refused cells.
        remarks: what a reader should know and that spoils nothing.
    """

    machine: dict[str, Any]
    model: dict[str, Any]
    method: dict[str, Any]
    title: str = "Server benchmark"
    when: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()))
    servers: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    probes: dict[str, list[int]] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def refused(self) -> bool:
        """Whether any part of this run must not be taken as a result."""
        return bool(self.problems) or not self.cells or any(cell.refused for cell in self.cells)

    def to_json(self) -> str:
        """JSON with null for figures that do not exist."""
        value = {"schema": SCHEMA, "refused": self.refused, **dataclasses.asdict(self)}
        return json.dumps(_without_nan(value), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        value = json.loads(text)
        if value.pop("schema", None) != SCHEMA:
            raise ValueError("not a report of this version of the benchmark")
        value.pop("refused")
        cells = [_cell(cell) for cell in value.pop("cells")]
        return cls(cells=cells, **value)

    def write(self, folder: Path, name: str) -> None:
        """Replace NAME.json and NAME.md; a run that is cut short in the middle of this leaves the ones before."""
        folder.mkdir(parents=True, exist_ok=True)
        for kind, text in (("json", self.to_json()), ("md", self.markdown())):
            unfinished = folder / f".{name}.{kind}"
            unfinished.write_text(text)
            unfinished.replace(folder / f"{name}.{kind}")

    def markdown(self) -> str:
        parts = [f"# {self.title}", "", *self._warning(), *self._facts(), ""]
        for workload in dict.fromkeys(cell.workload for cell in self.cells):
            cells = [cell for cell in self.cells if cell.workload == workload]
            parts += [f"## {workload}", "", *glance_table(cells), "", *latency_table(cells), ""]
        parts += [*self._not_ahead(), *self._servers(), *_DEFINITIONS]
        return "\n".join(parts).rstrip() + "\n"

    def _warning(self) -> list[str]:
        if not self.refused:
            return []
        reasons = list(self.problems) or [] if self.cells else [*self.problems, "nothing was measured"]
        for cell in self.cells:
            where = f"{TITLES[cell.system]}, {cell.workload}, {cell.level}"
            reasons += [f"{where}: {reason}" for reason in cell.refused]
        return ["**REFUSED: this run is not a result.**", "", *(f"- {reason}" for reason in reasons), ""]

    def _facts(self) -> list[str]:
        lines = [f"- {self.when}", f"- machine: {words(self.machine)}", f"- model: {words(self.model)}"]
        lines += [f"- method: {words(self.method)}", *(f"- **{remark}**" for remark in self.remarks)]
        lines += [f"- not measured: {TITLES[system]}: {reason}" for system, reason in self.missing.items()]
        reference = "hf" if "hf" in self.probes else next(iter(self.probes), "")
        for system in self.probes:
            if system != reference and self.probes[system] and self.probes[reference]:
                shared = agreement(self.probes[system], self.probes[reference])
                pair = f"{TITLES[system]} and {TITLES[reference]}"
                lines.append(f"- the greedy answers of {pair} to one prompt share their first {shared} tokens")
        for cell in self.cells:
            lines += [f"- warning, {TITLES[cell.system]} at {cell.level}: {warning}" for warning in cell.warnings]
        return lines

    def _not_ahead(self) -> list[str]:
        behind = not_ahead(self.cells)
        if len({cell.system for cell in self.cells if not cell.refused}) < 2:
            return []
        return ["## Where minisgl is not ahead", "", *(f"- {line}" for line in behind or ["nowhere in this run"]), ""]

    def _servers(self) -> list[str]:
        lines = ["## Servers", ""]
        for system, server in self.servers.items():
            how = f"`{server['command']}`" if server["command"] else f"already running at {server['url']}"
            lines.append(
                f"- **{TITLES[system]}**: {how}; ready after {server['ready_seconds']:g} s; {words(server['facts'])}"
            )
        return [*lines, ""]


def machine_facts(copy: dict[str, Any]) -> dict[str, Any]:
    """What the figures were measured on; `copy` comes from bandwidth.measure."""
    return {
        "processor": cpu_name(),
        "device": copy["name"] if copy["device"] != "cpu" else "cpu",
        "copy_bandwidth_gb_s": round(copy["copy_bytes_per_s"] / 1e9, 1),
        "load_average_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": copy["torch"],
    }


def merge(reports: Sequence[Report]) -> Report:
    """One report of several that measured the same model on the same kind of machine, each some of the systems."""
    first = reports[0]
    for other in reports[1:]:
        for what in ("model", "device", "processor"):
            mine, theirs = (r.model if what == "model" else r.machine.get(what) for r in (first, other))
            if mine != theirs:
                raise ValueError(f"these reports do not belong together: {what} differs ({mine} and {theirs})")
    merged = dataclasses.replace(first, servers={}, missing={}, probes={}, cells=[], problems=[], remarks=[])
    for report in reports:
        merged.servers |= report.servers
        merged.missing |= report.missing
        merged.probes |= report.probes
        merged.cells += report.cells
        merged.problems += report.problems
        merged.remarks += report.remarks
    measured = {cell.system for cell in merged.cells}
    merged.missing = {system: why for system, why in merged.missing.items() if system not in measured}
    return merged


# ---- tables ---------------------------------------------------------------------------------------------------------


def glance_table(cells: Sequence[Cell]) -> list[str]:
    """Output tokens per second and TTFT p50, a row a level and a column a system."""
    systems = [system for system in SYSTEMS if any(cell.system == system for cell in cells)]
    head = "| load | " + " | ".join(f"{TITLES[system]} tokens/s (TTFT p50)" for system in systems) + " |"
    rows = [head, "|---:|" + "---:|" * len(systems)]
    for level in _levels(cells):
        here = {cell.system: cell for cell in cells if cell.level == level}
        best = max((cell.output_tps for cell in here.values() if not cell.refused), default=math.nan)
        columns = []
        for system in systems:
            cell = here.get(system)
            if cell is None:
                columns.append("-")
            elif cell.refused:
                columns.append("REFUSED")
            else:
                rate = number(cell.output_tps)
                columns.append(f"{f'**{rate}**' if cell.output_tps == best else rate} ({number(cell.ttft.p50)} ms)")
        rows.append(f"| {level} | " + " | ".join(columns) + " |")
    return rows


def latency_table(cells: Sequence[Cell]) -> list[str]:
    """Every percentile, a row a level and system."""
    rows = [
        "| load | system | tokens/s (runs) | TTFT p50 / p90 / p99 ms | between tokens p50 / p90 / p99 ms "
        "| end to end p50 / p90 / p99 ms | decode step: batch, GB/s (of copy) | requests |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for level in _levels(cells):
        for cell in sorted(
            (cell for cell in cells if cell.level == level), key=lambda cell: SYSTEMS.index(cell.system)
        ):
            if cell.refused:
                rows.append(
                    f"| {level} | {TITLES[cell.system]} | REFUSED: {cell.refused[0]} | | | | | {cell.requests} |"
                )
                continue
            runs = " ".join(number(tps) for tps in cell.output_tps_runs)
            columns = [
                str(level),
                TITLES[cell.system],
                f"{number(cell.output_tps)} ({runs})",
                *(_percentiles(summary) for summary in (cell.ttft, cell.itl, cell.e2e)),
                _decode(cell.decode),
                str(cell.requests),
            ]
            rows.append("| " + " | ".join(columns) + " |")
    return rows


_BETTER: tuple[tuple[str, Callable[[Cell], float], bool], ...] = (
    ("tokens/s", lambda cell: cell.output_tps, True),
    ("TTFT p50 ms", lambda cell: cell.ttft.p50, False),
    ("TTFT p99 ms", lambda cell: cell.ttft.p99, False),
    ("between tokens p50 ms", lambda cell: cell.itl.p50, False),
    ("between tokens p99 ms", lambda cell: cell.itl.p99, False),
    ("end to end p50 ms", lambda cell: cell.e2e.p50, False),
)


def not_ahead(cells: Sequence[Cell]) -> list[str]:
    """One line for every figure in which another system is at least as good as minisgl."""
    lines = []
    for mine in (cell for cell in cells if cell.system == "minisgl" and not cell.refused):
        for other in cells:
            same = other.workload == mine.workload and other.level == mine.level
            if not same or other.system == "minisgl" or other.refused:
                continue
            behind = []
            for name, value, more_is_better in _BETTER:
                ours, theirs = value(mine), value(other)
                if (theirs >= ours) if more_is_better else (theirs <= ours):
                    behind.append(f"{name} {number(ours)} against {number(theirs)}")
            if behind:
                lines.append(f"{mine.workload}, load {mine.level}, {TITLES[other.system]}: {'; '.join(behind)}")
    return lines


def number(value: float) -> str:
    """Three or more significant digits, thousands separated; a dash for what does not exist."""
    if math.isnan(value):
        return "-"
    for limit, digits in ((0.1, 4), (1, 3), (10, 2), (100, 1)):
        if abs(value) < limit:
            return f"{value:.{digits}f}"
    return f"{value:,.0f}"


def _percentiles(summary: Summary) -> str:
    return " / ".join(number(value) for value in (summary.p50, summary.p90, summary.p99))


def _decode(decode: Decode | None) -> str:
    if decode is None:
        return "-"
    return f"{number(decode.batch)}, {number(decode.bytes_per_s / 1e9)} ({decode.copy_fraction:.0%})"


def _levels(cells: Sequence[Cell]) -> list[Level]:
    return sorted({cell.level for cell in cells}, key=lambda level: (level.rate, level.concurrency))


_UNITS = {"copy_bandwidth_gb_s": "copy bandwidth {} GB/s", "ready_seconds": "ready after {} s"}


def words(value: Any) -> str:
    """Nested facts as one readable phrase."""
    if isinstance(value, dict):
        return ", ".join(
            _UNITS[key].format(words(item)) if key in _UNITS else f"{key.replace('_', ' ')} {words(item)}"
            for key, item in value.items()
        )
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


_DEFINITIONS = [
    "## What the figures mean",
    "",
    "- load: a number is sessions running at any time (closed loop), `N/s` Poisson arrivals at that rate (open loop).",
    "- TTFT: from just before the request is sent (connecting included) to the arrival of its first token.",
    "- between tokens: gaps between arrivals at the client; an arrival that brings n tokens counts as n equal gaps.",
    "- tokens/s: output tokens of all requests over the time from the first request's start to the last one's end; in "
    "parentheses each run's own.",
    "- Hugging Face's baseline answers one request at a time: under load its TTFT is mostly the wait for its turn.",
    "- tokens are counted by the ids or counts that each server reports, and checked against its final usage.",
    "- decode step: batch is the mean number of requests decoding at a time (Little's law); GB/s is the bytes of "
    "weights (as the checkpoint has them) and of that batch's keys and values over the median time per token, beside "
    "its share of the measured copy bandwidth (read + write; a step only reads, so a share above 100 % is possible).",
]


# ---- JSON -----------------------------------------------------------------------------------------------------------


def _cell(value: dict[str, Any]) -> Cell:
    plain: dict[str, Any] = {key: math.nan if item is None else item for key, item in value.items()}
    for name in ("ttft", "first_text", "itl", "tpot", "e2e"):
        figures: dict[str, Any] = {key: math.nan if item is None else item for key, item in value[name].items()}
        plain[name] = Summary(**figures)
    plain["level"] = Level(**value["level"])
    plain["decode"] = Decode(**value["decode"]) if value["decode"] else None
    for name in ("refused", "warnings", "output_tps_runs"):
        plain[name] = tuple(value[name])
    return Cell(**plain)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
