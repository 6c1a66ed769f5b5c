"""The micro-benchmark of streamed chunks, with a real http worker, and how its clients tell chunks apart."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchlib.stream_readers import _Client

BENCH = Path(__file__).resolve().parents[2] / "bench"


def test_every_wire_is_measured(tmp_path: Path) -> None:
    words = ["--rounds", "2", "--streams", "1", "3", "--steps", "4", "--chunks", "8"]
    command = [sys.executable, str(BENCH / "chunk_cost.py"), *words, "--json", str(tmp_path / "costs.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    costs = json.loads((tmp_path / "costs.json").read_text())["costs"]
    assert {(row["wire"], row["streams"]) for row in costs} == {
        (wire, streams) for wire in ("native", "chat", "sglang", "send() alone") for streams in (1, 3)
    }
    assert all(0 < cost < 100_000 for row in costs for cost in row["rounds"])
    assert all(len(row["rounds"]) == 2 for row in costs)
    header, *lines = done.stdout.splitlines()
    assert "3 streams" in header and [line.split()[0] for line in lines] == ["native", "chat", "sglang", "send()"]


RESPONSE = (
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    + b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in (b'{"a":1}\n', b"data: x\n\n", b"data: y\n\n"))
    + b"0\r\n\r\n"
)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_chunks_are_counted_however_they_arrive(size: int) -> None:
    client = _Client()
    pieces = [RESPONSE[start : start + size] for start in range(0, len(RESPONSE), size)]
    numbers = [number for piece in pieces for number in client.take(piece)]
    assert client.complete
    assert numbers == [0, 1, 2]
