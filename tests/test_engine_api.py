"""The engine as a library, with the demo model: streams, batches, early ends, refusals."""

from __future__ import annotations

import gc
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from minisgl import Engine
from minisgl.engine_api import EngineError, RequestRefused
from minisgl.sampling_params import InvalidSamplingParams
from minisgl.scheduler_proc.engine import StepEngine
from minisgl.tokenizer_proc.encode import PromptRefused

GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 24}


def chat(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


QUESTIONS = [chat("Hello, my name is Anna."), chat("What is 12 + 30?"), chat("Tell me a story.")]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine("demo", device="cpu", dtype="float32", cpu_threads=1, max_total_tokens=1024) as engine:
        yield engine


@pytest.fixture(autouse=True)
def no_page_is_left_behind(engine: Engine) -> Iterator[None]:
    yield
    gc.collect()
    stats = engine.stats()
    assert (stats["running"], stats["waiting"], stats["kv_pages_leaked"]) == (0, 0, 0)
    assert stats["kv_pages_free"] == stats["kv_pages_total"]


def test_a_stream_brings_the_text_of_the_whole_answer(engine: Engine) -> None:
    whole = engine.generate(QUESTIONS[1], **GREEDY)
    assert "42" in whole.text
    assert whole.finish_reason == "stop" and whole.matched in engine.model.eos_token_ids
    stream = engine.generate(QUESTIONS[1], stream=True, **GREEDY)
    deltas = list(stream)
    assert len(deltas) > 1
    assert "".join(deltas) == whole.text
    assert stream.result().token_ids == whole.token_ids
    assert list(stream) == []


def test_text_ids_and_messages_are_prompts(engine: Engine) -> None:
    ids = engine._encoder.encode("Hello", None)
    assert engine.generate("Hello", **GREEDY).token_ids == engine.generate(ids, **GREEDY).token_ids
    answer = engine.generate(chat("Hello"), **GREEDY)
    assert answer.usage["prompt_tokens"] > len(ids)


def test_usage_and_timing_add_up(engine: Engine) -> None:
    answer = engine.generate(QUESTIONS[2], ignore_eos=True, **GREEDY)
    assert answer.finish_reason == "length"
    assert answer.usage["completion_tokens"] == len(answer.token_ids) == 24
    assert answer.usage["total_tokens"] == answer.usage["prompt_tokens"] + 24
    assert sum(answer.timing["hops_us"].values()) == pytest.approx(answer.timing["ttft_us"])
    assert 0 < answer.timing["ttft_us"] <= answer.timing["total_ms"] * 1000


def test_a_batch_answers_like_its_prompts_one_by_one(engine: Engine) -> None:
    alone = [engine.generate(question, **GREEDY).token_ids for question in QUESTIONS]
    together = engine.generate(QUESTIONS, **GREEDY)
    assert [answer.token_ids for answer in together] == alone


def test_streams_can_be_read_in_turns(engine: Engine) -> None:
    alone = [engine.generate(question, **GREEDY).text for question in QUESTIONS]
    streams = engine.generate(QUESTIONS, stream=True, **GREEDY)
    texts = [""] * len(streams)
    for index in [2, 0, 1] * 30:
        texts[index] += next(streams[index], "")
    assert texts == alone


def test_streams_can_be_read_by_threads(engine: Engine) -> None:
    alone = [engine.generate(question, **GREEDY).text for question in QUESTIONS]
    texts = [""] * len(QUESTIONS)

    def read(index: int) -> None:
        texts[index] = "".join(engine.generate(QUESTIONS[index], stream=True, **GREEDY))

    threads = [threading.Thread(target=read, args=(index,)) for index in range(len(QUESTIONS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert texts == alone


def test_the_same_seed_gives_the_same_answer(engine: Engine) -> None:
    sampling = {"temperature": 1.5, "max_new_tokens": 24, "ignore_eos": True}
    first, second = (engine.generate(QUESTIONS[2], seed=5, **sampling).token_ids for _ in range(2))
    assert first == second
    unseeded = engine.generate([QUESTIONS[2]] * 3, **sampling)
    assert len({tuple(answer.token_ids) for answer in unseeded}) > 1


@pytest.mark.parametrize("end", [lambda stream: stream.close(), lambda stream: stream.__exit__(None, None, None)])
def test_a_closed_stream_frees_its_pages_at_once(engine: Engine, end: Callable[[Any], None]) -> None:
    stream = engine.generate(QUESTIONS[2], stream=True, ignore_eos=True, **GREEDY)
    first = next(stream)
    assert engine.stats()["kv_pages_free"] < engine.stats()["kv_pages_total"]
    end(stream)
    assert engine.stats()["kv_pages_free"] == engine.stats()["kv_pages_total"]
    result = stream.result()
    assert (result.finish_reason, result.text.startswith(first)) == ("abort", True)
    assert next(stream, None) is None


def test_a_dropped_stream_frees_its_pages_at_once(engine: Engine) -> None:
    stream = engine.generate(QUESTIONS[2], stream=True, **GREEDY)
    next(stream)
    never_read = engine.generate(QUESTIONS[2], stream=True, **GREEDY)
    del stream, never_read
    assert engine.stats()["kv_pages_free"] == engine.stats()["kv_pages_total"]


def test_a_stop_string_ends_the_text(engine: Engine) -> None:
    whole = engine.generate(QUESTIONS[2], **GREEDY)
    stop = whole.text[10:14]
    answer = engine.generate(QUESTIONS[2], stop=stop, **GREEDY)
    assert answer.text == whole.text[: whole.text.index(stop)]
    assert (answer.finish_reason, answer.matched) == ("stop", stop)
    assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]
    assert len(answer.token_ids) < len(whole.token_ids)


def test_a_stop_id_ends_the_text(engine: Engine) -> None:
    stop_id = engine.generate(QUESTIONS[2], **GREEDY).token_ids[5]
    answer = engine.generate(QUESTIONS[2], stop_token_ids=stop_id, **GREEDY)
    assert (answer.finish_reason, answer.matched, answer.token_ids[-1]) == ("stop", stop_id, stop_id)


def test_under_kv_pressure_answers_stay_the_same(engine: Engine) -> None:
    sampling = {"temperature": 0, "max_new_tokens": 60, "ignore_eos": True}
    alone = [engine.generate(question, **sampling).token_ids for question in QUESTIONS]
    with Engine("demo", device="cpu", dtype="float32", cpu_threads=1, max_total_tokens=112) as small:
        together = small.generate(QUESTIONS, **sampling)
        assert small.stats()["preemptions"] > 0
    assert [answer.token_ids for answer in together] == alone


def test_what_cannot_be_served_is_refused_and_disturbs_nobody(engine: Engine) -> None:
    running = engine.generate(QUESTIONS[1], stream=True, **GREEDY)
    next(running)
    with pytest.raises(RequestRefused, match="KV cache of 1024 tokens"):
        engine.generate("Hello", max_new_tokens=2000)
    with pytest.raises(PromptRefused, match="empty"):
        engine.generate([])
    with pytest.raises(PromptRefused, match="empty"):
        engine.generate(["Hello", ""])
    with pytest.raises(InvalidSamplingParams, match="top_p"):
        engine.generate("Hello", top_p=2.0)
    with pytest.raises(TypeError, match="max_tokens"):
        engine.generate("Hello", max_tokens=2)
    assert "42" in running.result().text


def test_a_failing_step_loses_the_requests_and_the_next_ones_run(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = engine.generate(QUESTIONS[0], stream=True, **GREEDY)
    failing = engine.generate(QUESTIONS[1], stream=True, **GREEDY)
    read = next(failing)

    def fail(*_: object) -> None:
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(StepEngine, "retire", fail)
        with pytest.raises(RuntimeError, match="the device is gone"):
            failing.result()
    with pytest.raises(EngineError, match="the device is gone"):
        waiting.result()
    assert read
    assert "42" in engine.generate(QUESTIONS[1], **GREEDY).text


def test_a_closed_engine_says_so() -> None:
    engine = Engine("demo", device="cpu", dtype="float32", cpu_threads=1, max_total_tokens=256)
    stream = engine.generate(QUESTIONS[0], stream=True, **GREEDY)
    read = next(stream)
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        stream.result()
    with pytest.raises(EngineError, match="closed"):
        engine.generate("Hello")
    assert read


def test_log_probabilities_come_for_prompt_and_answer(engine: Engine) -> None:
    plain = engine.generate(QUESTIONS[1], **GREEDY)
    assert plain.logprobs is None and plain.prompt_logprobs is None
    answer = engine.generate(QUESTIONS[1], logprobs=2, prompt_logprobs_from=0, **GREEDY)
    assert answer.token_ids == plain.token_ids
    assert answer.logprobs is not None and answer.prompt_logprobs is not None
    assert [one.token_id for one in answer.logprobs] == answer.token_ids
    for one in answer.logprobs:
        # Greedy takes the likeliest.
        assert one.logprob == pytest.approx(one.top[0][2])
        assert len(one.top) == 2 and one.top[0][2] >= one.top[1][2]
    assert b"".join(one.data for one in answer.logprobs[:-1]).decode() == answer.text
    first, *others = answer.prompt_logprobs
    assert len(others) + 1 == answer.usage["prompt_tokens"]
    assert math.isnan(first.logprob) and first.top == []
    assert all(one.logprob < 0 and len(one.top) == 2 for one in others)
    cut = engine.generate(QUESTIONS[1], logprobs=0, stop="42", **GREEDY)
    assert cut.logprobs is not None and [one.token_id for one in cut.logprobs] == cut.token_ids


def test_penalties_and_biases_change_the_answer(engine: Engine) -> None:
    plain = engine.generate(QUESTIONS[2], ignore_eos=True, **GREEDY).token_ids
    assert len(set(plain)) < len(plain)
    without = engine.generate(QUESTIONS[2], ignore_eos=True, logit_bias={plain[0]: -100}, **GREEDY).token_ids
    assert plain[0] not in without
    different = engine.generate(QUESTIONS[2], ignore_eos=True, presence_penalty=2.0, frequency_penalty=2.0, **GREEDY)
    assert len(set(different.token_ids)) > len(set(plain))
    together = engine.generate(
        [QUESTIONS[2]] * 3, ignore_eos=True, presence_penalty=2.0, frequency_penalty=2.0, **GREEDY
    )
    assert all(answer.token_ids == different.token_ids for answer in together)
    with pytest.raises(RequestRefused, match="logit_bias names token id"):
        engine.generate("Hello", logit_bias={10**6: 1.0})


def test_a_stop_string_among_the_first_tokens_does_not_count(engine: Engine) -> None:
    whole = engine.generate(QUESTIONS[2], **GREEDY)
    stop = whole.text[:3]
    answer = engine.generate(QUESTIONS[2], stop=stop, min_new_tokens=4, **GREEDY)
    assert answer.text.startswith(stop) and len(answer.token_ids) >= 4
    assert engine.generate(QUESTIONS[2], stop=stop, **GREEDY).text == ""
