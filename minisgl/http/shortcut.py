"""The way of generating requests past FastAPI, whose layers cost more than all that is done for such a request here.

FastAPI knows the same routes, for their documentation and to refuse other methods.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from minisgl.http.errors import ApiError

Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]


class Shortcut:
    """Calls the endpoints of these paths for POST; everything else goes to the application."""

    def __init__(self, app: ASGIApp, posts: Mapping[str, Endpoint]) -> None:
        self._app = app
        self._posts = posts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._posts.get(scope["path"])
        if endpoint is None or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            response = await endpoint(Request(scope, receive))
        except ApiError as error:
            response = error.response()
        except Exception:
            await ApiError.of_bug().response()(scope, receive, send)
            # The server logs it.
            raise
        await response(scope, receive, send)
