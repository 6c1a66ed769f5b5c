"""What GET /health answers: the supervisor's last word, and how old it is."""

from __future__ import annotations

import time

from minisgl.messages import Health, JsonObject

STALE_SECONDS = 1.0


class HealthView:
    """The supervisor sends Health several times a second; its silence is itself a problem."""

    def __init__(self) -> None:
        self._last: Health | None = None
        self._heard_at = 0.0

    def take(self, message: Health) -> None:
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

    def workers(self) -> JsonObject:
        return self._last.workers if self._last is not None else {}
