"""What one streamed chunk costs the http process: microseconds of its CPU time, JSON and socket write included.

    python bench/chunk_cost.py                              every wire at 1, 32, 128 and 256 streams
    python bench/chunk_cost.py --wires native --streams 32 --rounds 5 --json costs.json

A real http worker process is fed by a stand-in for the detokenizer with the real messages over ZeroMQ, one token for
every stream in each step, and read by real sockets in a process of its own. The next step is sent only when every
client has the last one, so that no two chunks of a stream can go out together: each is a write of its own. CPU time is
that of all threads of the http process, kernel included, between two steps in the middle of the streams.

The last line is what the kernel's part costs: a plain send() of a chunk of `native`, in turn with the others. CPU time
depends on the machine, and on what shares its caches and cores: compare variants in turn (A B A B) on one.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from benchlib.servers import REPOSITORY
from benchlib.stream_readers import RESPONSE_END, TIMEOUT_SECONDS, StreamReaders

sys.path.insert(0, str(REPOSITORY))

from minisgl.channels import Inbox, Outbox, ipc_address
from minisgl.config import ModelSpec, ServerConfig, WorkerSpec
from minisgl.messages import (
    AbortRequest,
    DeltaBatch,
    Dispatched,
    Failed,
    FinishReason,
    GenerateRequest,
    Hello,
    Message,
    Opening,
    Progress,
    Ready,
    Shutdown,
    WorkerUp,
)
from minisgl.pulse import Pulse
from minisgl.timeline import now
from minisgl.worker import run_worker

WIRES = {
    "native": ("/generate", {"prompt": "Hello", "max_new_tokens": 4096}),
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4096}),
    "sglang": ("/generate", {"text": "Hello", "sampling_params": {"max_new_tokens": 4096}}),
}
BARE = "send() alone"
WARM_UP_STEPS = 16
MODEL = ModelSpec("model", "model", "model", 2**20, 2**15, (2,), "Qwen2ForCausalLM")


def main() -> int:
    arguments = make_parser().parse_args()
    wires = [*arguments.wires, BARE]
    cells = [(wire, streams) for streams in arguments.streams for wire in wires]
    costs: dict[tuple[str, int], list[float]] = {cell: [] for cell in cells}
    with http_worker() as worker:
        for _ in range(arguments.rounds):
            for wire, streams in cells:
                steps = max(arguments.steps, arguments.chunks // streams)
                measure = bare_cost if wire == BARE else functools.partial(worker.cost, wire)
                costs[wire, streams].append(measure(streams, steps))
    rows = [
        {"wire": wire, "streams": streams, "us_per_chunk": statistics.median(found), "rounds": found}
        for (wire, streams), found in costs.items()
    ]
    print(table(rows, wires, arguments.streams))
    if arguments.json:
        facts = {"cpus": os.cpu_count(), "python": sys.version.split()[0], "load": os.getloadavg()[0], "costs": rows}
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wires", nargs="+", default=list(WIRES), choices=WIRES, help="default: all")
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 32, 128, 256], help="default: 1 32 128 256")
    parser.add_argument("--steps", type=int, default=64, help="measured chunks of each stream at least (default: 64)")
    parser.add_argument("--chunks", type=int, default=2048, help="measured chunks in all at least (default: 2048)")
    parser.add_argument("--rounds", type=int, default=3, help="how often; the median counts (default: 3)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser


def table(rows: list[dict[str, object]], wires: list[str], streams: list[int]) -> str:
    """Microseconds per chunk: the median of the rounds, and their range."""
    lines = ["CPU us per chunk".ljust(18) + "".join(f"{count} streams".rjust(22) for count in streams)]
    found = {(row["wire"], row["streams"]): row["rounds"] for row in rows}
    for wire in wires:
        cells = [found[wire, count] for count in streams]
        shown = [f"{statistics.median(cell):.1f} ({min(cell):.1f} to {max(cell):.1f})" for cell in cells]
        lines.append(wire.ljust(18) + "".join(text.rjust(22) for text in shown))
    return "\n".join(lines)


class HttpWorker:
    """A real http worker process and the ring it hangs on, which is this process."""

    def __init__(self, run_dir: str) -> None:
        control = ipc_address(run_dir, "supervisor", 1)
        self._supervisor = Inbox(control, {Hello, Progress, Ready, Failed})
        listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self._port = listener.getsockname()[1]
        spec = WorkerSpec(
            name="http-0",
            kind="http",
            index=0,
            epoch=1,
            inbox_address=ipc_address(run_dir, "http-0", 1),
            control_address=control,
            replicas=1,
            config=ServerConfig(
                port=0, log_level="warning", http_workers=1, tokenizer_workers=1, detokenizer_workers=1
            ),
            model=MODEL,
        )
        context = multiprocessing.get_context("spawn")
        self._pulse = Pulse()
        life_line, self._life = context.Pipe(duplex=False)
        self._process = context.Process(
            target=run_worker, args=(spec.pack(), life_line, self._pulse.worker_end, listener)
        )
        self._process.start()
        listener.close()
        hello = self._wait(Hello)
        assert isinstance(hello, Hello)
        self._ring = Outbox(hello.address)
        self._wait(Ready)
        self._requests = Inbox(ipc_address(run_dir, "tokenizer-0", 1), {GenerateRequest, AbortRequest})
        for name, address in (("scheduler-0", ""), ("detokenizer-0", ""), ("tokenizer-0", self._requests.address)):
            self._ring.send(WorkerUp(name, 1, address))

    def cost(self, wire: str, streams: int, steps: int) -> float:
        """Microseconds of the http process's CPU time per chunk."""
        path, body = WIRES[wire]
        payload = json.dumps({**body, "stream": True}).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nConnection: close\r\n"
        readers = StreamReaders(self._port, f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload, streams)
        _keep_apart(self._process.pid, readers.pid)
        requests = [self._next_request() for _ in range(streams)]
        rids = [request.rid for request in requests]
        self._ring.send(Dispatched(0, 1, rids))
        openings = [
            Opening(row, 5, 0, [*request.stamps, *(now() for _ in range(7))]) for row, request in enumerate(requests)
        ]
        begun_ns = 0
        for step in range(WARM_UP_STEPS + steps):
            if step == WARM_UP_STEPS:
                begun_ns = cpu_ns(self._process.pid)
            self._ring.send(step_of(rids, step, FinishReason.NONE, openings if step == 0 else []))
            readers.wait_step()
        spent_ns = cpu_ns(self._process.pid) - begun_ns
        self._ring.send(step_of(rids, -1, FinishReason.LENGTH, []))
        readers.wait_end()
        self._supervisor.drain()
        return spent_ns / 1000 / (steps * streams)

    def stop(self) -> None:
        self._ring.send(Shutdown())
        self._process.join(TIMEOUT_SECONDS)
        self._process.kill()
        for closing in (self._ring, self._supervisor, self._requests):
            closing.close()
        self._life.close()

    def _wait(self, kind: type[Message]) -> Message:
        while self._supervisor.wait(int(TIMEOUT_SECONDS * 1000)):
            message = self._supervisor.receive()
            if isinstance(message, Failed):
                raise RuntimeError(message.details)
            if isinstance(message, kind):
                return message
        raise TimeoutError(f"the http process sent no {kind.__name__}")

    def _next_request(self) -> GenerateRequest:
        if not self._requests.wait(int(TIMEOUT_SECONDS * 1000)):
            raise TimeoutError("the http process passed no request on")
        request = self._requests.receive()
        assert isinstance(request, GenerateRequest), request
        return request


