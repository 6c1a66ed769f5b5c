"""The radix tree alone: a model check against brute force, locking, eviction order."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from minisgl.scheduler_proc.prefix_cache import Node, PrefixCache

PAGE = 2
PROMPTS = st.lists(st.integers(0, 2), max_size=12)


class CacheMachine(RuleBasedStateMachine):
    """Drives the cache beside a plain dict of prefix -> page."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache(PAGE)
        self.model: dict[tuple[int, ...], int] = {}
        self.next_page = 0
        self.locks: list[tuple[Node, tuple[int, ...]]] = []

    def longest(self, tokens: list[int]) -> list[int]:
        pages = []
        for end in range(PAGE, len(tokens) + 1, PAGE):
            if tuple(tokens[:end]) not in self.model:
                break
            pages.append(self.model[tuple(tokens[:end])])
        return pages

    @rule(tokens=PROMPTS)
    def match_and_lock(self, tokens: list[int]) -> None:
        node, pages = self.cache.match(tokens)
        assert pages == self.longest(tokens)
        self.cache.lock(node)
        self.locks.append((node, tuple(tokens[: len(pages) * PAGE])))

    @rule(tokens=PROMPTS)
    def insert(self, tokens: list[int]) -> None:
        full = len(tokens) // PAGE
        shared = self.longest(tokens)
        fresh = list(range(self.next_page, self.next_page + full))
        self.next_page += full
        _, path = self.cache.insert(tokens, fresh)
        assert path == shared + fresh[len(shared) :]
        for index in range(len(shared), full):
            self.model[tuple(tokens[: (index + 1) * PAGE])] = fresh[index]

    @precondition(lambda self: self.locks)
    @rule(data=st.data(), tokens=PROMPTS)
    def insert_after_a_locked_node(self, data: st.DataObject, tokens: list[int]) -> None:
        """And move the lock there, as a prompt does that is computed chunk by chunk."""
        at = data.draw(st.integers(0, len(self.locks) - 1))
        locked, prefix = self.locks[at]
        whole, begin = [*prefix, *tokens], len(prefix) // PAGE
        full, shared = len(tokens) // PAGE, self.longest(whole)[begin:]
        fresh = list(range(self.next_page, self.next_page + full))
        self.next_page += full
        node, path = self.cache.insert(tokens, fresh, locked)
        assert path == shared + fresh[len(shared) :]
        for index in range(len(shared), full):
            self.model[tuple(whole[: (begin + index + 1) * PAGE])] = fresh[index]
        self.cache.lock(node, instead_of=locked)
        self.locks[at] = node, tuple(whole[: (begin + full) * PAGE])

    @precondition(lambda self: self.locks)
    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        node, _ = self.locks.pop(data.draw(st.integers(0, len(self.locks) - 1)))
        self.cache.unlock(node)

    @rule(count=st.integers(1, 8))
    def evict(self, count: int) -> None:
        evictable = self.cache.evictable_pages
        freed = self.cache.evict(count)
        assert len(freed) == min(count, evictable)
        gone = {prefix for prefix, page in self.model.items() if page in freed}
        for _, locked_prefix in self.locks:
            assert not any(locked_prefix[: len(prefix)] == prefix for prefix in gone)
        for prefix in gone:
            del self.model[prefix]
        for prefix in self.model:
            assert len(prefix) == PAGE or prefix[:-PAGE] in self.model, "a cached prefix has a hole"

    @invariant()
    def counts_agree(self) -> None:
        assert sorted(self.cache.pages()) == sorted(self.model.values())
        assert self.cache.cached_pages == len(self.model)
        locked = {prefix for prefix in self.model for _, path in self.locks if path[: len(prefix)] == prefix}
        assert self.cache.locked_pages == len(locked)


TestPrefixCache = CacheMachine.TestCase


def test_least_recently_used_leaf_goes_first() -> None:
    cache = PrefixCache(1)
    cache.insert([1, 2], [10, 11])
    cache.insert([1, 3], [10, 12])
    cache.match([1, 2])
    assert cache.evict(1) == [12]
    assert cache.evict(5) == [11, 10]


def test_a_prefix_is_used_as_lately_as_what_continues_it() -> None:
    cache = PrefixCache(1)
    node, _ = cache.insert([1], [10])
    cache.lock(node)
    cache.insert([2], [11])
    cache.unlock(node)
    cache.insert([3], [12], after=node)
    assert cache.evict(3) == [11, 12, 10]


def test_locked_paths_stay() -> None:
    cache = PrefixCache(1)
    cache.insert([1, 2, 3], [10, 11, 12])
    node, pages = cache.match([1, 2])
    assert pages == [10, 11]
    cache.lock(node)
    assert cache.evict(5) == [12]
    cache.unlock(node)
    assert cache.evict(5) == [11, 10]
