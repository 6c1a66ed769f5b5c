"""Compiles grammars beside the scheduler's loop, and keeps what was compiled.

A grammar_server process does the work; it is started by the first request that needs it. Equal grammars are compiled
once. What comes back is read by a thread in native code, so the loop is not held up.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import OrderedDict
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from select import select
from typing import Any

from minisgl.child_process import package_environment
from minisgl.sampling_params import Grammar
from minisgl.scheduler_proc.adjustments import Refusal
from minisgl.scheduler_proc.grammar import GrammarRefused
from minisgl.scheduler_proc.grammar_wire import BUSY_FACTOR, CompilerSettings, read_frame, write_frame
from minisgl.scheduler_proc.xgrammar_import import import_xgrammar_alone

WORKERS = 2
"""Grammars compiled at once: a slow one does not hold up the others."""
MAX_CACHED = 256
MAX_CACHED_BYTES = 256 * 2**20
QUEUE_LIMITS = 6
"""A grammar waits for its turn at most this many time limits."""
START_SECONDS = 120.0
GRACE_SECONDS = 5.0


class GrammarCompiler:
    """Compiled grammars for one model. Nothing is started before the first `compile`; not thread-safe.

    Args:
        own_process: whether this process imports nothing in other threads, so that xgrammar can be imported fast.
    """

    def __init__(self, settings: CompilerSettings, own_process: bool = False) -> None:
        self._settings = settings
        self._own_process = own_process
        self._threads = ThreadPoolExecutor(WORKERS, thread_name_prefix="grammar")
        self._local = threading.local()
        self._servers: set[_Server] = set()
        self._closed = False
        self._tokenizer: Any = None
        self._tokenizer_lock = threading.Lock()
        self._cached: OrderedDict[Grammar, Future[Any]] = OrderedDict()

    def compile(self, grammar: Grammar) -> Future[Any]:
        """The compiled grammar (an xgrammar.CompiledGrammar), or a GrammarRefused, now or soon."""
        known = self._cached.pop(grammar, None)
        if known is None or not _worth_keeping(known):
            latest_start = time.monotonic() + QUEUE_LIMITS * self._settings.seconds
            known = self._threads.submit(self._compile, grammar, latest_start)
        self._cached[grammar] = known
        self._forget_oldest()
        return known

    def wait(self, seconds: float) -> None:
        """Return when a grammar is ready, or after `seconds`."""
        wait([future for future in self._cached.values() if not future.done()], seconds, FIRST_COMPLETED)

    def close(self) -> None:
        """End the processes. Grammars still being compiled are refused."""
        self._closed = True
        for server in list(self._servers):
            server.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _forget_oldest(self) -> None:
        size = sum(_size(future) for future in self._cached.values())
        for grammar, future in list(self._cached.items())[:-1]:
            if len(self._cached) <= MAX_CACHED and size <= MAX_CACHED_BYTES:
                return
            if future.done():
                size -= _size(future)
                del self._cached[grammar]

    # ---- in a thread of the pool ----

    def _compile(self, grammar: Grammar, latest_start: float) -> Any:
        if time.monotonic() > latest_start:
            raise GrammarRefused(
                Refusal(503, "overloaded", "too many grammars are waiting to be compiled; try again in a while")
            )
        server = None
        try:
            server = self._server()
            compiled, outcome = server.ask(grammar)
        except (OSError, EOFError, TimeoutError) as error:
            if server is not None:
                self._drop(server)
            raise GrammarRefused(
                Refusal(500, "grammar_compiler_failed", "the grammar compiler stopped; try again")
            ) from error
        if not compiled:
            raise GrammarRefused(Refusal(400, "invalid_grammar", f"{grammar.kind}: {outcome}"))
        from xgrammar import CompiledGrammar

        return CompiledGrammar.deserialize_json(outcome.decode(), self._tokenizer)

    def _server(self) -> _Server:
        """This thread's own server."""
        server: _Server | None = getattr(self._local, "server", None)
        if server is None or server.closed:
            server = self._local.server = _Server(self._settings)
            self._servers.add(server)
            try:
                self._learn_tokenizer(server)
            except BaseException:
                self._drop(server)
                raise
        return server

    def _learn_tokenizer(self, server: _Server) -> None:
        """Wait until a server is up; the first one's description of the tokenizer is kept."""
        with self._tokenizer_lock:
            if self._closed:
                raise EOFError
            # Takes its time, in which the server starts.
            if self._own_process:
                import_xgrammar_alone()
            from xgrammar import TokenizerInfo

            described = server.read(START_SECONDS)
            if self._tokenizer is None:
                self._tokenizer = TokenizerInfo.deserialize_json(described)

    def _drop(self, server: _Server) -> None:
        server.close()
        self._servers.discard(server)


class _Server:
    """One grammar_server process."""

    def __init__(self, settings: CompilerSettings) -> None:
        self.closed = False
        self._answer_seconds = settings.seconds * BUSY_FACTOR + GRACE_SECONDS
        self._process = subprocess.Popen(
            [sys.executable, "-m", "minisgl.scheduler_proc.grammar_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**package_environment(), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            # Its end is that of its stdin; a Ctrl-C in the terminal is for others.
            start_new_session=True,
        )
        self._ask(asdict(settings))

    def ask(self, grammar: Grammar) -> tuple[bool, Any]:
        """Whether the grammar could be compiled; and the result as bytes, or the reason.

        Raises OSError, EOFError or TimeoutError when the process is gone or silent.
        """
        self._ask(grammar)
        compiled, outcome = self.read(self._answer_seconds)
        return compiled, outcome

    def read(self, seconds: float) -> Any:
        assert self._process.stdout
        if not select([self._process.stdout], [], [], seconds)[0]:
            raise TimeoutError
        return read_frame(self._process.stdout)

    def close(self) -> None:
        self.closed = True
        self._process.kill()
        self._process.wait()

    def _ask(self, value: Any) -> None:
        assert self._process.stdin
        write_frame(self._process.stdin, value)


def _worth_keeping(compiled: Future[Any]) -> bool:
    """Not what may go better the next time."""
    if not compiled.done() or compiled.exception() is None:
        return not compiled.cancelled()
    error = compiled.exception()
    return isinstance(error, GrammarRefused) and error.refusal.status == 400


def _size(compiled: Future[Any]) -> int:
    """Bytes that a compiled grammar takes; 0 before it is there."""
    if not compiled.done() or compiled.exception() is not None:
        return 0
    size: int = compiled.result().memory_size_bytes
    return size
