"""The grammar compiler with its real server process, on the demo model's tokenizer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import psutil
import pytest

from minisgl.child_process import package_environment
from minisgl.config import ServerConfig
from minisgl.grammars import choice_grammar
from minisgl.model_source import resolve_model
from minisgl.sampling_params import Grammar
from minisgl.scheduler_proc.grammar import GrammarRefused
from minisgl.scheduler_proc.grammar_compiler import GrammarCompiler
from minisgl.scheduler_proc.grammar_wire import CompilerSettings

SECONDS = 2.0


def settings() -> CompilerSettings:
    model = resolve_model(ServerConfig(model="demo"), lambda *progress: None)
    return CompilerSettings(model.directory, False, model.vocab_size, list(model.eos_token_ids), SECONDS)


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(settings())
    assert not servers(), "nothing runs before the first grammar"
    yield compiler
    compiler.close()
    assert not servers()


def servers(pid: int | None = None) -> list[psutil.Process]:
    children = psutil.Process(pid).children()
    return [child for child in children if "minisgl.scheduler_proc.grammar_server" in child.cmdline()]


def matches(compiled: Any, text: str) -> bool:
    from xgrammar import GrammarMatcher

    matcher = GrammarMatcher(compiled)
    return bool(matcher.accept_string(text) and matcher.is_completed())


def refusal(future: Future[Any]) -> tuple[int, str, str]:
    with pytest.raises(GrammarRefused) as refused:
        future.result(timeout=60)
    return refused.value.refusal


TAG = (
    '{"type": "structural_tag", "format": {"type": "tag", "begin": "<t>", "end": "</t>", '
    '"content": {"type": "json_schema", "json_schema": {"properties": {"a": {"minimum": 1}}, "required": ["a"]}}}}'
)


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (Grammar("json_object", ""), ["{}", '{"a": [1, null, {"b": "x"}]}'], ["[]", "1", '{"a": 1', '{"a": 01}']),
        (Grammar("json_schema", '{"type": "array", "items": {"type": "integer"}}'), ["[]", "[1, 2]"], ['["a"]', "1"]),
        (Grammar("json_schema", '{"pattern": "^a.c$"}'), ['"abc"'], ['"ac"', '"a"c"', '"a\nc"', '"abcd"']),
        (Grammar("regex", r"\d{3}-[^a-f]+."), ["123-xyz.", "123-gé"], ["12-x", "123-x\n", "123-a."]),
        (Grammar("regex", r"a\.[.]\-\\"), ["a..-\\"], ["ab.-\\", "a.b-\\"]),
        (Grammar("ebnf", 'root ::= "a" item* "z"\nitem ::= [0-9] | "é"'), ["az", "a1é2z"], ["a", "axz"]),
        (Grammar("structural_tag", TAG), ['<t>{"a":2}</t>'], ['<t>{"a":0}</t>', '<t>{"a":2}', "x"]),
    ],
)
def test_every_kind_matches_what_it_says(
    compiler: GrammarCompiler, grammar: Grammar, good: list[str], bad: list[str]
) -> None:
    compiled = compiler.compile(grammar).result(timeout=60)
    assert [matches(compiled, text) for text in good] == [True] * len(good)
    assert [matches(compiled, text) for text in bad] == [False] * len(bad)


def test_a_choice_matches_its_texts_alone_whatever_is_in_them(compiler: GrammarCompiler) -> None:
    texts = ["yes", "no", "", 'say "hi"', "a\\nb", "a\nb\r\t\x00", "größe 名前 😀", "]-[^{}|*+?()", "yes|no", "\u2028"]
    compiled = compiler.compile(choice_grammar(texts)).result(timeout=60)
    assert all(matches(compiled, text) for text in texts)
    assert not any(matches(compiled, text) for text in ("ye", "yesno", "yes ", "a\\\nb", "say hi", "a\nb"))
    with pytest.raises(ValueError, match="at least one"):
        choice_grammar([])


@pytest.mark.parametrize(
    ("kind", "source", "reason"),
    [
        ("regex", "(a", "The parenthesis is not closed"),
        ("regex", r"(?=a)b", "Lookahead is not supported"),
        ("regex", r"\Aa", "Escape sequence '\\A' is not recognized"),
        ("regex", "a$b", "It is ignored"),
        ("ebnf", "root = 'a'", "EBNF"),
        ("ebnf", 'start ::= "a"', "The root rule"),
        ("ebnf", "root ::= thing", "thing"),
        ("ebnf", 'root ::= "a" root2\nroot2 ::= root2', "no token of this model can follow"),
        ("json_schema", "{", "not valid JSON"),
        ("json_schema", '{"type": "any"}', "Unsupported type"),
        # xgrammar sees this by itself since 0.2.9.
        ("json_schema", '{"$ref": "#"}', ("no token of this model can follow", "Circular $ref")),
        ("json_schema", '{"$ref": "http://127.0.0.1:1/s.json"}', "inside this one"),
        ("json_schema", '{"oneOf": [{"type": "integer"}, {"type": "number"}]}', "oneOf with overlapping"),
        ("json_schema", '{"pattern": "a+", "maxLength": 3}', "minLength/maxLength is not supported"),
        ("json_schema", '{"type": "number", "multipleOf": 0.1}', "multipleOf is not supported"),
        ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}', "Invalid range"),
        ("json_schema", "[" * 100_000, "nested too deeply"),
        ("structural_tag", '{"type": "structural_tag"}', "must have a format field"),
        ("regex", "((a|b?c){1,3000}){1,3000}|" + "|".join(f"[a-z]{{{n}}}x" for n in range(400)), "make it simpler"),
        ("json_schema", '{"items":' * 4000 + "{}" + "}" * 4000, "nested too deeply"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_the_reason(
    compiler: GrammarCompiler, kind: str, source: str, reason: str | tuple[str, ...]
) -> None:
    status, code, message = refusal(compiler.compile(Grammar(kind, source)))
    assert (status, code) == (400, "invalid_grammar")
    assert message.startswith(f"{kind}: ") and "/project/" not in message
    assert any(words in message for words in ((reason,) if isinstance(reason, str) else reason))


def test_time_and_memory_are_limited_and_others_go_on_meanwhile(compiler: GrammarCompiler) -> None:
    compiler.compile(Grammar("regex", "warm")).result(timeout=60)
    (server,) = servers()
    slow = Grammar("json_schema", '{"properties": {' + ",".join(f'"property{i}": {{}}' for i in range(9000)) + "}}")
    started = time.monotonic()
    long = compiler.compile(slow)
    assert compiler.compile(slow) is long
    time.sleep(0.3)
    assert matches(compiler.compile(Grammar("regex", "quick")).result(timeout=60), "quick")
    assert not long.done()
    assert refusal(long)[2] == f"json_schema: it takes more than {SECONDS:g} s to compile: make it simpler"
    assert time.monotonic() - started < SECONDS + 20.0
    assert server in servers() and not server.children()
    hungry = Grammar("ebnf", "root ::= " + " ".join(f'("{chr(97 + i % 26)}" | "b"){{0,100000}}' for i in range(2000)))
    assert "make it simpler" in refusal(compiler.compile(hungry))[2]


def test_equal_grammars_are_compiled_once(compiler: GrammarCompiler) -> None:
    first = compiler.compile(Grammar("regex", "[a-z]+ once"))
    assert compiler.compile(Grammar("regex", "[a-z]+ once")) is first
    first.result(timeout=60)
    assert compiler.compile(Grammar("regex", "[a-z]+ once")) is first
    wrong = compiler.compile(Grammar("regex", "(wrong"))
    refusal(wrong)
    assert compiler.compile(Grammar("regex", "(wrong")) is wrong


def test_the_vocabulary_is_that_of_the_logits_without_special_tokens(compiler: GrammarCompiler) -> None:
    from minisgl.detokenizer_proc.incremental import TokenTexts
    from minisgl.tokenizer_proc.tokenizer_files import load_tokenizer

    compiled = compiler.compile(Grammar("regex", "x")).result(timeout=60)
    vocabulary, made_with = compiled.tokenizer_info.decoded_vocab, settings()
    assert len(vocabulary) == made_with.vocab_size
    assert compiled.tokenizer_info.stop_token_ids == made_with.eos_ids
    texts = TokenTexts(load_tokenizer(made_with.directory))
    decoder = texts.open(skip_special_tokens=True)
    whole = [token_id for token_id, data in enumerate(vocabulary) if _is_text(data)]
    assert len(whole) > 2000
    assert decoder.push(whole) == b"".join(vocabulary[token_id] for token_id in whole).decode()
    assert all(vocabulary[token_id] == b"" for token_id in texts.special_ids)


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_a_dead_server_costs_the_requests_at_it_and_no_others() -> None:
    before = servers()
    compiler = GrammarCompiler(settings())
    try:
        compiler.compile(Grammar("regex", "a")).result(timeout=60)
        (server,) = [server for server in servers() if server not in before]
        server.suspend()
        lost = compiler.compile(Grammar("regex", "b"))
        server.kill()
        assert refusal(lost)[:2] == (500, "grammar_compiler_failed")
        assert matches(compiler.compile(Grammar("regex", "b")).result(timeout=60), "b")
        assert len(servers()) == len(before) + 1 and server not in servers()
    finally:
        compiler.close()


OWNER = """
import sys
from minisgl.sampling_params import Grammar
from minisgl.scheduler_proc.grammar_compiler import GrammarCompiler
from minisgl.scheduler_proc.grammar_wire import CompilerSettings
compiler = GrammarCompiler(CompilerSettings(sys.argv[1], False, int(sys.argv[2]), [2], 60.0))
compiler.compile(Grammar("regex", "a")).result()
long = compiler.compile(Grammar("regex", "|".join(f"[a-z]{{{n}}}x" for n in range(400))))
print("compiling", flush=True)
long.result()
"""


def test_nothing_outlives_its_owner() -> None:
    made_with = settings()
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, made_with.directory, str(made_with.vocab_size)],
        stdout=subprocess.PIPE,
        env=package_environment(),
    )
    try:
        assert owner.stdout and owner.stdout.readline() == b"compiling\n"
        deadline = time.monotonic() + 30
        while len(left := psutil.Process(owner.pid).children(recursive=True)) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(left) == 2, "the server and its fork"
    finally:
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
    deadline = time.monotonic() + 30
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in left):
        assert time.monotonic() < deadline
        time.sleep(0.02)
