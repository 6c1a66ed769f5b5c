"""Slow readers beside fast ones on the real stack with a made-up engine: they cost bounded memory and no time.

The run with 512 clients at once takes three minutes: pytest -m long -s tests/e2e/test_e2e_readers.py
"""

from __future__ import annotations

import contextlib
import itertools
import json
import selectors
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import delivery_bench
import pytest
from benchlib.client import Target
from benchlib.load import Load, LoadGenerator
from benchlib.stats import inter_token_gaps, percentile
from benchlib.workloads import Lengths, Session, Workload, load_tokenizer
from real_server import until

from minisgl.http.streaming import MAX_HELD_BYTES
from minisgl.http.writer import MAX_PENDING_CHARS

NEW_TOKENS = 128
CONNECTION_BYTES = 256 * 2**10
"""Of a client: what its transport holds before it says that it is full, its text, and the objects of its request."""
TRICKLE_BYTES, TRICKLE_SECONDS = 512, 0.05


@contextlib.contextmanager
def reading(sockets: list[socket.socket], trickle: bool = False) -> Iterator[None]:
    """Read whatever comes, in a thread; or so slowly that the server runs away."""
    over = threading.Event()

    def read() -> None:
        with selectors.DefaultSelector() as ready:
            for client in sockets:
                ready.register(client, selectors.EVENT_READ)
            while not over.wait(TRICKLE_SECONDS if trickle else 0) and ready.get_map():
                for key, _ in ready.select(0.1):
                    with contextlib.suppress(ConnectionResetError):
                        if key.fileobj.recv(TRICKLE_BYTES if trickle else 2**16):  # type: ignore[union-attr]
                            continue
                    ready.unregister(key.fileobj)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield
    finally:
        over.set()
        reader.join()


@dataclass(frozen=True)
class Gaps:
    """Milliseconds between the tokens of the fast readers."""

    median: float
    p99: float


class Bench:
    """A server, and the fast readers' answers checked and timed."""

    def __init__(self, url: str, generator: LoadGenerator, arguments: object, fast: int) -> None:
        self.url = url
        self.target = Target.of_url(url, "minisgl")
        self._generator = generator
        self._fast = fast
        self._tokenizer = load_tokenizer(arguments.model)  # type: ignore[attr-defined]
        self._sessions = Workload("random", Lengths("16"), Lengths(str(NEW_TOKENS))).sessions(fast, self._tokenizer, 1)

    def stats(self) -> dict[str, int]:
        return delivery_bench.workers(self.url)["http-0"]["stats"]

    def mib(self) -> float:
        return delivery_bench.of_each_worker(self.url, delivery_bench.resident_mib)["http-0"]

    def serve_fast(self) -> Gaps:
        """Serve the fast readers: each must get its own answer, all of it."""
        records = self._generator.run(Load(self.target, self._sessions, self._fast)).records
        assert [record.problem for record in records] == [""] * self._fast
        answers = {record.token_ids: record.text for record in records}
        assert answers == dict(map(self._expected, self._sessions))
        gaps = [gap for record in records for gap in inter_token_gaps(record.arrivals)]
        return Gaps(percentile(gaps, 50), percentile(gaps, 99))

    def _expected(self, session: Session) -> tuple[tuple[int, ...], str]:
        """The made-up engine repeats the prompt."""
        prompt = self._tokenizer.encode(session.turns[0].text).ids
        token_ids = list(itertools.islice(itertools.cycle(prompt), NEW_TOKENS))
        return tuple(token_ids), self._tokenizer.decode(token_ids)


@contextlib.contextmanager
def slow_clients(target: Target, count: int) -> Iterator[list[socket.socket]]:
    """Clients that ask for a long answer and leave the reading to the test; every second one speaks OpenAI's wire.

    There the text that waits grows with each token, past the allowance before the answer is over.
    """
    body = json.dumps({"prompt": "Hello", "stream": True, "ignore_eos": True, "max_tokens": 6000}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: slow\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with delivery_bench.stalled_clients(target, count // 2) as clients, contextlib.ExitStack() as stack:
        others = [stack.enter_context(socket.socket()) for _ in range(count // 2)]
        for client in others:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.connect((target.host, target.port))
            client.sendall(head + body)
        yield [client for pair in zip(clients, others, strict=True) for client in pair]


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("slow", "fast", "slowdown", "rounds", "until_dropped"),
    [(48, 48, 1, 1, False), pytest.param(256, 256, 8, 3, True, marks=pytest.mark.long)],
    ids=["96 clients", "512 clients"],
)
def test_clients_that_do_not_read_cost_the_others_nothing_and_bounded_memory(
    slow: int, fast: int, slowdown: int, rounds: int, until_dropped: bool
) -> None:
    words = ["--slowdown", str(slowdown), "--server-args", "--max-running-requests 512 --max-total-tokens 4194304"]
    arguments = delivery_bench.make_parser().parse_args(words)
    with LoadGenerator(1) as generator, delivery_bench.paced_server(arguments) as url:
        bench = Bench(url, generator, arguments, fast)
        bench.serve_fast()
        quiet_mib = most_mib = bench.mib()
        alone, beside_readers, beside_slow = [], [], []
        for number in range(rounds):
            alone.append(bench.serve_fast())
            with slow_clients(bench.target, slow) as clients, reading(clients):
                until(lambda: bench.stats()["streams"] >= slow)
                beside_readers.append(bench.serve_fast())
            until(lambda: bench.stats()["streams"] == 0)
            with slow_clients(bench.target, slow) as clients, reading(clients[: slow // 2], trickle=True):
                until(lambda: bench.stats()["slow_clients"] >= slow * 0.9, 60)
                aborted = bench.stats()["aborted"]
                beside_slow.append(bench.serve_fast())
                assert bench.stats()["slow_clients"] >= slow / 2
                most_mib = max(most_mib, bench.mib())
                while until_dropped and number == rounds - 1 and bench.stats()["aborted"] < aborted + slow // 4:
                    bench.serve_fast()
                    most_mib = max(most_mib, bench.mib())
            until(lambda: bench.stats()["streams"] == 0)
        text_bytes = min(slow // 2 * MAX_PENDING_CHARS, MAX_HELD_BYTES)
        bound_mib = (1.25 * text_bytes + slow * CONNECTION_BYTES) / 2**20
        print(f"\nhttp: {quiet_mib:.0f} MiB quiet, {most_mib:.0f} MiB with {slow} slow clients")
        for name, gaps in (("alone", alone), ("beside readers", beside_readers), ("beside slow clients", beside_slow)):
            print(f"{name}: " + "; ".join(f"median {one.median:.2f}, p99 {one.p99:.2f} ms" for one in gaps))
        assert most_mib - quiet_mib < bound_mib

        # On a busy machine they differ by chance; held up by a slow client they would wait for ever.
        def best(gaps: list[Gaps]) -> Gaps:
            return Gaps(min(one.median for one in gaps), min(one.p99 for one in gaps))

        assert best(beside_slow).median < 2 * best(beside_readers).median + 10
        assert best(beside_slow).p99 < 3 * best(beside_readers).p99 + 100
