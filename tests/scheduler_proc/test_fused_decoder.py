"""The fused CUDA forward against decoder.py: on a CUDA device, or uncaptured in Triton's interpreter on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds; the interpreter needs it too")

from tiny_models import random_decoder  # noqa: E402

from minisgl.sampling_params import SamplingParams  # noqa: E402
from minisgl.scheduler_proc import cuda_graphs  # noqa: E402
from minisgl.scheduler_proc.attention.kv_pool import KVPool  # noqa: E402
from minisgl.scheduler_proc.attention.torch_sdpa import TorchSdpaAttention  # noqa: E402
from minisgl.scheduler_proc.cuda_graphs import GraphRunner  # noqa: E402
from minisgl.scheduler_proc.graph_sizes import PrefillSize  # noqa: E402
from minisgl.scheduler_proc.input_block import PulledBlock  # noqa: E402
from minisgl.scheduler_proc.models.forward_batch import make_forward_batch  # noqa: E402
from minisgl.scheduler_proc.models.fused_decoder import FusedDecoder, StepLogits  # noqa: E402
from minisgl.scheduler_proc.request import Request, StepPlan, StepRow  # noqa: E402

PAGE_SIZE, PAGES, CONTEXT = 4, 64, 128
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 2 if DEVICE.type == "cuda" else 1,  # the interpreter is slow
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": CONTEXT,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 24},
}


# The interpreter takes ten seconds for each; what is special about the others, test_small_kernels.py has as well.
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[pytest.mark.long] if DEVICE.type == "cpu" and name != "qwen2" else [])
        for name in FAMILIES
    ],
)
@pytest.mark.parametrize(
    "captured", ["no graph", *(pytest.param(some, marks=pytest.mark.gpu) for some in ("few", "all"))]
)
def test_logits_equal_the_plain_decoder(family: str, captured: str, tmp_path: Path) -> None:
    with torch.inference_mode():
        model = random_decoder(tmp_path, {**SHAPE, **FAMILIES[family]}, DEVICE, CONTEXT)
        plain_pool, fused_pool = (KVPool(model.kv_shapes, PAGES, PAGE_SIZE, torch.float32, DEVICE) for _ in range(2))
        plain = TorchSdpaAttention(plain_pool)
        runner = GraphRunner(FusedDecoder(model, fused_pool, CONTEXT), fused_pool, 8, CONTEXT)
        if captured == "few":
            # What is not captured yet runs in larger graphs.
            runner.capture_first(lambda done, total: None)
        elif captured == "all":
            capture_everything(runner)

        generator = torch.Generator().manual_seed(5)
        requests = [new_request(index, length, generator) for index, length in enumerate((5, 40, 70))]
        # A short prompt, longer ones, the rest of a chunked one beside decode rows, then decode rows alone: they go on
        # over the ends of pages, fewer go on, and all come together again.
        everyone, two = [0, 1, 2], [2, 0]
        steps = [([(0, 5)], 0), ([(0, 1), (1, 40), (2, 33)], 1), ([(0, 1), (1, 1), (2, 37)], 2)]
        steps += [([(index, 1) for index in company], len(company)) for company in [everyone] * 5 + [two] * 2]
        steps += [([(index, 1) for index in everyone], 3)]
        computed = [0, 0, 0]
        fresh: set[Request] = set()
        for lengths, decode_rows in steps:
            rows = [StepRow(requests[index], computed[index], length, True) for index, length in lengths]
            for index, length in lengths:
                computed[index] += length
            plan = StepPlan(1, rows, decode_rows)
            batch, _ = make_forward_batch(plan, PAGE_SIZE, DEVICE)
            expected = model.forward(batch, plain.begin_step(batch))
            if decode_rows:
                # The host has not seen the newest tokens of those that decoded last: they are on the device.
                unseen = {
                    row.request: row.request.token_ids.pop() for row in rows[:decode_rows] if row.request in fresh
                }
            parts: list[torch.Tensor] = []

            def take(rows: list[StepRow], step: StepLogits, parts: list[torch.Tensor] = parts) -> None:
                parts.append(step.logits[: len(rows)].clone())

            runner.run(plan, take)
            if decode_rows:
                for request, token in unseen.items():
                    request.token_ids.append(token)
            found = torch.cat(parts)
            assert found.shape == expected.shape
            assert (found - expected).norm() / expected.norm() < 1e-4
            tokens = expected.argmax(-1).tolist()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            assert runner.results.of_this_step(len(rows)).tolist() == [tokens, [1] * len(rows)]
            fresh = {row.request for row in rows}
            for row, token in zip(rows, tokens, strict=True):
                if row.start + row.length == len(row.request.token_ids):
                    row.request.token_ids.append(token)


@pytest.mark.gpu
def test_a_step_of_many_parts_keeps_their_inputs_apart(tmp_path: Path) -> None:
    """More prompts than one graph takes, and than there are staging buffers: none may overwrite another's inputs."""
    prompts, length = 24, 100
    with torch.inference_mode():
        model = random_decoder(tmp_path, {**SHAPE, **FAMILIES["qwen2"]}, DEVICE, CONTEXT)
        pool = KVPool(model.kv_shapes, prompts * 30 + 1, PAGE_SIZE, torch.float32, DEVICE)
        runner = GraphRunner(FusedDecoder(model, pool, CONTEXT), pool, 64, CONTEXT)
        capture_everything(runner)
        generator = torch.Generator().manual_seed(6)
        requests = [new_request(index, length, generator) for index in range(prompts)]
        for index, request in enumerate(requests):
            request.pages = list(range(index * 30, index * 30 + 30))
        rows = [StepRow(request, 0, length, True) for request in requests]

        def tokens_of(plans: list[StepPlan]) -> list[int]:
            found: list[torch.Tensor] = []
            for plan in plans:
                runner.run(plan, lambda rows, step: found.append(step.tokens[: len(rows)].clone()))
            return torch.cat(found).tolist()

        alone = tokens_of([StepPlan(1, [row], 0) for row in rows])
        for _ in range(5):
            assert tokens_of([StepPlan(1, rows, 0)]) == alone


