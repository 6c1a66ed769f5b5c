"""How long one decode step and one prefill take on the GPU alone: replays of the engine's captured graphs.

    python bench/decode_step.py MODEL_DIR [--batch 1,8,64] [--context 256,2048]

Nothing of the serving stack runs; weights are random unless --load-format auto. Prints milliseconds a step and the
bandwidth that the step's weights and KV reads come to.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch

from minisgl.config import ServerConfig
from minisgl.model_source import resolve_model
from minisgl.sampling_params import SamplingParams
from minisgl.scheduler_proc.engine import StepEngine
from minisgl.scheduler_proc.request import Request, StepPlan, StepRow

WARM_UP, REPEATS, BATCHES = 20, 50, 7


def plan_of(rows: int, start: int, length: int, page_size: int, num_pages: int) -> StepPlan:
    """Rows that compute `length` positions from `start` on; requests share pages when there are too few."""
    count = -(-(start + length) // page_size)
    requests = [
        Request(
            index,
            [1] * (start + length),
            start + length,
            SamplingParams(temperature=0.0),
            1,
            frozenset(),
            [],
            pages=[(index * count + page) % num_pages for page in range(count)],
        )
        for index in range(rows)
    ]
    decode = length == 1 and start > 0
    return StepPlan(1, [StepRow(request, start, length, True) for request in requests], rows if decode else 0)


def replay_ms(engine: StepEngine, plan: StepPlan) -> float:
    """Median GPU time of one replay, over several batches of back-to-back replays.

    A decode graph counts its positions on: a batch's last step is REPEATS tokens further than the plan.
    """
    runner = engine.graphs
    if runner is None:
        raise SystemExit("this needs a CUDA device and a model of decoder.py's families")
    graph = runner.graph_of(plan)
    with torch.inference_mode():
        runner.run(plan, lambda rows, step: None)
        for _ in range(WARM_UP):
            graph.replay()
        times = []
        for _ in range(BATCHES):
            runner.run(plan, lambda rows, step: None)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(REPEATS):
                graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / REPEATS)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch", default="1,2,4,8,16,32,64,128,256")
    parser.add_argument("--context", default="256,2048", help="of the last step measured, in tokens; more than 50")
    parser.add_argument("--prefill", default="16,64,256,512,1024", help="prompt lengths")
    parser.add_argument("--load-format", default="dummy")
    arguments = parser.parse_args()
    config = ServerConfig(model_local_dir=str(arguments.model), load_format=arguments.load_format)
    spec = resolve_model(config, lambda stage, done, total: None)
    engine = StepEngine.load(config, spec, 0, lambda stage, done, total: None)
    engine.warm_up()
    while engine.prepare_next():
        pass
    print(f"{spec.name}, {engine.device_name}, {engine.dtype_name}")
    for context in (int(text) for text in arguments.context.split(",")):
        for batch in (int(text) for text in arguments.batch.split(",")):
            plan = plan_of(batch, context - 1 - REPEATS, 1, engine.page_size, engine.num_pages)
            ms = replay_ms(engine, plan)
            gigabytes = (engine.weight_bytes + batch * context * engine.kv_bytes_per_token) / 1e9
            print(
                f"decode  batch {batch:4d} context {context:5d}: {ms:7.3f} ms  {gigabytes / ms * 1e3:7.0f} GB/s",
                flush=True,
            )
    for tokens in (int(text) for text in arguments.prefill.split(",")):
        ms = replay_ms(engine, plan_of(1, 0, tokens, engine.page_size, engine.num_pages))
        print(f"prefill tokens {tokens:5d}: {ms:7.3f} ms", flush=True)


if __name__ == "__main__":
    main()
