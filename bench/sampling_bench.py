"""What sampling costs beside greedy decoding: one minisgl server, all settings measured in turn over HTTP.

    python bench/sampling_bench.py --model DIR --device cuda [--concurrency 1,8,64] [--rounds 2]

Prints tokens/s and, of all requests, the median milliseconds to the first token and between tokens.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from benchlib import options
from benchlib.load import Load, LoadGenerator, RequestRecord
from benchlib.servers import Server
from benchlib.workloads import Lengths, Workload, load_tokenizer

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature 1": {"temperature": 1.0},
    "temperature 0.8, top-p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "Qwen2.5's chat defaults": {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_model_options(parser.add_argument_group("model"))
    options.add_server_options(parser.add_argument_group("server"), ("minisgl",))
    parser.add_argument("--concurrency", type=options.integers, default=[1, 8, 64], help="default: 1,8,64")
    parser.add_argument("--rounds", type=int, default=2, help="repeats of everything (default: 2)")
    parser.add_argument("--waves", type=int, default=3, help="requests per concurrent one (default: 3)")
    parser.add_argument("--min-requests", type=int, default=6, help="requests at least (default: 6)")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for the server's log")
    arguments = parser.parse_args()
    options.exit_on_sigterm()
    setup = options.make_setup(arguments, ("minisgl",))
    workload = Workload("random", Lengths("16"), Lengths("128"))
    tokenizer = load_tokenizer(setup.model_dir)
    found: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    with LoadGenerator(arguments.client_processes) as generator, Server("minisgl", setup) as server:

        def run(name: str, streams: int, requests: int, seed: int) -> list[RequestRecord]:
            sessions = workload.sessions(requests, tokenizer, seed)
            extra = SETTINGS[name] and SETTINGS[name] | {"seed": seed}
            load = Load(server.target, sessions, streams, request_timeout=arguments.request_timeout, extra=extra)
            records = generator.run(load).records
            problems = [record.problem for record in records if record.problem]
            if problems:
                raise SystemExit(f"{name}, {streams} streams: {problems[0]}; {server.death() or server.last_words()}")
            return records

        for round_number in range(arguments.rounds):
            for streams in arguments.concurrency:
                for number, name in enumerate(SETTINGS):
                    seed = 1000 * round_number + 10 * streams + number
                    run(name, streams, streams, seed + 100_000)
                    records = run(name, streams, max(arguments.waves * streams, arguments.min_requests), seed)
                    found.setdefault((name, streams), []).append(figures(records))
                    print(f"{name}, {streams} streams: {found[name, streams][-1][0]:,.0f} tokens/s", flush=True)
    print("\n| streams | setting | tokens/s, each round | of greedy | TTFT p50, ms | between tokens p50, ms |")
    print("|---|---|---|---|---|---|")
    for (name, streams), rounds in found.items():
        speeds, firsts, gaps = zip(*rounds, strict=True)
        share = sum(speeds) / sum(one[0] for one in found["greedy", streams])
        each = " / ".join(f"{speed:,.0f}" for speed in speeds)
        middle = [f"{statistics.median(values):.2f}" for values in (firsts, gaps)]
        print(f"| {streams} | {name} | {each} | {share:.0%} | {middle[0]} | {middle[1]} |")


def figures(records: list[RequestRecord]) -> tuple[float, float, float]:
    """Tokens a second, and the medians of the milliseconds to the first token and between tokens."""
    seconds = (max(record.finished_ns for record in records) - min(record.started_ns for record in records)) / 1e9
    return (
        sum(record.output_tokens for record in records) / seconds,
        statistics.median(record.ttft_ms for record in records),
        statistics.median(record.tpot_ms for record in records),
    )


if __name__ == "__main__":
    main()
