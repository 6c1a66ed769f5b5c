"""The OpenAPI document against the real stack: what it allows, what it forbids, and what it says of the answers.

Schemathesis makes requests from the document, right and wrong ones, and checks that no answer is a 5xx, a status or a
media type that the document does not name, or other than its schema, and that nothing forbidden is accepted. What it
may not expect is that all it makes is accepted: some rules (this model's name, its vocabulary) are not in the document.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_server import RealServer, starting

pytest.importorskip("schemathesis", reason="needs schemathesis (pip install schemathesis)")

GENERATION = "^/(generate|v1/chat/completions|v1/completions)$"
SECONDS = "4"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    # Short answers, so that many requests find time.
    for server in starting(tmp_path_factory.mktemp("schema") / "log", "--context-length", "64"):
        server.wait_ready()
        yield server


@pytest.mark.parametrize(
    "choice",
    [
        ("--exclude-path-regex", GENERATION, "--phases", "examples,coverage,fuzzing"),
        ("--include-path-regex", GENERATION, "--phases", "examples,fuzzing"),
    ],
    ids=["small routes", "generation"],
)
def test_no_answer_contradicts_the_document(server: RealServer, choice: tuple[str, ...], tmp_path: Path) -> None:
    limits = ("--max-time", SECONDS, "--request-timeout", "30", "--no-shrink")
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", *limits, *choice]
    command += ["--exclude-checks", "positive_data_acceptance", "--warnings", "off"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    assert " generated, " in done.stdout
    status, health = server.health()
    assert (status, [worker["restarts"] for worker in health["workers"].values()]) == (
        200,
        [0] * len(health["workers"]),
    )
