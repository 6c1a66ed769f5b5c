"""What a launch needs of its host: listening port, run directory for the sockets, numbers of GPUs and workers."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import importlib.metadata
import os
import re
import socket
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minisgl.config import ServerConfig
from minisgl.launcher import LaunchFailed

_RUN_DIR = re.compile(r"minisgl-run-\d+-\w+")
_LONGEST_BASE = 48
"""A socket's path may have about 100 bytes, of which the run directory and the worker's name take up to 50."""


# ---- listening port -------------------------------------------------------------------------------------------------


def bind_listen_sockets(host: str, port: int, count: int) -> list[socket.socket]:
    """`count` sockets bound to one port (0 takes a free one), not yet listening; several share it by SO_REUSEPORT.

    Raises LaunchFailed when the port is taken or the address is not this host's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise LaunchFailed(f"--host {host} is not a usable address: {error.strerror}") from None
    # Sockets that share a port would share it with another server as well, so one that does not share asks first.
    first = _bind(family, address, host, shared=False)
    if count == 1:
        return [first]
    address = (address[0], first.getsockname()[1], *address[2:])
    first.close()
    return [_bind(family, address, host, shared=True) for _ in range(count)]


def listen(sockets: list[socket.socket], backlog: int = 2048) -> None:
    """Let connections queue up until the http workers accept them; raises LaunchFailed when the port is taken."""
    for sock in sockets:
        try:
            sock.listen(backlog)
        except OSError as error:
            raise _port_error(error, *sock.getsockname()[:2]) from None


def _bind(family: socket.AddressFamily, address: tuple[object, ...], host: str, shared: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _port_error(error, host, int(str(address[1]))) from None
    return sock


def _port_error(error: OSError, host: str, port: int) -> LaunchFailed:
    if error.errno == errno.EADDRINUSE:
        return LaunchFailed(f"port {port} is in use{_port_owner(port)}: choose another with --port")
    if error.errno == errno.EACCES:
        return LaunchFailed(f"port {port} needs privileges this user does not have: choose one above 1023 with --port")
    return LaunchFailed(f"cannot listen on {host} port {port}: {error.strerror}")


def _port_owner(port: int) -> str:
    """` (by pid 123 name)` of the process that listens on a port, or nothing when the host does not tell."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if int(fields[1].rpartition(":")[2], 16) == port and fields[3] == "0A":
                    inodes.add(f"socket:[{fields[9]}]")
    for descriptor in Path("/proc").glob("[0-9]*/fd/*") if inodes else ():
        with contextlib.suppress(OSError):
            if str(descriptor.readlink()) in inodes:
                process = descriptor.parents[1]
                return f" (by pid {process.name} {(process / 'comm').read_text().strip()})"
    return ""


# ---- run directory --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def run_directory() -> Iterator[str]:
    """A fresh directory, open to this user alone, for one launch's sockets; removed at the end.

    A launcher holds a lock on its directory, which the kernel releases however the launcher dies. So a directory
    without a lock is the leftover of a dead one and is removed here too.
    """
    base = Path(tempfile.gettempdir())
    if len(str(base)) > _LONGEST_BASE:
        base = Path("/tmp")
    for leftover in base.glob("minisgl-run-*"):
        with contextlib.suppress(OSError):
            _remove_if_unlocked(leftover)
    path, lock = _create_locked(base)
    try:
        yield str(path)
    finally:
        _remove_sockets(path)
        os.close(lock)


def _create_locked(base: Path) -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=f"minisgl-run-{os.getpid()}-", dir=base))
        # Another launch may sweep the directory before the lock is on it; then make another.
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.stat()
                return path, lock
            except (BlockingIOError, FileNotFoundError):
                os.close(lock)


def _remove_if_unlocked(path: Path) -> None:
    info = path.lstat()
    if not (_RUN_DIR.fullmatch(path.name) and stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid()):
        return
    lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove_sockets(path)
    finally:
        os.close(lock)


def _remove_sockets(path: Path) -> None:
    """Remove a run directory: only sockets, so that nothing a user put there is ever deleted."""
    for entry in path.iterdir():
        if entry.is_socket():
            entry.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        path.rmdir()


# ---- workers -------------------------------------------------------------------------------------------------------

_WORKERS = {"http_workers": (4, 4, 16), "tokenizer_workers": (8, 2, 8), "detokenizer_workers": (8, 1, 8)}
"""On a GPU host: at least so many CPUs for each, at most so many for each GPU, and at most so many."""
_BUSY_POLL_MS = 100
"""Longer than most answers of a small model take, so that the next question of a chat's client finds all awake."""


def with_worker_counts(config: ServerConfig, replicas: int, cpus: int | None = None) -> ServerConfig:
    """The settings with the numbers of workers (0) and the busy polling (None) that were left to choose.

    A GPU makes up to 90,000 tokens a second of a small model. One costs http 7 to 14 us and the detokenizer 3 to 6, the
    less the further behind they are (bench/ENGINE_LOG.md, entry 6); a request costs http some 300 us and the tokenizer
    100. So four http workers are a third busy and read a burst of 256 requests in 20 ms, two tokenizers keep up with
    them; one detokenizer is half busy. A model on the CPU is far slower than one worker of each, and needs the CPUs.

    Args:
        replicas: schedulers.
        cpus: that this process may use (None: finds out).
    """
    cpus = usable_cpus() if cpus is None else cpus
    on_gpu = config.device not in ("cpu", "mps") and cuda_device_count(os.environ) > 0
    counts: dict[str, Any] = {}
    for name, (cpus_each, most_per_gpu, most) in _WORKERS.items():
        best = min(cpus // cpus_each, most_per_gpu * replicas, most) if on_gpu else 1
        counts[name] = getattr(config, name) or max(1, best)
    if config.busy_poll_ms is None:
        roomy = on_gpu and cpus >= 2 * (sum(counts.values()) + replicas)
        counts["busy_poll_ms"] = _BUSY_POLL_MS if roomy else 0
    return dataclasses.replace(config, **counts)


def usable_cpus() -> int:
    """CPUs (hardware threads) that this process may use: its affinity, and its control group's quota."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cpus = min(cpus, max(1, int(quota) // int(period)))
    return cpus


# ---- devices --------------------------------------------------------------------------------------------------------


def replica_count(config: ServerConfig, env: Mapping[str, str] | None = None) -> int:
    """Scheduler processes to start: --dp-size, else one per CUDA device, else one. Does not import torch."""
    env = os.environ if env is None else env
    if config.dp_size is not None:
        return config.dp_size
    if env.get("ENABLE_MULTI_DEVICE") == "0" or config.device in ("cpu", "mps"):
        return 1
    return max(1, cuda_device_count(env) - config.base_gpu_id)


def cuda_device_count(env: Mapping[str, str]) -> int:
    """CUDA devices that torch will see here: those of the driver, limited by CUDA_VISIBLE_DEVICES."""
    if importlib.metadata.version("torch").endswith("+cpu"):
        return 0
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return _driver_device_count()
    named = [name for name in visible.split(",") if name.strip()]
    return min(len(named) if "-1" not in named else named.index("-1"), _driver_device_count())


def _driver_device_count() -> int:
    """What NVML, the library behind nvidia-smi, counts; 0 without an NVIDIA driver."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    if nvml.nvmlInit_v2() != 0:
        return 0
    count = ctypes.c_uint(0)
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    nvml.nvmlShutdown()
    return count.value
