"""The real stack seen from outside: its metrics while it works and after a death, and where its API key shows up."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from real_server import RealServer, chat, starting, until

from minisgl.client import Client
from minisgl.config import ServerConfig
from minisgl.http.accounting import OUTCOMES
from minisgl.own_server import OwnServer

KEY = "e2e-s3cret"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MINISGL_API_KEY", KEY)
        settings = ("--http-workers", "2", "--narrate", "--log-level", "debug")
        for server in starting(tmp_path_factory.mktemp("observed") / "log", *settings):
            server.wait_ready()
            yield server


def generate(server: RealServer, body: dict[str, object]) -> httpx.Response:
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx.post(f"{server.url}/generate", json={**body, "stream": False}, headers=headers, timeout=60)


def scrape(server: RealServer) -> dict[str, float]:
    """Per sample name the sum over its series."""
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics", timeout=5).text):
        for sample in family.samples:
            name = f"{sample.name}.{sample.labels['outcome']}" if "outcome" in sample.labels else sample.name
            sums[name] = sums.get(name, 0.0) + sample.value
    return sums


def settled(server: RealServer, received: float = 0.0) -> dict[str, float]:
    """The samples once all http workers and the scheduler count the same tokens, and every request has its outcome.

    What one http worker says of another, and of the scheduler, is up to a second old: they may agree on the past.

    Args:
        received: how many requests they must have heard of at least.
    """
    samples: dict[str, float] = {}

    def agree() -> bool:
        samples.update(scrape(server))
        ended = sum(samples.get(f"minisgl:requests_total.{name}", 0.0) for name in OUTCOMES)
        tokens = samples["sglang:generation_tokens_total"]
        all_ended = ended == requests_received(samples) >= received
        return 0 < tokens == samples.get("minisgl:tokens_sampled_total") and all_ended

    until(agree)
    return samples


def requests_received(samples: dict[str, float]) -> float:
    return samples["minisgl:requests_received_total"]


def test_the_counters_of_all_processes_agree(server: RealServer) -> None:
    before = settled(server)
    answers = [generate(server, chat("Count from 1 to 15.")).json() for _ in range(6)]
    tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)

    after = settled(server, requests_received(before) + 6)

    def grown(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    assert grown("minisgl:requests_total.ok") == 6
    assert grown("sglang:generation_tokens_total") == grown("minisgl:tokens_sampled_total") == tokens
    assert grown("sglang:prompt_tokens_total") == sum(answer["usage"]["prompt_tokens"] for answer in answers)
    assert grown("sglang:time_to_first_token_seconds_count") == 6
    assert after["sglang:max_total_num_tokens"] > 0
    assert after["sglang:num_running_reqs"] == after["minisgl:kv_pages_leaked"] == 0
    assert after["minisgl:worker_up"] == 5


def test_a_restart_is_counted(server: RealServer) -> None:
    os.kill(server.worker_pids()["detokenizer-0"], signal.SIGKILL)
    until(lambda: scrape(server)["minisgl:worker_restarts_total"] == 1)
    until(lambda: scrape(server)["minisgl:healthy"] == 1, seconds=20)
    assert generate(server, chat("Spell the word cat.")).status_code == 200


def test_the_key_is_in_no_command_line_and_no_log(server: RealServer) -> None:
    assert httpx.get(f"{server.url}/model_info", timeout=5).status_code == 401
    assert generate(server, chat("Hello!")).status_code == 200
    processes = server.processes()
    assert len(processes) > 5
    assert not any(KEY in argument for process in processes for argument in process.cmdline())
    assert "is request" in server.output()
    assert KEY not in server.output()


def test_the_server_of_a_terminal_client_keeps_the_key_to_itself() -> None:
    config = ServerConfig(model="demo", port=0, device="cpu", cpu_threads=1, dtype="float32", api_key=KEY)
    log: list[str] = []
    with OwnServer(config, log.extend, lambda *_: None) as server:
        family = psutil.Process().children(recursive=True)
        assert len(family) > 4
        assert not any(KEY in argument for process in family for argument in process.cmdline())
        assert Client(server.url, KEY).model_name() == "demo"
        assert httpx.get(f"{server.url}/model_info", timeout=5).status_code == 401
    assert KEY not in "".join(log)
