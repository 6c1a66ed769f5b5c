"""GET /metrics: what this server does, in Prometheus's text format, under sglang's names where sglang has one.

One scrape of any http worker answers for the whole server: every worker's statistics reach every http worker by way of
the supervisor (those of others are at most 0.7 s old). Each series says in `worker` whose it is; a restarted
worker counts from zero again, which Prometheus understands as a counter reset.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from minisgl.config import WorkerSpec
from minisgl.http.accounting import OUTCOMES, Accounts
from minisgl.http.figures import HOP_BOUNDS, LATENCY_BOUNDS, TOKEN_BOUNDS
from minisgl.http.health import HealthView
from minisgl.http.streaming import Streams
from minisgl.messages import JsonObject
from minisgl.timeline import HOPS

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Value: TypeAlias = "float | None"
"""None when there is nothing to tell yet."""
Workers: TypeAlias = "dict[str, JsonObject]"
"""Per worker its entry in Health.workers."""


class ServerMetrics:
    """Reads the numbers when it is asked for them; between scrapes it does nothing."""

    def __init__(self, spec: WorkerSpec, accounts: Accounts, streams: Streams, health: HealthView) -> None:
        self._spec = spec
        self._accounts = accounts
        self._streams = streams
        self._health = health

    async def render(self) -> bytes:
        """All metrics as of one moment. Writing them takes some milliseconds, so streams get their turn in between."""
        texts = []
        for metric in list(self._collect()):
            texts.append(generate_latest(_Family(metric)))
            await asyncio.sleep(0)
        return b"".join(texts)

    def _collect(self) -> Iterator[Metric]:
        model = self._spec.model.name
        workers: Workers = self._health.workers()
        schedulers = {name: worker for name, worker in workers.items() if _kind(name) == "scheduler"}
        https = self._http_stats(workers)
        healthy = not self._health.problems() and not self._streams.draining
        yield GaugeMetricFamily("minisgl:healthy", "1 when GET /health says ok", float(healthy))
        yield from _worker_metrics(workers)
        for family, name, text, read in _SCHEDULER:
            yield _family(family, name, text, model, ((worker, read(entry)) for worker, entry in schedulers.items()))
        for family, name, text, stat in _HTTP:
            yield _family(family, name, text, model, ((worker, stats[stat]) for worker, stats in https.items()))
        yield _outcomes(https, model)
        yield from _histograms(https, model)

    def _http_stats(self, workers: Workers) -> Workers:
        """The statistics of every http worker, each consistent in itself; our own are those of this moment."""
        others = {
            name: {**workers[name]["stats"], **figures}
            for name, figures in self._health.figures.items()
            if name != self._spec.name
        }
        own = {**self._accounts.snapshot(), **self._streams.snapshot(), **self._streams.figures.snapshot()}
        for stats in (https := {self._spec.name: own, **others}).values():
            stats["ended"] = stats["requests_total"] - stats["in_flight"]
            stats["cache_hit_rate"] = stats["cached_tokens"] / max(1, stats["prompt_tokens"])
        return https


class _Family(Collector):
    """One metric as a registry of its own."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterable[Metric]:
        return [self._metric]


# ---- one value a worker ---------------------------------------------------------------------------------------------


def _stat(name: str) -> Callable[[JsonObject], Value]:
    return lambda worker: worker.get("stats", {}).get(name)


def _pages_used(worker: JsonObject) -> Value:
    """KV pages that running requests hold; merely cached ones count as free, since they can be had at any time."""
    stats = worker.get("stats", {})
    if "kv_pages_total" not in stats:
        return None
    used: int = stats["kv_pages_total"] - stats["kv_pages_free"]
    return used


def _pages_unused(worker: JsonObject) -> Value:
    """KV pages that hold nothing, not even a cached prefix."""
    stats = worker.get("stats", {})
    if "kv_pages_free" not in stats:
        return None
    unused: int = stats["kv_pages_free"] - stats["kv_pages_evictable"]
    return unused


def _usage(worker: JsonObject) -> Value:
    used = _pages_used(worker)
    return None if used is None else used / max(1, worker["stats"]["kv_pages_total"])


