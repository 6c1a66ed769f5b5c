"""The scripts end to end: a real minisgl with the demo model, and the same thing broken in the middle of a run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import delivery_bench
import psutil
import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
SECONDS = 90


def run(script, *words):
    return subprocess.run(
        [sys.executable, str(BENCH / script), *words], capture_output=True, text=True, timeout=SECONDS, check=False
    )


@pytest.mark.parametrize("script", ["server_bench.py", "local_bench.py", "ttfb.py", "make_model.py"])
def test_help_is_there_and_imports_nothing_heavy(script):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(BENCH / script), "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    assert "python bench/" in done.stdout
    for heavy in ("torch", "transformers", "matplotlib"):
        assert f" {heavy}\n" not in done.stderr


def test_a_run_on_the_demo_model_is_a_result_with_a_report(tmp_path):
    done = run(
        *("server_bench.py", "--systems", "minisgl", "--concurrency", "1,3", "--rounds", "1", "--output-len", "64"),
        *("--waves", "2", "--min-requests", "3", "--out", str(tmp_path), "--records"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "server.json").read_text())
    assert report["refused"] is False
    assert report["remarks"] == []
    assert [(cell["level"]["concurrency"], cell["requests"]) for cell in report["cells"]] == [(1, 3), (3, 6)]
    for cell in report["cells"]:
        assert cell["output_tokens"] == 64
        assert cell["prompt_tokens"] == 16
        assert 0 < cell["ttft"]["p50"] <= cell["ttft"]["p99"] <= cell["e2e"]["p99"]
        assert cell["decode"]["copy_fraction"] > 0
    assert report["servers"]["minisgl"]["facts"]["version"].startswith("0.")
    assert "## 16 in, 64 out" in (tmp_path / "server.md").read_text()
    rows = [json.loads(line) for line in (tmp_path / "server.records.jsonl").read_text().splitlines()]
    assert Counter(row["level"] for row in rows) == {"1": 3, "3": 6}
    # Tokens that came with the first one have no gap; of 8, all may on a busy machine.
    assert all(0 < len(row["gaps_ms"]) <= 63 for row in rows)


def wait_for_answers(server, count):
    """Until the launcher's server has answered so many requests."""
    (port,) = {socket.laddr.port for socket in server.net_connections("tcp") if socket.status == psutil.CONN_LISTEN}
    deadline = time.monotonic() + SECONDS
    while delivery_bench.workers(f"http://127.0.0.1:{port}")["http-0"]["stats"]["ok"] < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_server_that_dies_in_the_middle_is_reported_as_such(tmp_path):
    bench = subprocess.Popen(
        [
            *(sys.executable, str(BENCH / "server_bench.py"), "--systems", "minisgl", "--concurrency", "2"),
            *("--min-requests", "500", "--output-len", "64", "--rounds", "1", "--out", str(tmp_path)),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in bench.stderr:
            if "is ready" in line:
                break
        server = next(
            child
            for child in psutil.Process(bench.pid).children()
            if any("launch.py" in word for word in child.cmdline())
        )
        wait_for_answers(server, 20)
        processes = [server, *server.children(recursive=True)]
        server.kill()
        _, text = bench.communicate(timeout=SECONDS)
    finally:
        bench.kill()
    assert bench.returncode == 1
    assert "REFUSED" in text
    report = json.loads((tmp_path / "server.json").read_text())
    assert report["refused"] is True
    reasons = " ".join(report["cells"][0]["refused"])
    assert "minisgl ended by itself (SIGKILL)" in reasons
    assert "connection lost" in reasons
    assert report["cells"][0]["output_tps"] is None
    assert "**REFUSED: this run is not a result.**" in (tmp_path / "server.md").read_text()
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert alive == []


def test_the_hops_of_a_real_server_add_up(tmp_path):
    trace = tmp_path / "trace.json"
    done = run("ttfb.py", "--requests", "12", "--concurrency", "3", "--perfetto", str(trace), "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "hops add up to the client's own TTFB" in done.stdout
    events = json.loads(trace.read_text())["traceEvents"]
    flows = Counter(event["id"] for event in events if event["ph"] in "stf")
    assert len(flows) == 12
    processes = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert {"client", "http", "tokenizer", "scheduler", "detokenizer"} <= processes
    # Every request has 16 tokens, so it takes part in 16 steps, alone or with up to two others.
    steps = [event["name"] for event in events if event["name"].startswith("step of ")]
    assert sum(int(name.removeprefix("step of ")) for name in steps) == 12 * 16
    assert {"step of 1", "step of 2", "step of 3"} >= set(steps)


def test_a_server_that_cannot_start_is_named_with_its_last_words(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "qwen2"}')
    done = run("ttfb.py", "--model", str(model), "--out", str(tmp_path), "--quick")
    assert done.returncode == 1
    assert "REFUSED: minisgl ended by itself" in done.stderr
    assert "last words" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_a_run_that_is_cut_short_keeps_what_it_measured_and_leaves_no_server(tmp_path):
    bench = subprocess.Popen(
        [
            *(sys.executable, str(BENCH / "server_bench.py"), "--systems", "minisgl", "--concurrency", "1,2"),
            *("--min-requests", "2", "--output-len", "8", "--rounds", "500", "--out", str(tmp_path)),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in bench.stderr:
            if "load 2:" in line:
                break
        processes = psutil.Process(bench.pid).children(recursive=True)
        bench.terminate()
        assert bench.wait(30) == 143
    finally:
        bench.kill()
    report = json.loads((tmp_path / "server.json").read_text())
    assert report["cells"][0]["output_tps"] > 0
    assert "cut short" in report["remarks"][0]
    assert "**cut short" in (tmp_path / "server.md").read_text()
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert alive == []


@pytest.mark.long
def test_served_streams_and_padded_batches_take_turns():
    words = ("--batch", "2", "--rounds", "2", "--waves", "1", "--output-len", "uniform:4:9", "--request-timeout", "60")
    done = run("padded_batch.py", *words)
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.fullmatch(
        r"  2 at a time: minisgl over HTTP ([\d.]+) tokens/s, Hugging Face's padded batch ([\d.]+): [\d.]+x"
        r"   \(rounds [\d.]+ : [\d.]+, [\d.]+ : [\d.]+\)\n",
        done.stdout,
    )
    assert found is not None, done.stdout
    assert min(float(figure) for figure in found.groups()) > 1
