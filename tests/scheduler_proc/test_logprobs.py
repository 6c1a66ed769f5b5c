"""Log probabilities of answers and prompts against transformers' own forward over the whole context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from scheduler_fakes import make_scheduler, tokenized
from tiny_models import VOCAB_SIZE, Checkpoint, CheckpointMaker, load_engine, prompts, server_config

from minisgl.messages import NO_TOKEN, Logprobs, TokenizedRequest
from minisgl.sampling_params import SamplingParams
from minisgl.scheduler_proc.core import ReplicaCore
from minisgl.scheduler_proc.request import scored_positions
from minisgl.scheduler_proc.scheduler import SCORED_TOKENS


@dataclass
class Answer:
    token_ids: list[int] = field(default_factory=list)
    parts: list[Logprobs] = field(default_factory=list)
    prompt: Logprobs | None = None


def serve(core: ReplicaCore, requests: Sequence[tuple[list[int], SamplingParams]]) -> list[Answer]:
    """Run requests together; each log probability must come once and with its own row."""
    answers = [Answer() for _ in requests]
    for rid, (prompt, sampling) in enumerate(requests):
        refusal = core.submit(TokenizedRequest(rid, list(prompt), sampling, [0]))
        assert refusal is None, refusal
    while core.busy:
        batch = core.step()
        if batch is None:
            continue
        assert [part.row for part in batch.logprobs] == sorted(part.row for part in batch.logprobs)
        for part in batch.logprobs:
            answer = answers[batch.rids[part.row]]
            if part.of_prompt:
                assert answer.prompt is None and not answer.token_ids
                answer.prompt = part
            else:
                assert part.token_ids == [batch.token_ids[part.row]]
                answer.parts.append(part)
        for rid, token_id in zip(batch.rids, batch.token_ids, strict=True):
            answers[rid].token_ids.append(token_id)
    return answers


def check(model: Checkpoint, prompt: list[int], sampling: SamplingParams, answer: Answer) -> None:
    """Compare with log_softmax over one forward of prompt and answer."""
    ids = prompt + answer.token_ids
    with torch.inference_mode():
        expected = model.module(torch.tensor([ids])).logits[0].float().log_softmax(dim=-1)
    most = min(sampling.logprobs or 0, VOCAB_SIZE)
    assert len(answer.parts) == (0 if sampling.logprobs is None else len(answer.token_ids))
    for position, part in enumerate(answer.parts, len(prompt)):
        assert_scores(expected[position - 1], ids[position], part.values[0], part.top_ids, part.top_values, most)
    start = sampling.prompt_logprobs_from
    assert (answer.prompt is None) == (start is None)
    if answer.prompt is None or start is None:
        return
    part = answer.prompt
    assert part.token_ids == prompt[start:]
    for index, position in enumerate(range(start, len(prompt))):
        top = slice(index * most, (index + 1) * most)
        if position == 0:
            assert math.isnan(part.values[0])
            # A prompt of one token computes nothing that could say how many likeliest tokens there are.
            assert set(part.top_ids[top]) <= {NO_TOKEN} and all(math.isnan(value) for value in part.top_values[top])
        else:
            assert_scores(
                expected[position - 1], ids[position], part.values[index], part.top_ids[top], part.top_values[top], most
            )


def assert_scores(
    expected: torch.Tensor, token_id: int, value: float, top_ids: list[int], top_values: list[float], most: int
) -> None:
    assert value == pytest.approx(float(expected[token_id]), abs=2e-4)
    likeliest = expected.topk(most).values.tolist()
    assert top_values == pytest.approx(likeliest, abs=2e-4)
    assert [float(expected[top_id]) for top_id in top_ids] == pytest.approx(likeliest, abs=2e-4)
    assert len(set(top_ids)) == most


def wishes() -> list[dict[str, Any]]:
    """What each of four requests asks for: everything, some things, other sampling, nothing."""
    return [
        {"logprobs": 3, "prompt_logprobs_from": 0, "temperature": 0.0},
        {"logprobs": 0, "temperature": 0.8, "seed": 1, "presence_penalty": 1.0, "logit_bias": ((5, 3.0),)},
        {"logprobs": 128, "prompt_logprobs_from": 11, "repetition_penalty": 1.2, "temperature": 0.0},
        {"prompt_logprobs_from": 1, "temperature": 1.0, "seed": 2, "min_new_tokens": 4, "stop_token_ids": (7, 8)},
    ]


def requests() -> list[tuple[list[int], SamplingParams]]:
    return [
        (prompt, SamplingParams(max_new_tokens=10, **fields))
        for prompt, fields in zip(prompts(), wishes(), strict=True)
    ]


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gpt2", "gemma2"])
def test_alone_batched_chunked_cached_and_preempted(family: str, checkpoint: CheckpointMaker) -> None:
    model = checkpoint(family)
    engine = load_engine(model.spec)

    def core(engine: Any = engine, **settings: Any) -> ReplicaCore:
        return ReplicaCore(engine, server_config(**settings), model.spec)

    alone = [serve(core(), [request])[0] for request in requests()]

    def check_all(answers: list[Answer]) -> None:
        for (prompt, sampling), answer, lonely in zip(requests(), answers, alone, strict=True):
            assert answer.token_ids == lonely.token_ids
            check(model, prompt, sampling, answer)

    check_all(alone)
    check_all(serve(core(), requests()))
    check_all(serve(core(chunked_prefill_size=7), requests()))
    warm = core(chunked_prefill_size=7)
    serve(warm, [(prompt, SamplingParams(max_new_tokens=10, temperature=0.0)) for prompt in prompts()])
    check_all(serve(warm, requests()))
    check_all(serve(warm, requests()))
    tight = load_engine(model.spec, max_total_tokens=68)
    pressed = core(tight, max_total_tokens=68, chunked_prefill_size=11)
    check_all(serve(pressed, requests()))
    assert pressed.scheduler.preemptions > 0


def test_asking_changes_no_token(checkpoint: CheckpointMaker) -> None:
    model = checkpoint("qwen2")
    core = ReplicaCore(load_engine(model.spec), server_config(), model.spec)
    silent = []
    for (prompt, _), fields in zip(requests(), wishes(), strict=True):
        fields = {**fields, "logprobs": None, "prompt_logprobs_from": None}
        silent.append((prompt, SamplingParams(max_new_tokens=10, **fields)))
    asked, unasked = serve(core, requests()), serve(core, silent)
    assert [answer.token_ids for answer in asked] == [answer.token_ids for answer in unasked]
    assert all(not answer.parts and answer.prompt is None for answer in unasked)


@pytest.mark.parametrize("start", [0, 1, 2, 9])
def test_a_short_prompt_and_a_start_behind_its_end(checkpoint: CheckpointMaker, start: int) -> None:
    model = checkpoint("qwen2")
    core = ReplicaCore(load_engine(model.spec), server_config(), model.spec)
    for prompt in ([3], [3, 4]):
        sampling = SamplingParams(max_new_tokens=1, logprobs=2, prompt_logprobs_from=start, temperature=0.0)
        (answer,) = serve(core, [(prompt, sampling)])
        assert answer.prompt is not None
        assert answer.prompt.token_ids == prompt[start:]
        check(model, prompt, sampling, answer)


def test_a_cached_prefix_is_used_up_to_the_first_token_asked_for(checkpoint: CheckpointMaker) -> None:
    model = checkpoint("qwen2")
    core = ReplicaCore(load_engine(model.spec), server_config(), model.spec)
    prompt = prompts()[2]
    cached = []
    for start in (None, None, 20, 8, 0):
        core.submit(TokenizedRequest(1, prompt, SamplingParams(max_new_tokens=1, prompt_logprobs_from=start), [0]))
        batch = core.step()
        assert batch is not None
        cached.append(batch.opened[0].cached_tokens)
    assert cached == [0, 28, 16, 4, 0]  # whole pages of 4 tokens, and position 19 gives token 20's


def test_a_step_scores_a_bounded_number_of_positions(checkpoint: CheckpointMaker) -> None:
    model = checkpoint("qwen2")
    core = ReplicaCore(load_engine(model.spec, max_total_tokens=2048), server_config(max_total_tokens=2048), model.spec)
    prompt = [3 + index % 7 for index in range(100)]
    for rid in range(6):
        sampling = SamplingParams(max_new_tokens=1, prompt_logprobs_from=0 if rid else 90)
        core.submit(TokenizedRequest(rid, [rid, *prompt], sampling, [0]))
    tokens, scored = [], []
    while (plan := core.scheduler.plan()) is not None:
        tokens.append(sum(row.length for row in plan.rows))
        scored.append(sum(len(scored_positions(row)) for row in plan.rows))
    assert sum(tokens) == 6 * 101 and tokens[0] > SCORED_TOKENS
    assert sum(scored) == 11 + 5 * 100 and max(scored) <= SCORED_TOKENS


def test_a_prompt_preempted_half_way_gives_each_log_probability_once() -> None:
    scheduler, engine = make_scheduler(num_pages=10, page_size=1, step_tokens=2)
    scheduler.submit(tokenized(1, [5], max_new_tokens=9, ignore_eos=True))
    plan = scheduler.plan()
    assert plan is not None
    scheduler.retire(plan, engine.retire(engine.launch(plan)))
    scheduler.submit(tokenized(2, [1, 2, 3, 4, 5, 6], max_new_tokens=1, prompt_logprobs_from=2))
    found, in_flight = [], []
    while scheduler.running or scheduler.waiting:
        plan = scheduler.plan()
        if plan is not None:
            in_flight.append((plan, engine.launch(plan)))
        if len(in_flight) > 1 or plan is None:
            plan, launched = in_flight.pop(0)
            token_ids = engine.retire(launched)
            found += scheduler.retire(plan, token_ids, engine.logprobs(launched)).logprobs
        assert len(in_flight) < 3
    assert scheduler.preemptions == 1
    assert found == [Logprobs(0, True, [3, 4, 5, 6], [2.0, 3.0, 4.0, 5.0])]


def test_more_log_probabilities_than_a_message_can_bring_are_refused() -> None:
    scheduler, _ = make_scheduler(num_pages=2500, context_length=10_000)
    fields = {"max_new_tokens": 1, "logprobs": 127}
    assert scheduler.submit(tokenized(1, [5] * 8200, prompt_logprobs_from=8, **fields)) is None
    refusal = scheduler.submit(tokenized(2, [5] * 8200, prompt_logprobs_from=7, **fields))
    assert refusal is not None and refusal.status == 400 and "8193 prompt tokens" in refusal.message
