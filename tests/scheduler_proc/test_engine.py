"""The engine as the scheduler sees it: loading, memory, hand-made plans, and the demo model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import (
    VOCAB_SIZE,
    Checkpoint,
    CheckpointMaker,
    load_engine,
    prompts,
    serve,
    server_config,
)

import minisgl.demo_model
from minisgl.config import ConfigError, ModelSpec
from minisgl.sampling_params import SamplingParams
from minisgl.scheduler_proc.engine import StepEngine
from minisgl.scheduler_proc.models.config import ModelError
from minisgl.scheduler_proc.request import Request, StepPlan, StepRow

GREEDY = SamplingParams(max_new_tokens=10, temperature=0.0)


@pytest.fixture(scope="module")
def model(checkpoint: CheckpointMaker) -> Checkpoint:
    return checkpoint("qwen2")


@pytest.fixture(scope="module")
def engine(model: Checkpoint) -> StepEngine:
    return load_engine(model.spec)


def make_request(prompt: list[int], pages: list[int], sampling: SamplingParams = GREEDY) -> Request:
    return Request(0, list(prompt), len(prompt), sampling, 10, frozenset(), [], pages=pages)


def run(engine: StepEngine, rows: list[tuple[Request, int, int, bool]], decode_rows: int) -> list[int]:
    return engine.retire(engine.launch(StepPlan(1, [StepRow(*row) for row in rows], decode_rows)))


def test_hand_made_plans_of_decodes_and_chunks(engine: StepEngine, model: Checkpoint) -> None:
    """A decoding request, one in the middle of its prompt, and one that starts over on other pages."""
    _, long, longest, short = prompts()
    first, second = make_request(long, [9, 3, 4, 1, 30, 31, 32]), make_request(longest, list(range(40, 52)))
    expected_first, expected_second = model.generate(long), model.generate(longest)

    first.token_ids += run(engine, [(first, 0, 17, True)], 0)
    assert run(engine, [(first, 17, 1, False), (second, 0, 6, False)], 1) == []
    first.token_ids += run(engine, [(first, 17, 1, True), (second, 6, 15, False)], 1)
    tokens = run(engine, [(first, 18, 1, True), (second, 21, 9, True)], 1)
    first.token_ids.append(tokens[0])
    second.token_ids.append(tokens[1])
    assert first.token_ids[17:] == expected_first[:3]

    # As after a preemption: what it has generated so far is its prompt now.
    first.pages = [60, 61, 62, 63, 64, 65, 66]
    tokens = run(engine, [(second, 30, 1, True), (first, 0, 20, True)], 1)
    assert tokens == [expected_second[1], expected_first[3]]
    assert short not in (first.token_ids, second.token_ids)


def test_sampled_tokens_do_not_change_with_batching_chunking_or_preemption(
    engine: StepEngine, model: Checkpoint
) -> None:
    filters: list[dict[str, Any]] = [{}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.02}]
    requests = [
        (prompt, SamplingParams(max_new_tokens=10, temperature=0.8, seed=seed, **filters[seed]))
        for seed, prompt in enumerate(prompts())
    ]
    alone = [serve(engine, model.spec, [request])[0][0] for request in requests]
    assert serve(engine, model.spec, requests)[0] == alone
    tight = load_engine(model.spec, max_total_tokens=68)
    preempted, core = serve(tight, model.spec, requests, max_total_tokens=68, chunked_prefill_size=11)
    assert core.scheduler.preemptions > 0
    assert preempted == alone


def test_warm_up_leaves_no_trace(model: Checkpoint) -> None:
    for settings in ({}, {"max_total_tokens": 4}, {"page_size": 1, "max_total_tokens": 1}):
        load_engine(model.spec, **settings).warm_up()
    warmed = load_engine(model.spec)
    warmed.warm_up()
    assert serve(warmed, model.spec, [(prompts()[1], GREEDY)])[0][0] == model.generate(prompts()[1])


def test_loading_tells_its_stages(model: Checkpoint) -> None:
    told: list[tuple[str, int, int]] = []
    StepEngine.load(server_config(), model.spec, 0, lambda *stage: told.append(stage))
    names = [name for name, _, _ in told]
    assert list(dict.fromkeys(names)) == ["loading weights", "sizing KV memory"]
    last = told[names.index("sizing KV memory") - 1]
    assert last[1] == last[2] > 0


def test_what_the_engine_says_about_itself(engine: StepEngine) -> None:
    assert (engine.page_size, engine.num_pages) == (4, 128)
    assert (engine.device_name, engine.dtype_name) == ("cpu (1 threads)", "float32")


def test_kv_memory_is_bounded_by_use_and_by_memory(model: Checkpoint) -> None:
    # 3 requests of at most 128 tokens never need more.
    assert load_engine(model.spec, max_total_tokens=None, max_running_requests=3).num_pages == 3 * 128 // 4
    page_bytes = 3 * 2 * 2 * 8 * 4 * 4
    with pytest.raises(ConfigError, match=r"no room for the KV cache on cpu: .* GiB are free .*--mem-fraction-static"):
        load_engine(model.spec, max_total_tokens=None, mem_fraction_static=1e-12)
    with pytest.raises(ConfigError, match="less than one page of 4 tokens"):
        load_engine(model.spec, max_total_tokens=3)
    with pytest.raises(ConfigError, match=r"needs \d+\.\d+ GiB of KV memory"):
        load_engine(model.spec, max_total_tokens=2**52 // page_bytes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without CUDA")
def test_a_device_that_is_not_there_is_refused(model: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="torch sees no CUDA device"):
        load_engine(model.spec, device="cuda")


def test_a_model_without_weights_is_refused(model: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((model.directory / "config.json").read_bytes())
    spec = ModelSpec(str(tmp_path), "tiny", "tiny", 128, VOCAB_SIZE, (), "Qwen2ForCausalLM")
    with pytest.raises(ModelError, match="load-format dummy"):
        load_engine(spec)
    engine = load_engine(spec, load_format="dummy", dtype="bfloat16")
    outputs, _ = serve(engine, spec, [(prompt, GREEDY) for prompt in prompts()])
    assert [len(output) for output in outputs] == [10] * 4


def test_logits_that_are_not_finite_give_tokens_and_one_warning(
    model: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    engine = load_engine(model.spec)
    with torch.inference_mode():
        engine.model.weights.norm.fill_(float("nan"))
    sampled = SamplingParams(max_new_tokens=5, temperature=1.0, top_p=0.9, seed=1)
    with caplog.at_level("WARNING"):
        outputs, _ = serve(engine, model.spec, [(prompts()[0], GREEDY), (prompts()[1], sampled)])
    assert all(0 <= token < VOCAB_SIZE for output in outputs for token in output)
    assert [record.message for record in caplog.records if "not finite" in record.message] == [caplog.messages[0]]


def test_native_models_start_without_transformers_or_the_compiler() -> None:
    """Both take more than a second to import."""
    program = (
        "import sys; sys.path[:0] = ['.', 'tests/scheduler_proc']\n"
        "from minisgl.config import ModelSpec, ServerConfig\n"
        "from minisgl.scheduler_proc.engine import StepEngine\n"
        "import minisgl.demo_model\n"
        "directory = minisgl.demo_model.__path__[0]\n"
        "spec = ModelSpec(directory, 'demo', 'demo', 128, 2560, (2,), 'Qwen2ForCausalLM')\n"
        "config = ServerConfig(device='cpu', max_total_tokens=512)\n"
        "StepEngine.load(config, spec, 0, lambda *stage: None).warm_up()\n"
        "print({'transformers', 'torch._dynamo', 'sympy'} & set(sys.modules))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "set()", done.stderr


def test_the_demo_model_equals_transformers() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = Path(minisgl.demo_model.__path__[0])
    module = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    eos_ids = tuple(sorted({*np.atleast_1d(module.generation_config.eos_token_id).tolist(), tokenizer.eos_token_id}))
    questions = ["Hello, my name is Maria.", "What is 123 + 456?", "Tell me a story.", "你好"]
    texts = [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in questions]
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    expected = [
        module.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=list(eos_ids))[
            0
        ].tolist()[len(prompt) :]
        for prompt in ids
    ]
    spec = ModelSpec(str(directory), "demo", "demo", 4096, module.config.vocab_size, eos_ids, "Qwen2ForCausalLM")
    greedy = SamplingParams(max_new_tokens=40, temperature=0.0)
    requests = [(prompt, greedy) for prompt in ids]
    engine = load_engine(spec)
    assert [serve(engine, spec, [request])[0][0] for request in requests] == expected
    assert serve(engine, spec, requests, chunked_prefill_size=5)[0] == expected

    # Three long answers in a pool for one and a half.
    endless = SamplingParams(max_new_tokens=40, temperature=0.0, ignore_eos=True)
    stories = [(ids[2], endless)] * 3
    room = (len(ids[2]) + 40) * 3 // 2
    preempted, core = serve(load_engine(spec, max_total_tokens=room), spec, stories, max_total_tokens=room)
    assert core.scheduler.preemptions > 0
    assert preempted == serve(engine, spec, stories[:1])[0] * 3