@contextlib.contextmanager
def http_worker() -> Iterator[HttpWorker]:
    with tempfile.TemporaryDirectory(prefix="chunks-") as run_dir:
        worker = HttpWorker(run_dir)
        try:
            yield worker
        finally:
            worker.stop()


def bare_cost(streams: int, steps: int) -> float:
    """Microseconds of CPU time of a plain send() to one of so many clients, which all read before the next round."""
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        readers = StreamReaders(listener.getsockname()[1], b"GET", streams)
        clients = [listener.accept()[0] for _ in range(streams)]
        spent_ns = 0
        for step in range(WARM_UP_STEPS + steps):
            chunk = b'16\r\n{"text_delta":" word"}\n\r\n' if step else b"HTTP/1.1 200 OK\r\n\r\n1\r\n\n\r\n"
            begun_ns = time.thread_time_ns()
            for client in clients:
                client.send(chunk)
            spent_ns += (time.thread_time_ns() - begun_ns) * (step >= WARM_UP_STEPS)
            readers.wait_step()
        for client in clients:
            client.send(RESPONSE_END)
            client.close()
        readers.wait_end()
    return spent_ns / 1000 / (steps * streams)


def step_of(rids: list[int], step: int, finish: FinishReason, openings: list[Opening]) -> DeltaBatch:
    """What the detokenizer sends after one step: one token for every stream."""
    count = len(rids)
    text = " word" if step % 8 else " “quoted” \n"
    launched = now()
    return DeltaBatch(
        rids,
        [text] * count,
        [1] * count,
        [100 + step % 1000] * count,
        [finish] * count,
        openings,
        steps_ns=[launched, now()],
    )


def cpu_ns(pid: int | None) -> int:
    """CPU time of all threads of a process."""
    tasks = Path(f"/proc/{pid}/task")
    if tasks.exists():
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir())
    times = psutil.Process(pid).cpu_times()
    return int((times.user + times.system) * 1e9)


def _keep_apart(server: int | None, clients: int | None) -> None:
    """The http process on a core of its own, as far as there are two: caches stay warm, and figures comparable."""
    if not hasattr(os, "sched_setaffinity") or server is None or clients is None:
        return
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        os.sched_setaffinity(server, cores[:1])
        os.sched_setaffinity(clients, cores[1:])


if __name__ == "__main__":
    sys.exit(main())
