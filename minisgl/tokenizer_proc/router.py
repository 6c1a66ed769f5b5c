"""Which replica takes the next request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from minisgl.messages import TokenizedRequest


class Router(Protocol):
    """A load-balancing policy. It sees every request once, in dispatch order."""

    def choose(self, request: TokenizedRequest, alive: Sequence[int]) -> int:
        """One of `alive`: the indices of the replicas that are up, ascending, at least one."""


class RoundRobin:
    """Each replica in turn, passing over those that are down.

    Args:
        first: where to begin, so that several tokenizer processes do not all begin with replica 0.
    """

    def __init__(self, first: int = 0) -> None:
        self._next = first

    def choose(self, request: TokenizedRequest, alive: Sequence[int]) -> int:
        chosen = next((index for index in alive if index >= self._next), alive[0])
        self._next = chosen + 1
        return chosen


def make_router(load_balance_method: str, first: int) -> Router:
    """The policy of a --load-balance-method."""
    return {"round_robin": RoundRobin}[load_balance_method](first)
