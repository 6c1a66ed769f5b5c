"""Compiles grammars, in a process of its own: `python -m minisgl.scheduler_proc.grammar_server`.

In, on stdin: the settings, then one grammar after the other. Out, on stdout: the tokenizer as xgrammar sees it, then
one answer per grammar. It ends when stdin does, so whoever started it cannot leave it behind.

Every grammar is compiled in a fork, which the kernel ends when it takes too long or too much memory: schemas come from
clients, and compiling one can take any amount of either, or crash. Nothing is loaded twice, and nothing is lost.
"""

from __future__ import annotations

import functools
import os
import re
import resource
import signal
import sys
import tempfile
from collections.abc import Callable
from select import select
from typing import Any

import msgpack
import numpy as np

from minisgl.child_process import die_with_parent
from minisgl.detokenizer_proc.incremental import decoder_types
from minisgl.scheduler_proc.adjustments import withdraw
from minisgl.scheduler_proc.grammar import GrammarState
from minisgl.scheduler_proc.grammar_wire import BUSY_FACTOR, CompilerSettings, read_frame, write_frame
from minisgl.scheduler_proc.json_schema import UnsupportedSchema, enforceable, enforceable_structural_tag
from minisgl.scheduler_proc.xgrammar_import import import_xgrammar_alone
from minisgl.tokenizer_proc.tokenizer_files import load_tokenizer

MAX_EXTRA_MEMORY = 2**30
"""Bytes that compiling one grammar may take."""
MAX_COMPILED_BYTES = 16 * 2**20
TRIAL_TOKENS = 48


class Unusable(Exception):
    """The grammar is wrong or too costly; the message says why."""


def main() -> None:
    # Keep stdout for the answers alone; whatever a library prints goes to the log.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    settings = CompilerSettings(**read_frame(sys.stdin.buffer))
    compiler = _Compiler(settings)
    write_frame(answers, compiler.tokenizer_json)
    while True:
        try:
            kind, source = read_frame(sys.stdin.buffer)
            answer = _in_fork(functools.partial(compiler.compile, kind, source), settings.seconds)
        except EOFError:
            return
        write_frame(answers, answer)


def _in_fork(work: Callable[[], bytes], seconds: float) -> tuple[bool, bytes | str]:
    """What `work` returns, or why it did not; within a time and a memory limit. Raises EOFError when stdin ends."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reader)
        status = 1
        try:
            _limit_self(seconds)
            with os.fdopen(writer, "wb") as stream:
                stream.write(msgpack.packb(_outcome(work)))
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        # Nothing is asked before the last answer, so this can only be the end of whoever asked.
        if sys.stdin.buffer in select([stream, sys.stdin.buffer], [], [])[0]:
            os.kill(pid, signal.SIGKILL)
            raise EOFError
        data = stream.read()
    _, status = os.waitpid(pid, 0)
    if status == 0:
        outcome: tuple[bool, bytes | str] = msgpack.unpackb(data, use_list=False)
        return outcome
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGALRM):
        return False, f"it takes more than {seconds:g} s to compile: make it simpler"
    return False, f"it takes more than {MAX_EXTRA_MEMORY // 2**20} MiB to compile, or crashes xgrammar: make it simpler"


def _limit_self(seconds: float) -> None:
    # Time that this process runs; on a busy machine it may wait for a good while longer.
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, seconds * BUSY_FACTOR)
    os.nice(5)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    die_with_parent()
    if sys.platform == "linux":
        with open("/proc/self/statm") as sizes:
            size = int(sizes.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MAX_EXTRA_MEMORY,) * 2)


def _outcome(work: Callable[[], bytes]) -> tuple[bool, bytes | str]:
    try:
        return True, work()
    except (Unusable, UnsupportedSchema) as error:
        return False, str(error)
    except RecursionError:
        return False, "it is nested too deeply"
    except MemoryError:
        return False, f"it takes more than {MAX_EXTRA_MEMORY // 2**20} MiB to compile: make it simpler"
    except Exception as error:  # xgrammar's own, of many classes
        return False, _plain(str(error))


def _plain(message: str) -> str:
    """xgrammar's message without its source places and checks."""
    if "bad_alloc" in message:
        return f"it takes more than {MAX_EXTRA_MEMORY // 2**20} MiB to compile: make it simpler"
    message = re.sub(r"\[\d+:\d+:\d+\] \S+:\d+: ", "", message)
    message = re.sub(r"Check failed: .*? is false: ", "", message)
    return " ".join(message.split())[:500]


