"""What the supervisor knows of one worker: its state, its signs of life, and when it is to be restarted."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from minisgl.channels import Outbox
from minisgl.config import ServerConfig
from minisgl.launcher import WorkerProcess
from minisgl.messages import Failed, JsonObject
from minisgl.worker import REST_SECONDS

MAX_DEATHS = 5
DEATH_WINDOW_SECONDS = 60.0
"""A worker that dies MAX_DEATHS times within this window is beyond help."""
SILENCE_SECONDS = 0.7
"""Heartbeats come each 0.4 s; without one for this long the worker is reported."""
STALL_SECONDS = 2.0
"""A main loop that has not come round for this long is reported."""
SCHEDULER_STALL_FRACTION = 0.1
"""Of --watchdog-timeout: a scheduler's step may be a long prefill, so its loop is reported after this much."""


class State(str, enum.Enum):
    """STARTING -> READY -> DEAD (waits for its back-off) -> RESTARTING -> READY."""

    STARTING = "starting"
    READY = "ready"
    DEAD = "dead"
    RESTARTING = "restarting"


@dataclass(frozen=True)
class Limits:
    """How long (seconds) one kind of worker may be silent, or its main loop away, before it is reported or killed."""

    silence: float
    silence_fatal: float
    stall: float
    stall_fatal: float

    @classmethod
    def of(cls, kind: str, config: ServerConfig) -> Limits:
        if kind == "scheduler":
            stall, stall_fatal = config.watchdog_timeout * SCHEDULER_STALL_FRACTION, config.watchdog_timeout
        else:
            stall, stall_fatal = STALL_SECONDS, config.hang_timeout
        return cls(SILENCE_SECONDS, config.hang_timeout, stall, stall_fatal)


@dataclass(eq=False)
class WorkerRecord:
    """One worker through all its lives. Times are seconds of CLOCK_MONOTONIC."""

    kind: str
    index: int
    limits: Limits
    state: State = State.STARTING
    epoch: int = 0
    process: WorkerProcess | None = None
    outbox: Outbox | None = None
    """To its inbox, from its Hello to its death."""
    address: str = ""
    started_at: float = 0.0
    heard_at: float = 0.0
    loop_age: float = 0.0
    """Age of its main loop's last round when it was last heard."""
    rests_until: float = 0.0
    """It waits for messages, and its next heartbeat may take until then; 0.0 while it works."""
    changes: int = 0
    """How often its stats have changed."""
    told_changes: int = -1
    """Of http: how many changes, of all workers, it has been told of."""
    suspended: bool = False
    """While it rested, the system had stopped it when last looked at."""
    stage: str = ""
    info: JsonObject = field(default_factory=dict)
    stats: JsonObject = field(default_factory=dict)
    last_words: Failed | None = None
    hang: str = ""
    """Why the supervisor killed it, if it did."""
    deaths: list[float] = field(default_factory=list)
    cause: str = ""
    """Of the last death."""

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.index}"

    def begin(self, now: float, process: WorkerProcess, address: str) -> None:
        """A new life starts (its epoch has been counted up already)."""
        self.state = State.RESTARTING if self.deaths else State.STARTING
        self.process, self.address = process, address
        self.started_at = self.heard_at = now
        self.loop_age, self.stage, self.hang, self.last_words = 0.0, "", "", None
        self.rests_until, self.suspended = 0.0, False
        self.info, self.stats = {}, {}

    def take_pulse(self, now: float) -> None:
        """Read the heartbeats of the current life, if there is one."""
        if self.process is None:
            return
        for heartbeat in self.process.heartbeats():
            sent_at = heartbeat.sent_ns / 1e9
            self.heard_at = max(self.heard_at, sent_at)
            self.rests_until = sent_at + REST_SECONDS + self.limits.silence if heartbeat.rests else 0.0
            self.changes += heartbeat.stats != self.stats
            self.loop_age, self.stats = heartbeat.loop_age_us / 1e6, heartbeat.stats
        was_suspended, self.suspended = self.suspended, now < self.rests_until and self.process.stopped
        # While it rests, that the system has not stopped it is the sign of life.
        if now < self.rests_until and not (was_suspended and self.suspended):
            self.heard_at = now

    def may_rest(self, now: float) -> bool:
        """Whether it is enough to look at it again when it stirs."""
        return self.state is State.READY and now < self.rests_until and not self.suspended

    def end(self, now: float, cause: str) -> None:
        """The current life is over."""
        self.state, self.process, self.cause, self.stage = State.DEAD, None, cause, ""
        self.deaths.append(now)
        if self.outbox is not None:
            self.outbox.close()
            self.outbox = None

    def recent_deaths(self) -> int:
        """Deaths within the window that ends with the last one."""
        return sum(died > self.deaths[-1] - DEATH_WINDOW_SECONDS for died in self.deaths)

    def restart_at(self) -> float:
        """When a dead worker is due again: at once, then after 0.5, 1, 2, ... 32 seconds."""
        repeats = self.recent_deaths() - 1
        return self.deaths[-1] + (0.5 * 2 ** min(repeats - 1, 6) if repeats else 0.0)

    def silence(self, now: float, watched_since: float) -> float:
        """Seconds without a heartbeat, of those in which the supervisor itself was awake to hear one."""
        return now - max(self.heard_at, watched_since)

    def stall(self, now: float, watched_since: float) -> float:
        """Seconds since its main loop came round, counted like `silence`."""
        return min(self.loop_age + now - self.heard_at, now - watched_since)

    def hang_verdict(self, now: float, watched_since: float) -> str:
        """Why a ready worker must be killed as hanging; empty when it need not."""
        silence, stall = self.silence(now, watched_since), self.stall(now, watched_since)
        if silence > self.limits.silence_fatal:
            return f"hung: no answer for {silence:.1f} s"
        if stall > self.limits.stall_fatal:
            return f"hung: no progress for {stall:.1f} s"
        return ""

    def problem(self, now: float, watched_since: float) -> str:
        """One sentence on what is wrong with this worker; empty when nothing is."""
        stage = f": {self.stage}" if self.stage else ""
        if self.state is State.STARTING:
            return f"{self.name} is starting{stage}"
        if self.state is not State.READY:
            return f"{self.name} died ({self.cause}) {now - self.deaths[-1]:.1f} s ago and is being restarted{stage}"
        silence, stall = self.silence(now, watched_since), self.stall(now, watched_since)
        if silence > self.limits.silence:
            return f"{self.name} has not answered for {silence:.1f} s"
        if stall > self.limits.stall:
            return f"{self.name} has made no progress for {stall:.1f} s"
        return ""

    def health(self, now: float) -> JsonObject:
        """Its entry in Health.workers."""
        return {
            "state": self.state.value,
            "epoch": self.epoch,
            "pid": self.process.pid if self.process else None,
            "restarts": max(0, self.epoch - 1),
            "heartbeat_age_ms": round((now - self.heard_at) * 1000),
            "loop_age_ms": round((self.loop_age + now - self.heard_at) * 1000),
            "info": self.info,
            "stats": self.stats,
        }
