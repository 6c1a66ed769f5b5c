"""--enable-deterministic-inference: a request's tokens and log probabilities do not depend on its company, to the bit.

What may differ between two runs of one request: how many others there are and of what lengths, where its prompt is cut,
which of it comes from the prefix cache, whether it was preempted, and the page size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCAB_SIZE, Checkpoint, CheckpointMaker, load_engine, serve

import minisgl.demo_model
from minisgl.config import ConfigError, ModelSpec
from minisgl.sampling_params import SamplingParams
from minisgl.scheduler_proc.engine import StepEngine
from minisgl.scheduler_proc.models.linear import exact_linears, with_fixed_rows

DEMO = ModelSpec(str(Path(minisgl.demo_model.__path__[0])), "demo", "demo", 4096, 2560, (), "Qwen2ForCausalLM")
NEW_TOKENS = 12


class Recorder:
    """Stands before a model and keeps the logits of every sampling row, by the request's tokens so far."""

    def __init__(self, engine: StepEngine) -> None:
        self.logits: dict[tuple[int, ...], torch.Tensor] = {}
        self.differing = 0
        self._forward = engine._forward
        self._launch = engine.launch
        engine._forward = self.forward
        engine.launch = self.launch  # type: ignore[method-assign]

    def launch(self, plan: Any) -> Any:
        self._keys = [tuple(row.request.token_ids[: row.start + row.length]) for row in plan.rows if row.sample]
        return self._launch(plan)

    def forward(self, batch: Any) -> torch.Tensor:
        logits: torch.Tensor = self._forward(batch)
        for key, row in zip(self._keys, logits, strict=True):
            seen = self.logits.setdefault(key, row.clone())
            self.differing += not torch.equal(seen, row)
        return logits


def random_requests(count: int, vocab_size: int, longest: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of all lengths, half of them with a common beginning; greedy and drawn in turn."""
    generator = torch.Generator().manual_seed(count)

    def ids(length: int) -> list[int]:
        return [int(token) for token in torch.randint(3, vocab_size, (length,), generator=generator)]

    common, requests = ids(longest // 2), []
    for number in range(count):
        length = int(torch.randint(1, longest // 2, (1,), generator=generator))
        sampling = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=(number % 3) * 0.6, seed=number)
        requests.append((common * (number % 2) + ids(length), sampling))
    return requests


def run_everywhere(spec: ModelSpec, requests: Sequence[tuple[list[int], SamplingParams]], **settings: Any) -> None:
    """Run requests alone and in every kind of company; all logits of one request's state must be the same."""
    settings |= {"enable_deterministic_inference": True, "max_total_tokens": 8192}
    engine = load_engine(spec, page_size=8, **settings)
    recorder = Recorder(engine)
    plain = {"disable_radix_cache": True}
    alone = [serve(engine, spec, [request], **plain)[0][0] for request in requests]
    assert len({tuple(tokens) for tokens in alone}) > len(requests) // 2, "the model says the same to everyone"
    for count in (2, 7):
        assert serve(engine, spec, requests[:count], **plain)[0] == alone[:count]
    assert serve(engine, spec, requests, chunked_prefill_size=7, **plain)[0] == alone
    cached, core = serve(engine, spec, requests * 2, max_running_requests=3)
    assert cached == alone * 2
    assert core.scheduler.cache is not None and core.scheduler.cache.cached_pages > 0
    assert recorder.differing == 0

    # Three long answers in a pool for one and a half.
    story = min((prompt for prompt, _ in requests), key=len)
    long = (story, SamplingParams(max_new_tokens=40, temperature=0.6, seed=5))
    room = (len(story) + 40) * 3 // 2
    (expected,), _ = serve(engine, spec, [long], **plain)
    tight = load_engine(spec, page_size=4, **{**settings, "max_total_tokens": room})
    again = Recorder(tight)
    again.logits = recorder.logits
    preempted, core = serve(tight, spec, [long] * 3, max_total_tokens=room)
    assert core.scheduler.preemptions > 0
    assert preempted == [expected] * 3
    assert again.differing == 0


@pytest.mark.parametrize("family", ["qwen3", "mistral", "llama-biased"])
def test_float32_of_several_families(family: str, checkpoint: CheckpointMaker) -> None:
    model: Checkpoint = checkpoint(family)
    run_everywhere(model.spec, random_requests(12, VOCAB_SIZE, 80), dtype="float32")


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "bfloat16"},
        {"dtype": "float32"},
        pytest.param({"dtype": "bfloat16", "quantization": "int8"}, marks=pytest.mark.long),
    ],
    ids=lambda settings: "-".join(str(value) for value in settings.values()),
)
def test_the_demo_model(settings: dict[str, Any]) -> None:
    run_everywhere(DEMO, random_requests(8, 2560, 150), **settings)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_depend_on_their_row_alone(threads: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = with_fixed_rows(exact_linears(torch.device("cpu"), dtype)).layer
    torch.set_num_threads(threads)
    try:
        for outputs, inputs in ((1152, 896), (896, 1216), (2560, 256)):
            linear = layer(torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype))
            hidden = torch.randn(100, inputs).to(dtype)
            alone = torch.cat([linear(row[None]) for row in hidden])
            order = torch.randperm(100)
            for rows in (order[:2], order[:31], order[:33], order):
                assert torch.equal(linear(hidden[rows]), alone[rows])
    finally:
        torch.set_num_threads(1)


def test_64_at_once() -> None:
    requests = random_requests(64, 2560, 60)
    settings: dict[str, Any] = {"enable_deterministic_inference": True, "dtype": "bfloat16", "max_total_tokens": 16384}
    engine = load_engine(DEMO, **settings)
    together = serve(engine, DEMO, requests)[0]
    assert [serve(engine, DEMO, [request])[0][0] for request in requests[:64:8]] == together[::8]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_demo_model_on_cuda(dtype: str) -> None:
    run_everywhere(DEMO, random_requests(8, 2560, 150), dtype=dtype, device="cuda")


@pytest.mark.gpu
def test_logits_on_cuda_are_the_same_alone_and_in_batches_of_any_size() -> None:
    requests = random_requests(64, 2560, 60)
    settings: dict[str, Any] = {"enable_deterministic_inference": True, "dtype": "bfloat16", "max_total_tokens": 16384}
    engine = load_engine(DEMO, device="cuda", **settings)
    recorder = Recorder(engine)
    alone = [serve(engine, DEMO, [request], disable_radix_cache=True)[0][0] for request in requests[:12]]
    for count in (7, 32, 64):
        for chunk in (512, 20):
            found, _ = serve(engine, DEMO, requests[:count], chunked_prefill_size=chunk, disable_radix_cache=True)
            assert found[:12] == alone[:count]
    assert recorder.differing == 0


def test_without_the_flag_the_company_shows() -> None:
    """Else the tests above would prove nothing: the same comparison, of logits, on the fast path."""
    engine = load_engine(DEMO, dtype="bfloat16", max_total_tokens=8192)
    recorder = Recorder(engine)
    requests = random_requests(8, 2560, 150)
    for request in requests:
        serve(engine, DEMO, [request], disable_radix_cache=True)
    serve(engine, DEMO, requests, disable_radix_cache=True)
    assert recorder.differing > 0


def test_other_models_and_backends_are_refused(checkpoint: CheckpointMaker) -> None:
    for spec, settings in ((checkpoint("phi3").spec, {}), (DEMO, {"attention_backend": "torch_sdpa"})):
        with pytest.raises(ConfigError, match=r"--enable-deterministic-inference is for .* backend of its own"):
            load_engine(spec, enable_deterministic_inference=True, **settings)
