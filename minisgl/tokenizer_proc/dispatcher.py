"""The way from the tokenizer to the replicas: who is up, who takes a request, who has been given what."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from minisgl import timeline
from minisgl.channels import Peers
from minisgl.messages import (
    AbortRequest,
    Dispatched,
    FlushCache,
    TokenizedRequest,
    WorkerDown,
    WorkerUp,
    http_worker_of,
)
from minisgl.tokenizer_proc.router import Router


class Dispatcher:
    """Sends each request to one living replica, and holds requests while there is none."""

    def __init__(self, replicas: int, router: Router) -> None:
        self.held: dict[int, TokenizedRequest] = {}
        """Requests by id, in arrival order, that wait for a replica to come up."""
        self._schedulers = Peers("scheduler", replicas)
        self._router = router
        self._sent: defaultdict[tuple[int, int, int], list[int]] = defaultdict(list)

    def dispatch(self, request: TokenizedRequest) -> None:
        """Send a request to a replica now, or as soon as one is up."""
        alive = self._schedulers.alive()
        if not alive:
            self.held[request.rid] = request
            return
        replica = self._router.choose(request, alive)
        request.stamps.append(timeline.now())
        self._schedulers.send(replica, request)
        http_index, _ = http_worker_of(request.rid)
        self._sent[http_index, replica, self._schedulers.epochs[replica]].append(request.rid)

    def withdraw(self, rid: int) -> bool:
        """Forget a held request; False if it is not held (any more)."""
        return self.held.pop(rid, None) is not None

    def abort(self, message: AbortRequest) -> None:
        """Tell every replica: which one has the request is not remembered here, and the others ignore it."""
        for replica in self._schedulers.alive():
            self._schedulers.send(replica, message)

    def flush_caches(self, message: FlushCache) -> None:
        """Tell every replica, those that are just starting as soon as they are up."""
        for replica in range(len(self._schedulers.names)):
            self._schedulers.send(replica, message)

    def take_announcements(self) -> Iterator[tuple[int, Dispatched]]:
        """(http worker, message) for what was sent since the last call."""
        sent, self._sent = self._sent, defaultdict(list)
        for (http_index, replica, epoch), rids in sent.items():
            yield http_index, Dispatched(replica, epoch, rids)

    def up(self, message: WorkerUp) -> None:
        if self._schedulers.up(message) is None:
            return
        held, self.held = self.held, {}
        for request in held.values():
            self.dispatch(request)

    def down(self, message: WorkerDown) -> None:
        # What had been sent to the dead replica is http's to replay: it knows from Dispatched.
        self._schedulers.down(message.worker, message.epoch)

    def close(self) -> None:
        self._schedulers.close()
