"""The prefix cache: which KV pages hold which token prefixes, as a radix tree with one node per full page.

A node's path from the root spells a token prefix; its page holds the keys and values of the last page_size tokens of
that prefix, which depend on the whole prefix and on nothing else. Requests that share a prefix share its pages.

Ownership of a page: a page is *owned* by a running request, or *cached* (it belongs to a node here), or free. A request
that uses cached pages locks the deepest node it uses; a locked node and all its ancestors are never evicted. Only
leaves are evicted, least recently used first, so a cached prefix never has a hole.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class Node:
    """One cached page. `users` counts the locks on this node and on everything below it."""

    key: tuple[int, ...]
    page: int
    parent: Node | None
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)
    users: int = 0
    last_used: int = 0


class PrefixCache:
    """Longest-prefix lookup over pages of `page_size` tokens, with locking and LRU eviction.

    Attributes:
        cached_pages: pages that belong to the tree.
        locked_pages: those of them that eviction may not take now.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.cached_pages = 0
        self.locked_pages = 0
        self._root = Node((), -1, None)
        self._clock = 0
        self._leaves: list[tuple[int, int, Node]] = []
        """Eviction candidates as a heap; an entry whose node changed since it was pushed is stale and skipped."""

    @property
    def evictable_pages(self) -> int:
        return self.cached_pages - self.locked_pages

    def match(self, token_ids: Sequence[int]) -> tuple[Node, list[int]]:
        """The deepest node whose prefix starts `token_ids`, and its path's pages in position order.

        The caller locks the node before anything else may evict.
        """
        node, pages = self._root, list[int]()
        self._clock += 1
        size = self.page_size
        for start in range(0, len(token_ids) - size + 1, size):
            child = node.children.get(tuple(token_ids[start : start + size]))
            if child is None:
                break
            child.last_used = self._clock
            pages.append(child.page)
            node = child
        if node is not self._root:
            self._offer(node)
        return node, pages

    def insert(
        self, token_ids: Sequence[int], pages: Sequence[int], after: Node | None = None
    ) -> tuple[Node, list[int]]:
        """Hand the full pages of a computed prefix, or of its continuation, over to the cache.

        Args:
            token_ids: tokens whose keys and values are computed; a tail shorter than a page is left out.
            pages: the request's pages in position order, covering at least the full pages of token_ids.
            after: the node that they continue, locked by the caller; None where they begin a prefix.

        Returns:
            The deepest node, and the cached pages of token_ids in position order. Where such a page is not the one
            given, the same content was cached already, and the one given stays the caller's.
        """
        node, path = after or self._root, list[int]()
        self._clock += 1
        size = self.page_size
        for index in range(len(token_ids) // size):
            key = tuple(token_ids[index * size : (index + 1) * size])
            child = node.children.get(key)
            if child is None:
                child = Node(key, pages[index], node)
                node.children[key] = child
                self.cached_pages += 1
            child.last_used = self._clock
            path.append(child.page)
            node = child
        if node is not self._root:
            self._offer(node)
        return node, path

    def lock(self, node: Node, instead_of: Node | None = None) -> None:
        """Protect a node's whole path from eviction until the matching unlock.

        Args:
            instead_of: a node on that path which is locked already; its lock becomes this one.
        """
        step: Node | None = node
        while step is not None and step is not self._root and step is not instead_of:
            step.users += 1
            self.locked_pages += step.users == 1
            step = step.parent

    def unlock(self, node: Node) -> None:
        step: Node | None = node
        while step is not None and step is not self._root:
            step.users -= 1
            self.locked_pages -= step.users == 0
            step = step.parent
        self._offer(node)

    def evict(self, count: int) -> list[int]:
        """Forget up to `count` of the least recently used unlocked pages and return them, now the caller's to free."""
        freed: list[int] = []
        while len(freed) < count and self._leaves:
            last_used, _, node = heapq.heappop(self._leaves)
            if node.parent is None or node.children or node.users or node.last_used != last_used:
                continue
            parent = node.parent
            # Using a prefix is using all of it; a continuation is inserted without a look at what is before it.
            parent.last_used = max(parent.last_used, last_used)
            del parent.children[node.key]
            node.parent = None
            freed.append(node.page)
            self.cached_pages -= 1
            if parent is not self._root:
                self._offer(parent)
        return freed

    def pages(self) -> list[int]:
        """Every cached page, for the conservation check."""
        found: list[int] = []
        stack = list(self._root.children.values())
        while stack:
            node = stack.pop()
            found.append(node.page)
            stack.extend(node.children.values())
        return found

    def _offer(self, node: Node) -> None:
        """Make a node an eviction candidate if it is one now; each change that can make it one calls this again."""
        if node is self._root or node.children or node.users or node.parent is None:
            return
        if len(self._leaves) > 4 * self.cached_pages + 64:
            live = {entry[2]: entry for entry in self._leaves if entry[0] == entry[2].last_used and entry[2].parent}
            self._leaves = list(live.values())
            heapq.heapify(self._leaves)
        heapq.heappush(self._leaves, (node.last_used, id(node), node))
