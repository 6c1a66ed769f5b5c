"""Compare minisgl, sglang and a Hugging Face baseline over HTTP: one client, the same prompts, the same lengths.

    python bench/server_bench.py                                 the demo model on the CPU, a few minutes
    python bench/server_bench.py --quick                         a one-minute look
    python bench/server_bench.py --model DIR --device cuda       a model directory on a GPU
    python bench/server_bench.py --rates 1,4 --workload multi-turn
    python bench/server_bench.py --merge a.json b.json           one report of runs made apart

bench/make_model.py makes model directories. Writes NAME.json, NAME.md and NAME.png into --out. Exits with 1 when a
request failed, broke off or came back empty: such a run is refused as a result.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchlib import bandwidth, options
from benchlib.campaign import Campaign, Plan
from benchlib.load import LoadGenerator
from benchlib.progress import output, say
from benchlib.report import Report, glance_table, machine_facts, merge
from benchlib.results import Level
from benchlib.servers import OPENMP_WAIT_POLICY, SYSTEMS, TITLES, missing_reason
from benchlib.workloads import Lengths, Workload, load_tokenizer
from rich.markdown import Markdown


def main() -> int:
    arguments = make_parser().parse_args()
    if arguments.merge:
        report = merge([Report.from_json(path.read_text()) for path in arguments.merge])
        return finish(report, arguments)
    options.exit_on_sigterm()
    setup = options.make_setup(arguments)
    plan = make_plan(arguments)
    missing = {system: missing_reason(system, setup) for system in arguments.systems}
    systems = [system for system, reason in missing.items() if not reason]
    for system, reason in missing.items():
        if reason:
            say(f"{TITLES[system]} is left out: {reason}")
    say("measuring the copy bandwidth ...")
    report = Report(
        machine=machine_facts(bandwidth.measure(setup.python, setup.device)),
        model=options.model_facts(setup),
        method={
            **plan.facts(),
            "client processes": arguments.client_processes,
            "OpenMP wait policy of all": os.environ.get("OMP_WAIT_POLICY", OPENMP_WAIT_POLICY),
        },
        title=arguments.title or "Server benchmark",
        missing={system: reason for system, reason in missing.items() if reason},
    )
    with LoadGenerator(arguments.client_processes) as generator:
        campaign = Campaign(plan, setup, load_tokenizer(setup.model_dir), generator)
        for group in [systems] if plan.order == "interleaved" else [[system] for system in systems]:
            for _ in campaign.measure(group):
                # Written after every run, so that whoever cuts this short has what was measured.
                campaign.report_into(report, finished=False)
                report.write(arguments.out, arguments.name)
        campaign.report_into(report, finished=True)
    if arguments.records:
        campaign.write_records(arguments.out / f"{arguments.name}.records.jsonl")
    return finish(report, arguments)


def finish(report: Report, arguments: argparse.Namespace) -> int:
    """Write everything, show the short table, and say with the exit status whether it is a result."""
    report.write(arguments.out, arguments.name)
    written = ".md and .json"
    try:
        from benchlib.plots import plot_report
    except ImportError:
        say("no plot: matplotlib is missing (pip install '.[bench]')")
    else:
        plot_report(report, arguments.out / f"{arguments.name}.png")
        written = ".md, .json and .png"
    for workload in dict.fromkeys(cell.workload for cell in report.cells):
        table = glance_table([cell for cell in report.cells if cell.workload == workload])
        output.print(Markdown("\n".join([f"**{workload}**", "", *table])))
    say(f"wrote {arguments.out / arguments.name}{written}")
    if report.refused:
        say("REFUSED: this run is not a result; the report says why")
    return 1 if report.refused else 0


def make_plan(arguments: argparse.Namespace) -> Plan:
    if arguments.quick:
        arguments.concurrency, arguments.rounds, arguments.waves, arguments.min_requests = [1, 4], 1, 2, 4
        arguments.seconds, arguments.hf_max_requests = 5.0, 4
        arguments.output_len = min(arguments.output_len, Lengths("32"), key=lambda lengths: lengths.longest)
    levels = [Level(rate=rate) for rate in arguments.rates] or [Level(number) for number in arguments.concurrency]
    shape = (arguments.output_len, arguments.prefix_len, arguments.groups, arguments.turns)
    order = arguments.order
    if order == "auto":
        order = "interleaved" if arguments.device == "cpu" else "alone"
    return Plan(
        workloads=[Workload(arguments.workload, input_len, *shape) for input_len in arguments.input_len],
        levels=levels,
        rounds=arguments.rounds,
        order=order,
        waves=arguments.waves,
        min_requests=arguments.min_requests,
        seconds=arguments.seconds,
        seed=arguments.seed,
        request_timeout=arguments.request_timeout,
        hf_max_concurrency=arguments.hf_max_concurrency,
        hf_max_requests=arguments.hf_max_requests,
        time_limit=arguments.time_limit,
    )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what is measured")
    what.add_argument("--systems", type=options.system_names, default=list(SYSTEMS), help="default: minisgl,sglang,hf")
    options.add_model_options(what)
    what.add_argument("--quick", action="store_true", help="concurrency 1 and 4, one short round: about a minute")
    what.add_argument("--rounds", type=int, default=2, help="repeats of everything (default: 2)")
    what.add_argument(
        "--order",
        default="auto",
        choices=("auto", "interleaved", "alone"),
        help="interleaved: all up, measured A B A B; alone: one at a time (default: interleaved on CPUs, else alone)",
    )
    what.add_argument("--hf-max-concurrency", type=int, default=8, help="the baseline does not batch (default: 8)")
    what.add_argument("--hf-max-requests", type=int, default=16, help="requests per run of the baseline (default: 16)")
    what.add_argument("--time-limit", type=float, default=float("inf"), help="seconds; no run is begun after them")
    what.add_argument("--merge", type=Path, nargs="+", metavar="JSON", help="merge these reports instead of measuring")

    load = parser.add_argument_group("load")
    load.add_argument("--workload", default="random", choices=("random", "shared-prefix", "multi-turn"))
    load.add_argument("--concurrency", type=options.integers, default=[1, 4, 8], help="closed loop (default: 1,4,8)")
    load.add_argument("--rates", type=options.rates, default=[], help="open loop instead: Poisson arrivals a second")
    load.add_argument("--seconds", type=float, default=20.0, help="length of an open-loop run (default: 20)")
    load.add_argument("--waves", type=int, default=4, help="closed loop: sessions per concurrent one (default: 4)")
    load.add_argument("--min-requests", type=int, default=8, help="closed loop: sessions at least (default: 8)")
    load.add_argument(
        "--input-len",
        type=options.several_lengths,
        default=[Lengths("16")],
        help="prompt tokens: N, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA; several are measured in turn (default: 16)",
    )
    load.add_argument("--output-len", type=options.lengths, default=Lengths("128"), help="new tokens (default: 128)")
    load.add_argument("--prefix-len", type=int, default=256, help="shared-prefix: tokens in common (default: 256)")
    load.add_argument("--groups", type=int, default=4, help="shared-prefix: different prefixes (default: 4)")
    load.add_argument("--turns", type=int, default=3, help="multi-turn: turns of a session (default: 3)")
    load.add_argument("--seed", type=int, default=0)

    servers = parser.add_argument_group("servers")
    options.add_server_options(servers)
    servers.add_argument("--sglang-site", type=Path, help="folder with sglang's packages, for its process alone")

    files = parser.add_argument_group("output")
    options.add_output_options(files, "server")
    files.add_argument("--records", action="store_true", help="also write every request as a JSON line")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
