"""Spans of requests, as a real OTLP collector gets them from a real http worker."""

from __future__ import annotations

import gzip
import itertools
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from http_rig import Rig, running
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from minisgl.messages import FinishReason, GenerateRequest, RequestError
from minisgl.timeline import HOPS

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """Takes OTLP over HTTP and keeps the spans."""

    def __init__(self) -> None:
        collector = self
        self.paths: set[str] = set()
        self.spans: list[Span] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.paths.add(self.path)
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    for scope in resource.scope_spans:
                        collector.spans += scope.spans
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def request(self, name: str) -> tuple[Span, dict[str, Span]]:
        """The span of the request with this id, and its children by name."""
        deadline = time.monotonic() + 10
        while not (found := [span for span in self.spans if _attributes(span).get("gen_ai.response.id") == name]):
            assert time.monotonic() < deadline, f"no span of {name}"
            time.sleep(0.02)
        (root,) = found
        return root, {span.name: span for span in self.spans if span.parent_span_id == root.span_id}


def _attributes(span: Span) -> dict[str, object]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value") or "string_value") for pair in span.attributes}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


@pytest.fixture(scope="module")
def rig(collector: Collector) -> Iterator[Rig]:
    with running(otlp_endpoint=collector.url) as rig:
        yield rig


def test_a_request_is_a_span_with_a_child_for_every_hop(rig: Rig, collector: Collector) -> None:
    began = time.time_ns()
    parent = f"00-{TRACE_ID}-{SPAN_ID}-01"
    connection = rig.post({"prompt": "Hi", "temperature": 0.5}, **{"X-Request-Id": "traced", "traceparent": parent})
    request = rig.from_http(GenerateRequest)
    rig.delta(request, "a", [1], opens=True)
    response = connection.getresponse()
    time.sleep(0.05)
    rig.delta(request, "b", [2, 3], FinishReason.LENGTH)
    response.read()
    root, children = collector.request("traced")
    assert collector.paths == {"/v1/traces"}
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE_ID, SPAN_ID)
    assert began <= root.start_time_unix_nano < root.end_time_unix_nano <= time.time_ns()
    attributes = _attributes(root)
    assert attributes["gen_ai.request.model"] == "demo"
    assert attributes["gen_ai.usage.input_tokens"] == 7
    assert attributes["gen_ai.usage.output_tokens"] == 3
    assert attributes["minisgl.outcome"] == "ok"
    assert set(children) == {*HOPS, "decode"}
    hops = [children[hop] for hop in HOPS]
    assert hops[0].start_time_unix_nano == root.start_time_unix_nano
    for before, after in itertools.pairwise(hops):
        assert before.end_time_unix_nano == after.start_time_unix_nano
    decode = children["decode"]
    assert decode.end_time_unix_nano - decode.start_time_unix_nano > 0.04e9
    for child in children.values():
        assert child.trace_id == root.trace_id
        assert child.end_time_unix_nano <= root.end_time_unix_nano


def test_a_request_that_failed_is_an_error(rig: Rig, collector: Collector) -> None:
    connection = rig.post({"prompt": "Hi"}, **{"X-Request-Id": "broken", "traceparent": "nonsense"})
    rig.ring.send(RequestError(rig.from_http(GenerateRequest).rid, 500, "engine_failure", "the engine failed"))
    assert connection.getresponse().status == 500
    root, children = collector.request("broken")
    assert (root.status.code, root.status.message) == (Status.STATUS_CODE_ERROR, "the engine failed")
    assert not root.parent_span_id
    assert set(children) == {"http_parse"}


def test_a_client_can_ask_for_no_span(rig: Rig, collector: Collector) -> None:
    parent = f"00-{TRACE_ID}-{SPAN_ID}-00"
    for name, headers in (("unsampled", {"traceparent": parent}), ("sampled", {})):
        connection = rig.post({"prompt": "Hi"}, **{"X-Request-Id": name, **headers})
        rig.answer(rig.from_http(GenerateRequest), "a")
        connection.getresponse().read()
    collector.request("sampled")
    assert not [span for span in collector.spans if _attributes(span).get("gen_ai.response.id") == "unsampled"]


def test_a_collector_that_is_away_harms_nothing_and_the_last_spans_are_sent_at_the_end(collector: Collector) -> None:
    with running(otlp_endpoint="http://127.0.0.1:9") as rig:
        connection, request = rig.ask({"prompt": "Hi"})
        rig.answer(request, "a")
        assert connection.getresponse().status == 200
        began = time.monotonic()
        assert rig.stop() == 0
        assert time.monotonic() - began < 5
    with running(otlp_endpoint=f"{collector.url}/v1/traces") as rig:
        connection = rig.post({"prompt": "Hi"}, **{"X-Request-Id": "last"})
        rig.answer(rig.from_http(GenerateRequest), "a")
        connection.getresponse().read()
        rig.stats(ok=1)
        assert rig.stop() == 0
    collector.request("last")
