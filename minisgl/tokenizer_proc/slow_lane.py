"""A thread for long texts, so that short ones are not stuck behind them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


class SlowLane:
    """Does one piece of work after the other in a thread of its own (the tokenizer releases the interpreter lock)."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[int, Callable[[], Any]]] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self.requests: dict[int, Callable[[Any], None]] = {}
        """What takes the result, by request id; until `finished` hands it over or `cancel` takes it out."""
        threading.Thread(target=self._run, name="slow-lane", daemon=True).start()

    def submit(self, rid: int, work: Callable[[], T], deliver: Callable[[T], None]) -> None:
        """Have `work` done for a request; `finished` then hands out `deliver` with its result."""
        self.requests[rid] = deliver
        self._jobs.put((rid, work))

    def cancel(self, rid: int) -> bool:
        """Forget a request; False if it is not in this lane."""
        return self.requests.pop(rid, None) is not None

    def finished(self) -> Iterator[tuple[int, Callable[[Any], None], Any]]:
        """(rid, deliver, result or what went wrong) of each request that is done, once. Never blocks."""
        while not self._results.empty():
            rid, result = self._results.get()
            deliver = self.requests.pop(rid, None)
            if deliver is not None:
                yield rid, deliver, result

    def _run(self) -> None:
        while True:
            rid, work = self._jobs.get()
            if rid not in self.requests:
                continue
            try:
                result = work()
            except BaseException as error:  # a panic of the native library is no Exception
                result = error
            self._results.put((rid, result))
