"""Greedy output equals transformers' generate token for token in float32, however the requests are batched."""

from __future__ import annotations

import pytest
from tiny_models import (
    GENERIC_FAMILIES,
    NATIVE_FAMILIES,
    NEW_TOKENS,
    Checkpoint,
    CheckpointMaker,
    load_engine,
    prompts,
    serve,
)

from minisgl.sampling_params import SamplingParams
from minisgl.scheduler_proc.models.decoder import Decoder

GREEDY = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0)


@pytest.fixture(params=[*NATIVE_FAMILIES, *GENERIC_FAMILIES])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(family: str, checkpoint: CheckpointMaker) -> Checkpoint:
    return checkpoint(family)


def test_alone_batched_chunked_and_preempted(family: str, model: Checkpoint) -> None:
    """Four prompts of different lengths, some beyond the sliding windows."""
    requests = [(prompt, GREEDY) for prompt in prompts()]
    expected = [model.generate(prompt) for prompt in prompts()]
    assert len({tuple(tokens) for tokens in expected}) == len(expected)
    assert any(len(set(tokens)) > 2 for tokens in expected), "the oracle repeats itself"

    engine = load_engine(model.spec)
    assert isinstance(engine.model, Decoder) == (family in NATIVE_FAMILIES)
    alone = [serve(engine, model.spec, [request])[0][0] for request in requests]
    assert alone == expected

    batched, _ = serve(engine, model.spec, requests)
    assert batched == expected

    chunked, _ = serve(engine, model.spec, requests, chunked_prefill_size=7)
    assert chunked == expected

    tight = load_engine(model.spec, max_total_tokens=68)
    preempted, core = serve(tight, model.spec, requests, max_total_tokens=68, chunked_prefill_size=11)
    assert core.scheduler.preemptions > 0
    assert preempted == expected


def test_with_a_repetition_penalty_too(family: str, model: Checkpoint) -> None:
    penalised = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0, repetition_penalty=1.4)
    requests = [(prompt, penalised) for prompt in prompts()]
    expected = [model.generate(prompt, repetition_penalty=1.4) for prompt in prompts()]
    assert expected != [model.generate(prompt) for prompt in prompts()]
    engine = load_engine(model.spec)
    assert serve(engine, model.spec, requests)[0] == expected
    tight = load_engine(model.spec, max_total_tokens=68)
    preempted, core = serve(tight, model.spec, requests, max_total_tokens=68, chunked_prefill_size=11)
    assert core.scheduler.preemptions > 0
    assert preempted == expected
