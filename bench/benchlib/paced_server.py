"""minisgl with an engine that computes nothing: every process is the real one, only a step's duration is made up.

So the delivery path of a fast GPU can be measured on a machine that has none. `run_paced` is the entry point of every
worker process; as a program this module is launch.py with that entry point:

    python -m benchlib.paced_server --model DIR --device cpu --port 0
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from socket import socket

from benchlib.pace import SLOWDOWN, decode_ms, prefill_ms
from minisgl.command_line import parse_args
from minisgl.config import WorkerSpec
from minisgl.messages import AbortRequest, TokenizedRequest
from minisgl.scheduler_proc.core import ReplicaCore
from minisgl.scheduler_proc.main import serve
from minisgl.scheduler_proc.request import RowLogprobs, StepPlan, StepRow
from minisgl.serve import run
from minisgl.worker import PROCESS_KINDS, Worker, run_worker


@dataclass(frozen=True)
class PacedStep:
    tokens: list[int]
    done_at: float


class PacedEngine:
    """Meets core.StepRunner. Answers repeat their prompt, so that a client can tell whether it was sent its own."""

    page_size = 16
    device_name = "cuda:0 (paced, no device)"
    dtype_name = "none"
    runs_ahead = True

    def __init__(self, kv_tokens: int, slowdown: float) -> None:
        self.num_pages = kv_tokens // self.page_size
        self._slowdown = slowdown
        self._free_at = 0.0

    def launch(self, plan: StepPlan) -> PacedStep:
        """Steps run one after another, as on a device."""
        prompts = [row.length for row in plan.rows[plan.decode_rows :]]
        milliseconds = decode_ms(plan.decode_rows) + prefill_ms(prompts)
        self._free_at = max(self._free_at, time.monotonic()) + milliseconds * self._slowdown / 1e3
        return PacedStep([_next_token(row) for row in plan.rows if row.sample], self._free_at)

    def retire(self, step: PacedStep) -> list[int]:
        time.sleep(max(0.0, step.done_at - time.monotonic()))
        return step.tokens

    def logprobs(self, step: PacedStep) -> list[RowLogprobs]:
        return []

    def stay_ahead(self, pages_used: int) -> None: ...

    def prepare_next(self, pages_used: int) -> bool:
        return False


def _next_token(row: StepRow) -> int:
    request = row.request
    return request.token_ids[(row.start + row.length) % request.prompt_len]


# ---- processes ------------------------------------------------------------------------------------------------------


def run_paced(packed_spec: bytes, life_line: Connection, pulse: socket, listen_socket: socket | None = None) -> None:
    """What a worker process runs."""
    PROCESS_KINDS["scheduler"] = "benchlib.paced_server"
    run_worker(packed_spec, life_line, pulse, listen_socket)


def main(worker: Worker) -> None:
    """The scheduler process."""
    spec: WorkerSpec = worker.spec
    worker.open_inbox(TokenizedRequest, AbortRequest)
    kv_tokens = spec.config.max_total_tokens or 2**20
    engine = PacedEngine(kv_tokens, float(os.environ.get(SLOWDOWN, "1")))
    core = ReplicaCore(engine, spec.config, spec.model, spec.index, spec.epoch)
    worker.ready(core.info())
    serve(worker, core)


if __name__ == "__main__":
    # Spawned workers import this module under its own name, not as __main__.
    from benchlib.paced_server import run_paced as entry_point

    sys.exit(run(parse_args(), entry_point=entry_point))
