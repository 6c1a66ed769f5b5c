"""The routes. `create_app` builds the ASGI application around an explicit Service; there is no global state."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp

import minisgl
from minisgl.config import DEMO_MODEL, WorkerSpec
from minisgl.http import api_docs, native
from minisgl.http.accounting import Accounts, Call
from minisgl.http.answers import EventStream, Renderer, Sink, Stream, WholeAnswer
from minisgl.http.errors import ApiError, json_response
from minisgl.http.health import HealthView
from minisgl.http.metrics import MEDIA_TYPE, ServerMetrics
from minisgl.http.protocol import Edge, Ingress, ingress_of
from minisgl.http.security import Gate
from minisgl.http.streaming import Streams
from minisgl.http.writer import ResponseWriter
from minisgl.messages import JsonObject

BODY_SECONDS = 60.0
"""A request whose body has not arrived by then is dropped."""


@dataclass(frozen=True)
class Service:
    """What the routes work with. `uploads` are the requests whose bodies are still arriving."""

    spec: WorkerSpec
    streams: Streams
    accounts: Accounts
    health: HealthView
    uploads: set[Ingress] = field(default_factory=set)


def create_app(service: Service) -> ASGIApp:
    app = FastAPI(
        title="minisgl",
        version=minisgl.__version__,
        description=api_docs.DESCRIPTION,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers={ApiError: _on_api_error, HTTPException: _on_http_error, Exception: _on_bug},
    )

    async def generate(request: Request) -> Response:
        return await _generate(service, request)

    async def health() -> Response:
        problems = service.health.problems()
        if service.streams.draining:
            problems = [f"the server is {service.streams.draining}", *problems]
        status = "unhealthy" if problems else "ok"
        body = {"status": status, "problems": problems, "workers": service.health.workers()}
        return json_response(503 if problems else 200, body)

    server_metrics = ServerMetrics(service.spec, service.accounts, service.streams, service.health)

    async def metrics() -> Response:
        return Response(await server_metrics.render(), media_type=MEDIA_TYPE)

    async def model_info() -> Response:
        return json_response(200, _model_info(service.spec))

    async def hint() -> Response:
        return PlainTextResponse(f"minisgl serves {service.spec.model.name}. Try POST /generate, or open /docs.\n")

    add = app.add_api_route
    add("/generate", generate, methods=["POST"], response_model=None, **api_docs.GENERATE)
    add("/health", health, methods=["GET"], response_model=None, **api_docs.HEALTH)
    add("/metrics", metrics, methods=["GET"], response_model=None, **api_docs.METRICS)
    add("/get_model_info", model_info, methods=["GET"], response_model=None, **api_docs.MODEL_INFO)
    add("/model_info", model_info, methods=["GET"], response_model=None, **api_docs.MODEL_INFO)
    add("/", hint, methods=["GET"], include_in_schema=False)
    return Edge(app, Gate(service.spec.config))


async def _generate(service: Service, request: Request) -> Response:
    config = service.spec.config
    ingress = ingress_of(request.scope)
    call = Call(service.accounts, ingress.request_id, ingress.received_ns)
    try:
        raw = await _read_body(service, request, ingress)
        service.streams.check_admission()
        generation = native.parse(raw, service.spec.model)
        sse = "text/event-stream" in request.headers.get("accept", "")
        wire = native.ServerSentEvents if sse else native.JsonLines
        renderer: Renderer = wire(generation.return_token_ids)
        sink: Sink = EventStream(renderer) if generation.stream else WholeAnswer(renderer)
        writer = ResponseWriter(ingress, config.narrate)
        name, prompt, sampling = ingress.request_id, generation.prompt, generation.sampling
        stream = Stream(call=call, writer=writer, sink=sink, prompt=prompt, sampling=sampling, name=name)
        return service.streams.submit([stream])
    except ApiError as error:
        call.end(error.outcome, f"{error.status} {error.code}")
        raise
    except ClientDisconnect:
        call.end("aborted", "client disconnected before its request was complete")
        return Response(status_code=400)
    except BaseException:
        call.end("failed", "internal error")
        raise


async def _read_body(service: Service, request: Request, ingress: Ingress) -> bytes:
    """The request's body; raises ApiError 413 as soon as it is known to be too large."""
    limit = service.spec.config.max_body_bytes
    too_large = ApiError(413, "body_too_large", f"the request body must not exceed {limit} bytes")
    if int(request.headers.get("content-length", 0)) > limit:
        raise too_large
    if request.headers.get("content-encoding", "identity") != "identity":
        raise ApiError(415, "encoded_body", "send the request body uncompressed, without Content-Encoding")
    body = bytearray()
    deadline = asyncio.get_running_loop().call_later(BODY_SECONDS, ingress.abort_connection)
    service.uploads.add(ingress)
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise too_large
    finally:
        deadline.cancel()
        service.uploads.discard(ingress)
    return bytes(body)


def _model_info(spec: WorkerSpec) -> JsonObject:
    """sglang's keys. Clients load a tokenizer from `tokenizer_path`, so it is a name or path that can be loaded."""
    model = spec.model
    path = model.directory if model.source == DEMO_MODEL else model.source
    return {
        "model_path": path,
        "served_model_name": model.name,
        "tokenizer_path": path,
        "is_generation": True,
        "preferred_sampling_params": None,
        "weight_version": "default",
        "load_format": spec.config.load_format,
        "reasoning_parser": None,
        "tool_call_parser": None,
        "disaggregation_mode": "null",
        "has_image_understanding": False,
        "has_audio_understanding": False,
        "architectures": [model.architecture],
        "context_length": model.context_length,
        "vocab_size": model.vocab_size,
        "eos_token_ids": list(model.eos_token_ids),
    }


async def _on_api_error(request: Request, error: Any) -> Response:
    response: Response = error.response()
    return response


async def _on_http_error(request: Request, error: Any) -> Response:
    """A request that no route takes."""
    method, path = request.method, request.url.path
    if error.status_code == 405:
        allowed = error.headers.get("Allow", "another method")
        refusal = ApiError(405, "method_not_allowed", f"{path} does not take {method}; use {allowed}")
    else:
        refusal = ApiError(error.status_code, "not_found", f"there is no {path} here; see /docs for the routes")
    return json_response(refusal.status, refusal.body(), dict(error.headers or {}))


async def _on_bug(request: Request, error: Exception) -> Response:
    return ApiError(500, "internal_error", "the server failed to handle this request; its log says why").response()