class _Compiler:
    """xgrammar with the model's tokenizer; `tokenizer_json` describes it to whoever reads what is compiled."""

    def __init__(self, settings: CompilerSettings) -> None:
        tokenizer = load_tokenizer(settings.directory, settings.trust_remote_code)
        self._xgrammar = xgrammar = import_xgrammar_alone()
        decoders = decoder_types(tokenizer)
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        texts = [""] * settings.vocab_size
        for text, token_id in vocabulary.items():
            if token_id < settings.vocab_size:
                texts[token_id] = text
        # A special token has no text in an answer. xgrammar never allows a token without text.
        for token_id, token in tokenizer.get_added_tokens_decoder().items():
            if token.special and token_id < settings.vocab_size:
                texts[token_id] = ""
        kinds = xgrammar.VocabType
        self._wordpiece = "WordPiece" in decoders
        self._vocab_size = settings.vocab_size
        self._eos_ids = settings.eos_ids
        self._tokenizer = xgrammar.TokenizerInfo(
            texts,
            kinds.BYTE_LEVEL if decoders == ["ByteLevel"] else kinds.BYTE_FALLBACK,
            vocab_size=settings.vocab_size,
            stop_token_ids=settings.eos_ids,
        )
        self.tokenizer_json: str = self._tokenizer.serialize_json()

    def compile(self, kind: str, source: str) -> bytes:
        """A grammar in xgrammar's serialized form; raises Unusable, UnsupportedSchema, or what xgrammar raises."""
        if self._wordpiece:
            raise Unusable("no grammar can be enforced for this model: its tokenizer is of the WordPiece kind")
        with _Warnings() as warnings:
            compiled = self._compile(kind, source)
        # A warning says which part of the grammar was not taken as it is meant.
        ignored = [line for line in warnings.lines if not re.search(r"'\\[^a-zA-Z0-9]' is not recognized", line)]
        if ignored:
            raise Unusable(ignored[0])
        self._try_out(compiled)
        data: bytes = compiled.serialize_json().encode()
        if len(data) > MAX_COMPILED_BYTES:
            raise Unusable(f"it is too large when compiled ({len(data) >> 20} MiB): make it simpler")
        return data

    def _compile(self, kind: str, source: str) -> Any:
        compiler = self._xgrammar.GrammarCompiler(self._tokenizer, max_threads=1, cache_enabled=False)
        # One line of JSON: with free whitespace a weak model may never stop writing spaces.
        if kind == "json_object":
            return compiler.compile_json_schema('{"type": "object"}', any_whitespace=False, strict_mode=False)
        if kind == "json_schema":
            return compiler.compile_json_schema(enforceable(source), any_whitespace=False, strict_mode=False)
        if kind == "regex":
            return compiler.compile_regex(_dot_without_newline(source))
        if kind == "ebnf":
            return compiler.compile_grammar(source)
        return compiler.compile_structural_tag(enforceable_structural_tag(source))

    def _try_out(self, compiled: Any) -> None:
        """Write a random answer: a grammar that crashes, ends nowhere or costs too much should do so here."""
        matcher = self._xgrammar.GrammarMatcher(compiled)
        state = GrammarState(matcher)
        random = np.random.default_rng(0)
        row = np.zeros(-(-self._vocab_size // 32), np.int32)
        for _ in range(TRIAL_TOKENS):
            state.fill(row)
            if state.problem:
                raise Unusable(state.problem.message)
            withdraw(row, self._eos_ids)
            # The row is longer than the vocabulary, and its last bits may be set.
            allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")[: self._vocab_size])
            state.accept(int(random.choice(allowed)))
            if state.ended:
                return
            if state.problem:
                raise Unusable(state.problem.message)


def _dot_without_newline(pattern: str) -> str:
    """`.` of a regular expression is anything but a newline; xgrammar would take newlines, too."""
    parts: list[str] = []
    in_class = False
    for part in re.findall(r"\\.|.", pattern, re.DOTALL):
        if part == "[":
            in_class = True
        elif part == "]":
            in_class = False
        parts.append(r"[^\n]" if part == "." and not in_class else part)
    return "".join(parts)


class _Warnings:
    """Collects what native code writes to stderr meanwhile."""

    def __enter__(self) -> _Warnings:
        self.lines: list[str] = []
        self._file = tempfile.TemporaryFile()
        self._stderr = os.dup(2)
        os.dup2(self._file.fileno(), 2)
        return self

    def __exit__(self, *exception: object) -> None:
        os.dup2(self._stderr, 2)
        os.close(self._stderr)
        self._file.seek(0)
        for line in self._file.read().decode(errors="replace").splitlines():
            if "Warning: " in line:
                self.lines.append(_plain(line.split("Warning: ")[-1]))
        self._file.close()


if __name__ == "__main__":
    main()
