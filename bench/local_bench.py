"""Compare minisgl, sglang and Hugging Face inside the process that asks: no HTTP, one request at a time.

    python bench/local_bench.py                            3 chat turns of 512 new tokens each, context kept
    python bench/local_bench.py --max-new-tokens 64 "Tell me a story about a river."
    python bench/local_bench.py --model DIR --device cuda --sglang-site DIR
    python bench/local_bench.py --quick

Writes NAME.json and NAME.md into --out. Exits with 1 when an answer is missing, empty or of the wrong length: such a
run is refused as a result.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchlib import bandwidth, options
from benchlib.inprocess import Messages, Remote, TurnResult
from benchlib.progress import output, progress_bar, say
from benchlib.report import machine_facts, number, words
from benchlib.servers import SYSTEMS, TITLES, ServerError, Setup, missing_reason
from benchlib.stats import percentile
from rich.markdown import Markdown

TURNS = (
    "Hello! My name is Ada. Tell me a story about a small boat and a big river.",
    "What happened to the boat after that?",
    "Do you remember my name? Say it, and end the story.",
)
WARMUP = [{"role": "user", "content": "Count to ten."}]
WARMUP_TOKENS = 16


@dataclass
class Outcome:
    """What one system did: by turn the results of all rounds, and why it must not be believed, if so."""

    turns: list[list[TurnResult]]
    versions: dict[str, str] = field(default_factory=dict)
    ready_seconds: float = math.nan
    problem: str = ""


def main() -> int:
    arguments = make_parser().parse_args()
    options.exit_on_sigterm()
    if arguments.quick:
        arguments.max_new_tokens, arguments.rounds = min(arguments.max_new_tokens, 64), 1
    setup = options.make_setup(arguments)
    texts = (arguments.prompt,) if arguments.prompt else TURNS
    missing = {system: missing_reason(system, setup) for system in arguments.systems}
    systems = [system for system in arguments.systems if not missing[system]]
    for system in arguments.systems:
        if missing[system]:
            say(f"{TITLES[system]} is left out: {missing[system]}")
    say("measuring the copy bandwidth ...")
    machine = machine_facts(bandwidth.measure(setup.python, setup.device))
    outcomes = {system: Outcome([[] for _ in texts]) for system in systems}
    # On a GPU each system takes the memory for itself; on a CPU all are loaded and answer in turn, A B A B.
    for group in [systems] if setup.device == "cpu" else [[system] for system in systems]:
        measure(group, setup, texts, arguments, outcomes)
    facts = {
        "machine": machine,
        "model": options.model_facts(setup),
        "method": {
            "turns": len(texts),
            "new tokens a turn": arguments.max_new_tokens,
            "rounds": arguments.rounds,
            "order": "all loaded, answering in turn (A B A B)"
            if setup.device == "cpu"
            else "each alone on the machine",
            "sampling": "greedy, EOS ignored",
            "warm-up": f"one turn of {WARMUP_TOKENS} tokens, not counted",
        },
    }
    missing = {system: reason for system, reason in missing.items() if reason}
    return finish(facts, outcomes, missing, setup, arguments)


def measure(
    systems: Sequence[str],
    setup: Setup,
    texts: Sequence[str],
    arguments: argparse.Namespace,
    outcomes: dict[str, Outcome],
) -> None:
    """Load these systems together and let them answer in turn, one at a time."""
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(progress_bar())
        task = bar.add_task("", total=len(systems) * (1 + arguments.rounds * len(texts)))
        loaded: list[Remote] = []
        for system in systems:
            bar.update(task, description=f"loading {TITLES[system]}")
            outcome = outcomes[system]
            try:
                remote = stack.enter_context(Remote(system, setup))
                remote.answer(WARMUP, WARMUP_TOKENS)
            except ServerError as error:
                outcome.problem = str(error)
                continue
            outcome.versions, outcome.ready_seconds = remote.versions, remote.ready_seconds
            loaded.append(remote)
            bar.advance(task)
        for _ in range(arguments.rounds):
            contexts: dict[str, Messages] = {remote.system: [] for remote in loaded}
            for turn, text in enumerate(texts):
                for remote in list(loaded):
                    bar.update(task, advance=1, description=f"{TITLES[remote.system]} answers turn {turn + 1}")
                    outcome, context = outcomes[remote.system], contexts[remote.system]
                    context.append({"role": "user", "content": text})
                    try:
                        result = remote.answer(context, arguments.max_new_tokens)
                        outcome.problem = result.problem(arguments.max_new_tokens)
                    except ServerError as error:
                        outcome.problem = str(error)
                    if outcome.problem:
                        loaded.remove(remote)
                        continue
                    outcome.turns[turn].append(result)
                    context.append({"role": "assistant", "content": result.text})


def finish(
    facts: dict[str, Any],
    outcomes: dict[str, Outcome],
    missing: dict[str, str],
    setup: Setup,
    arguments: argparse.Namespace,
) -> int:
    """Write the report, show its table, and say with the exit status whether it is a result."""
    problems = {system: outcome.problem for system, outcome in outcomes.items() if outcome.problem}
    refused = bool(problems) or not outcomes
    table = table_of(outcomes, setup, facts["machine"]["copy_bandwidth_gb_s"] * 1e9)
    lines = [f"# {arguments.title or 'Local benchmark'}", ""]
    if refused:
        lines += ["**REFUSED: this run is not a result.**", ""]
    lines += [f"- {TITLES[system]}: {problem}" for system, problem in problems.items()]
    lines += [f"- {name}: {words(fact)}" for name, fact in facts.items()]
    lines += [f"- not measured: {TITLES[system]}: {reason}" for system, reason in missing.items()]
    for system, outcome in outcomes.items():
        lines.append(f"- {TITLES[system]}: {words(outcome.versions)}, loaded in {number(outcome.ready_seconds)} s")
    lines += ["", *table, "", *DEFINITIONS]
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{arguments.name}.md").write_text("\n".join(lines) + "\n")
    results = {system: dataclasses.asdict(outcome) for system, outcome in outcomes.items()}
    value = {"refused": refused, **facts, "missing": missing, "results": results}
    (arguments.out / f"{arguments.name}.json").write_text(json.dumps(value, indent=1, ensure_ascii=False))
    output.print(Markdown("\n".join(table)))
    say(f"wrote {arguments.out / arguments.name}.md and .json")
    for system, problem in problems.items():
        say(f"REFUSED: {TITLES[system]}: {problem}")
    return 1 if refused else 0


def table_of(outcomes: dict[str, Outcome], setup: Setup, copy_bytes_per_s: float) -> list[str]:
    """Medians over the rounds, a row a turn and system, each with minisgl's throughput as a multiple of it."""
    cost = bandwidth.DecodeCost.of_config(bandwidth.model_config(setup.model_dir), setup.dtype)
    rows = [
        "| turn | system | tokens in | tokens out | TTFT ms | time s | tokens/s | ms/token after the first "
        "| GB/s (of copy) | minisgl is |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for turn in range(max((len(outcome.turns) for outcome in outcomes.values()), default=0)):
        mine = outcomes.get("minisgl")
        for system, outcome in outcomes.items():
            results = outcome.turns[turn]
            if outcome.problem or not results:
                rows.append(f"| {turn + 1} | {TITLES[system]} | REFUSED | | | | | | | |")
                continue
            rate, step = (median([getattr(r, name) for r in results]) for name in ("tokens_per_second", "step_ms"))
            context = results[0].prompt_tokens + results[0].output_tokens / 2
            bytes_per_s = cost.step_bytes(1, context) / (step / 1e3) if cost else math.nan
            ratio = "-"
            if mine and not mine.problem and system != "minisgl":
                ratio = f"{median([r.tokens_per_second for r in mine.turns[turn]]) / rate:.2f} x as fast"
            columns = [
                turn + 1,
                TITLES[system],
                results[0].prompt_tokens,
                results[0].output_tokens,
                number(median([r.ttft_ms for r in results])),
                number(median([r.total_ms for r in results]) / 1e3),
                number(rate),
                number(step),
                f"{number(bytes_per_s / 1e9)} ({bytes_per_s / copy_bytes_per_s:.0%})" if cost else "-",
                ratio,
            ]
            rows.append("| " + " | ".join(str(column) for column in columns) + " |")
    return rows


def median(values: Sequence[float]) -> float:
    return percentile(values, 50)


DEFINITIONS = [
    "TTFT: from the call to the first token (minisgl: to its first text). tokens/s: all tokens over the whole time of "
    "the turn, prompt included. Figures are medians over the rounds. GB/s: bytes of weights and of the context's keys "
    "and values over the time per token; in parentheses as a share of the measured copy bandwidth (read + write).",
]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", help="one user message instead of the default suite of 3 turns")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="tokens of every answer (default: 512)")
    parser.add_argument(
        "--systems", type=options.system_names, default=list(SYSTEMS), help="default: minisgl,sglang,hf"
    )
    parser.add_argument("--rounds", type=int, default=2, help="repeats of everything (default: 2)")
    parser.add_argument("--quick", action="store_true", help="64 tokens, one round")
    options.add_model_options(parser.add_argument_group("model"))
    parser.add_argument("--sglang-site", type=Path, help="folder with sglang's packages, for its process alone")
    options.add_output_options(parser.add_argument_group("output"), "local")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