def _tokens(pages: Callable[[JsonObject], Value]) -> Callable[[JsonObject], Value]:
    """A number of KV pages as tokens."""

    def read(worker: JsonObject) -> Value:
        count, page_size = pages(worker), worker.get("info", {}).get("page_size")
        return None if count is None or page_size is None else count * page_size

    return read


_G, _C = GaugeMetricFamily, CounterMetricFamily
_PREEMPTED = "running requests that had to give their KV pages back"
_SCHEDULER = (
    (_G, "sglang:num_running_reqs", "requests that are being computed", _stat("running")),
    (_G, "sglang:num_queue_reqs", "requests that wait for a place", _stat("waiting")),
    (_G, "sglang:max_total_num_tokens", "tokens that the KV cache holds", _tokens(_stat("kv_pages_total"))),
    (_G, "sglang:num_used_tokens", "KV cache held by running requests, in tokens", _tokens(_pages_used)),
    (_G, "sglang:token_usage", "part of the KV cache held by running requests, 0 to 1", _usage),
    (_G, "sglang:kv_available_tokens", "unused KV cache, in tokens", _tokens(_pages_unused)),
    (_G, "sglang:kv_evictable_tokens", "prefix cache not in use, in tokens", _tokens(_stat("kv_pages_evictable"))),
    (_C, "sglang:num_retracted_requests", _PREEMPTED, _stat("preemptions")),
    (_C, "minisgl:preemptions", _PREEMPTED, _stat("preemptions")),
    (_G, "minisgl:kv_pages_capacity", "KV pages there are", _stat("kv_pages_total")),
    (_G, "minisgl:kv_pages_free", "KV pages that no running request holds", _stat("kv_pages_free")),
    (
        _G,
        "minisgl:kv_pages_leaked",
        "KV pages that are unaccounted for; 0 unless there is a bug",
        _stat("kv_pages_leaked"),
    ),
    (_C, "minisgl:steps", "model steps", _stat("steps")),
    (_G, "minisgl:last_step_milliseconds", "duration of the last model step", _stat("step_ms")),
    (_C, "minisgl:tokens_sampled", "tokens sampled, those that nobody waited for included", _stat("tokens_generated")),
)
_HTTP = (
    (_C, "sglang:prompt_tokens", "tokens of the prompts that have been computed", "prompt_tokens"),
    (_C, "sglang:cached_tokens", "those of them that came from the prefix cache", "cached_tokens"),
    (_G, "sglang:cache_hit_rate", "cached part of all prompt tokens, 0 to 1", "cache_hit_rate"),
    (_C, "sglang:generation_tokens", "tokens of answers that have arrived", "generation_tokens"),
    (_G, "sglang:gen_throughput", "tokens per second over the last seconds", "gen_throughput"),
    (_C, "sglang:num_requests", "requests that ended, in whatever way", "ended"),
    (_C, "sglang:num_aborted_requests", "requests that ended by an abort", "aborted"),
    (_C, "minisgl:requests_received", "requests received: those ended plus those in flight", "requests_total"),
    (_G, "minisgl:requests_in_flight", "requests received and not ended", "in_flight"),
    (_C, "minisgl:requests_replayed", "requests sent again after a worker died", "replayed"),
    (_C, "minisgl:late_rows", "answers to requests that nobody waited for any more", "late_rows"),
    (_G, "minisgl:slow_clients", "clients whose socket is full", "slow_clients"),
)


def _family(
    family: type[GaugeMetricFamily] | type[CounterMetricFamily],
    name: str,
    text: str,
    model: str,
    values: Iterable[tuple[str, Value]],
) -> CounterMetricFamily | GaugeMetricFamily:
    metric = family(name, text, labels=("model_name", "worker"))
    for worker, value in values:
        if value is not None:
            metric.add_metric((model, worker), value)
    return metric


def _outcomes(https: Workers, model: str) -> Metric:
    metric = CounterMetricFamily("minisgl:requests", "requests that ended", labels=("model_name", "worker", "outcome"))
    for worker, stats in https.items():
        for outcome in OUTCOMES:
            metric.add_metric((model, worker, outcome), stats[outcome])
    return metric


# ---- the processes --------------------------------------------------------------------------------------------------


