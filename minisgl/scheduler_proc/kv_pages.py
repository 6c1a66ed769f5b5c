"""KV pages: which are free, and when a released page may be used again. Numbers only; the memory is the engine's."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable


class KvAccountingError(Exception):
    """Pages were lost or are in two places at once: a bug in the scheduler."""


class KvPages:
    """The free list of `total` page ids, and the queue of released pages that a step in flight may still touch.

    A step that was launched reads and writes the pages in its plan until it completes, so a page is released *after a
    step* and comes back to the free list when that step has completed. Steps complete in the order of their numbers.

    Conservation law: free + retiring + cached + owned = total, where `cached` pages belong to the prefix cache and
    `owned` ones to running requests.
    """

    def __init__(self, total: int, page_size: int) -> None:
        self.total = total
        self.page_size = page_size
        self.retiring = 0
        self._never_taken = total
        self._free = list(range(total - 1, -1, -1))
        self._retire_queue: deque[tuple[int, list[int]]] = deque()
        self._completed_step = 0

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def taken_once(self) -> int:
        """How many pages have been in use so far: those with the lowest ids."""
        return self.total - self._never_taken

    def pages_for(self, tokens: int) -> int:
        """How many pages hold this many tokens."""
        return -(-tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages (at least 1) off the free list; the caller has checked that there are as many."""
        if count > len(self._free):
            raise KvAccountingError(f"{count} pages were asked for and {len(self._free)} are free")
        taken = self._free[-count:]
        del self._free[-count:]
        # Released pages lie on top of those that were never taken.
        self._never_taken = min(self._never_taken, len(self._free))
        taken.reverse()
        return taken

    def release(self, pages: list[int], after_step: int) -> None:
        """Give pages back; they are free again when `after_step` has completed."""
        if after_step <= self._completed_step:
            self._free.extend(reversed(pages))
        else:
            self._retire_queue.append((after_step, pages))
            self.retiring += len(pages)

    def complete(self, step: int) -> None:
        """Every step up to `step` has completed."""
        self._completed_step = step
        while self._retire_queue and self._retire_queue[0][0] <= step:
            pages = self._retire_queue.popleft()[1]
            self._free.extend(reversed(pages))
            self.retiring -= len(pages)

    def leaked(self, cached: int, owned: int) -> int:
        """By how much the conservation law is broken: 0, or the number of pages that are nowhere (below 0: twice)."""
        return self.total - self.free - self.retiring - cached - owned

    def check(self, cached: Iterable[int], owned: Iterable[int]) -> None:
        """Raise KvAccountingError unless every page is in exactly one place. O(total): for tests."""
        retiring = [page for _, pages in self._retire_queue for page in pages]
        everywhere = sorted([*self._free, *retiring, *cached, *owned])
        if everywhere != list(range(self.total)) or len(retiring) != self.retiring:
            raise KvAccountingError(f"pages found {everywhere}, {self.retiring} counted as retiring, of {self.total}")
