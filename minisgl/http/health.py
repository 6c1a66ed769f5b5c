"""What GET /health answers: the supervisor's last word, and how old it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from minisgl.messages import Health, JsonObject

STALE_SECONDS = 1.0


class HealthView:
    """The supervisor tells news at once, and several times a second that there are none, unless all processes rest.

    Its silence is itself a problem.

    Args:
        waiting: what it has left since the last call. Each question here begins with it.

    Attributes:
        figures: those of the other http workers, where there are several, as of the last question; they are for
            GET /metrics alone.
    """

    def __init__(self, waiting: Callable[[], Iterable[Health]]) -> None:
        self._waiting = waiting
        self.figures: dict[str, JsonObject] = {}
        self._last: Health | None = None
        self._awake_since_ns = 0

    def take(self, message: Health) -> None:
        if self._last is not None and message.sent_ns < self._last.sent_ns:
            return
        self.figures = {
            name: worker["stats"].pop("figures")
            for name, worker in message.workers.items()
            if "figures" in worker.get("stats", {})
        }
        self._last = message

    def problems(self) -> list[str]:
        """One sentence each; empty when the server can serve."""
        self.catch_up()
        if self._last is None:
            return ["the supervisor has not reported yet"]
        silence = (time.monotonic_ns() - max(self._last.sent_ns, self._awake_since_ns)) / 1e9
        if silence > STALE_SECONDS:
            return [f"the supervisor has been silent for {silence:.1f} s", *self._last.problems]
        return self._last.problems

    def streams_of_others(self, name: str) -> int:
        """Requests that http workers other than `name` had in flight when they last told."""
        others = (entry for other, entry in self.workers().items() if other.startswith("http-") and other != name)
        return sum(entry.get("stats", {}).get("streams", 0) for entry in others)

    def workers(self) -> JsonObject:
        self.catch_up()
        return self._last.workers if self._last is not None else {}

    def awake(self) -> None:
        """This process ends its rest, and so does the supervisor: its words are to be expected from now on."""
        self._awake_since_ns = time.monotonic_ns()

    def may_rest(self) -> bool:
        """Whether this process may rest: not when it is the supervisor that is not there."""
        self.catch_up()
        return self._last is not None and time.monotonic_ns() - self._last.sent_ns < STALE_SECONDS * 1e9

    def catch_up(self) -> None:
        """Take what the supervisor has left."""
        for message in self._waiting():
            self.take(message)
