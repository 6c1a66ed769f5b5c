"""The delivery benchmark runs the real stack; only its engine is made up."""

from __future__ import annotations

import subprocess
import sys

import pytest
from benchlib.pace import decode_ms, prefill_ms
from benchlib.servers import REPOSITORY


def test_it_reports_every_process_and_hop():
    command = [sys.executable, "bench/delivery_bench.py", "--streams", "6", "--waves", "2", "--rounds", "1"]
    extra = ["--output-len", "24", "--stalled", "2", "--server-args", "--http-workers 2 --detokenizer-workers 2"]
    done = subprocess.run([*command, *extra], cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "REFUSED" not in done.stdout
    for word in ("tokens/s", "http-0", "http-1", "detokenizer-1", "scheduler-0", "pipe_to_http", "between tokens"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("lengths", "milliseconds"),
    [([], 0), ([16], 0.97), ([512, 512], 3.02), ([512, 513], 3.02 + 0.97), ([16] * 65, 3.02 + 0.97), ([2048], 6.04)],
)
def test_prompts_run_in_parts_of_bounded_tokens_and_rows(lengths, milliseconds):
    assert prefill_ms(lengths) == pytest.approx(milliseconds)


def test_a_decode_step_takes_the_smallest_graph_that_holds_it():
    assert [decode_ms(rows) for rows in (0, 1, 17, 256)] == [0, 1.0, 1.05, 1.57]
