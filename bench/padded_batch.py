"""What continuous batching over HTTP is worth beside what needs no server: Hugging Face `generate` on a padded batch.

    python bench/padded_batch.py [--model DIR] [--batch 8,32] [--input-len 16] [--output-len 32]
    python bench/padded_batch.py --output-len uniform:8:128      answers of different lengths

minisgl's server and the model in this process take the same prompts in turn, A B A B. The server's clients stream each
answer, and the next request begins when one ends; Hugging Face pads the prompts of a batch, generates until its longest
answer is done and decodes all of them at the end. Both begin with text and end with text.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchlib.servers import OPENMP_WAIT_POLICY

# Read by OpenMP when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", OPENMP_WAIT_POLICY)

from benchlib import options
from benchlib.hf_model import HfModel
from benchlib.load import Load, LoadGenerator
from benchlib.results import Level, Run
from benchlib.servers import Server
from benchlib.workloads import Lengths, Session, Workload, load_tokenizer


def main() -> None:
    """Print tokens/s of both for each batch size, and their ratio."""
    arguments = make_parser().parse_args()
    options.exit_on_sigterm()
    with tempfile.TemporaryDirectory() as logs:
        arguments.out = Path(logs)
        setup = options.make_setup(arguments, ("minisgl",))
        tokenizer = load_tokenizer(setup.model_dir)
        workload = Workload("random", arguments.input_len, arguments.output_len)
        hf = HfModel.load(setup.model_dir, setup.device, setup.dtype)
        with Server("minisgl", setup) as server, LoadGenerator(arguments.client_processes) as generator:
            for batch in arguments.batch:
                served, padded = list[float](), list[float]()
                for number in range(-1, arguments.rounds):
                    # The first round warms both up.
                    count = batch * (arguments.waves if number >= 0 else 1)
                    sessions = workload.sessions(count, tokenizer, number)
                    served.append(serve(generator, server, workload, sessions, batch))
                    padded.append(generate(hf, sessions, batch))
                report(batch, served[1:], padded[1:])


def serve(generator: LoadGenerator, server: Server, workload: Workload, sessions: list[Session], batch: int) -> float:
    """Tokens/s of the server's clients together."""
    result = generator.run(Load(server.target, sessions, batch))
    run = Run("minisgl", workload, Level(batch), len(sessions), result, server.death())
    if run.problems:
        sys.exit(f"the server did not answer everything: {', '.join(run.problems)}")
    return run.output_tokens / run.wall_s


def generate(hf: HfModel, sessions: list[Session], batch: int) -> float:
    """Tokens/s that were asked for; those that a shorter answer gets while it waits for the longest do not count."""
    began = time.perf_counter()
    for first in range(0, len(sessions), batch):
        turns = [session.turns[0] for session in sessions[first : first + batch]]
        inputs = hf.tokenizer([turn.text for turn in turns], return_tensors="pt", padding=True, padding_side="left")
        longest = max(turn.max_new_tokens for turn in turns)
        ids = hf.model.generate(**inputs.to(hf.model.device), max_new_tokens=longest, do_sample=False)
        answers = ids[:, -longest:].tolist()
        hf.tokenizer.batch_decode([answer[: turn.max_new_tokens] for answer, turn in zip(answers, turns, strict=True)])
    asked = sum(session.turns[0].max_new_tokens for session in sessions)
    return asked / (time.perf_counter() - began)


def report(batch: int, served: list[float], padded: list[float]) -> None:
    ratio = statistics.median(one / other for one, other in zip(served, padded, strict=True))
    rounds = ", ".join(f"{one:.1f} : {other:.1f}" for one, other in zip(served, padded, strict=True))
    print(
        f"{batch:3} at a time: minisgl over HTTP {statistics.median(served):.1f} tokens/s, Hugging Face's padded batch "
        f"{statistics.median(padded):.1f}: {ratio:.2f}x   (rounds {rounds})",
        flush=True,
    )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what is measured")
    options.add_model_options(what)
    what.add_argument("--batch", type=options.integers, default=[8, 32], help="streams, and prompts of a batch")
    what.add_argument("--rounds", type=int, default=3, help="of each in turn (default: 3)")
    what.add_argument("--waves", type=int, default=2, help="batches in a round (default: 2)")
    what.add_argument("--input-len", type=options.lengths, default=Lengths("16"), help="prompt tokens (default: 16)")
    what.add_argument("--output-len", type=options.lengths, default=Lengths("32"), help="new tokens (default: 32)")
    options.add_server_options(parser.add_argument_group("the server"), ("minisgl",))
    return parser


if __name__ == "__main__":
    main()
