"""The routes. `create_app` builds the ASGI application around an explicit Service; there is no global state."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp

import minisgl
from minisgl.config import WorkerSpec
from minisgl.http import admin, api_docs, compat_docs, info, native, openai, page, sglang, text_tools
from minisgl.http.accounting import Accounts, Call
from minisgl.http.answers import Stream
from minisgl.http.errors import ApiError, json_response
from minisgl.http.generation import Caller, Generation
from minisgl.http.health import HealthView
from minisgl.http.metrics import MEDIA_TYPE, ServerMetrics
from minisgl.http.neighbours import Neighbours
from minisgl.http.protocol import Edge, Ingress, ingress_of
from minisgl.http.questions import Questions
from minisgl.http.schemas import parse_object
from minisgl.http.security import Gate
from minisgl.http.shortcut import Shortcut
from minisgl.http.streaming import Streams
from minisgl.http.writer import ResponseWriter
from minisgl.messages import JsonObject

Read: TypeAlias = Callable[[JsonObject, Caller], Generation]
"""How an API validates its request bodies."""
BODY_SECONDS = 60.0
"""A request whose body has not arrived by then is dropped."""


@dataclass(frozen=True)
class Service:
    """What the routes work with. `uploads` are the requests whose bodies are still arriving."""

    spec: WorkerSpec
    streams: Streams
    questions: Questions
    neighbours: Neighbours
    accounts: Accounts
    health: HealthView
    uploads: set[Ingress] = field(default_factory=set)


def create_app(service: Service) -> ASGIApp:
    app = FastAPI(
        title="minisgl",
        version=minisgl.__version__,
        description=api_docs.DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        # The document then names the media types that are written down, and no other.
        default_response_class=Response,
        responses=api_docs.UNAUTHORIZED if service.spec.config.has_keys else {},
        exception_handlers={ApiError: _on_api_error, HTTPException: _on_http_error, Exception: _on_bug},
    )

    started = int(time.time())

    async def generate(request: Request) -> Response:
        return await _generate(service, request, _read_either)

    async def chat_completions(request: Request) -> Response:
        return await _generate(service, request, openai.read_chat)

    async def completions(request: Request) -> Response:
        return await _generate(service, request, openai.read_completion)

    async def models() -> Response:
        return json_response(200, {"object": "list", "data": [info.model_card(service.spec, started)]})

    async def model(name: str) -> Response:
        return json_response(200, info.model_card(service.spec, started, name))

    async def server_info() -> Response:
        return json_response(200, info.server_info(service.spec, service.health))

    async def tokenize(request: Request) -> Response:
        body, caller = await _read_object(service, request)
        return json_response(200, await text_tools.tokenize(body, caller, service.questions))

    async def detokenize(request: Request) -> Response:
        body, caller = await _read_object(service, request)
        return json_response(200, await text_tools.detokenize(body, caller, service.questions))

    async def flush_cache(request: Request) -> Response:
        return await admin.flush_cache(service.spec.config, service.questions, request.query_params)

    async def abort_request(request: Request) -> Response:
        body, _ = await _read_object(service, request)
        name = sglang.read_abort(body)
        service.streams.abort_named(name)
        service.neighbours.abort_named(name)
        return Response(status_code=200)

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
        return json_response(200, info.model_info(service.spec))

    add = app.add_api_route
    add("/generate", generate, methods=["POST"], response_model=None, **compat_docs.GENERATE)
    add("/health", health, methods=["GET"], response_model=None, **api_docs.HEALTH)
    add("/metrics", metrics, methods=["GET"], response_model=None, **api_docs.METRICS)
    add("/get_model_info", model_info, methods=["GET"], response_model=None, **api_docs.MODEL_INFO)
    add("/model_info", model_info, methods=["GET"], response_model=None, **api_docs.MODEL_INFO)
    add("/server_info", server_info, methods=["GET"], response_model=None, **compat_docs.SERVER_INFO)
    add("/get_server_info", server_info, methods=["GET"], response_model=None, **compat_docs.SERVER_INFO)
    add("/health_generate", health, methods=["GET"], response_model=None, **api_docs.HEALTH)
    add("/flush_cache", flush_cache, methods=["GET", "POST"], response_model=None, **compat_docs.FLUSH_CACHE)
    add("/reset_prefix_cache", flush_cache, methods=["POST"], response_model=None, **compat_docs.FLUSH_CACHE)
    for prefix in ("", "/v1"):
        add(f"{prefix}/tokenize", tokenize, methods=["POST"], response_model=None, **compat_docs.TOKENIZE)
        add(f"{prefix}/detokenize", detokenize, methods=["POST"], response_model=None, **compat_docs.DETOKENIZE)
    add("/abort_request", abort_request, methods=["POST"], response_model=None, **compat_docs.ABORT)
    add("/v1/chat/completions", chat_completions, methods=["POST"], response_model=None, **compat_docs.CHAT)
    add("/v1/completions", completions, methods=["POST"], response_model=None, **compat_docs.COMPLETIONS)
    add("/v1/models", models, methods=["GET"], response_model=None, **compat_docs.MODELS)
    add("/v1/models/{name:path}", model, methods=["GET"], response_model=None, **compat_docs.MODEL)
    for path, endpoint in page.endpoints():
        add(path, endpoint, methods=["GET"], response_model=None, include_in_schema=False)
    config = service.spec.config
    posts = {"/generate": generate, "/v1/chat/completions": chat_completions, "/v1/completions": completions}
    return Edge(Shortcut(app, posts), Gate(config), traced=config.otlp_endpoint is not None)


def _read_either(body: JsonObject, caller: Caller) -> Generation:
    """POST /generate has two APIs; the body's keys say which one is meant."""
    read: Read = sglang.read if "text" in body or "input_ids" in body else native.read
    return read(body, caller)


async def _generate(service: Service, request: Request, read: Read) -> Response:
    ingress = ingress_of(request.scope)
    call = Call(service.accounts, ingress.request_id, ingress.received_ns)
    try:
        raw = await _read_body(service, request, ingress)
        service.streams.check_admission()
        generation = read(parse_object(raw), _caller(service, request))
        if len(generation.asks) > 1:
            service.streams.check_admission(len(generation.asks))
            generation.check_size(len(raw))
        writer = ResponseWriter(ingress, service.spec.config.narrate)
        return service.streams.submit(_streams(generation, call, writer))
    except ApiError as error:
        call.end(error.outcome, f"{error.status} {error.code}")
        raise
    except ClientDisconnect:
        call.end("aborted", "client disconnected before its request was complete")
        return Response(status_code=400)
    except BaseException:
        call.end("failed", "internal error")
        raise


def _streams(generation: Generation, call: Call, writer: ResponseWriter) -> list[Stream]:
    return [
        Stream(
            call=call,
            writer=writer,
            sink=generation.sink,
            prompt=ask.prompt,
            sampling=ask.sampling,
            name=ask.name,
            index=index,
            template=ask.template,
            grammar_field=ask.grammar_field,
            reads_only=ask.reads_only,
            steps_ns=[] if ask.keep_steps else None,
        )
        for index, ask in enumerate(generation.asks)
    ]


async def _read_object(service: Service, request: Request) -> tuple[JsonObject, Caller]:
    """The JSON object in the body of a request that is no generation, and who asks."""
    raw = await _read_body(service, request, ingress_of(request.scope))
    return parse_object(raw), _caller(service, request)


def _caller(service: Service, request: Request) -> Caller:
    sse = "text/event-stream" in request.headers.get("accept", "")
    return Caller(service.spec.model, ingress_of(request.scope).request_id, sse)


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
    return ApiError.of_bug().response()
