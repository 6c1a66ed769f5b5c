"""What became of every generation request: counters that always balance, and one log line a request.

At any moment `received` equals the sum of the outcomes plus the requests in flight.
"""

from __future__ import annotations

import logging

from minisgl.messages import JsonObject
from minisgl.timeline import now

logger = logging.getLogger(__name__)

OUTCOMES = ("ok", "client_error", "rejected", "aborted", "failed")
"""ok: answered in full. client_error: refused with a 4xx. rejected: 503, server full or draining. aborted: the client
left, did not read, or the scheduler aborted the request. failed: any other error."""


class Accounts:
    """Counts generation requests and how they ended."""

    def __init__(self) -> None:
        self.received = 0
        self.outcomes = dict.fromkeys(OUTCOMES, 0)

    @property
    def in_flight(self) -> int:
        return self.received - sum(self.outcomes.values())

    def snapshot(self) -> JsonObject:
        return {"requests_total": self.received, "in_flight": self.in_flight, **self.outcomes}


class Call:
    """One generation request as the client sees it, from its arrival to its one outcome."""

    def __init__(self, accounts: Accounts, request_id: str, received_ns: int) -> None:
        self.request_id = request_id
        self.received_ns = received_ns
        self._accounts = accounts
        self._ended = False
        accounts.received += 1

    def end(self, outcome: str, detail: str) -> None:
        """Count and log the outcome; only the first call does."""
        if self._ended:
            return
        self._ended = True
        self._accounts.outcomes[outcome] += 1
        total_ms = (now() - self.received_ns) / 1e6
        logger.info("%s %s %s total=%.1fms", self.request_id, outcome, detail, total_ms)
