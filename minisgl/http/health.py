"""What GET /health answers: the supervisor's last word, and how old it is."""

from __future__ import annotations

import time

from minisgl.messages import Health, JsonObject

STALE_SECONDS = 1.0


class HealthView:
    """The supervisor sends Health twice a second; its silence is itself a problem.

    Attributes:
        figures: those of the other http workers, where there are several; they are for GET /metrics alone.
    """

    def __init__(self) -> None:
        self.figures: dict[str, JsonObject] = {}
        self._last: Health | None = None
        self._heard_at = 0.0

    def take(self, message: Health) -> None:
        self.figures = {
            name: worker["stats"].pop("figures")
            for name, worker in message.workers.items()
            if "figures" in worker.get("stats", {})
        }
        self._last = message
        self._heard_at = time.monotonic()

    def problems(self) -> list[str]:
        """One sentence each; empty when the server can serve."""
        if self._last is None:
            return ["the supervisor has not reported yet"]
        silence = time.monotonic() - self._heard_at
        if silence > STALE_SECONDS:
            return [f"the supervisor has been silent for {silence:.1f} s", *self._last.problems]
        return self._last.problems

    def streams_of_others(self, name: str) -> int:
        """Requests that http workers other than `name` had in flight when they last told."""
        others = (entry for other, entry in self.workers().items() if other.startswith("http-") and other != name)
        return sum(entry.get("stats", {}).get("streams", 0) for entry in others)

    def workers(self) -> JsonObject:
        return self._last.workers if self._last is not None else {}
