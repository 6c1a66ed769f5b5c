"""How much running streams notice of a long prompt that arrives: the gaps between their tokens, before and meanwhile.

    python bench/long_prompt.py [MODEL_DIR] [--streams 32] [--prompt 16384] [--dtype bfloat16] [--chunk N]
    python bench/long_prompt.py MODEL_DIR --device cuda
    python bench/long_prompt.py MODEL_DIR --device cuda --served [--rounds 3]

In-process, gaps are those between steps. With --served a server is started, and gaps are those that its HTTP clients
see. Without MODEL_DIR it is a small model with random weights and room for 32k positions.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

# Read by OpenMP when torch is loaded, as in the scheduler process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchlib.client import Connection, Exchange
from benchlib.servers import Server, Setup
from benchlib.target import Target

from minisgl.config import ModelSpec, ServerConfig
from minisgl.messages import TokenizedRequest
from minisgl.sampling_params import SamplingParams
from minisgl.scheduler_proc.core import ReplicaCore
from minisgl.scheduler_proc.engine import StepEngine

QUIET_SECONDS = 0.4
"""How long the streams are watched before the prompt, and must still run after it."""

SMALL = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}


def main() -> None:
    """Print the gaps of the quiet streams, and those while the prompt is computed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=16384)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--chunk", type=int, help="--chunked-prefill-size (default: the server's own choice)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    parser.add_argument("--served", action="store_true", help="measure over HTTP; needs MODEL_DIR with a tokenizer")
    parser.add_argument("--tokens", type=int, default=1500, help="of each stream over HTTP (default: 1500)")
    parser.add_argument("--rounds", type=int, default=3, help="how many prompts, one after another (default: 3)")
    arguments = parser.parse_args()
    if arguments.served:
        if arguments.model is None:
            parser.error("--served needs MODEL_DIR; bench/make_model.py makes one")
        serve(arguments)
        return
    with tempfile.TemporaryDirectory() as empty:
        directory = arguments.model or Path(empty)
        if arguments.model is None:
            (directory / "config.json").write_text(json.dumps(SMALL))
        shape = json.loads((directory / "config.json").read_text())
        context, vocabulary = arguments.prompt + 4096, shape["vocab_size"]
        spec = ModelSpec(str(directory), "bench", "bench", context, vocabulary, (), shape["architectures"][0])
        config = ServerConfig(
            device=arguments.device, dtype=arguments.dtype, load_format="dummy", chunked_prefill_size=arguments.chunk
        )
        engine = StepEngine.load(config, spec, 0, lambda *_: None)
        engine.warm_up()
        # What a server does when it is ready, and while it waits for its first request.
        gc.collect()
        gc.freeze()
        while engine.prepare_next():
            pass
        core = ReplicaCore(engine, config, spec)
        for round_ in range(arguments.rounds):
            report(*measure(core, arguments.streams, arguments.prompt, vocabulary, round_))


def report(quiet: list[float], loud: list[float], seconds: float) -> None:
    """Print the gaps in seconds before and beside a prompt that took so long."""
    usual, worst = statistics.median(quiet), max(quiet)
    print(
        f"quiet gaps: median {usual * 1e3:.2f}, worst {worst * 1e3:.2f} ms; beside the prompt: "
        f"median {statistics.median(loud) * 1e3:.2f}, worst {max(loud) * 1e3:.2f} ms = {max(loud) / usual:.2f} x the "
        f"quiet median, {max(loud) / worst:.2f} x the quiet worst; first token after {seconds * 1e3:.0f} ms",
        flush=True,
    )


def measure(
    core: ReplicaCore, streams: int, prompt: int, vocabulary: int, round_: int
) -> tuple[list[float], list[float], float]:
    """Seconds of each step with all streams decoding: 100 quiet ones, those until the prompt's first token, and all."""
    endless = SamplingParams(max_new_tokens=4000, temperature=0.0, ignore_eos=True)
    rids = range(round_ * (streams + 1), (round_ + 1) * (streams + 1))
    for rid in rids[:-1]:
        core.submit(TokenizedRequest(rid, [rid % 4096 + 1] * 16, endless, [0]))
    begun: set[int] = set()
    while len(begun) < streams:
        begun.update(timed_step(core)[1])
    for _ in range(5):
        core.step()
    quiet = [timed_step(core)[0] for _ in range(100)]
    ids = random.Random(round_).choices(range(vocabulary), k=prompt)
    began = time.perf_counter()
    core.submit(TokenizedRequest(rids[-1], ids, SamplingParams(max_new_tokens=1, temperature=0.0), [0]))
    loud = []
    while True:
        seconds, answered = timed_step(core)
        loud.append(seconds)
        if rids[-1] in answered:
            break
    total = time.perf_counter() - began
    for rid in rids[:-1]:
        core.abort(rid)
    while core.busy:
        core.step()
    return quiet, loud, total


def timed_step(core: ReplicaCore) -> tuple[float, list[int]]:
    """A step's seconds, and the requests that got a token."""
    begun = time.perf_counter()
    batch = core.step()
    return time.perf_counter() - begun, batch.rids if batch else []


def serve(arguments: argparse.Namespace) -> None:
    """Start a server and report each round of streams and prompt."""
    chunk = [] if arguments.chunk is None else ["--chunked-prefill-size", str(arguments.chunk)]
    with tempfile.TemporaryDirectory() as logs:
        setup = Setup(arguments.model, arguments.device, arguments.dtype, Path(logs), extra_args={"minisgl": chunk})
        vocabulary = json.loads((arguments.model / "config.json").read_text())["vocab_size"]
        with Server("minisgl", setup) as server:
            for round_ in range(arguments.rounds):
                report(*asyncio.run(served_round(server.target, arguments, vocabulary, round_)))


async def served_round(
    target: Target, arguments: argparse.Namespace, vocabulary: int, round_: int
) -> tuple[list[float], list[float], float]:
    """As measure, over HTTP: seconds between two arrivals of a stream, of all streams."""
    ids = random.Random(round_ + 1).choices(range(vocabulary // 2), k=arguments.prompt)
    streams = [
        asyncio.create_task(ask(target, ids[16 * index : 16 * index + 16], arguments.tokens))
        for index in range(arguments.streams)
    ]
    await asyncio.sleep(QUIET_SECONDS)
    began = time.monotonic_ns()
    prompt = await ask(target, ids, 1)
    await asyncio.sleep(QUIET_SECONDS)
    still_running = [not task.done() for task in streams]
    exchanges = await asyncio.gather(*streams)
    if prompt.error or any(exchange.error for exchange in exchanges):
        raise SystemExit(prompt.error or next(exchange.error for exchange in exchanges if exchange.error))
    if not all(still_running):
        raise SystemExit("the streams ended before the prompt's answer: raise --tokens")
    quiet, loud = list[float](), list[float]()
    all_begun = max(exchange.pieces[0][0] for exchange in exchanges)
    for exchange in exchanges:
        stamps = [at for at, _ in exchange.pieces]
        for before, after in itertools.pairwise(stamps):
            if before > all_begun and after < began:
                quiet.append((after - before) / 1e9)
            elif after > began and before < prompt.first_byte_ns:
                loud.append((after - before) / 1e9)
    return quiet, loud, (prompt.first_byte_ns - began) / 1e9


async def ask(target: Target, ids: list[int], tokens: int) -> Exchange:
    connection = Connection(target)
    sampling = {"max_new_tokens": tokens, "temperature": 0.0, "ignore_eos": True}
    body = {"input_ids": ids, "sampling_params": sampling, "stream": True}
    try:
        return await connection.ask("POST", "/generate", body, timeout=120)
    finally:
        connection.close()


if __name__ == "__main__":
    main()
