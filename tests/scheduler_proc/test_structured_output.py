"""Answers that match their grammars: the demo model, the real compiler, and the scheduler in all its moods."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import jsonschema
import numpy as np
import pytest
from random_schemas import random_schema

from minisgl import Engine
from minisgl.config import ModelSpec, ServerConfig
from minisgl.engine_api import Completion, RequestRefused
from minisgl.grammars import choice_grammar
from minisgl.messages import FinishReason, RequestError, TokenBatch, TokenizedRequest
from minisgl.sampling_params import Grammar, SamplingParams
from minisgl.scheduler_proc.core import ReplicaCore
from minisgl.scheduler_proc.json_schema import enforceable
from minisgl.scheduler_proc.request import RowLogprobs, StepPlan

CHAT = [{"role": "user", "content": "Tell me about Anna."}]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 120}},
    "required": ["name", "age"],
}


def json_schema(schema: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(schema))


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine("demo", device="cpu", dtype="float32", max_running_requests=32) as engine:
        yield engine


def answer_all(engine: Engine, asked: list[dict[str, Any]]) -> list[Completion]:
    """The answers to requests that run together."""
    streams = [engine.generate(CHAT, stream=True, **fields) for fields in asked]
    return [stream.result() for stream in streams]


class PrefixChecker:
    """Says whether a text can be the beginning of an answer, byte by byte and so without the model's tokenizer."""

    def __init__(self) -> None:
        import xgrammar

        self._xgrammar = xgrammar
        single_bytes = xgrammar.TokenizerInfo([bytes([b]) for b in range(256)], stop_token_ids=[])
        self._compiler = xgrammar.GrammarCompiler(single_bytes, max_threads=1)

    def begins(self, schema: Any, text: str) -> bool:
        source = enforceable(json.dumps(schema))
        compiled = self._compiler.compile_json_schema(source, any_whitespace=False, strict_mode=False)
        return bool(self._xgrammar.GrammarMatcher(compiled).accept_string(text))


@pytest.mark.timeout(240)
def test_200_random_schemas(engine: Engine) -> None:
    schemas = [random_schema(random.Random(seed)) for seed in range(200)]
    asked: list[dict[str, Any]] = [
        {
            "grammar": json_schema(schema),
            "temperature": float(seed % 2),
            "seed": seed,
            "max_new_tokens": 160,
        }
        for seed, schema in enumerate(schemas)
    ]
    # Plain neighbours, among them one that must answer as it does alone.
    asked += [{"temperature": 1.0, "seed": 7, "max_new_tokens": 60}] * 4
    answers = answer_all(engine, asked)
    assert [answer.text for answer in answers[200:]] == [answers[200].text] * 4
    checker = PrefixChecker()
    stopped = 0
    for schema, answer in zip(schemas, answers, strict=False):
        if answer.finish_reason == "stop":
            stopped += 1
            jsonschema.Draft202012Validator(schema).validate(json.loads(answer.text))
        else:
            assert answer.finish_reason == "length"
            assert checker.begins(schema, answer.text.rstrip("\ufffd")), (schema, answer.text)
    assert stopped > 150, "most of these schemas have short answers only"


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (Grammar("regex", r"[A-Z][a-z]{2,8} (is|was) \d{1,3}\.\d years old!?"), None),
        (Grammar("regex", r"(?:[^\x00-\x7f]|\s|.){5,20}"), None),
        (
            Grammar("ebnf", 'root ::= "[" item ("," item)? "]"\nitem ::= [a-c]{1,3} | "é"'),
            r"\[([a-c]{1,3}|é)(,\1?.*)?\]",
        ),
        (choice_grammar(["yes", "no", "maybe", "größe\n"]), "yes|no|maybe|größe\n"),
        (choice_grammar(["a", "ab", "abc"]), "a|ab|abc"),
    ],
)
def test_regex_ebnf_and_choice(engine: Engine, grammar: Grammar, pattern: str | None) -> None:
    asked = [
        {"grammar": grammar, "temperature": t, "seed": s, "max_new_tokens": 80} for t in (0.0, 1.5) for s in range(4)
    ]
    for answer in answer_all(engine, asked):
        assert answer.finish_reason == "stop" and answer.matched in engine.model.eos_token_ids
        assert re.fullmatch(pattern or grammar.source, answer.text), answer.text


