"""One server from its settings to its exit status: what `python launch.py` does."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from minisgl.command_line import parse_args
from minisgl.config import ConfigError, ModelSpec, ServerConfig
from minisgl.host import bind_listen_sockets, listen, replica_count, run_directory, with_worker_counts
from minisgl.launch_view import LaunchView, open_view, ready_notice
from minisgl.launcher import EntryPoint, LaunchFailed, LocalLauncher
from minisgl.log import setup_logging
from minisgl.model_source import ModelNotFound, resolve_model
from minisgl.supervisor import LAST_WORDS_SECONDS, Supervisor
from minisgl.worker import run_worker

WARM_UP_TOKENS = 2

Announce: TypeAlias = Callable[[str, str], None]
"""Called with the server's URL and the notice for the user."""


def _print_notice(url: str, notice: str) -> None:
    print(notice, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and serve; the process's exit status."""
    return run(parse_args(argv))


def run(
    config: ServerConfig,
    view: LaunchView | None = None,
    announce: Announce = _print_notice,
    entry_point: EntryPoint = run_worker,
) -> int:
    """Serve until a signal ends it. Must be called from a process's main thread.

    Args:
        view: shows the start; None chooses one for standard error.
        announce: called once when the server answers.
        entry_point: what every worker process runs.

    Returns:
        0 after a drain that answered every request (or a start that the user stopped), 1 after a failure, whose root
        cause is the last line on standard error, or when requests were cut; 130 when Ctrl-C ended a download.
    """
    started = time.monotonic()
    setup_logging("launcher", config.log_level)
    view = view or open_view()
    try:
        replicas = replica_count(config)
        config = with_worker_counts(config, replicas)
        sockets = bind_listen_sockets(config.host, config.port, config.http_workers)
        config = dataclasses.replace(config, port=sockets[0].getsockname()[1])
        view.progress("model", "resolving the model", 0, 0)
        model = resolve_model(config, lambda stage, done, total: view.progress("model", stage, done, total))
        view.progress("model", model.name, 1, 1)
        with run_directory() as run_dir:
            launcher = LocalLauncher(run_dir, sockets, entry_point)
            try:
                return asyncio.run(_serve(config, model, replicas, launcher, sockets, view, announce, started))
            finally:
                launcher.close()
    except (LaunchFailed, ModelNotFound, ConfigError) as error:
        view.close()
        if isinstance(error, LaunchFailed) and error.details:
            print(error.details.rstrip(), file=sys.stderr)
        print(f"minisgl: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        view.close()


async def _serve(
    config: ServerConfig,
    model: ModelSpec,
    replicas: int,
    launcher: LocalLauncher,
    sockets: list[socket.socket],
    view: LaunchView,
    announce: Announce,
    started: float,
) -> int:
    supervisor = Supervisor(config, model, replicas, launcher, view.progress)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, supervisor.request_stop)
    listen(sockets)
    supervisor.start()
    try:
        if not await supervisor.wait_all_ready():
            return 0
        view.close()
        address, port = _client_address(config)
        stopped = asyncio.ensure_future(supervisor.wait_stopped())
        # Requests go round the replicas, so this many warm each of them.
        warm_up = asyncio.gather(*(_warm_up(address, port, config.api_key) for _ in range(replicas)))
        waited: list[asyncio.Future[Any]] = [warm_up, stopped]
        await asyncio.wait(waited, timeout=config.startup_timeout, return_when=asyncio.FIRST_COMPLETED)
        if not warm_up.done() or warm_up.exception() is not None:
            # A worker's death explains more than the answer that it spoiled.
            await asyncio.wait([stopped], timeout=LAST_WORDS_SECONDS)
            if stopped.done():
                return stopped.result()
            if not warm_up.done():
                raise LaunchFailed(f"the first request got no answer within {config.startup_timeout:g} s")
        await warm_up
        supervisor.serving()
        seconds = time.monotonic() - started
        url = f"http://{f'[{address}]' if ':' in address else address}:{port}"
        announce(url, ready_notice(model, url, supervisor.info_of("scheduler-0"), replicas, seconds))
        return await stopped
    finally:
        await supervisor.stop()
        for sock in sockets:
            sock.close()


def _client_address(config: ServerConfig) -> tuple[str, int]:
    """Where a client on this host reaches the server."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(config.host, config.host), config.port


async def _warm_up(address: str, port: int, api_key: str | None) -> None:
    """Stream one short request through the whole ring; raises LaunchFailed when it does not come back complete."""
    fields = {"prompt": "Hello", "max_new_tokens": WARM_UP_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
    body = json.dumps(fields)
    head = f"POST /generate HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Type: application/json\r\n"
    if api_key is not None:
        head += f"Authorization: Bearer {api_key}\r\n"
    try:
        reader, writer = await asyncio.open_connection(address, port)
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        answer = (await reader.read()).decode(errors="replace")
        writer.close()
    except OSError as error:
        raise LaunchFailed(f"the first request got no answer: {error}") from None
    answer_head, _, answer_body = answer.partition("\r\n\r\n")
    if " 200 " not in answer_head.partition("\r\n")[0] or '"done"' not in answer_body:
        raise LaunchFailed(f"the first request failed: {answer_body.strip() or answer_head or 'connection closed'}")


if __name__ == "__main__":
    raise SystemExit(main())
