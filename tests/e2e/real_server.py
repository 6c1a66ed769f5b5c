"""The real stack as a user starts it (`python launch.py`), and clients that note exactly what they were sent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

REPOSITORY = Path(__file__).parents[2]
READY_SECONDS = 90.0
# One thread: a model this small gains nothing from two, and the test and the other processes need a core as well.
SETTINGS = ("--model", "demo", "--port", "0", "--device", "cpu", "--cpu-threads", "1", "--dtype", "float32")


class RealServer:
    """One `python launch.py`, its output in a file."""

    def __init__(self, log: Path, *settings: str) -> None:
        self._log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "launch.py", *SETTINGS, *settings],
                cwd=REPOSITORY,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.url = ""

    @property
    def pid(self) -> int:
        return self.process.pid

    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_ready(self) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, f"the launch ended:\n{self.output()}"
            return "The server is fired up and ready to roll!" in self.output()

        until(ready, READY_SECONDS)
        match = re.search(r"http://127\.0\.0\.1:\d+", self.output())
        assert match is not None
        self.url = match.group()

    def wait_exit(self, seconds: float = 30.0) -> int:
        return self.process.wait(seconds)

    def health(self) -> tuple[int, dict[str, Any]]:
        response = httpx.get(f"{self.url}/health", timeout=20)
        return response.status_code, response.json()

    def stats(self, worker: str) -> dict[str, Any]:
        stats: dict[str, Any] = self.health()[1]["workers"][worker]["stats"]
        return stats

    def worker_pids(self) -> dict[str, int]:
        return {name: worker["pid"] for name, worker in self.health()[1]["workers"].items()}

    def processes(self) -> list[psutil.Process]:
        """The launcher and all that descends from it."""
        launcher = psutil.Process(self.pid)
        return [launcher, *launcher.children(recursive=True)]

    def run_dirs(self) -> list[Path]:
        return list(Path(tempfile.gettempdir()).glob(f"minisgl-run-{self.pid}-*"))

    def end(self) -> None:
        """After a test, however it went: stop at once, by force if need be."""
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                self.process.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(0.3 if number is signal.SIGTERM else 10)


def until(condition: Callable[[], Any], seconds: float = 30.0) -> float:
    """Wait for a condition; returns how long it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() < started + seconds, "the condition did not come true in time"
        time.sleep(0.02)
    return time.monotonic() - started


def all_gone(processes: Sequence[psutil.Process]) -> bool:
    """Whether none of these runs any more; a zombie that nobody reaps (in a container without init) does not."""
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


# ---- clients --------------------------------------------------------------------------------------------------------


def chat(text: str, **fields: Any) -> dict[str, Any]:
    """A greedy request body."""
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_new_tokens": 64, **fields}


@dataclass
class Reply:
    """What one client was sent."""

    status: int = 0
    deltas: list[str] = field(default_factory=list)
    end: dict[str, Any] | None = None
    """The done or error event, or the body of a refusal."""
    broken: str = ""
    """How the connection failed, if it did."""
    finished_at: float = 0.0

    @property
    def text(self) -> str:
        return "".join(self.deltas)

    @property
    def complete(self) -> bool:
        return self.end is not None and self.end.get("event") == "done"

    @property
    def refused(self) -> bool:
        """An explicit error: an error status with a body, or an error event in the stream."""
        return self.end is not None and not self.complete


async def stream(client: httpx.AsyncClient, url: str, body: dict[str, Any], reply: Reply) -> None:
    """Send one streaming request and note its reply as it arrives."""
    try:
        async with client.stream("POST", f"{url}/generate", json={**body, "stream": True}) as response:
            reply.status = response.status_code
            if response.status_code != 200:
                reply.end = json.loads(await response.aread())
                return
            async for line in response.aiter_lines():
                event = json.loads(line)
                if "text_delta" in event:
                    reply.deltas.append(event["text_delta"])
                else:
                    reply.end = event
    except httpx.HTTPError as error:
        reply.broken = f"{type(error).__name__}: {error}"
    finally:
        reply.finished_at = time.monotonic()


def ask(url: str, body: dict[str, Any], seconds: float = 60.0) -> Reply:
    """One streaming request by itself."""

    async def alone() -> Reply:
        reply = Reply()
        async with httpx.AsyncClient(timeout=seconds) as client:
            await asyncio.wait_for(stream(client, url, body, reply), seconds)
        return reply

    return asyncio.run(alone())


class Crowd:
    """Streaming clients that run beside the test."""

    def __init__(self, url: str) -> None:
        self._url = url
        limits = httpx.Limits(max_connections=None)
        self._client = httpx.AsyncClient(timeout=60, limits=limits)
        self._tasks: list[asyncio.Task[None]] = []
        self.replies: list[Reply] = []

    def add(self, bodies: Sequence[dict[str, Any]]) -> None:
        for body in bodies:
            self.replies.append(Reply())
            self._tasks.append(asyncio.create_task(stream(self._client, self._url, body, self.replies[-1])))

    async def until_streaming(self, count: int) -> None:
        """Until that many have been sent text (or have ended)."""
        while sum(bool(reply.deltas) or reply.finished_at > 0 for reply in self.replies) < count:
            await asyncio.sleep(0.005)

    async def until_ended(self, count: int) -> None:
        while sum(reply.finished_at > 0 for reply in self.replies) < count:
            await asyncio.sleep(0.005)

    async def finish(self, seconds: float) -> None:
        """Wait for all to end; a client that is left hanging fails the test."""
        _, hanging = await asyncio.wait(self._tasks, timeout=seconds)
        assert not hanging, f"{len(hanging)} of {len(self._tasks)} clients were left hanging"
        await self._client.aclose()

    async def leave(self, count: int) -> None:
        """The first `count` clients hang up."""
        for task in self._tasks[:count]:
            task.cancel()
        await asyncio.gather(*self._tasks[:count], return_exceptions=True)


@dataclass
class HealthLog:
    """What GET /health said, in short intervals: (when asked, when answered, status or 0, problems)."""

    entries: list[tuple[float, float, int, list[str]]] = field(default_factory=list)

    async def watch(self, url: str) -> None:
        async with httpx.AsyncClient(timeout=5) as client:
            while True:
                asked = time.monotonic()
                try:
                    response = await client.get(f"{url}/health")
                    status, problems = response.status_code, response.json()["problems"]
                except httpx.HTTPError:
                    status, problems = 0, []
                self.entries.append((asked, time.monotonic(), status, problems))
                await asyncio.sleep(0.03)

    async def until_bad(self, since: float) -> None:
        """Until the trouble that began at `since` has been seen."""
        while not any(answered > since and status != 200 for _, answered, status, _ in self.entries):
            await asyncio.sleep(0.02)

    async def until_bad_then_good(self, since: float) -> None:
        """Until the trouble that began at `since` has been seen and is over."""
        await self.until_bad(since)
        while self.entries[-1][2] != 200:
            await asyncio.sleep(0.02)

    def first_bad(self, since: float) -> tuple[float, list[str]]:
        """How long after `since` there was first another answer than 200 or none, and the problems it named."""
        for _, answered, status, problems in self.entries:
            if answered > since and status != 200:
                return answered - since, problems
        raise AssertionError("/health never said that anything was wrong")


def starting(log: Path, *settings: str) -> Iterator[RealServer]:
    """A started server for a fixture; ended with it if it still runs."""
    server = RealServer(log, *settings)
    try:
        yield server
    finally:
        server.end()


def send_signal(pid: int, number: signal.Signals) -> float:
    """Signal a process; returns when."""
    os.kill(pid, number)
    return time.monotonic()
