"""Sampling on the fused CUDA forward with steps launched ahead; without CUDA in Triton's interpreter."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds; the interpreter needs it too")

from tiny_models import random_decoder  # noqa: E402

from minisgl.config import ModelSpec, ServerConfig  # noqa: E402
from minisgl.messages import NO_TOKEN, Logprobs, TokenizedRequest  # noqa: E402
from minisgl.sampling_params import SamplingParams  # noqa: E402
from minisgl.scheduler_proc.attention.kv_pool import KVPool  # noqa: E402
from minisgl.scheduler_proc.attention.torch_sdpa import TorchSdpaAttention  # noqa: E402
from minisgl.scheduler_proc.core import ReplicaCore, scheduler_limits  # noqa: E402
from minisgl.scheduler_proc.cuda_graphs import GraphRunner  # noqa: E402
from minisgl.scheduler_proc.engine import StepEngine  # noqa: E402
from minisgl.scheduler_proc.models.decoder import Decoder  # noqa: E402
from minisgl.scheduler_proc.models.forward_batch import ForwardBatch  # noqa: E402
from minisgl.scheduler_proc.models.fused_decoder import FusedDecoder  # noqa: E402

PAGE_SIZE, PAGES, CONTEXT, VOCAB_SIZE = 4, 64, 64, 97
CONFIG = ServerConfig(device="cpu", max_running_requests=4, chunked_prefill_size=8)
SPEC = ModelSpec("", "tiny", "tiny", CONTEXT, VOCAB_SIZE, (), "Qwen2ForCausalLM")
SHAPE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
}
WISHES: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"logprobs": 2, "prompt_logprobs_from": 0, "temperature": 0.0},
    {"logprobs": 0, "presence_penalty": 2.0, "temperature": 0.7, "seed": 4},
    {"repetition_penalty": 1.5, "frequency_penalty": 0.5, "temperature": 0.0},
    {"repetition_penalty": 1.1, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "seed": 5},
]


def engine_of(model: Decoder, pages: int, fused: bool, captured: bool) -> StepEngine:
    pool = KVPool(model.kv_shapes, pages + 1, PAGE_SIZE, torch.float32, DEVICE)
    graphs = GraphRunner(FusedDecoder(model, pool, CONTEXT), pool, 4, CONTEXT) if fused else None
    if captured and graphs is not None:
        graphs.capture_first(lambda done, total: None)
    limits = scheduler_limits(CONFIG, SPEC, "cpu")
    attention = TorchSdpaAttention(pool)

    def forward(batch: ForwardBatch) -> torch.Tensor:
        return model.forward(batch, attention.begin_step(batch))

    return StepEngine(model, forward, None, graphs, pool, pages, limits, DEVICE, 1)


def serve(engine: StepEngine) -> tuple[dict[int, list[int]], dict[int, list[Logprobs]], int]:
    """The tokens and log probabilities of each of WISHES, and how many preemptions there were."""
    core = ReplicaCore(engine, CONFIG, SPEC)
    for rid, fields in enumerate(WISHES):
        prompt = [rid + 1, *range(20, 31)]
        assert core.submit(TokenizedRequest(rid, prompt, SamplingParams(max_new_tokens=5, **fields), [0])) is None
    tokens: dict[int, list[int]] = {rid: [] for rid in range(len(WISHES))}
    parts: dict[int, list[Logprobs]] = {rid: [] for rid in range(len(WISHES))}
    while core.busy:
        batch = core.step()
        for rid, token_id in zip(batch.rids, batch.token_ids, strict=True) if batch else ():
            tokens[rid].append(token_id)
        for part in batch.logprobs if batch else ():
            assert batch is not None
            parts[batch.rids[part.row]].append(part)
    return tokens, parts, core.scheduler.preemptions


@pytest.mark.parametrize(
    ("captured", "pages"),
    [(False, PAGES), pytest.param(True, PAGES, marks=pytest.mark.gpu), pytest.param(True, 7, marks=pytest.mark.gpu)],
)
def test_tokens_and_log_probabilities_equal_the_plain_engine(captured: bool, pages: int, tmp_path: Path) -> None:
    """With all the pages they need, and with so few that requests are preempted."""
    with torch.inference_mode():
        model = random_decoder(tmp_path, SHAPE, DEVICE, CONTEXT)
        # Noise this small makes nearly equal logits; larger weights keep rounding from deciding.
        model.weights.embedding.mul_(20)
        plain, fused = engine_of(model, PAGES, False, captured), engine_of(model, pages, True, captured)
    assert fused.runs_ahead and not plain.runs_ahead
    expected_tokens, expected, _ = serve(plain)
    tokens, found, preemptions = serve(fused)
    assert tokens == expected_tokens
    assert (preemptions > 0) == (pages < PAGES)
    assert [len(parts) for parts in found.values()] == [0, 6, 5, 0, 0]
    assert found[1][0].of_prompt and len(found[1][0].values) == 12
    for rid in found:
        for ours, theirs in zip(found[rid], expected[rid], strict=True):
            assert (ours.of_prompt, ours.token_ids, ours.top_ids) == (
                theirs.of_prompt,
                theirs.token_ids,
                theirs.top_ids,
            )
            assert ours.values == pytest.approx(theirs.values, abs=1e-4, nan_ok=True)
            assert ours.top_values == pytest.approx(theirs.top_values, abs=1e-4, nan_ok=True)


@dataclass
class Visit:
    """A request that is submitted before a step, and perhaps aborted before a later one."""

    step: int
    prompt: list[int]
    sampling: SamplingParams
    aborted_at: int | None


def visits_of(seed: int) -> list[Visit]:
    """Ten requests that come at different times, with prompts that share beginnings."""
    random = Random(seed)
    prompts = [random.choices(range(VOCAB_SIZE), k=random.randrange(1, 20)) for _ in range(3)]
    kinds: list[dict[str, Any]] = [{"temperature": 0.0}] * 4
    kinds += [{"temperature": 0.8}, {"repetition_penalty": 1.3}, {"logit_bias": ((3, 5.0),), "temperature": 0.0}]
    visits = []
    for index in range(10):
        prompt, step = random.choice(prompts), random.randrange(30)
        fields = {"temperature": 0.0, "max_new_tokens": random.randrange(1, 16), **random.choice(kinds)}
        sampling = SamplingParams(**fields, seed=index, ignore_eos=True)
        aborted_at = step + random.randrange(3, 25) if random.random() < 0.25 else None
        visits.append(
            Visit(step, prompt[: random.choice([len(prompt), random.randint(1, len(prompt))])], sampling, aborted_at)
        )
    return visits


def tokens_of_visits(engine: StepEngine, visits: list[Visit]) -> list[list[int]]:
    core, step = ReplicaCore(engine, CONFIG, SPEC), 0
    tokens: list[list[int]] = [[] for _ in visits]
    while core.busy or step < 60:
        for rid, visit in enumerate(visits):
            if visit.step == step:
                assert core.submit(TokenizedRequest(rid, list(visit.prompt), visit.sampling, [0])) is None
            if visit.aborted_at == step:
                core.abort(rid)
        batch = core.step() if core.busy else None
        for rid, token_id in zip(batch.rids, batch.token_ids, strict=True) if batch else ():
            tokens[rid] += [token_id] * (token_id != NO_TOKEN)
        step += 1
    assert core.scheduler.leaked_pages() == 0
    return tokens


# The interpreter takes five seconds for one.
@pytest.mark.parametrize("seed", range(6 if DEVICE.type == "cuda" else 2))
@pytest.mark.parametrize("captured", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_tokens_are_the_same_whoever_comes_and_goes(captured: bool, seed: int, tmp_path: Path) -> None:
    """Company that changes, shared prefixes, aborts and preemptions, beside rows that go on for many steps."""
    with torch.inference_mode():
        model = random_decoder(tmp_path, SHAPE, DEVICE, CONTEXT)
        model.weights.embedding.mul_(20)
        plain, fused = engine_of(model, PAGES, False, False), engine_of(model, (9, 12)[seed % 2], True, captured)
    visits = visits_of(seed)
    expected, found = tokens_of_visits(plain, visits), tokens_of_visits(fused, visits)
    for visit, right, tokens in zip(visits, expected, found, strict=True):
        if visit.aborted_at is None:
            assert len(tokens) == visit.sampling.max_new_tokens
        assert tokens[: len(right)] == right[: len(tokens)]