def test_json_object_and_structural_tag(engine: Engine) -> None:
    tag = {
        "type": "structural_tag",
        "format": {
            "type": "tag",
            "begin": '<tool_call>\n{"name": "add", "arguments": ',
            "content": {"type": "json_schema", "json_schema": PERSON},
            "end": "}\n</tool_call>",
        },
    }
    asked = [
        {"grammar": Grammar("json_object", ""), "temperature": 1.0, "seed": 3, "max_new_tokens": 200},
        {"grammar": Grammar("structural_tag", json.dumps(tag)), "temperature": 1.0, "seed": 3, "max_new_tokens": 120},
    ]
    plain, tagged = answer_all(engine, asked)
    assert plain.finish_reason == tagged.finish_reason == "stop"
    assert isinstance(json.loads(plain.text), dict)
    call = json.loads(tagged.text.removeprefix("<tool_call>").removesuffix("</tool_call>"))
    jsonschema.validate(call["arguments"], PERSON)


def test_what_else_is_asked_of_a_request_holds_beside_its_grammar(engine: Engine) -> None:
    digits = Grammar("regex", "[0-9]*")
    asked: list[dict[str, Any]] = [
        {"grammar": digits, "stop": ["7"], "ignore_eos": True, "max_new_tokens": 400},
        {"grammar": digits, "min_new_tokens": 25, "max_new_tokens": 400},
        {"grammar": digits, "ignore_eos": True, "max_new_tokens": 30},
        {"grammar": Grammar("regex", "[0-9]{4}"), "ignore_eos": True, "min_new_tokens": 30, "max_new_tokens": 40},
        {"grammar": digits, "max_new_tokens": 30, "logit_bias": [[engine._encoder.encode("5", 1)[-1], 100.0]]},
        {"grammar": digits, "max_new_tokens": 20, "ignore_eos": True, "presence_penalty": 2.0, "logprobs": 3},
    ]
    stopped, least, endless, forced, biased, penalised = answer_all(engine, [{"seed": 5, **one} for one in asked])
    assert (stopped.finish_reason, stopped.matched) == ("stop", "7") and re.fullmatch("[0-689]*", stopped.text)
    assert least.finish_reason == "stop" and least.usage["completion_tokens"] > 25
    assert endless.finish_reason == "length" and re.fullmatch("[0-9]{30,}", endless.text)
    assert forced.finish_reason == "stop" and re.fullmatch("[0-9]{4}", forced.text)
    assert biased.text.startswith("555")
    assert re.fullmatch("[0-9]+", penalised.text)


def test_a_wrong_grammar_is_refused_and_one_too_slow_for_the_loop_is_ended(engine: Engine) -> None:
    with pytest.raises(RequestRefused, match="parenthesis is not closed"):
        engine.generate("x", grammar=Grammar("regex", "(a"))
    beside = engine.generate(CHAT, stream=True, max_new_tokens=200, ignore_eos=True, seed=1)
    ambiguous = Grammar("ebnf", 'root ::= root root root | "a" | ""')
    with pytest.raises(RequestRefused, match="too much time for each token"):
        engine.generate("aaa", grammar=ambiguous, max_new_tokens=3000, ignore_eos=True)
    assert beside.result().usage["completion_tokens"] == 200


def test_a_preempted_answer_is_the_same(engine: Engine) -> None:
    asked: list[dict[str, Any]] = [
        {"grammar": Grammar("regex", r"([A-Z][a-z]+ ){12}"), "temperature": 1.0, "seed": seed, "max_new_tokens": 60}
        for seed in range(4)
    ]
    undisturbed = [answer.text for answer in answer_all(engine, asked)]
    with Engine("demo", device="cpu", dtype="float32", max_total_tokens=160) as small:
        answers = answer_all(small, asked)
        assert small.stats()["preemptions"] > 0
    assert [answer.text for answer in answers] == undisturbed


# ---- the core alone -------------------------------------------------------------------------------------------------