def _worker_metrics(workers: Workers) -> Iterator[Metric]:
    up = GaugeMetricFamily("minisgl:worker_up", "1 while this life of the worker is ready", labels=("worker", "epoch"))
    one = ("worker",)
    restarts = CounterMetricFamily("minisgl:worker_restarts", "lives after the first", labels=one)
    silence = GaugeMetricFamily("minisgl:worker_heartbeat_age_seconds", "since its last sign of life", labels=one)
    stall = GaugeMetricFamily("minisgl:worker_loop_age_seconds", "since its main loop came round", labels=one)
    depth = GaugeMetricFamily("minisgl:queue_depth", "requests that wait in or pass through this worker", labels=one)
    dropped = CounterMetricFamily("minisgl:ipc_frames_dropped", "frames that were no valid message", labels=one)
    for name, worker in workers.items():
        stats = worker.get("stats", {})
        up.add_metric((name, str(worker["epoch"])), worker["state"] == "ready")
        restarts.add_metric((name,), worker.get("restarts", 0))
        silence.add_metric((name,), worker.get("heartbeat_age_ms", 0) / 1000)
        stall.add_metric((name,), worker.get("loop_age_ms", 0) / 1000)
        depth.add_metric((name,), sum(stats.get(part, 0) for part in _QUEUES[_kind(name)]))
        dropped.add_metric((name,), stats.get("frames_dropped", 0))
    yield from (up, restarts, silence, stall, depth, dropped)


_QUEUES = {
    "http": ("streams",),
    "tokenizer": ("held", "in_slow_lane"),
    "scheduler": ("waiting",),
    "detokenizer": ("streams",),
}


def _kind(worker: str) -> str:
    return worker.rpartition("-")[0]


# ---- histograms -----------------------------------------------------------------------------------------------------

_HISTOGRAMS = (
    ("sglang:time_to_first_token_seconds", "from the request's head to its first token", "ttft", LATENCY_BOUNDS),
    ("sglang:inter_token_latency_seconds", "a request's mean gap, once for each of its gaps", "itl", LATENCY_BOUNDS),
    ("sglang:e2e_request_latency_seconds", "of the requests answered in full", "e2e", LATENCY_BOUNDS),
    ("sglang:queue_time_seconds", "in the scheduler's queue", "queue", LATENCY_BOUNDS),
    ("sglang:prompt_tokens_histogram", "of the requests answered in full", "prompt", TOKEN_BOUNDS),
    ("sglang:generation_tokens_histogram", "of the requests answered in full", "generation", TOKEN_BOUNDS),
)
_EDGES = {
    "pipe_to_tokenizer": "http-tokenizer",
    "pipe_to_scheduler": "tokenizer-scheduler",
    "pipe_to_detokenizer": "scheduler-detokenizer",
    "pipe_to_http": "detokenizer-http",
}


def _histograms(https: Workers, model: str) -> Iterator[Metric]:
    common = ("model_name", "worker")
    hops = HistogramMetricFamily(
        "minisgl:hop_seconds", "hops of the way to the first byte; together they are its time", labels=(*common, "hop")
    )
    ages = HistogramMetricFamily(
        "minisgl:ipc_message_age_seconds", "between two processes, to the first byte", labels=(*common, "edge")
    )
    for name, text, key, bounds in _HISTOGRAMS:
        metric = HistogramMetricFamily(name, text, labels=common)
        for worker, stats in https.items():
            _add(metric, (model, worker), bounds, stats["histograms"][key])
        yield metric
    for worker, stats in https.items():
        for hop in HOPS:
            _add(hops, (model, worker, hop), HOP_BOUNDS, stats["hops"][hop])
        for hop, edge in _EDGES.items():
            _add(ages, (model, worker, edge), HOP_BOUNDS, stats["hops"][hop])
    yield from (hops, ages)


def _add(
    metric: HistogramMetricFamily, labels: tuple[str, ...], bounds: tuple[float, ...], figures: list[float]
) -> None:
    """One series, of a histogram as Figures.snapshot gives it."""
    total, *counts = figures
    uppers = [*(str(float(bound)) for bound in bounds), "+Inf"]
    metric.add_metric(labels, list(zip(uppers, itertools.accumulate(counts), strict=True)), total)
