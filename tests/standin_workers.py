"""Tiny workers for the supervisor's tests: real processes on the real control channel that misbehave on demand.

A stand-in reads its orders from files in the model directory, named `<worker>.<order>`:
    raise, exit   at load: raise RuntimeError(text) or end with this status (negative: kill itself by that signal)
    slow          at load: never become ready
    stuck         while serving: the main loop does not come round while the file is there
    stats         while serving: JSON to report as worker.stats
    calm          while serving: wait for messages and for nothing else, as the real ones do
It writes what it is told to `<worker>.<epoch>.seen`, one JSON array a line.
"""

from __future__ import annotations

import json
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socket
from typing import Any

from minisgl.config import WorkerSpec
from minisgl.messages import Drain, Health, Shutdown, WorkerDown, WorkerUp
from minisgl.worker import IDLE_MS, PROCESS_KINDS, Worker, run_worker


def run_standin(packed_spec: bytes, life_line: Connection, pulse: socket, listen_socket: socket | None = None) -> None:
    """The entry point given to LocalLauncher."""
    PROCESS_KINDS[WorkerSpec.unpack(packed_spec).kind] = "standin_workers"
    run_worker(packed_spec, life_line, pulse, listen_socket)


def main(worker: Worker) -> None:
    inbox = worker.open_inbox(Health, Drain)
    orders = Path(worker.spec.model.directory)
    name = worker.spec.name
    worker.progress("loading", 1, 2)
    if (text := read(orders / f"{name}.raise")) is not None:
        raise RuntimeError(text)
    if (status := read(orders / f"{name}.exit")) is not None:
        if int(status) < 0:
            os.kill(os.getpid(), -int(status))
        os._exit(int(status))
    while (orders / f"{name}.slow").exists():
        time.sleep(0.05)
    worker.ready({"device": "none"})
    with (orders / f"{name}.{worker.spec.epoch}.seen").open("w") as seen:
        while True:
            while (orders / f"{name}.stuck").exists():
                time.sleep(0.05)
            worker.tick()
            worker.stats.update(json.loads(read(orders / f"{name}.stats") or "{}"))
            worker.wait(IDLE_MS if (orders / f"{name}.calm").exists() else 200)
            for message in (*worker.health_reports(), *inbox.drain()):
                seen.write(json.dumps([type(message).__name__, *message.pack(), time.monotonic()]) + "\n")
                seen.flush()
                worker.stats["draining"] = worker.stats.get("draining", False) or isinstance(message, Drain)
                if isinstance(message, Shutdown):
                    return


def read(path: Path) -> str | None:
    return path.read_text() if path.exists() else None


def seen(orders: Path, worker: str, epoch: int, *kinds: type[Any]) -> list[list[Any]]:
    """What one life of a stand-in was told so far: [message type, *fields, when]."""
    text = read(orders / f"{worker}.{epoch}.seen") or ""
    names = {kind.__name__ for kind in kinds or (WorkerUp, WorkerDown, Health, Drain, Shutdown)}
    lines = [json.loads(line) for line in text.splitlines() if line.endswith("]")]
    return [line for line in lines if line[0] in names]
