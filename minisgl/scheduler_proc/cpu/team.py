"""The threads that run a compiled step together, and how they wait for each other and share out work."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from minisgl.scheduler_proc.cpu.compiler import inlined
from minisgl.scheduler_proc.cpu.intrinsics import atomic_add, atomic_load, pause, sleep_while_equal, wake_sleepers

Job: TypeAlias = Callable[[int], None]

_SPINS = 200
"""Turns of a waiting loop, about 10 microseconds, before a thread sleeps. Whoever is late may have lost its core to
another process; a core that falls idle is what the system gives it."""
_LINE = 64
"""Bytes of a cache line; counters have one each."""


def counters(phases: int) -> npt.NDArray[np.int64]:
    """What the threads of a step of so many phases count: arrivals and sleepers, then the items taken of each phase."""
    return np.zeros((phases + 1) * _LINE // 8, np.int64)


@inlined
def take(counts, phase):
    """The next item of a phase that no thread has taken yet; whoever is held up takes fewer."""
    return atomic_add(counts + _LINE * (phase + 1), 1)


@inlined
def take_run(counts, phase, threads, items):
    """Some of the items that no thread has taken yet, the first and the one after the last; equal if none are left.

    They are a share of what is left, so that each thread mostly reads on where it is and all are done together.
    """
    place = counts + _LINE * (phase + 1)
    count = max((items - atomic_load(place)) // (2 * threads), 1)
    begin = atomic_add(place, count)
    return begin, min(begin + count, items)


@inlined
def wait_for_all(counts, threads, phase):
    """Wait until all threads are through with a phase; returns the next one's number."""
    everyone, sleepers = threads * (phase + 1), counts + 8
    if threads > 1:
        if atomic_add(counts, 1) + 1 == everyone:
            if atomic_load(sleepers) > 0:
                wake_sleepers(counts)
        else:
            spins = 0
            arrived = atomic_load(counts)
            while arrived < everyone:
                if spins < _SPINS:
                    pause()
                else:
                    atomic_add(sleepers, 1)
                    sleep_while_equal(counts, arrived)
                    atomic_add(sleepers, -1)
                spins += 1
                arrived = atomic_load(counts)
    return phase + 1


class Team:
    """Threads that live as long as the process; the caller is the first of them."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._jobs: list[queue.SimpleQueue[Job]] = [queue.SimpleQueue() for _ in range(threads - 1)]
        self._results: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        for index, jobs in enumerate(self._jobs, 1):
            threading.Thread(target=self._work, args=(index, jobs), name=f"cpu-step-{index}", daemon=True).start()

    def run(self, job: Job, threads: int) -> None:
        """Call job(thread index) in so many threads, and return when all have; raises what one of them raised."""
        others = self._jobs[: threads - 1]
        for jobs in others:
            jobs.put(job)
        errors = [_attempt(job, 0), *(self._results.get() for _ in others)]
        for error in errors:
            if error is not None:
                raise error

    def _work(self, index: int, jobs: queue.SimpleQueue[Job]) -> None:
        while True:
            self._results.put(_attempt(jobs.get(), index))


def _attempt(job: Job, index: int) -> BaseException | None:
    """What a share raised, if it did."""
    try:
        job(index)
    except BaseException as error:
        return error
    return None
