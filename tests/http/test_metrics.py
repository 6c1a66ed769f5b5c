"""GET /metrics through a real http worker, read as Prometheus reads it: names, counters that balance, the board."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from importlib import resources
from typing import Any

import pytest
from http_rig import Rig, running
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from minisgl.http.accounting import OUTCOMES
from minisgl.http.figures import Histogram
from minisgl.messages import AbortRequest, FinishReason, GenerateRequest, Health, RequestError
from minisgl.timeline import HOPS

SCHEDULER = {
    "state": "ready",
    "epoch": 4,
    "restarts": 3,
    "heartbeat_age_ms": 120,
    "loop_age_ms": 30,
    "info": {"page_size": 16},
    "stats": {
        "running": 5,
        "waiting": 2,
        "kv_pages_free": 30,
        "kv_pages_evictable": 10,
        "kv_pages_total": 40,
        "kv_pages_leaked": 0,
        "preemptions": 7,
        "steps": 1000,
        "step_ms": 2.5,
        "tokens_generated": 12345,
        "frames_dropped": 1,
    },
}
OTHER_WORKERS = {
    "tokenizer-0": {"state": "ready", "epoch": 1, "stats": {"held": 3, "in_slow_lane": 1}},
    "detokenizer-0": {"state": "dead", "epoch": 2, "stats": {}},
    "http-0": {"state": "ready", "epoch": 3, "stats": {"streams": 9}},
}


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with running(max_queued_requests=3) as rig:
        yield rig


def scrape_when(rig: Rig, name: str, **labels: str) -> Scrape:
    """A scrape that has such a sample: messages from the supervisor take a moment."""
    deadline = time.monotonic() + 20
    while not (scrape := Scrape(rig)).values(name, **labels):
        assert time.monotonic() < deadline, f"no sample of {name} {labels}"
    return scrape


def scrape_at(rig: Rig, in_flight: int) -> Scrape:
    """A scrape with this many requests in flight: one ends a moment after its last byte."""
    deadline = time.monotonic() + 20
    while (scrape := Scrape(rig)).value("minisgl:requests_in_flight") != in_flight:
        assert time.monotonic() < deadline, f"not {in_flight} requests in flight"
    return scrape


class Scrape:
    """What one GET /metrics says, and how long it took."""

    def __init__(self, rig: Rig) -> None:
        started = time.monotonic()
        status, raw = rig.get("/metrics")
        self.seconds = time.monotonic() - started
        assert status == 200
        families = list(text_string_to_metric_families(raw.decode()))
        self.families: dict[str, Metric] = {family.name: family for family in families}
        assert len(families) == len(self.families), "a metric is told twice"

    def values(self, name: str, **labels: str) -> list[float]:
        """The samples of this name that have these labels."""
        samples = (sample for family in self.families.values() for sample in family.samples)
        return [sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items()]

    def value(self, name: str, **labels: str) -> float:
        """Their sum; there must be some."""
        values = self.values(name, **labels)
        assert values, f"no sample of {name} {labels}"
        return sum(values)

    def outcomes(self) -> dict[str, float]:
        return {outcome: self.value("minisgl:requests_total", outcome=outcome) for outcome in OUTCOMES}


def test_schedulers_and_processes_are_reported_under_the_names_that_boards_use(rig: Rig) -> None:
    rig.ring.send(Health([], {"scheduler-0": SCHEDULER, **OTHER_WORKERS}))
    scrape = scrape_when(rig, "minisgl:worker_up", worker="scheduler-0", epoch="4")
    expected = {
        "sglang:num_running_reqs": 5,
        "sglang:num_queue_reqs": 2,
        "sglang:max_total_num_tokens": 640,
        "sglang:num_used_tokens": 160,
        "sglang:kv_available_tokens": 320,
        "sglang:kv_evictable_tokens": 160,
        "sglang:token_usage": 0.25,
        "sglang:num_retracted_requests_total": 7,
        "minisgl:preemptions_total": 7,
        "minisgl:kv_pages_capacity": 40,
        "minisgl:kv_pages_free": 30,
        "minisgl:kv_pages_leaked": 0,
        "minisgl:steps_total": 1000,
        "minisgl:tokens_sampled_total": 12345,
    }
    for name, value in expected.items():
        assert scrape.value(name, worker="scheduler-0", model_name="demo") == value, name
    assert scrape.value("minisgl:healthy") == 1
    assert scrape.value("minisgl:worker_up", worker="scheduler-0", epoch="4") == 1
    assert scrape.value("minisgl:worker_up", worker="detokenizer-0", epoch="2") == 0
    assert scrape.value("minisgl:worker_restarts_total", worker="scheduler-0") == 3
    assert scrape.value("minisgl:worker_heartbeat_age_seconds", worker="scheduler-0") == 0.12
    assert scrape.value("minisgl:ipc_frames_dropped_total", worker="scheduler-0") == 1
    depths = {name: scrape.value("minisgl:queue_depth", worker=name) for name in (*OTHER_WORKERS, "scheduler-0")}
    assert depths == {"tokenizer-0": 4, "detokenizer-0": 0, "http-0": 9, "scheduler-0": 2}


def test_a_scheduler_without_statistics_has_no_values_rather_than_wrong_ones(rig: Rig) -> None:
    starting = {"state": "restarting", "epoch": 5, "info": {}, "stats": {}}
    rig.ring.send(Health(["scheduler-0 is being restarted"], {"scheduler-0": starting}))
    scrape = scrape_when(rig, "minisgl:worker_up", worker="scheduler-0", epoch="5")
    assert scrape.value("minisgl:worker_up") == 0
    assert scrape.value("minisgl:healthy") == 0
    assert not scrape.values("sglang:num_running_reqs")
    assert not scrape.values("sglang:max_total_num_tokens")


def test_a_request_is_measured_when_it_ends(rig: Rig) -> None:
    before = Scrape(rig)

    def grown(scrape: Scrape, name: str, **labels: str) -> float:
        return scrape.value(name, **labels) - before.value(name, **labels)

    connection, request = rig.ask({"prompt": "Hi"})
    rig.delta(request, "a", [1, 2], opens=True)
    connection.getresponse().readline()
    running = Scrape(rig)
    # Tokens are counted as they arrive, durations at the end.
    assert grown(running, "sglang:prompt_tokens_total") == 7
    assert grown(running, "sglang:cached_tokens_total") == 2
    assert grown(running, "sglang:generation_tokens_total") == 2
    assert running.value("sglang:gen_throughput") >= 0
    assert grown(running, "sglang:time_to_first_token_seconds_count") == 0
    assert running.value("minisgl:requests_in_flight") == 1
    rig.delta(request, "b", [3, 4, 5])
    rig.delta(request, "c", [6], FinishReason.LENGTH)
    after = scrape_at(rig, in_flight=0)
    assert grown(after, "sglang:generation_tokens_total") == 6
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "queue_time_seconds"):
        assert grown(after, f"sglang:{name}_count") == 1
    # Two tokens came first, so there are four gaps.
    assert grown(after, "sglang:inter_token_latency_seconds_count") == 4
    gaps = grown(after, "sglang:inter_token_latency_seconds_sum")
    assert 0 < gaps < grown(after, "sglang:e2e_request_latency_seconds_sum")
    assert grown(after, "sglang:prompt_tokens_histogram_sum") == 7
    assert grown(after, "sglang:generation_tokens_histogram_sum") == 6
    assert grown(after, "sglang:generation_tokens_histogram_bucket", le="4.0") == 0
    assert grown(after, "sglang:generation_tokens_histogram_bucket", le="16.0") == 1
    assert {hop: grown(after, "minisgl:hop_seconds_count", hop=hop) for hop in HOPS} == dict.fromkeys(HOPS, 1)
    hops = sum(grown(after, "minisgl:hop_seconds_sum", hop=hop) for hop in HOPS)
    assert hops == pytest.approx(grown(after, "sglang:time_to_first_token_seconds_sum"), rel=1e-6)
    edge = {"edge": "detokenizer-http"}
    age = grown(after, "minisgl:ipc_message_age_seconds_sum", **edge)
    assert age == pytest.approx(grown(after, "minisgl:hop_seconds_sum", hop="pipe_to_http"))


def test_the_first_token_of_a_whole_answer_is_not_its_last(rig: Rig) -> None:
    before = Scrape(rig)
    connection, request = rig.ask({"prompt": "Hi", "stream": False})
    rig.delta(request, "a", opens=True)
    time.sleep(0.3)
    rig.delta(request, "b", [1], FinishReason.LENGTH)
    assert connection.getresponse().status == 200
    after = scrape_at(rig, in_flight=0)
    first, last = (
        after.value(name) - before.value(name)
        for name in ("sglang:time_to_first_token_seconds_sum", "sglang:e2e_request_latency_seconds_sum")
    )
    assert first + 0.25 < last


def test_a_response_with_two_answers_is_one_request_and_two_measurements(rig: Rig) -> None:
    before = Scrape(rig)
    connection = rig.post({"model": "demo", "prompt": "Hi", "n": 2}, "/v1/completions")
    requests = [rig.from_http(GenerateRequest) for _ in range(2)]
    for request in requests:
        rig.answer(request, "a", "b")
    assert connection.getresponse().status == 200
    after = scrape_at(rig, in_flight=0)
    expected = {"sglang:num_requests_total": 1, "sglang:time_to_first_token_seconds_count": 2}
    for name, count in {**expected, "sglang:generation_tokens_total": 4}.items():
        assert after.value(name) - before.value(name) == count, name


def test_a_prompt_that_was_never_computed_is_not_counted(rig: Rig) -> None:
    before = Scrape(rig)
    _, request = rig.ask({"prompt": "Hi"})
    rig.delta(request, "", [], FinishReason.ABORT, opens=True)
    after = scrape_at(rig, in_flight=0)
    assert after.outcomes()["aborted"] == before.outcomes()["aborted"] + 1
    for name in ("sglang:prompt_tokens_total", "sglang:time_to_first_token_seconds_count"):
        assert after.value(name) == before.value(name)


def test_the_counters_balance_exactly_whatever_happens(rig: Rig) -> None:
    """Every way a request can end, with others in flight, and the balance looked at after each."""
    first = Scrape(rig)

    def expect(**changes: int) -> None:
        scrape = scrape_at(rig, changes.pop("in_flight"))
        outcomes = scrape.outcomes()
        grown = {name: count - first.outcomes()[name] for name, count in outcomes.items()}
        assert grown == {**dict.fromkeys(OUTCOMES, 0), **changes}
        in_flight = scrape.value("minisgl:requests_in_flight")
        assert scrape.value("minisgl:requests_received_total") == sum(outcomes.values()) + in_flight
        assert scrape.value("sglang:num_requests_total") == sum(outcomes.values())
        assert scrape.value("sglang:num_aborted_requests_total") == outcomes["aborted"]

    for body in (b"{", b"{}", {"prompt": 1}, {"prompt": "x", "temperature": -1}):
        assert rig.error(body)[0] == 400
    expect(client_error=4, in_flight=0)
    held = [rig.ask({"prompt": "held"}) for _ in range(3)]
    assert rig.error({"prompt": "full"})[1]["code"] == "queue_full"
    expect(client_error=4, rejected=1, in_flight=3)
    connection, request = held.pop()
    connection.close()
    rig.from_http(AbortRequest)
    rig.delta(request, "", [], FinishReason.ABORT)
    expect(client_error=4, rejected=1, aborted=1, in_flight=2)
    connection, request = held.pop()
    rig.ring.send(RequestError(request.rid, 400, "context_length_exceeded", "too long"))
    assert connection.getresponse().status == 400
    expect(client_error=5, rejected=1, aborted=1, in_flight=1)
    connection, request = held.pop()
    rig.delta(request, "a", opens=True)
    rig.ring.send(RequestError(request.rid, 500, "engine_failure", "broken"))
    connection.getresponse().read()
    expect(client_error=5, rejected=1, aborted=1, failed=1, in_flight=0)
    connection, request = rig.ask({"prompt": "good"})
    rig.answer(request, "a", "b")
    connection.getresponse().read()
    expect(client_error=5, rejected=1, aborted=1, failed=1, ok=1, in_flight=0)


def test_a_scrape_under_load_is_fast_and_consistent() -> None:
    with running() as rig:
        asked = [rig.ask({"prompt": str(index)}) for index in range(200)]
        for _, request in asked:
            rig.delta(request, "a", opens=True)
        rig.settle()
        seconds = []
        for _ in range(10):
            for _, request in asked:
                rig.delta(request, "b")
            scrape = Scrape(rig)
            seconds.append(scrape.seconds)
            in_flight = scrape.value("minisgl:requests_in_flight")
            assert scrape.value("minisgl:requests_received_total") == in_flight + sum(scrape.outcomes().values()) == 200
        # The goal is 50 ms; of the best one, as a busy test machine holds any of them up.
        assert min(seconds) < 0.05, seconds


def test_one_scrape_answers_for_all_http_workers() -> None:
    with running(http_workers=2) as rig:
        connection, request = rig.ask({"prompt": "Hi"})
        rig.answer(request, "a", "b")
        connection.getresponse().read()
        # What a second worker would send is what this one does.
        stats = rig.stats(ok=1, in_flight=0)
        other = {"state": "ready", "epoch": 1, "stats": {**stats, "requests_total": 11, "ok": 10, "in_flight": 0}}
        rig.ring.send(Health([], {"http-1": other}))
        scrape = scrape_when(rig, "minisgl:requests_received_total", worker="http-1")
        assert scrape.value("minisgl:requests_received_total", worker="http-0") == 1
        assert scrape.value("minisgl:requests_received_total", worker="http-1") == 11
        assert scrape.value("minisgl:requests_total", worker="http-1", outcome="ok") == 10
        assert scrape.value("sglang:generation_tokens_total") == 4
        assert scrape.value("sglang:time_to_first_token_seconds_count", worker="http-1") == 1
        assert "figures" not in rig.get("/health")[1]["workers"]["http-1"]["stats"]


def test_histograms_count_values_on_their_bounds_below_them() -> None:
    histogram = Histogram((1, 2))
    for value in (0.5, 1, 1.5, 2, 3):
        histogram.observe(value)
    histogram.observe(2, times=3)
    assert histogram.counts == [2, 5, 1]
    assert histogram.sum == 14


# ---- the Grafana board ----------------------------------------------------------------------------------------------


def board() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(resources.files("minisgl.http").joinpath("grafana.json").read_text())
    return loaded


def queries() -> list[str]:
    targets = [target["expr"] for panel in board()["panels"] for target in panel.get("targets", [])]
    variables = [str(variable["query"]) for variable in board()["templating"]["list"] if variable["type"] == "query"]
    return targets + variables


def test_every_metric_of_the_board_exists(rig: Rig) -> None:
    rig.ring.send(Health([], {"scheduler-0": SCHEDULER}))
    scrape = scrape_when(rig, "minisgl:worker_up", worker="scheduler-0", epoch="4")
    exported = {sample.name for family in scrape.families.values() for sample in family.samples}
    asked = {name for query in queries() for name in re.findall(r"\b(?:sglang|minisgl):\w+", query)}
    assert len(asked) > 20
    assert not asked - exported


def test_every_label_of_the_board_exists(rig: Rig) -> None:
    scrape = Scrape(rig)
    labels = {label for family in scrape.families.values() for sample in family.samples for label in sample.labels}
    matched = {name for query in queries() for name in re.findall(r"[{,]\s*(\w+)\s*=~?", query)}
    grouped = {
        name.strip()
        for query in queries()
        for group in re.findall(r"\bby \(([^)]*)\)", query)
        for name in group.split(",")
    }
    assert matched | grouped <= labels


def test_the_panels_of_the_board_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in board()["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not taken & cells, panel["title"]
        taken |= cells
        assert panel["type"] == "row" or panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert len({panel["id"] for panel in board()["panels"]}) == len(board()["panels"])
