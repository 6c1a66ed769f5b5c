"""Ports, run directories and device counts of the host."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import stat
import tempfile
from pathlib import Path

import pytest

from minisgl import host
from minisgl.config import ServerConfig
from minisgl.host import (
    bind_listen_sockets,
    cuda_device_count,
    listen,
    replica_count,
    run_directory,
    with_worker_counts,
)
from minisgl.launcher import LaunchFailed


def test_a_free_port_is_taken_and_others_are_kept_out() -> None:
    (sock,) = bind_listen_sockets("127.0.0.1", 0, 1)
    listen([sock])
    port = sock.getsockname()[1]
    assert port > 0
    expected = rf"port {port} is in use \(by pid {os.getpid()} .+\): choose another with --port"
    for count in (1, 3):
        with pytest.raises(LaunchFailed, match=expected):
            bind_listen_sockets("127.0.0.1", port, count)
    sock.close()


def test_several_sockets_share_one_port_and_each_gets_connections() -> None:
    sockets = bind_listen_sockets("127.0.0.1", 0, 3)
    listen(sockets)
    port = sockets[0].getsockname()[1]
    assert {sock.getsockname()[1] for sock in sockets} == {port}
    clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(64)]
    accepted = []
    for sock in sockets:
        sock.setblocking(False)
        accepted.append(0)
        while True:
            try:
                sock.accept()[0].close()
            except BlockingIOError:
                break
            accepted[-1] += 1
    assert sum(accepted) == 64 and all(accepted)
    with pytest.raises(LaunchFailed, match="is in use"):
        bind_listen_sockets("127.0.0.1", port, 3)
    for open_socket in [*clients, *sockets]:
        open_socket.close()


def test_two_launches_that_bound_the_same_port_find_out_when_they_listen() -> None:
    (first,) = bind_listen_sockets("127.0.0.1", 0, 1)
    (second,) = bind_listen_sockets("127.0.0.1", first.getsockname()[1], 1)
    listen([first])
    with pytest.raises(LaunchFailed, match="is in use"):
        listen([second])
    first.close()
    second.close()


def test_an_address_of_another_host_is_refused_with_a_sentence() -> None:
    with pytest.raises(LaunchFailed, match=r"cannot listen on 192\.0\.2\.1 port 0"):
        bind_listen_sockets("192.0.2.1", 0, 1)
    with pytest.raises(LaunchFailed, match="--host no such host is not a usable address"):
        bind_listen_sockets("no such host", 0, 1)


def test_a_run_directory_is_private_and_goes_with_the_launch() -> None:
    with run_directory() as name:
        path = Path(name)
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        bound = socket.socket(socket.AF_UNIX)
        bound.bind(str(path / "http-0.1"))
        with run_directory() as other:
            assert path.exists(), "a living launch's directory is not swept by the next"
            assert other != name
    bound.close()
    assert not path.exists()


def test_leftovers_of_dead_launches_are_swept_and_nothing_else() -> None:
    base = Path(tempfile.gettempdir())
    leftover = base / "minisgl-run-999999999-abcdefgh"
    lookalikes = [base / "minisgl-run-of-a-user", base / "minisgl-run-1-with_a_file"]
    for path in [leftover, *lookalikes]:
        path.mkdir(mode=0o700)
    precious = lookalikes[1] / "notes.txt"
    precious.write_text("keep me")
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(leftover / "scheduler-0.1"))
    dead.close()
    try:
        with run_directory():
            assert not leftover.exists()
            assert precious.read_text() == "keep me"
            assert lookalikes[0].is_dir()
    finally:
        precious.unlink()
        for path in lookalikes:
            path.rmdir()


def test_a_directory_that_is_swept_before_it_is_locked_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    make = host.tempfile.mkdtemp

    def make_and_lose_once(prefix: str, dir: Path) -> str:
        names.append(make(prefix=prefix, dir=dir))
        if len(names) == 1:
            Path(names[0]).rmdir()
        return names[-1]

    monkeypatch.setattr(host.tempfile, "mkdtemp", make_and_lose_once)
    with run_directory() as name:
        assert name == names[1]
        lock = os.open(name, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(lock)
        assert re.fullmatch(r"minisgl-run-\d+-\w+", Path(name).name)


@pytest.mark.parametrize(
    ("settings", "env", "devices", "replicas"),
    [
        ({}, {}, 0, 1),
        ({}, {}, 4, 4),
        ({"dp_size": 3}, {}, 0, 3),
        ({"dp_size": 3}, {"ENABLE_MULTI_DEVICE": "0"}, 4, 3),
        ({}, {"ENABLE_MULTI_DEVICE": "0"}, 4, 1),
        ({}, {"ENABLE_MULTI_DEVICE": "1"}, 4, 4),
        ({"device": "cpu"}, {}, 4, 1),
        ({"base_gpu_id": 1}, {}, 4, 3),
        ({"base_gpu_id": 9}, {}, 4, 1),
        ({}, {"CUDA_VISIBLE_DEVICES": ""}, 4, 1),
        ({}, {"CUDA_VISIBLE_DEVICES": "2,3"}, 4, 2),
        ({}, {"CUDA_VISIBLE_DEVICES": "0,-1,1"}, 4, 1),
        ({}, {"CUDA_VISIBLE_DEVICES": "0,1"}, 1, 1),
    ],
)
def test_the_number_of_replicas(
    settings: dict[str, object],
    env: dict[str, str],
    devices: int,
    replicas: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host, "_driver_device_count", lambda: devices)
    monkeypatch.setattr(host.importlib.metadata, "version", lambda name: "2.9.0")
    assert replica_count(ServerConfig(**settings), env) == replicas  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "gpus", "cpus", "counts"),
    [
        ({}, 1, 16, (4, 2, 1)),
        ({}, 1, 64, (4, 2, 1)),
        ({}, 1, 8, (2, 1, 1)),
        ({}, 1, 4, (1, 1, 1)),
        ({}, 1, 2, (1, 1, 1)),
        ({}, 2, 32, (8, 4, 2)),
        ({}, 8, 128, (16, 8, 8)),
        ({}, 8, 16, (4, 2, 2)),
        ({"device": "cpu"}, 1, 64, (1, 1, 1)),
        ({}, 0, 64, (1, 1, 1)),
        ({"http_workers": 3, "tokenizer_workers": 5, "detokenizer_workers": 2}, 1, 16, (3, 5, 2)),
        ({"http_workers": 1}, 1, 16, (1, 2, 1)),
        ({"http_workers": 2, "device": "cpu"}, 0, 1, (2, 1, 1)),
    ],
)
def test_the_numbers_of_http_tokenizer_and_detokenizer_workers(
    settings: dict[str, object],
    gpus: int,
    cpus: int,
    counts: tuple[int, int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host, "cuda_device_count", lambda env: gpus)
    config = with_worker_counts(ServerConfig(**settings), max(1, gpus), cpus)  # type: ignore[arg-type]
    assert (config.http_workers, config.tokenizer_workers, config.detokenizer_workers) == counts


@pytest.mark.parametrize(
    ("settings", "gpus", "cpus", "busy_poll_ms"),
    [
        ({}, 1, 16, 100),
        ({}, 1, 4, 0),
        ({}, 0, 64, 0),
        ({"device": "cpu"}, 1, 64, 0),
        ({}, 8, 16, 0),
        ({"busy_poll_ms": 0}, 1, 16, 0),
        ({"busy_poll_ms": 7}, 0, 1, 7),
    ],
)
def test_processes_stay_awake_only_where_there_are_cpus_to_spare(
    settings: dict[str, int], gpus: int, cpus: int, busy_poll_ms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "cuda_device_count", lambda env: gpus)
    config = with_worker_counts(ServerConfig(**settings), max(1, gpus), cpus)  # type: ignore[arg-type]
    assert config.busy_poll_ms == busy_poll_ms


def test_a_cpu_build_of_torch_has_no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_driver_device_count", lambda: 8)
    monkeypatch.setattr(host.importlib.metadata, "version", lambda name: "2.13.0+cpu")
    assert cuda_device_count({}) == 0
