"""Slow readers beside fast ones on the real stack with a made-up engine: they cost bounded memory and no time."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections.abc import Iterator

import delivery_bench
import pytest
from benchlib.client import Target
from benchlib.load import Load, LoadGenerator
from benchlib.servers import get_json
from benchlib.stats import inter_token_gaps, percentile
from benchlib.workloads import Lengths, Workload, load_tokenizer
from real_server import until

from minisgl.http.writer import MAX_PENDING_CHARS

SLOW, FAST = 96, 32


@contextlib.contextmanager
def read_all(sockets: list[socket.socket]) -> Iterator[None]:
    """Read whatever comes, in a thread."""
    over = threading.Event()

    def read() -> None:
        with selectors.DefaultSelector() as ready:
            for client in sockets:
                ready.register(client, selectors.EVENT_READ)
            while not over.is_set() and ready.get_map():
                for key, _ in ready.select(0.1):
                    if not key.fileobj.recv(2**16):  # type: ignore[union-attr]
                        ready.unregister(key.fileobj)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield
    finally:
        over.set()
        reader.join()


@pytest.mark.timeout(180)
def test_clients_that_do_not_read_cost_the_others_nothing_and_bounded_memory() -> None:
    arguments = delivery_bench.make_parser().parse_args([])
    sessions = Workload("random", Lengths("16"), Lengths("96")).sessions(
        2 * FAST, load_tokenizer(arguments.model), seed=1
    )
    with LoadGenerator(1) as generator, delivery_bench.paced_server(arguments) as url:
        target = Target.of_url(url, "minisgl")

        def http_stats() -> dict[str, int]:
            return (get_json(f"{url}/health") or {})["workers"]["http-0"]["stats"]

        def worst_gap() -> float:
            """Milliseconds between tokens at the 99th percentile of the fast readers, all of whom must be served."""
            result = generator.run(Load(target, sessions, FAST))
            assert not any(record.problem for record in result.records)
            return percentile([gap for record in result.records for gap in inter_token_gaps(record.arrivals)], 99)

        def http_mib() -> float:
            return delivery_bench.of_each_worker(url, delivery_bench.resident_mib)["http-0"]

        worst_gap()
        quiet_mib = http_mib()
        with delivery_bench.stalled_clients(target, SLOW) as sockets, read_all(sockets):
            until(lambda: http_stats()["streams"] >= SLOW)
            beside_readers = worst_gap()
        until(lambda: http_stats()["streams"] == 0)
        with delivery_bench.stalled_clients(target, SLOW):
            until(lambda: http_stats()["slow_clients"] >= SLOW // 2, 30)
            beside_stalled = worst_gap()
            assert http_stats()["slow_clients"] >= SLOW // 2
            assert http_mib() - quiet_mib < SLOW * MAX_PENDING_CHARS * 1.5 / 2**20
        # On a busy machine the two can differ by chance; held up by a stalled one they would wait for ever.
        assert beside_stalled < 3 * beside_readers + 100
        until(lambda: http_stats()["slow_clients"] == 0)