class DrawingEngine:
    """An engine without a model: draws a token that the row's mask allows, else a fixed one. It can run ahead."""

    page_size, num_pages, device_name, dtype_name = 4, 400, "cpu", "none"

    def __init__(self, vocab_size: int, runs_ahead: bool) -> None:
        self.runs_ahead = runs_ahead
        self.launched: list[list[int]] = []
        self._vocab_size = vocab_size
        self._random = np.random.default_rng(0)

    def stay_ahead(self, pages_used: int) -> None: ...

    def launch(self, plan: StepPlan) -> list[int]:
        self.launched.append([row.request.rid for row in plan.rows])
        tokens = []
        for row in plan.rows:
            mask = row.request.token_mask
            if row.sample and mask is not None:
                words = np.zeros(-(-self._vocab_size // 32), np.int32)
                mask.fill(words)
                allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
                tokens.append(int(self._random.choice(allowed)))
            elif row.sample:
                tokens.append(300)
        return tokens

    def retire(self, step: list[int]) -> list[int]:
        return step

    def logprobs(self, step: list[int]) -> list[RowLogprobs]:
        return []


@pytest.fixture
def core(engine: Engine, request: pytest.FixtureRequest) -> Iterator[tuple[ReplicaCore, DrawingEngine]]:
    spec: ModelSpec = dataclasses.replace(engine.model, context_length=1000)
    drawing = DrawingEngine(spec.vocab_size, runs_ahead=getattr(request, "param", False))
    core = ReplicaCore(drawing, ServerConfig(device="cpu"), spec)
    yield core, drawing
    core.close()


def submit(core: ReplicaCore, rid: int, grammar: Grammar | None, **fields: Any) -> RequestError | None:
    params = SamplingParams(grammar=grammar, **fields)
    return core.submit(TokenizedRequest(rid, [300, 301, 302], params, [0, 0, 0, 0]))


def run_out(core: ReplicaCore) -> dict[int, tuple[list[int], FinishReason]]:
    answers: dict[int, tuple[list[int], FinishReason]] = {}
    while core.busy:
        batch: TokenBatch | None = core.step()
        for rid, token_id, finish in zip(batch.rids, batch.token_ids, batch.finishes, strict=True) if batch else ():
            answers[rid] = ([*answers.get(rid, ([],))[0], token_id], finish)
    return answers


@pytest.mark.parametrize("core", [False, True], indirect=True, ids=["in step", "launch ahead"])
def test_rows_with_and_without_grammars_run_together(engine: Engine, core: tuple[ReplicaCore, DrawingEngine]) -> None:
    replica, drawing = core
    word = Grammar("regex", r"[a-z]{3,9}-\d\d")
    submit(replica, 100, word)
    assert run_out(replica)[100][1] is FinishReason.STOP
    drawing.launched.clear()
    for rid in range(12):
        assert submit(replica, rid, word if rid % 3 else None, max_new_tokens=50) is None
    answers = run_out(replica)
    for rid, (token_ids, finish) in answers.items():
        if rid % 3:
            text = engine._texts.open(True).push(token_ids)
            assert finish is FinishReason.STOP and re.fullmatch(r"[a-z]{3,9}-\d\d", text)
        else:
            assert (token_ids, finish) == ([300] * 50, FinishReason.LENGTH)
    assert len(answers) == 12 and replica.stats()["kv_pages_leaked"] == 0
    # A row with a mask needs its last token first, which a step launched ahead does not have.
    in_a_row = any(rid % 3 for one, two in pairwise(drawing.launched) for rid in set(one) & set(two))
    assert in_a_row is not drawing.runs_ahead


def test_a_compiling_request_holds_up_no_other_and_can_be_aborted(core: tuple[ReplicaCore, DrawingEngine]) -> None:
    replica, _ = core
    slow = Grammar("regex", "|".join(f"[a-z]{{{n}}}x" for n in range(400)))
    assert submit(replica, 1, slow) is None
    assert submit(replica, 2, slow) is None
    assert submit(replica, 3, None, max_new_tokens=20) is None
    started = time.monotonic()
    rows: list[tuple[int, FinishReason]] = []
    while replica.scheduler.running or replica.scheduler.waiting > 2:
        batch = replica.step()
        rows += zip(batch.rids, batch.finishes, strict=True) if batch else []
    assert rows == [(3, FinishReason.NONE)] * 19 + [(3, FinishReason.LENGTH)]
    assert time.monotonic() - started < 20 and replica.busy
    replica.abort(1)
    batch = replica.step()
    assert batch is not None and (batch.rids, batch.finishes) == ([1], [FinishReason.ABORT])
    assert [stream.rid for stream in batch.opened] == [1]
    errors = replica.fail_all(503, "shutting_down", "bye")
    assert errors == [RequestError(2, 503, "shutting_down", "bye")]
    assert replica.take_refused() == []


def test_a_refusal_that_comes_late_ends_its_request(core: tuple[ReplicaCore, DrawingEngine]) -> None:
    replica, _ = core
    assert submit(replica, 1, Grammar("regex", "(a")) is None
    assert run_out(replica) == {}
    (refusal,) = replica.take_refused()
    assert (refusal.rid, refusal.status, refusal.code) == (1, 400, "invalid_grammar")
    again = submit(replica, 2, Grammar("regex", "(a"))
    assert again == dataclasses.replace(refusal, rid=2)
