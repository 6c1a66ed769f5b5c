"""The other http workers of this server, for what a client asks of one of them and means of all."""

from __future__ import annotations

from minisgl.channels import Peers
from minisgl.config import WorkerSpec
from minisgl.messages import AbortNamed, WorkerDown, WorkerUp


class Neighbours:
    """One-way pipes to the other http workers that are up."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._index = spec.index
        self._peers = Peers("http", spec.config.http_workers)

    def abort_named(self, name: str | None) -> None:
        """Have them abort the requests that clients know by this name (None: all).

        One that is just starting has no requests, and must not be told later, when it has others.
        """
        for index in self._peers.alive():
            if index != self._index:
                self._peers.send(index, AbortNamed(name or ""))

    def worker_up(self, message: WorkerUp) -> None:
        self._peers.up(message)

    def worker_down(self, message: WorkerDown) -> None:
        self._peers.down(message.worker, message.epoch)

    def close(self) -> None:
        self._peers.close()
