"""OpenTelemetry: one span per request, with a child for each hop of its first byte and one for the decoding after it.

The hops are read off the request's stamps when it is over, so no other process knows of tracing. Needs the extra
`otel`; imported only with --otlp-endpoint.
"""

from __future__ import annotations

import threading
import time
from typing import Any
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import minisgl
from minisgl.config import WorkerSpec
from minisgl.http.answers import Stream
from minisgl.http.figures import stamps_to_first_byte
from minisgl.timeline import HOPS

EXPORT_MILLISECONDS = 1000
"""How often spans are sent, and how long the last ones may take."""


class RequestTracer:
    """Sends spans to a collector from a thread of its own; a collector that is away costs log lines, no more."""

    def __init__(self, endpoint: str, spec: WorkerSpec) -> None:
        url = endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + "/v1/traces"
        about = {"service.name": "minisgl", "service.version": minisgl.__version__, "service.instance.id": spec.name}
        self._model = spec.model.name
        self._provider = TracerProvider(resource=Resource.create(about), shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=url)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=EXPORT_MILLISECONDS))
        self._tracer = self._provider.get_tracer("minisgl")
        self._propagator = TraceContextTextMapPropagator()

    def record(self, stream: Stream, outcome: str) -> None:
        """Make the spans of a request that is over, as children of the span its client named, if it did."""
        to_wall_clock = time.time_ns() - time.monotonic_ns()
        began, ended = stream.call.received_ns + to_wall_clock, time.time_ns()
        parent = self._propagator.extract(stream.writer.ingress.trace_headers)
        span = self._tracer.start_span(
            "llm_request", parent, SpanKind.SERVER, self._attributes(stream, outcome), start_time=began
        )
        if outcome == "failed":
            span.set_status(Status(StatusCode.ERROR, stream.error.message if stream.error else ""))
        within = set_span_in_context(span)
        stamps = [stamp + to_wall_clock for stamp in stamps_to_first_byte(stream)]
        for hop, begin, end in zip(HOPS, stamps, stamps[1:], strict=False):
            self._tracer.start_span(hop, within, start_time=begin).end(end)
        if stream.last_ns > stream.first_ns:
            begin, end = stream.first_ns + to_wall_clock, stream.last_ns + to_wall_clock
            self._tracer.start_span("decode", within, start_time=begin).end(end)
        span.end(ended)

    def close(self) -> None:
        # The exporter tries a collector that is away again and again, and the SDK's own time limit does not end that.
        flush = threading.Thread(target=self._provider.force_flush, daemon=True)
        flush.start()
        flush.join(EXPORT_MILLISECONDS / 1e3)

    def _attributes(self, stream: Stream, outcome: str) -> dict[str, Any]:
        """Named after OpenTelemetry's conventions for generative AI, as far as these go."""
        attributes: dict[str, Any] = {
            "gen_ai.request.model": self._model,
            "gen_ai.request.temperature": stream.sampling.temperature,
            "gen_ai.request.top_p": stream.sampling.top_p,
            "gen_ai.response.id": stream.call.request_id,
            "gen_ai.usage.input_tokens": stream.prompt_tokens,
            "gen_ai.usage.output_tokens": stream.completion_tokens,
            "minisgl.cached_tokens": stream.cached_tokens,
            "minisgl.outcome": outcome,
            "minisgl.replays": stream.replays,
        }
        if stream.finish:
            attributes["gen_ai.response.finish_reasons"] = [stream.finish.name.lower()]
        if stream.first_tokens:
            stamps = stamps_to_first_byte(stream)
            attributes["gen_ai.latency.time_to_first_token"] = (stamps[-1] - stamps[0]) / 1e9
        return attributes
