"""The supervisor with real processes: starts, deaths, hangs, restarts, drains. (tests/e2e has the real workers.)"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from standin_workers import run_standin, seen
from worker_process import ONE_OF_EACH

from minisgl.channels import Outbox, ipc_address
from minisgl.config import ModelSpec, ServerConfig
from minisgl.host import run_directory
from minisgl.launcher import LaunchFailed, LocalLauncher
from minisgl.messages import Drain, Failed, Health, Ready, Shutdown, WorkerDown, WorkerUp
from minisgl.supervisor import Supervisor

WORKERS = {"http-0", "tokenizer-0", "detokenizer-0", "scheduler-0"}


class WatchedLauncher(LocalLauncher):
    """Tells whether the supervisor rests, and how often it has been stirred."""

    watching = False
    stirred = 0

    def watch(self, on_sign: Callable[[], None]) -> None:
        self.watching = True
        super().watch(on_sign)

    def unwatch(self) -> None:
        self.watching = False
        self.stirred += 1
        super().unwatch()


class Stack:
    """A supervisor over stand-in workers, and what its http worker hears."""

    def __init__(
        self, orders: Path, run_dir: str, launcher: WatchedLauncher, config: ServerConfig, replicas: int
    ) -> None:
        self.orders = orders
        self.run_dir = run_dir
        self.launcher = launcher
        self.stages: list[tuple[str, str, int, int]] = []
        model = ModelSpec(str(orders), "standin", "standin", 1024, 100, (0,), "None")
        self.supervisor = Supervisor(config, model, replicas, launcher, lambda *stage: self.stages.append(stage))

    async def serve(self) -> None:
        self.supervisor.start()
        assert await asyncio.wait_for(self.supervisor.wait_all_ready(), 60)
        self.supervisor.serving()
        await until(lambda: self.health() is not None and not self.problems())

    async def rest(self, calm: bool) -> None:
        """Wait until everyone rests, if they are calm enough to."""
        if calm:
            await until(lambda: self.launcher.watching)

    def order(self, name: str, text: str = "") -> None:
        (self.orders / name).write_text(text)

    def health(self) -> tuple[list[str], dict[str, Any]] | None:
        """The last Health message that http-0 got."""
        messages = seen(self.orders, "http-0", 1, Health)
        if not messages:
            return None
        _, problems, workers, *_ = max(messages, key=lambda message: message[3])
        return problems, workers

    def problems(self) -> list[str]:
        health = self.health()
        assert health is not None
        return health[0]

    def pid(self, worker: str) -> int:
        health = self.health()
        assert health is not None
        return health[1][worker]["pid"]

    def all_pids(self) -> set[int]:
        health = self.health()
        assert health is not None
        return {worker["pid"] for worker in health[1].values()}


@contextlib.asynccontextmanager
async def stack(orders: Path, replicas: int = 1, calm: bool = False, **settings: Any) -> AsyncIterator[Stack]:
    with run_directory() as run_dir:
        for name in WORKERS if calm else ():
            (orders / f"{name}.calm").touch()
        launcher = WatchedLauncher(run_dir, [None] * 4, entry_point=run_standin)  # type: ignore[list-item]
        config = ServerConfig(**{**ONE_OF_EACH, **settings})
        running = Stack(orders, run_dir, launcher, config, replicas)
        try:
            yield running
        finally:
            await running.supervisor.stop()
            launcher.close()
    assert not Path(run_dir).exists()


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 110))  # type: ignore[arg-type]


async def until(condition: Callable[[], Any], seconds: float = 30.0) -> float:
    """Wait for a condition; returns how long it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() < started + seconds, "the condition did not come true in time"
        await asyncio.sleep(0.02)
    return time.monotonic() - started


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_everyone_is_introduced_and_leaves_on_shutdown(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stack(tmp_path, replicas=2, http_workers=2) as running:
            assert stat.S_IMODE(Path(running.run_dir).stat().st_mode) == 0o700
            await running.serve()
            names = WORKERS | {"scheduler-1", "http-1"}

            def ups_of(name: str) -> dict[str, tuple[int, str]]:
                return {line[1]: (line[2], line[3]) for line in seen(tmp_path, name, 1, WorkerUp)}

            for name in names:
                # The last one ready is announced to the others while the stack already serves.
                await until(lambda name=name: len(ups_of(name)) >= len(names) - 1)
                ups = ups_of(name)
                assert set(ups) == names - {name}
                assert all(epoch == 1 and address.endswith(f"{up}.1") for up, (epoch, address) in ups.items())
            assert ("scheduler-0", "loading", 1, 2) in running.stages
            assert running.supervisor.info_of("scheduler-1") == {"device": "none"}
            pids = running.all_pids()
            assert len(pids) == len(names) and os.getpid() not in pids
            assert all(os.getsid(pid) == pid for pid in pids), "each worker leads a session of its own"
        assert all(gone(pid) for pid in pids)
        assert all(seen(tmp_path, name, 1, Shutdown) for name in names), "nobody had to be killed"

    run(scenario)


def test_a_dead_worker_is_reported_and_restarted_with_a_new_epoch(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stack(tmp_path) as running:
            await running.serve()
            before = {name: running.pid(name) for name in WORKERS}
            killed_at = time.monotonic()
            os.kill(before["scheduler-0"], signal.SIGKILL)
            await until(lambda: seen(tmp_path, "http-0", 1, WorkerDown))
            for name in WORKERS - {"scheduler-0"}:
                *down, when = seen(tmp_path, name, 1, WorkerDown)[0]
                assert down == ["WorkerDown", "scheduler-0", 1, "killed by signal 9"]
                assert when - killed_at < 3
            sentence = next(iter(first_problem(tmp_path, killed_at)))
            assert re.match(r"scheduler-0 died \(killed by signal 9\) \d\.\d s ago and is being restarted", sentence)
            await until(lambda: not running.problems())
            for name in WORKERS - {"scheduler-0"}:
                up = seen(tmp_path, name, 1, WorkerUp)[-1]
                assert up[1:3] == ["scheduler-0", 2] and up[3].endswith("scheduler-0.2")
                assert running.pid(name) == before[name], "nobody else was touched"
            assert {line[1] for line in seen(tmp_path, "scheduler-0", 2, WorkerUp)} == WORKERS - {"scheduler-0"}
            health = running.health()
            assert health is not None
            entry = health[1]["scheduler-0"]
            assert (entry["state"], entry["epoch"], entry["restarts"]) == ("ready", 2, 1)

    run(scenario)


def first_problem(orders: Path, since: float) -> list[str]:
    return next(line[1] for line in seen(orders, "http-0", 1, Health) if line[1] and line[-1] > since)


@pytest.mark.parametrize(
    ("order", "text", "cause"),
    [
        ("raise", "no weights in here", "scheduler-0 failed to start: RuntimeError: no weights in here"),
        ("exit", "-9", "scheduler-0 was killed by signal 9 (out of memory?)"),
        ("exit", "-6", "scheduler-0 was killed by signal 6"),
        ("exit", "3", "scheduler-0 exited with status 3"),
        ("exit", "0", "scheduler-0 exited with status 0"),
    ],
)
def test_a_failing_start_ends_the_launch_with_its_cause(tmp_path: Path, order: str, text: str, cause: str) -> None:
    async def scenario() -> None:
        async with stack(tmp_path) as running:
            running.order(f"scheduler-0.{order}", text)
            started = time.monotonic()
            running.supervisor.start()
            with pytest.raises(LaunchFailed) as failure:
                await running.supervisor.wait_all_ready()
            assert str(failure.value) == cause
            assert ("Traceback" in failure.value.details) == (order == "raise")
            assert time.monotonic() - started < 20

    run(scenario)


def test_a_start_that_takes_too_long_ends_the_launch(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stack(tmp_path, startup_timeout=4.0) as running:
            running.order("tokenizer-0.slow")
            running.supervisor.start()
            with pytest.raises(LaunchFailed, match=r"tokenizer-0 was not ready after 4 s \(it was at: loading\)"):
                await running.supervisor.wait_all_ready()

    run(scenario)


def test_the_user_can_stop_a_start(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stack(tmp_path) as running:
            running.order("scheduler-0.slow")
            running.supervisor.start()
            await asyncio.sleep(0.3)
            running.supervisor.request_stop()
            assert not await running.supervisor.wait_all_ready()
            assert await running.supervisor.wait_stopped() == 0

    run(scenario)


def test_a_crash_loop_ends_the_launch(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stack(tmp_path) as running:
            await running.serve()
            # From now on it dies while it loads, by a signal, so that every restart is tried.
            running.order("detokenizer-0.exit", "-11")
            os.kill(running.pid("detokenizer-0"), signal.SIGKILL)
            started = time.monotonic()
            with pytest.raises(LaunchFailed) as failure:
                await running.supervisor.wait_stopped()
            expected = "detokenizer-0 died 5 times within 60 s, the last time because: killed by signal 11"
            assert str(failure.value) == expected
            assert time.monotonic() - started > 0.5 + 1 + 2, "restarts back off"

    run(scenario)


def test_a_restart_that_cannot_load_ends_the_launch(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stack(tmp_path) as running:
            await running.serve()
            running.order("tokenizer-0.raise", "the file is gone")
            os.kill(running.pid("tokenizer-0"), signal.SIGKILL)
            with pytest.raises(
                LaunchFailed, match="tokenizer-0 could not be restarted: RuntimeError: the file is gone"
            ):
                await running.supervisor.wait_stopped()

    run(scenario)


def test_a_replica_that_cannot_be_restarted_does_not_end_the_others(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stack(tmp_path, replicas=2) as running:
            await running.serve()
            running.order("scheduler-1.raise", "the GPU is gone")
            pid = running.pid("scheduler-0")
            os.kill(running.pid("scheduler-1"), signal.SIGKILL)
            await until(lambda: "RuntimeError: the GPU is gone" in " ".join(running.problems()))
            (tmp_path / "scheduler-1.raise").unlink()
            await until(lambda: not running.problems())
            assert running.pid("scheduler-0") == pid

    run(scenario)


@pytest.mark.parametrize("calm", [False, True], ids=["busy", "at rest"])
@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_death_or_a_hang_is_told_within_a_second(how: signal.Signals, calm: bool, tmp_path: Path) -> None:
    """The best of a few: a busy machine may hold up any one of them, a rule that waits too long all of them."""

    async def scenario() -> None:
        async with stack(tmp_path, calm=calm, hang_timeout=10.0) as running:
            await running.serve()
            taken: list[float] = []
            while len(taken) < 4 and min(taken, default=1.0) >= 1.0:
                await until(lambda: not running.problems())
                await running.rest(calm)
                pid = running.pid("scheduler-0")
                os.kill(pid, how)
                taken.append(await until(running.problems))
                told = running.problems()
                assert len(told) == 1 and told[0].startswith("scheduler-0 "), "nobody else is to blame"
                if how == signal.SIGSTOP:
                    os.kill(pid, signal.SIGCONT)
            assert min(taken) < 1.0
            await until(lambda: not running.problems())
            assert running.health()[1]["scheduler-0"]["restarts"] == (len(taken) if how == signal.SIGKILL else 0)

    run(scenario)


def test_a_stack_without_work_rests_until_something_happens(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stack(tmp_path, calm=True) as running:
            await running.serve()
            await running.rest(True)
            stirred = running.launcher.stirred
            await asyncio.sleep(2.0)
            assert running.launcher.watching and running.launcher.stirred == stirred
            outbox = Outbox(ipc_address(running.run_dir, "tokenizer-0", 1))
            outbox.send(Drain())
            assert await until(lambda: running.launcher.stirred > stirred) < 2.0
            outbox.close()
            await running.rest(True)
            assert not running.problems()

    run(scenario)


def test_an_http_worker_that_rests_hears_of_what_the_others_do(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stack(tmp_path, calm=True, http_workers=2) as running:
            running.order("http-1.calm")
            (tmp_path / "http-0.calm").unlink()
            await running.serve()
            for number in range(3):
                await asyncio.sleep(1.0)
                running.order("http-0.stats", json.dumps({"in_flight": number}))

                def told(number: int = number) -> bool:
                    words = seen(tmp_path, "http-1", 1, Health)
                    return any(word[2]["http-0"]["stats"].get("in_flight") == number for word in words)

                assert await until(told) < 5.0

    run(scenario)


@pytest.mark.parametrize("calm", [False, True], ids=["busy", "at rest"])
def test_a_stopped_process_is_reported_then_replaced(calm: bool, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stack(tmp_path, calm=calm, hang_timeout=2.0) as running:
            await running.serve()
            await running.rest(calm)
            os.kill(running.pid("scheduler-0"), signal.SIGSTOP)
            assert await until(running.problems) < 2.0
            assert re.match(r"scheduler-0 has not answered for [01]\.", running.problems()[0])
            await until(lambda: seen(tmp_path, "http-0", 1, WorkerDown))
            assert "hung: no answer for" in seen(tmp_path, "http-0", 1, WorkerDown)[0][3]
            await until(lambda: not running.problems())

    run(scenario)


def test_a_stuck_main_loop_is_reported_then_replaced_though_its_heart_beats(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stack(tmp_path, hang_timeout=3.0) as running:
            await running.serve()
            running.order("tokenizer-0.stuck")
            assert await until(running.problems) < 3.0
            assert re.match(r"tokenizer-0 has made no progress for [23]\.", running.problems()[0])
            await until(lambda: seen(tmp_path, "http-0", 1, WorkerDown))
            assert "hung: no progress for " in seen(tmp_path, "http-0", 1, WorkerDown)[0][3]
            (tmp_path / "tokenizer-0.stuck").unlink()
            await until(lambda: not running.problems())

    run(scenario)


def test_a_long_scheduler_step_is_no_hang_until_the_watchdog_says_so(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stack(tmp_path, hang_timeout=1.0, watchdog_timeout=4.0) as running:
            await running.serve()
            running.order("scheduler-0.stuck")
            stuck_at = time.monotonic()
            assert await until(running.problems) < 3.5, "a tenth of the watchdog's time is worth a word"
            await until(lambda: seen(tmp_path, "http-0", 1, WorkerDown))
            assert time.monotonic() - stuck_at > 3.5, "but only the watchdog kills"

    run(scenario)


def test_the_supervisors_own_absence_is_not_held_against_the_workers(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stack(tmp_path, hang_timeout=1.0) as running:
            await running.serve()
            pids = running.all_pids()
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            # As after a frozen machine: nobody ran for a while, the supervisor included.
            time.sleep(1.5)
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
            await asyncio.sleep(1.0)
            await until(lambda: not running.problems())
            assert running.all_pids() == pids

    run(scenario)


def test_a_drain_waits_for_the_requests_in_flight(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stack(tmp_path) as running:
            running.order("http-0.stats", json.dumps({"in_flight": 3}))
            await running.serve()
            running.supervisor.request_stop()
            await until(lambda: seen(tmp_path, "http-0", 1, Drain))
            await until(running.problems)
            assert running.problems() == ["draining: the server answers its last requests and then stops"]
            stopped = asyncio.ensure_future(running.supervisor.wait_stopped())
            await asyncio.sleep(0.5)
            assert not stopped.done()
            running.order("http-0.stats", json.dumps({"in_flight": 0}))
            assert await asyncio.wait_for(stopped, 30) == 0

    run(scenario)


def test_a_drain_ends_the_rest(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stack(tmp_path, calm=True) as running:
            await running.serve()
            await running.rest(True)
            running.supervisor.request_stop()
            assert await asyncio.wait_for(running.supervisor.wait_stopped(), 5) == 0

    run(scenario)


@pytest.mark.parametrize("how", ["second signal", "timeout"])
def test_a_drain_can_be_cut_short(tmp_path: Path, how: str) -> None:
    async def scenario() -> None:
        async with stack(tmp_path, drain_timeout=1.0 if how == "timeout" else 60.0) as running:
            running.order("http-0.stats", json.dumps({"in_flight": 3}))
            await running.serve()
            await until(lambda: (running.health() or ([], {}))[1]["http-0"]["stats"].get("in_flight") == 3)
            running.supervisor.request_stop()
            if how == "second signal":
                running.supervisor.request_stop()
            assert await asyncio.wait_for(running.supervisor.wait_stopped(), 30) == 1

    run(scenario)


def test_a_killed_http_worker_is_told_to_drain_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stack(tmp_path) as running:
            running.order("http-0.stats", json.dumps({"in_flight": 1}))
            await running.serve()
            await until(lambda: (running.health() or ([], {}))[1]["http-0"]["stats"].get("in_flight") == 1)
            running.supervisor.request_stop()
            running.order("http-0.stats", json.dumps({"in_flight": 0}))
            os.kill(running.pid("http-0"), signal.SIGKILL)
            assert await asyncio.wait_for(running.supervisor.wait_stopped(), 30) == 0

    run(scenario)


def test_garbage_and_stale_reports_change_nothing(tmp_path: Path) -> None:
    import zmq

    async def scenario() -> None:
        async with stack(tmp_path) as running:
            await running.serve()
            address = f"ipc://{running.run_dir}/supervisor.1"
            raw = zmq.Context.instance().socket(zmq.PUSH)
            raw.connect(address)
            for frame in (b"", b"\x00\xff", os.urandom(4096), b"\x93\x18\x01"):
                raw.send(frame)
            raw.send_multipart([b"a", b"b"])
            forged = Outbox(address)
            forged.send(Failed("scheduler-0", 0, "an old life", ""))
            forged.send(Ready("scheduler-7", 1, {}))
            forged.send(Shutdown())
            await asyncio.sleep(0.5)
            await until(lambda: not running.problems())
            os.kill(running.pid("scheduler-0"), signal.SIGKILL)
            await until(lambda: seen(tmp_path, "http-0", 1, WorkerDown))
            assert seen(tmp_path, "http-0", 1, WorkerDown)[0][3] == "killed by signal 9"
            raw.close(0)
            forged.close()

    run(scenario)
