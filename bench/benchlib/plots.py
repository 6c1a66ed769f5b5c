"""Pictures of a report: TTFT and throughput against load, every system in one picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchlib.anatomy import Anatomy, summarize_hops
from benchlib.report import Report
from benchlib.results import Cell
from benchlib.servers import SYSTEMS, TITLES

COLORS = {"minisgl": "#d1495b", "sglang": "#00798c", "hf": "#8d99ae"}
MARKERS = {"minisgl": "o", "sglang": "s", "hf": "^"}


def plot_report(report: Report, path: Path) -> None:
    """Write a PNG with one row a workload: TTFT, time between tokens and throughput against the load."""
    cells = [cell for cell in report.cells if not cell.refused]
    workloads = list(dict.fromkeys(cell.workload for cell in cells))
    if not workloads:
        return
    figure, grid = plt.subplots(len(workloads), 3, figsize=(14, 3.9 * len(workloads)), squeeze=False)
    for row, workload in zip(grid, workloads, strict=True):
        mine = [cell for cell in cells if cell.workload == workload]
        _panel(row[0], mine, lambda c: c.ttft.p50, lambda c: c.ttft.p99, "time to first token, ms")
        _panel(row[1], mine, lambda c: c.itl.p50, lambda c: c.itl.p99, "time between tokens, ms")
        _panel(row[2], mine, lambda c: c.output_tps, None, "output tokens per second")
        row[1].set_title(workload, fontsize=11)
    grid[0][0].legend(frameon=False, fontsize=9)
    device = report.machine["device"] if report.machine["device"] != "cpu" else report.machine["processor"]
    figure.suptitle(f"{report.model['name']}, {report.model['dtype']}, {device}, {report.when[:10]}", fontsize=12)
    figure.text(0.995, 0.005, "solid: median, dotted: p99", ha="right", fontsize=8, color="#555555")
    figure.tight_layout(rect=(0, 0.015, 1, 0.99))
    figure.savefig(path, dpi=110)
    plt.close(figure)


PROCESS_COLORS = {
    "client": "#8d99ae",
    "http": "#00798c",
    "pipe": "#d5d8dc",
    "tokenizer": "#5fad56",
    "scheduler": "#d1495b",
    "detokenizer": "#edae49",
}


def plot_anatomy(anatomies: Sequence[Anatomy], path: Path, title: str) -> None:
    """Write a PNG of the waterfall: each hop begins where the one before it ends; whiskers reach to its p99."""
    hops = summarize_hops(anatomies)
    figure, axes = plt.subplots(figsize=(10, 5))
    offset = 0.0
    for row, hop in enumerate(hops):
        color = PROCESS_COLORS[hop.process]
        axes.barh(row, hop.mean_us, left=offset, color=color, edgecolor="#555555", linewidth=0.5, height=0.7)
        tail = offset + max(hop.mean_us, hop.p99_us)
        axes.plot([offset + hop.mean_us, tail], [row, row], color="#555555", linewidth=0.8)
        label = f"{hop.mean_us:,.0f} us (p50 {hop.p50_us:,.0f}, p99 {hop.p99_us:,.0f})"
        axes.annotate(label, (tail, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
        offset += hop.mean_us
    axes.set_yticks(range(len(hops)), [hop.name for hop in hops])
    axes.invert_yaxis()
    axes.set_xlim(0, max(offset * 1.45, axes.get_xlim()[1] * 1.25))
    axes.axvline(offset, color="#333333", linestyle=":", linewidth=1)
    axes.set_xlabel(f"microseconds since the client began to connect; mean time to first byte {offset:,.0f} us")
    axes.set_title(title, fontsize=11)
    handles = [Rectangle((0, 0), 1, 1, color=color) for color in PROCESS_COLORS.values()]
    axes.legend(handles, PROCESS_COLORS, loc="upper right", fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(
    axes: Any,
    cells: Sequence[Cell],
    value: Callable[[Cell], float],
    tail: Callable[[Cell], float] | None,
    title: str,
) -> None:
    open_loop = any(cell.level.rate for cell in cells)
    for system in SYSTEMS:
        own = [cell for cell in cells if cell.system == system]
        own.sort(key=lambda cell: cell.level.rate or cell.level.concurrency)
        if not own:
            continue
        loads = [cell.level.rate or cell.level.concurrency for cell in own]
        look = {"color": COLORS[system], "marker": MARKERS[system], "markersize": 5}
        axes.plot(loads, [value(cell) for cell in own], label=TITLES[system], linewidth=1.8, **look)
        if tail is not None:
            axes.plot(loads, [tail(cell) for cell in own], linestyle=":", linewidth=1.2, **look)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({cell.level.rate or cell.level.concurrency for cell in cells})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("requests per second" if open_loop else "concurrent requests")
    axes.set_ylabel(title)
    axes.grid(alpha=0.25, which="both", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
