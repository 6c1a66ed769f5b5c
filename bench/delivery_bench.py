"""What the way of tokens costs: the real server with an engine that only waits as long as a GPU would compute.

    python bench/delivery_bench.py                               256 streams, 16 tokens in, 128 out
    python bench/delivery_bench.py --streams 64 --slowdown 4     steps four times as long, for a machine of few cores
    python bench/delivery_bench.py --stalled 256                 beside clients that send a request and never read
    python bench/delivery_bench.py --server-args "--http-workers 2"

Prints throughput, TTFT, the gaps between tokens, the hops of the time to first byte, and each process's CPU time per
token. Figures of different machines do not compare; run variants in turn (A B A B) on an idle one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchlib.anatomy import HOPS, anatomy_of
from benchlib.load import Load, LoadGenerator, LoadResult
from benchlib.pace import SLOWDOWN
from benchlib.servers import REPOSITORY, get_json
from benchlib.stats import inter_token_gaps, percentile
from benchlib.target import Target
from benchlib.workloads import Lengths, Workload, load_tokenizer

DEMO_MODEL = REPOSITORY / "minisgl" / "demo_model"
WARM_UP_TOKENS = "16"
READY_SECONDS = 60.0
STALLED_TOKENS = 6000
CONTEXT_LENGTH = 8192


def main() -> int:
    arguments = make_parser().parse_args()
    shape = (Lengths(arguments.input_len), Lengths(arguments.output_len))
    tokenizer = load_tokenizer(arguments.model)
    with LoadGenerator(arguments.client_processes) as generator, paced_server(arguments) as url:
        target = Target.of_url(url, "minisgl")
        for number in range(arguments.rounds):
            warm_up = Workload("random", shape[0], Lengths(WARM_UP_TOKENS)).sessions(arguments.streams, tokenizer, -1)
            generator.run(Load(target, warm_up, arguments.streams))
            workload = Workload("random", *shape)
            sessions = workload.sessions(arguments.streams * arguments.waves, tokenizer, number)
            with stalled_clients(target, arguments.stalled):
                before = of_each_worker(url, thread_seconds)
                result = generator.run(Load(target, sessions, arguments.streams))
                after = of_each_worker(url, thread_seconds)
                memory = of_each_worker(url, resident_mib)
            spent = {name: after[name] - before[name] for name in after}
            print(f"\nround {number + 1}, load average {os.getloadavg()[0]:.2f}")
            print(report(result, spent))
            print("memory MiB: " + ", ".join(f"{name} {mib:.0f}" for name, mib in sorted(memory.items())))
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=DEMO_MODEL, help="whose tokenizer it is (default: the demo model)"
    )
    parser.add_argument("--streams", type=int, default=256, help="requests at a time, closed loop (default: 256)")
    parser.add_argument("--waves", type=int, default=3, help="requests per stream (default: 3)")
    parser.add_argument("--input-len", default="16", help="prompt tokens (default: 16)")
    parser.add_argument("--output-len", default="128", help="new tokens (default: 128)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slowdown", type=float, default=1.0, help="stretch the steps by this factor (default: 1)")
    parser.add_argument("--stalled", type=int, default=0, help="more clients, which never read (default: 0)")
    parser.add_argument("--client-processes", type=int, default=1)
    parser.add_argument("--server-args", default="", help="more flags for the server, in one string")
    return parser


@contextlib.contextmanager
def paced_server(arguments: argparse.Namespace) -> Iterator[str]:
    """The URL of a server that ends with the block."""
    words = ["--load-format", "dummy", "--device", "cpu", "--port", "0", "--log-level", "warning"]
    words += ["--max-running-requests", "256", "--chunked-prefill-size", "8192", "--max-queued-requests", "4096"]
    command = [sys.executable, "-m", "benchlib.paced_server", *words, *shlex.split(arguments.server_args)]
    path = os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "bench")))
    environment = {**os.environ, "PYTHONPATH": path, SLOWDOWN: str(arguments.slowdown)}
    with tempfile.TemporaryFile("w+") as log, tempfile.TemporaryDirectory() as directory:
        copy_with_long_context(arguments.model, Path(directory))
        command += ["--model", directory]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield wait_ready(process, log.fileno())
        finally:
            process.terminate()
            process.wait(30)


def copy_with_long_context(model: Path, directory: Path) -> None:
    for path in model.glob("*.json"):
        shutil.copy(path, directory)
    config = json.loads((directory / "config.json").read_text())
    config["max_position_embeddings"] = max(config["max_position_embeddings"], CONTEXT_LENGTH)
    (directory / "config.json").write_text(json.dumps(config))


def wait_ready(process: subprocess.Popen[bytes], log: int) -> str:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        text = os.pread(log, 2**16, 0).decode(errors="replace")
        if "ready to roll" in text and (match := re.search(r"http://[\d.]+:\d+", text)):
            return match[0]
        time.sleep(0.05)
    raise SystemExit(f"the server did not start:\n{os.pread(log, 2**16, 0).decode(errors='replace')}")


@contextlib.contextmanager
def stalled_clients(target: Target, count: int) -> Iterator[list[socket.socket]]:
    """Clients that ask for a long answer and never read it.

    Their events repeat the whole text, as sglang's do: tens of megabytes a client, more than the kernel takes.
    """
    fields = {"max_new_tokens": STALLED_TOKENS, "ignore_eos": True}
    body = json.dumps({"text": "Hello", "stream": True, "sampling_params": fields}).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: stalled\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.socket()) for _ in range(count)]
        for client in clients:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.connect((target.host, target.port))
            client.sendall(head + body)
        yield clients


def of_each_worker(url: str, figure: Callable[[int], float]) -> dict[str, float]:
    """A figure of each worker process, by its name."""
    return {name: figure(worker["pid"]) for name, worker in workers(url).items()}


def workers(url: str) -> dict[str, Any]:
    """What the server says of its workers, as soon as it is well: a busy machine makes it doubt them for a moment."""
    deadline = time.monotonic() + READY_SECONDS
    while (health := get_json(f"{url}/health")) is None:
        if time.monotonic() > deadline:
            raise SystemExit(f"{url} is not well")
        time.sleep(0.05)
    found: dict[str, Any] = health["workers"]
    return found


def resident_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def thread_seconds(pid: int) -> float:
    """CPU time of a process so far, all threads."""
    total = 0
    for schedstat in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):
            total += int(schedstat.read_text().split()[0])
    return total / 1e9


def report(result: LoadResult, spent: dict[str, float]) -> str:
    good = [record for record in result.records if not record.problem]
    problems = {record.problem for record in result.records if record.problem}
    if problems:
        return f"REFUSED: {len(result.records) - len(good)} requests failed: {sorted(problems)[:3]}"
    tokens = sum(record.output_tokens for record in good)
    seconds = (max(record.finished_ns for record in good) - min(record.started_ns for record in good)) / 1e9
    pieces = sum(len(record.arrivals) for record in good)
    gaps = [gap for record in good for gap in inter_token_gaps(record.arrivals)]
    bursts = [
        (after - before) / 1e6
        for record in good
        for (before, _), (after, _) in zip(record.arrivals, record.arrivals[1:], strict=False)
        if after > before
    ]
    lines = [
        f"{tokens / seconds:,.0f} tokens/s over {seconds:.2f} s, {tokens / pieces:.2f} tokens a line, "
        f"busiest client {result.client_busy:.0%}",
        _percentiles("TTFT ms", [record.ttft_ms for record in good]),
        _percentiles("between tokens ms", gaps),
        _percentiles("between arrivals ms", bursts),
        "CPU us a token: " + ", ".join(f"{name} {used / tokens * 1e6:.2f}" for name, used in sorted(spent.items())),
        "cores used: " + ", ".join(f"{name} {used / seconds:.2f}" for name, used in sorted(spent.items())),
        "hops to the first byte, ms:",
    ]
    anatomies = [anatomy_of(record) for record in good]
    for name, process, _ in HOPS:
        values = [anatomy.hops_us[name] / 1e3 for anatomy in anatomies]
        lines.append("  " + _percentiles(f"{process:>11} {name}", values))
    return "\n".join(lines)


def _percentiles(name: str, values: list[float]) -> str:
    shown = " / ".join(f"{percentile(values, q):.3f}" for q in (50, 90, 99, 100))
    return f"{name:<32} p50 / p90 / p99 / max  {shown}"


if __name__ == "__main__":
    raise SystemExit(main())
