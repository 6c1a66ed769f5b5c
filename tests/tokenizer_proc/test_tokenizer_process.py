"""The real tokenizer process on real pipes: what comes out for what goes in, and what it survives."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sample_tokenizers
from model_templates import QWEN3, WEATHER
from tokenizers import Tokenizer, models, pre_tokenizers
from worker_process import Wiring, WorkerProcess, demo_model_spec, take, take_until

from minisgl import timeline
from minisgl.channels import Inbox
from minisgl.config import ModelSpec
from minisgl.demo_model import demo_model_dir
from minisgl.messages import (
    AbortRequest,
    DeltaBatch,
    Dispatched,
    FlushCache,
    GenerateRequest,
    RequestError,
    Shutdown,
    TextAnswer,
    TokenizedRequest,
    encode,
    make_request_id,
)
from minisgl.sampling_params import SamplingParams
from minisgl.tokenizer_proc.encode import PromptEncoder
from minisgl.tokenizer_proc.main import LONG_PROMPT_CHARS

SAMPLING = SamplingParams(max_new_tokens=16, temperature=0.5, seed=7, stop=("x",))
HELLO = [{"role": "user", "content": "Hello"}]
# Renders any message; never ends for the message "loop".
TEMPLATE = (
    "{% for m in messages %}{{ m.content + '\n' }}{% if m.content == 'loop' %}"
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}{% endfor %}"
)


def rid(counter: int, http_index: int = 0, epoch: int = 1) -> int:
    return make_request_id(http_index, epoch, counter)


def generate(request: int, prompt: Any = "Hello") -> GenerateRequest:
    return GenerateRequest(request, prompt, SAMPLING, [timeline.now(), timeline.now()])


def ends_or_announces(message: Dispatched | RequestError) -> int:
    """How many requests a message to http is about."""
    return len(message.rids) if isinstance(message, Dispatched) else 1


class Stack:
    """A tokenizer process between two http workers and two schedulers; no scheduler is announced yet."""

    def __init__(self, model: ModelSpec, **settings: Any) -> None:
        self.wiring = Wiring()
        self.http = [self.wiring.inbox(f"http-{i}", 1, Dispatched, RequestError, TextAnswer) for i in range(2)]
        self.worker = WorkerProcess(
            self.wiring, self.wiring.spec("tokenizer", model, replicas=2, http_workers=2, **settings)
        )
        for index, inbox in enumerate(self.http):
            self.worker.announce(inbox, f"http-{index}")

    def scheduler(self, index: int, epoch: int = 1) -> Inbox:
        inbox = self.wiring.inbox(f"scheduler-{index}", epoch, TokenizedRequest, AbortRequest, FlushCache)
        self.worker.announce(inbox, f"scheduler-{index}", epoch)
        return inbox

    def __enter__(self) -> Stack:
        return self

    def __exit__(self, *problem: Any) -> None:
        self.worker.__exit__(*problem)
        self.wiring.close()


@pytest.fixture
def demo() -> Iterator[Stack]:
    with Stack(demo_model_spec(demo_model_dir())) as stack:
        yield stack


def test_requests_garbage_and_refusals(demo: Stack) -> None:
    assert demo.worker.ready.info == {"chat_template": True}
    encoder = PromptEncoder.from_directory(demo_model_dir(), 4096, 2560)
    scheduler = demo.scheduler(0)
    demo.worker.send_frames(b"")
    demo.worker.send_frames(os.urandom(1000))
    demo.worker.send_frames(encode(generate(rid(1)))[:-1])
    demo.worker.send_frames(b"two", b"frames")
    demo.worker.send(DeltaBatch())
    prompts: list[Any] = ["Hello, 你好", [5, 6, 7], HELLO]
    demo.worker.send(*(generate(rid(counter), prompt) for counter, prompt in enumerate(prompts)))
    # Refused: too long, empty, ids out of range, a message that the template cannot render, and one of http-1.
    bad: list[Any] = ["word " * 5000, [], [2560], [{"role": "user", "content": 5}]]
    demo.worker.send(*(generate(rid(10 + counter), prompt) for counter, prompt in enumerate(bad)))
    demo.worker.send(generate(rid(20, http_index=1), [5] * 4090), generate(rid(21, http_index=9)))
    demo.worker.send(generate(rid(22)))

    tokenized = take(scheduler, 4)
    assert [message.rid for message in tokenized] == [rid(0), rid(1), rid(2), rid(22)]
    assert [message.input_ids for message in tokenized[:3]] == [encoder.encode(prompt, 16) for prompt in prompts]
    assert all(message.sampling == SAMPLING for message in tokenized)
    for message in tokenized:
        assert len(message.stamps) == 4
        assert message.stamps == sorted(message.stamps)
    messages = take_until(demo.http[0], lambda messages: sum(map(ends_or_announces, messages)) == 8)
    assert [r for m in messages if isinstance(m, Dispatched) for r in m.rids] == [m.rid for m in tokenized]
    errors = {m.rid: m for m in messages if isinstance(m, RequestError)}
    assert [errors[rid(10 + counter)].code for counter in range(4)] == [
        "prompt_too_long",
        "empty_prompt",
        "invalid_token_id",
        "chat_template_error",
    ]
    assert {error.status for error in errors.values()} == {400}
    (error,) = take(demo.http[1])
    assert (error.rid, error.code) == (rid(20, http_index=1), "prompt_too_long")
    # A heartbeat may be taken while the counters are being written, so all of them are waited for.
    stats = demo.worker.wait_stats(lambda stats: (stats.get("requests"), stats.get("refused")) == (9, 5))
    assert (stats["frames_dropped"], stats["unanswerable"]) == (5, 1)


def test_no_replica_up_then_restarts(demo: Stack) -> None:
    demo.worker.send(*(generate(rid(counter)) for counter in range(3)), AbortRequest(rid(1)))
    (aborted,) = take(demo.http[0])
    assert (aborted.rid, aborted.code) == (rid(1), "aborted")
    demo.worker.send(generate(rid(9, http_index=1)))
    assert demo.worker.wait_stats(lambda stats: stats.get("held") == 3)
    # A dead http process waits for no answer.
    demo.worker.lose("http-1")
    demo.worker.send(generate(rid(10, http_index=1)))
    first = demo.scheduler(0)
    assert [message.rid for message in take(first, 2)] == [rid(0), rid(2)]
    assert take(demo.http[0]) == [Dispatched(0, 1, [rid(0), rid(2)])]

    demo.worker.lose("scheduler-0")
    demo.worker.send(generate(rid(3)))
    second = demo.scheduler(0, epoch=2)
    assert take(second)[0].rid == rid(3)
    assert take(demo.http[0]) == [Dispatched(0, 2, [rid(3)])]
    demo.worker.send(generate(rid(4)), AbortRequest(rid(4)))
    assert [type(message) for message in take(second, 2)] == [TokenizedRequest, AbortRequest]
    assert not first.wait(50)


def test_shutdown_ends_what_no_replica_has() -> None:
    with Stack(demo_model_spec(demo_model_dir())) as stack:
        stack.worker.send(generate(rid(1)))
        assert stack.worker.wait_stats(lambda stats: stats.get("held") == 1)
        stack.worker.send(Shutdown())
        (error,) = take(stack.http[0])
        assert (error.rid, error.status, error.code) == (rid(1), 503, "shutting_down")


def test_a_long_prompt_holds_no_short_one_up(tmp_path: Path) -> None:
    sample_tokenizers.save(tmp_path, sample_tokenizers.byte_level())
    with Stack(ModelSpec(str(tmp_path), "m", "m", 1_000_000, 500, (2,), "m")) as stack:
        scheduler = stack.scheduler(0)
        long = "one long prompt " * 30_000
        stack.worker.send(generate(rid(1), long), generate(rid(2), long), AbortRequest(rid(2)), generate(rid(3)))
        short, tokenized = take(scheduler, 2)
        assert (short.rid, tokenized.rid) == (rid(3), rid(1))
        assert tokenized.input_ids == sample_tokenizers.byte_level().encode(long).ids
        news = take_until(stack.http[0], lambda messages: sum(map(ends_or_announces, messages)) == 3)
        assert [m.rid for m in news if isinstance(m, RequestError)] == [rid(2)]
        assert [m for m in news if isinstance(m, Dispatched)] == [
            Dispatched(0, 1, [rid(3)]),
            Dispatched(0, 1, [rid(1)]),
        ]


def test_poisoned_prompts_end_alone(tmp_path: Path) -> None:
    # A word-level vocabulary without an unknown token: every other word is an exception in the library.
    poisonous = Tokenizer(models.WordLevel({"Hello": 0, "loop": 1}, unk_token="<none>"))
    poisonous.pre_tokenizer = pre_tokenizers.Whitespace()
    sample_tokenizers.save(tmp_path, poisonous, chat_template=TEMPLATE)
    with Stack(ModelSpec(str(tmp_path), "m", "m", 1_000_000, 2, (1,), "m")) as stack:
        scheduler = stack.scheduler(0)
        stack.worker.send(
            generate(rid(1), "poison"),
            generate(rid(2), "poison " * LONG_PROMPT_CHARS),
            generate(rid(3), [{"role": "user", "content": "loop"}]),
            generate(rid(4), HELLO),
        )
        assert take(scheduler)[0].input_ids == [0]
        errors = {m.rid: m for m in take(stack.http[0], 4) if isinstance(m, RequestError)}
        assert {r: (e.status, e.code) for r, e in errors.items()} == {
            rid(1): (500, "tokenizer_error"),
            rid(2): (500, "tokenizer_error"),
            rid(3): (400, "chat_template_error"),
        }
        assert "took more than" in errors[rid(3)].message
        assert stack.worker.wait_stats(lambda stats: stats.get("errors") == 2)


def test_a_request_sets_variables_of_the_template(tmp_path: Path) -> None:
    tokenizer = sample_tokenizers.byte_level()
    sample_tokenizers.save(tmp_path, tokenizer, chat_template=QWEN3)
    variables: list[dict[str, Any]] = [
        {"tools": [WEATHER], "enable_thinking": False},
        {"continue_final_message": True},
        {"messages": []},
    ]
    with Stack(ModelSpec(str(tmp_path), "m", "m", 10_000, 500, (2,), "m")) as stack:
        scheduler = stack.scheduler(0)
        for counter, template in enumerate(variables):
            stack.worker.send(GenerateRequest(rid(counter), HELLO, SAMPLING, [timeline.now()] * 2, template))
        prompts = [tokenizer.decode(m.input_ids, skip_special_tokens=False) for m in take(scheduler, 2)]
        assert "get_weather" in prompts[0]
        assert prompts[0].endswith("assistant\n<think>\n\n</think>\n\n")
        assert prompts[1] == "<|im_start|>user\nHello"
        messages = take_until(stack.http[0], lambda messages: sum(map(ends_or_announces, messages)) == 3)
        (error,) = [m for m in messages if isinstance(m, RequestError)]
        assert (error.rid, error.status, error.code) == (rid(2), 400, "unknown_template_variable")
        assert "no variable 'messages'" in error.message
