"""What becomes of the requests in flight when a worker dies: pure rules, carried out by streaming.py.

The promise to the client: a request that has shown it nothing is done again, under a new request id and with the same
seed, at most MAX_REPLAYS times; one whose text has begun ends with an explicit error, since two runs must never be
spliced. Whatever a dead or abandoned run still sends carries an id that nobody knows any more, and is ignored.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

MAX_REPLAYS = 2


class Fate(enum.Enum):
    """What happens to one request after a death."""

    KEEP = "keep"
    """It is not affected."""
    REPLAY = "replay"
    """Send it again under a new id."""
    FAIL = "fail"
    """End it with the error worker_lost."""
    FORGET = "forget"
    """It was being aborted, and nobody is left who could acknowledge that."""


@dataclass(frozen=True)
class Verdict:
    """`abort`: first send an Abort for the present id, since another process may still be working on it."""

    fate: Fate
    abort: bool = False


@dataclass(eq=False, slots=True)
class Flight:
    """What the rules need to know of a request.

    Attributes:
        rid: its present id on the ring.
        replica: (index, epoch) of the scheduler that has it; None until the tokenizer has said so.
        shown: the client has been given some of the answer.
        aborting: the client is gone; an Abort is on its way and the terminal row will acknowledge it.
        replays: how often it has been sent again.
    """

    rid: int = 0
    replica: tuple[int, int] | None = None
    shown: bool = False
    aborting: bool = False
    replays: int = 0


class WorkerLives:
    """Which life (epoch) of every worker is up, as far as this process has been told."""

    def __init__(self) -> None:
        self._up: dict[str, int] = {}
        self._last_dead: dict[str, int] = {}

    def up(self, worker: str, epoch: int) -> None:
        if not self.is_dead(worker, epoch):
            self._up[worker] = epoch

    def down(self, worker: str, epoch: int) -> bool:
        """Note a death. True when that life was up: one that died while starting never held a request."""
        self._last_dead[worker] = max(epoch, self._last_dead.get(worker, 0))
        if self._up.get(worker) != epoch:
            return False
        del self._up[worker]
        return True

    def is_dead(self, worker: str, epoch: int) -> bool:
        return epoch <= self._last_dead.get(worker, 0)


def scheduler_died(flight: Flight) -> Verdict:
    """For a request that was dispatched to the dead scheduler life."""
    if flight.aborting:
        return Verdict(Fate.FORGET)
    return Verdict(_again_or_fail(flight))


def tokenizer_died(flight: Flight) -> Verdict:
    """For a request that was sent through the dead tokenizer.

    One not yet reported as dispatched may have died with it or have just been passed on, so it is aborted as well as
    sent again. An Abort that has not been acknowledged may have died with it, so it is sent again too.
    """
    if flight.replica is not None:
        return Verdict(Fate.KEEP, abort=flight.aborting)
    if flight.aborting:
        return Verdict(Fate.FORGET, abort=True)
    return Verdict(_again_or_fail(flight), abort=True)


def detokenizer_died(flight: Flight) -> Verdict:
    """For a request whose rows go through the dead detokenizer: some are lost, so this run of it is of no use."""
    if flight.aborting:
        return Verdict(Fate.FORGET)
    return Verdict(_again_or_fail(flight), abort=True)


def _again_or_fail(flight: Flight) -> Fate:
    return Fate.FAIL if flight.shown or flight.replays >= MAX_REPLAYS else Fate.REPLAY
