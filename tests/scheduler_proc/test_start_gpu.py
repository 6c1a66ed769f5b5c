"""The start on a CUDA device: stages that tell how far they are, graphs captured when idle, nothing compiled later."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_models import serve, server_config

from minisgl.config import ModelSpec
from minisgl.sampling_params import SamplingParams
from minisgl.scheduler_proc.engine import StepEngine

pytestmark = pytest.mark.gpu

CONTEXT, VOCAB_SIZE = 4096, 3000
SHAPE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
}
SETTINGS: dict[str, Any] = {
    "device": "cuda",
    "dtype": "bfloat16",
    "load_format": "dummy",
    "page_size": 16,
    "max_total_tokens": 65536,
    "max_running_requests": 48,
}
WISHES: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9},
    {"temperature": 0.9, "top_p": 0.8, "logprobs": 2},
    {"temperature": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2},
    {"temperature": 0.0, "prompt_logprobs_from": 3, "logprobs": 1},
]
Stage = tuple[str, int, int]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> tuple[StepEngine, ModelSpec, list[Stage]]:
    """An engine as it is when the server says that it is ready, and the stages that it went through."""
    directory = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text(json.dumps(SHAPE))
    spec = ModelSpec(str(directory), "tiny", "tiny", CONTEXT, VOCAB_SIZE, (), "Qwen2ForCausalLM")
    stages: list[Stage] = []
    engine = StepEngine.load(server_config(**SETTINGS), spec, 0, lambda *stage: stages.append(stage))
    engine.warm_up()
    return engine, spec, stages


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The kernels that Triton does not have in memory when they are launched."""
    import triton

    names: list[str] = []
    runtime: Any = triton.knobs.runtime
    runtime.jit_cache_hook = lambda *, fn, **others: names.append(fn.name)
    try:
        yield names
    finally:
        runtime.jit_cache_hook = None


def requests() -> list[tuple[list[int], SamplingParams]]:
    """Prompts of one token up to more than any graph holds, with all kinds of sampling."""
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 2, 7, 16, 33, 100, 129, 500, 1021, 1500, 2999, *torch.randint(1, 400, (34,), generator=generator)]
    return [
        (
            torch.randint(0, VOCAB_SIZE, (int(length),), generator=generator).tolist(),
            SamplingParams(max_new_tokens=6 + index % 5, ignore_eos=True, seed=index, **WISHES[index % len(WISHES)]),
        )
        for index, length in enumerate(lengths)
    ]


def test_stages_tell_how_far_they_are(started: tuple[StepEngine, ModelSpec, list[Stage]]) -> None:
    stages = started[2]
    order = ["loading weights", "compiling kernels", "sizing KV memory", "capturing CUDA graphs"]
    assert list(dict.fromkeys(name for name, _, _ in stages)) == order
    for name in (order[0], order[1], order[3]):
        done, total = next((done, total) for stage, done, total in reversed(stages) if stage == name)
        assert done == total > 0


def test_requests_are_served_alike_before_and_after_the_other_graphs_and_nothing_is_compiled(
    started: tuple[StepEngine, ModelSpec, list[Stage]],
) -> None:
    engine, spec, _ = started
    served = [(prompt, sampling) for prompt, sampling in requests() if sampling.temperature == 0.0]
    with compilations() as compiled:
        few, _ = serve(engine, spec, served[:6])
        serve(engine, spec, requests(), max_running_requests=48)
        slowest = 0.0
        while True:
            begun = time.monotonic()
            if not engine.prepare_next():
                break
            torch.cuda.synchronize()
            slowest = max(slowest, time.monotonic() - begun)
        every, _ = serve(engine, spec, served[:6])
        serve(engine, spec, requests(), max_running_requests=48)
    assert compiled == []
    assert 0.0 < slowest < 0.1, "a request would wait that long"
    assert not engine.prepare_next()
    # In bfloat16 a graph of another size may decide a near tie otherwise.
    assert [len(output) for output in every] == [len(output) for output in few]
    same = sum(a == b for left, right in zip(few, every, strict=True) for a, b in zip(left, right, strict=True))
    assert same > 0.8 * sum(len(output) for output in few)


def test_without_memory_for_more_graphs_the_engine_serves_on(
    started: tuple[StepEngine, ModelSpec, list[Stage]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine, spec, _ = started
    assert engine.graphs is not None

    def fail() -> bool:
        raise torch.OutOfMemoryError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(engine.graphs, "capture_next", fail)
        assert not engine.prepare_next()
    assert "no memory is left for more CUDA graphs" in caplog.text
    assert not engine.prepare_next()
    assert len(serve(engine, spec, requests()[:3])[0]) == 3
