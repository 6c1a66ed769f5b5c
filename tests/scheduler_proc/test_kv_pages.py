"""The page allocator alone: conservation, and no page is handed out while a step in flight may use it."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from minisgl.scheduler_proc.kv_pages import KvAccountingError, KvPages

TOTAL = 10


class PagesMachine(RuleBasedStateMachine):
    """Allocates, releases after some step, completes steps in order."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = KvPages(TOTAL, page_size=4)
        self.owned: list[list[int]] = []
        self.released: list[tuple[int, list[int]]] = []
        self.planned = self.completed = 0
        self.ever_taken: set[int] = set()

    @rule(count=st.integers(1, TOTAL))
    def allocate(self, count: int) -> None:
        if count > self.pages.free:
            with pytest.raises(KvAccountingError):
                self.pages.allocate(count)
            return
        taken = self.pages.allocate(count)
        assert len(taken) == count
        self.ever_taken.update(taken)
        assert self.ever_taken == set(range(self.pages.taken_once)), "those taken once are those with the lowest ids"
        in_use = {page for step, pages in self.released if step > self.completed for page in pages}
        assert not in_use & set(taken), "a step in flight still uses this page"
        self.owned.append(taken)

    @rule()
    def plan_step(self) -> None:
        self.planned += 1

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        pages = self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1)))
        self.pages.release(pages, self.planned)
        self.released.append((self.planned, pages))

    @precondition(lambda self: self.completed < self.planned)
    @rule()
    def complete_step(self) -> None:
        self.completed += 1
        self.pages.complete(self.completed)

    @invariant()
    def every_page_is_in_one_place(self) -> None:
        owned = [page for pages in self.owned for page in pages]
        self.pages.check(cached=(), owned=owned)
        assert self.pages.leaked(cached=0, owned=len(owned)) == 0
        waiting = sum(len(pages) for step, pages in self.released if step > self.completed)
        assert self.pages.retiring == waiting


TestKvPages = PagesMachine.TestCase


def test_release_without_a_step_in_flight_is_immediate() -> None:
    pages = KvPages(4, page_size=16)
    taken = pages.allocate(3)
    assert (pages.free, taken) == (1, [0, 1, 2])
    pages.release(taken, after_step=0)
    assert (pages.free, pages.retiring) == (4, 0)
    assert pages.allocate(4) == [0, 1, 2, 3]


def test_release_waits_for_its_step() -> None:
    pages = KvPages(2, page_size=16)
    pages.release(pages.allocate(2), after_step=2)
    pages.complete(1)
    assert (pages.free, pages.retiring) == (0, 2)
    pages.complete(2)
    assert (pages.free, pages.retiring) == (2, 0)


def test_a_lost_page_and_a_page_in_two_places_are_found() -> None:
    pages = KvPages(3, page_size=16)
    taken = pages.allocate(2)
    assert pages.leaked(cached=0, owned=1) == 1
    with pytest.raises(KvAccountingError):
        pages.check(cached=(), owned=taken[:1])
    with pytest.raises(KvAccountingError):
        pages.check(cached=taken[:1], owned=taken)


def test_pages_for_rounds_up() -> None:
    pages = KvPages(3, page_size=16)
    assert [pages.pages_for(tokens) for tokens in (1, 16, 17, 32)] == [1, 1, 2, 2]