@pytest.mark.parametrize(("first", "pulls"), [(2, True), ((16, 1), True), ((16, 1), False)])
def test_what_is_launched_only_to_be_compiled_takes_no_tokens_of_other_steps(
    first: int | PrefillSize, pulls: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels that the process has already do run then, and tokens may be whatever others have not written."""
    if not pulls:
        monkeypatch.setattr(PulledBlock, "pull", lambda block: None)
    launched: list[bool] = []

    def launch(launch_all: Callable[[], None], *others: object) -> None:
        launch_all()
        launched.append(True)

    monkeypatch.setattr(cuda_graphs, "compile_ahead", launch)
    monkeypatch.setattr(cuda_graphs, "capture_order", lambda decodes, prefills: ([first, 1], 2))
    with torch.inference_mode():
        model = random_decoder(tmp_path, {**SHAPE, **FAMILIES["qwen2"]}, DEVICE, CONTEXT)
        pool = KVPool(model.kv_shapes, PAGES, PAGE_SIZE, torch.float32, DEVICE)
        runner = GraphRunner(FusedDecoder(model, pool, CONTEXT), pool, 8, CONTEXT)
        # No place in memory: a step that looked there would end the process.
        runner.results.last_tokens.fill_(10**9)
        runner.compile_kernels(1, lambda done, total: None)
    assert launched


def capture_everything(runner: GraphRunner) -> None:
    runner.capture_first(lambda done, total: None)
    while runner.capture_next():
        pass


def new_request(index: int, length: int, generator: torch.Generator) -> Request:
    token_ids = torch.randint(0, SHAPE["vocab_size"], (length,), generator=generator).tolist()
    pages = list(range(index * 20, index * 20 + 20))
    return Request(index, token_ids, length, SamplingParams(), 8, frozenset(), [], pages=pages)
