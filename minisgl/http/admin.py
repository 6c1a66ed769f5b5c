"""What an operator asks of a running server: GET or POST /flush_cache (vLLM: /reset_prefix_cache)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from starlette.responses import PlainTextResponse, Response

from minisgl.config import ServerConfig
from minisgl.http.errors import ApiError
from minisgl.http.questions import Questions

MAX_WAIT_SECONDS = 3600.0
_POLL_SECONDS = 0.05


async def flush_cache(config: ServerConfig, questions: Questions, query: Mapping[str, str]) -> Response:
    """200 when no replica has a cached prefix any more, 400 while requests run or wait; raises ApiError.

    Args:
        query: `timeout` says how many seconds to wait for running requests to end; without it there is no waiting.
    """
    wait_seconds = _read_timeout(query)
    if config.disable_radix_cache:
        return PlainTextResponse("Nothing to flush: the server keeps no prefix cache.\n")
    loop = asyncio.get_running_loop()
    deadline = loop.time() + wait_seconds
    while busy := await questions.flush_cache():
        if loop.time() >= deadline:
            names = ", ".join(f"scheduler-{replica}" for replica in sorted(busy))
            unable = (
                f"Not flushed: {names} still has running or waiting requests. Try again when they have ended, or send "
                "?timeout=SECONDS to wait for that.\n"
            )
            return PlainTextResponse(unable, 400)
        await asyncio.sleep(_POLL_SECONDS)
    return PlainTextResponse("Cache flushed.\n")


def _read_timeout(query: Mapping[str, str]) -> float:
    for name in query:
        if name != "timeout":
            raise ApiError(
                400,
                "unknown_field",
                f"unknown query parameter {name[:64]!r}; this route takes 'timeout'",
                param=name[:64],
            )
    text = query.get("timeout", "0")
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= MAX_WAIT_SECONDS:
        wanted = f"timeout must be a number of seconds from 0 to {MAX_WAIT_SECONDS:.0f}, got {text[:64]!r}"
        raise ApiError(400, "invalid_value", wanted, param="timeout")
    return seconds
