"""How much running streams notice of a long prompt that arrives: the gaps between their tokens, before and meanwhile.

    python bench/long_prompt.py [MODEL_DIR] [--streams 32] [--prompt 16384] [--dtype bfloat16] [--chunk N]

In-process, on the CPU. Without MODEL_DIR it is a small model with random weights and room for 32k positions.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

# Read by OpenMP when torch is loaded, as in the scheduler process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from minisgl.config import ModelSpec, ServerConfig
from minisgl.messages import TokenizedRequest
from minisgl.sampling_params import SamplingParams
from minisgl.scheduler_proc.core import ReplicaCore
from minisgl.scheduler_proc.engine import StepEngine

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
    """Print the median gap of the quiet streams, and the worst and median one while the prompt is computed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=16384)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--chunk", type=int, help="--chunked-prefill-size (default: the server's own choice)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as empty:
        directory = arguments.model or Path(empty)
        if arguments.model is None:
            (directory / "config.json").write_text(json.dumps(SMALL))
        shape = json.loads((directory / "config.json").read_text())
        spec = ModelSpec(
            str(directory),
            "bench",
            "bench",
            arguments.prompt + 1024,
            shape["vocab_size"],
            (),
            shape["architectures"][0],
        )
        config = ServerConfig(
            device="cpu", dtype=arguments.dtype, load_format="dummy", chunked_prefill_size=arguments.chunk
        )
        engine = StepEngine.load(config, spec, 0, lambda *_: None)
        engine.warm_up()
        quiet, loud, steps = measure(ReplicaCore(engine, config, spec), arguments.streams, arguments.prompt)
    usual = statistics.median(quiet)
    print(f"quiet: median {usual * 1e3:.1f} ms, worst {max(quiet) * 1e3:.1f} ms over {len(quiet)} steps")
    print(f"beside {arguments.prompt} prompt tokens: median {statistics.median(loud) * 1e3:.1f} ms, {steps} steps")
    print(f"worst {max(loud) * 1e3:.1f} ms = {max(loud) / usual:.2f} x the quiet median; prompt took {sum(loud):.2f} s")


def measure(core: ReplicaCore, streams: int, prompt: int) -> tuple[list[float], list[float], int]:
    """Seconds of each step with all streams decoding: 40 quiet ones, and those until the prompt's first token."""
    endless = SamplingParams(max_new_tokens=prompt, temperature=0.0, ignore_eos=True)
    for rid in range(streams):
        core.submit(TokenizedRequest(rid, [rid + 1] * 16, endless, [0]))
    begun: set[int] = set()
    while len(begun) < streams:
        batch = core.step()
        begun.update(batch.rids if batch else ())
    for _ in range(5):
        core.step()
    quiet = [timed_step(core)[0] for _ in range(40)]
    ids = [7 + number % 5000 for number in range(prompt)]
    core.submit(TokenizedRequest(streams, ids, SamplingParams(max_new_tokens=1, temperature=0.0), [0]))
    loud = []
    while True:
        seconds, rids = timed_step(core)
        loud.append(seconds)
        if streams in rids:
            return quiet, loud, len(loud)


def timed_step(core: ReplicaCore) -> tuple[float, list[int]]:
    """A step's seconds, and the requests that got a token."""
    begun = time.perf_counter()
    batch = core.step()
    return time.perf_counter() - begun, batch.rids if batch else []


if __name__ == "__main__":
    main()
