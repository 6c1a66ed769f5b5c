"""The anatomy of the time to first byte: how long each hop of a request takes, from connect to first byte.

    python bench/ttfb.py                                          starts minisgl with the demo model
    python bench/ttfb.py --minisgl-url http://127.0.0.1:30000     a server on this host that runs already
    python bench/ttfb.py --concurrency 8 --requests 200 --perfetto trace.json --plot ttfb.png

Prints a waterfall. Exits with 1 when a request failed, or when the hops of any request do not add up to the client's
own time to first byte within 2 %.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

from benchlib import options
from benchlib.anatomy import (
    TOLERANCE,
    Anatomy,
    HopSummary,
    NoAnatomy,
    anatomy_of,
    chrome_trace,
    spoiled,
    summarize_hops,
)
from benchlib.load import Load, LoadGenerator, RequestRecord
from benchlib.progress import output, progress_bar, say
from benchlib.servers import Server, ServerError
from benchlib.stats import percentile
from benchlib.workloads import Lengths, Workload, load_tokenizer, poisson_arrivals
from rich.table import Table
from rich.text import Text

COLORS = {
    "client": "bright_black",
    "http": "cyan",
    "pipe": "white",
    "tokenizer": "green",
    "scheduler": "red",
    "detokenizer": "yellow",
}
BAR_WIDTH = 44


def main() -> int:
    arguments = make_parser().parse_args()
    options.exit_on_sigterm()
    try:
        records = measure(arguments)
    except ServerError as error:
        say(f"REFUSED: {error}")
        return 1
    return report(records, arguments)


def measure(arguments: argparse.Namespace) -> list[RequestRecord]:
    """One record per request; raises ServerError when the server does not start."""
    with contextlib.ExitStack() as stack:
        generator = stack.enter_context(LoadGenerator(arguments.client_processes))
        setup = options.make_setup(arguments, ("minisgl",))
        if not arguments.minisgl_url:
            say("starting minisgl ...")
        target = stack.enter_context(Server("minisgl", setup)).target
        workload = Workload("random", arguments.input_len, arguments.output_len)
        tokenizer = load_tokenizer(setup.model_dir)
        warm_up = workload.sessions(max(4, arguments.concurrency), tokenizer, arguments.seed + 1)
        sessions = workload.sessions(arguments.requests, tokenizer, arguments.seed)
        arrivals = poisson_arrivals(arguments.requests, arguments.rate, arguments.seed) if arguments.rate else ()
        load = Load(
            target,
            sessions,
            0 if arrivals else arguments.concurrency,
            arrivals,
            arguments.request_timeout,
            fresh_connections=not arguments.keep_alive,
            extra={"return_steps": True} if arguments.perfetto else {},
        )
        generator.run(Load(target, warm_up, len(warm_up)))
        with progress_bar() as bar:
            task = bar.add_task("measuring", total=arguments.requests)
            return generator.run(load, lambda ended: bar.advance(task, ended)).records


def report(records: Sequence[RequestRecord], arguments: argparse.Namespace) -> int:
    problems = [record.problem for record in records if record.problem]
    missing = arguments.requests - len(records)
    if problems or missing:
        first = f", the first: {problems[0]}" if problems else ""
        say(f"REFUSED: {len(problems)} of {arguments.requests} requests failed, {missing} were not sent{first}")
        return 1
    try:
        anatomies = [anatomy_of(record) for record in records]
    except NoAnatomy as error:
        say(f"REFUSED: {error}")
        return 1
    output.print(waterfall(anatomies, arguments))
    if arguments.json:
        rows = [{"ttfb_us": anatomy.ttfb_us, **anatomy.hops_us} for anatomy in anatomies]
        arguments.json.write_text(json.dumps(rows, indent=1))
    if arguments.perfetto:
        arguments.perfetto.write_text(json.dumps(chrome_trace(anatomies)))
        say(f"wrote {arguments.perfetto}; open it at https://ui.perfetto.dev")
    if arguments.plot:
        from benchlib.plots import plot_anatomy

        plot_anatomy(anatomies, arguments.plot, title_of(arguments))
        say(f"wrote {arguments.plot}")
    return 1 if spoiled(anatomies) else 0


def title_of(arguments: argparse.Namespace) -> str:
    load = f"{arguments.rate:g} requests/s" if arguments.rate else f"{arguments.concurrency} at a time"
    return f"{arguments.requests} requests, {load}, {arguments.input_len.spec} tokens in"


def waterfall(anatomies: Sequence[Anatomy], arguments: argparse.Namespace) -> Table:
    """The hops in order, each a bar that begins where the one before it ends."""
    hops = summarize_hops(anatomies)
    ttfb = [anatomy.ttfb_us for anatomy in anatomies]
    mean = sum(ttfb) / len(ttfb)
    worst = max(anatomy.deviation for anatomy in anatomies)
    table = Table(title=f"Time to first byte: {title_of(arguments)}", caption=verdict(worst, spoiled(anatomies)))
    if any(hop.mean_us < 0 for hop in hops):
        table.caption = (
            f"{table.caption}\nbelow 0: the client had read the byte before the server noted that it was written"
        )
    for heading in ("hop", "in"):
        table.add_column(heading)
    for heading in ("mean us", "p50 us", "p99 us", "share"):
        table.add_column(heading, justify="right")
    table.add_column("waterfall of the means", width=BAR_WIDTH)
    offset = 0.0
    for hop in hops:
        figures = [f"{value:,.0f}" for value in (hop.mean_us, hop.p50_us, hop.p99_us)]
        table.add_row(hop.name, hop.process, *figures, f"{hop.mean_us / mean:.1%}", bar_of(hop, offset, mean))
        offset += hop.mean_us
    table.add_section()
    figures = [f"{value:,.0f}" for value in (offset, percentile(ttfb, 50), percentile(ttfb, 99))]
    table.add_row("all hops", "", *figures, f"{offset / mean:.1%}", Text("p50 and p99 are the client's own TTFB"))
    return table


def bar_of(hop: HopSummary, offset_us: float, total_us: float) -> Text:
    begin = max(0, min(BAR_WIDTH - 1, round(offset_us / total_us * BAR_WIDTH)))
    length = max(1, round(hop.mean_us / total_us * BAR_WIDTH))
    return Text(" " * begin + "━" * min(length, BAR_WIDTH - begin), style=COLORS[hop.process])


def verdict(worst: float, missed: int) -> str:
    if missed:
        return f"WRONG: {missed} requests' hops miss the client's TTFB by more than {TOLERANCE:.0%} (worst {worst:.1%})"
    return f"every request's hops add up to the client's own TTFB (worst deviation {worst:.2%})"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what is measured")
    options.add_model_options(what)
    what.add_argument("--requests", type=int, default=100, help="default: 100")
    what.add_argument("--concurrency", type=int, default=1, help="requests at a time (default: 1)")
    what.add_argument("--rate", type=float, default=0.0, help="Poisson arrivals a second instead")
    what.add_argument("--input-len", type=options.lengths, default=Lengths("16"), help="prompt tokens (default: 16)")
    what.add_argument("--output-len", type=options.lengths, default=Lengths("16"), help="new tokens (default: 16)")
    what.add_argument("--keep-alive", action="store_true", help="reuse connections instead of one per request")
    what.add_argument("--quick", action="store_const", const=20, dest="requests", help="20 requests")
    what.add_argument("--seed", type=int, default=0)
    servers = parser.add_argument_group("server")
    options.add_server_options(servers, ("minisgl",))
    files = parser.add_argument_group("output")
    files.add_argument("--perfetto", type=Path, metavar="FILE", help="write a trace for ui.perfetto.dev")
    files.add_argument("--plot", type=Path, metavar="FILE", help="write the waterfall as a picture")
    files.add_argument("--json", type=Path, metavar="FILE", help="write every request's hops")
    files.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the server's log")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
