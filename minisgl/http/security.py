"""Who may ask: the API key, and which web pages a browser lets read the answers (CORS)."""

from __future__ import annotations

import hashlib
import hmac

from starlette.responses import Response
from starlette.types import Scope

from minisgl.config import ServerConfig
from minisgl.http import page
from minisgl.http.errors import ApiError, json_response

OPEN_PATHS = frozenset(("/health", "/health_generate", "/metrics", *page.PATHS))
"""What load balancers and scrapers ask for, which have no key, and the web page, which asks its user for one."""

ADMIN_PATHS = frozenset(("/flush_cache", "/reset_prefix_cache", "/abort_request"))
"""What acts on the whole server, and takes the admin key alone where there is one."""

_EXPOSED = b"x-request-id, server-timing, retry-after"
_METHODS = b"GET, POST, PUT, DELETE, OPTIONS"


class Gate:
    """Answers what must not reach the routes, and says which headers every answer needs."""

    def __init__(self, config: ServerConfig) -> None:
        self._key = None if config.api_key is None else _digest(config.api_key.encode())
        self._admin_key = self._key if config.admin_api_key is None else _digest(config.admin_api_key.encode())
        self._origins = frozenset(origin.encode() for origin in config.cors_origins())

    def answer(self, scope: Scope) -> Response | None:
        """A refusal, or the answer to a browser's question whether it may ask; None lets the request in."""
        headers = dict(scope["headers"])
        if self._origins and scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
            return _preflight(headers)
        path = scope["path"]
        is_admin = path in ADMIN_PATHS
        key = self._admin_key if is_admin else self._key
        if key is None or path in OPEN_PATHS or path.startswith("/health/"):
            return None
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = _digest(token.strip())
        opens = [hmac.compare_digest(given, one) for one in (key, self._admin_key) if one is not None]
        if scheme.lower() == b"bearer" and any(opens):
            return None
        whose = (
            "route needs the server's admin" if is_admin and self._admin_key != self._key else "server needs its API"
        )
        wanted = f"this {whose} key: send the header 'Authorization: Bearer <key>'"
        return json_response(401, ApiError(401, "invalid_api_key", wanted).body(), {"www-authenticate": "Bearer"})

    def cors_headers(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        """What lets the asking page read the answer, if it is one of --cors-origin."""
        if not self._origins:
            return []
        origin = dict(scope["headers"]).get(b"origin")
        allowed = b"*" if b"*" in self._origins else origin if origin in self._origins else None
        if origin is None or allowed is None:
            return [(b"vary", b"origin")]
        exposed = (b"access-control-expose-headers", _EXPOSED)
        return [(b"vary", b"origin"), (b"access-control-allow-origin", allowed), exposed]


def _preflight(headers: dict[bytes, bytes]) -> Response:
    """Without an access-control-allow-origin beside it, which comes from `cors_headers`, this allows nothing."""
    response = Response(status_code=204)
    response.raw_headers += [
        (b"access-control-allow-methods", _METHODS),
        (b"access-control-allow-headers", headers.get(b"access-control-request-headers", b"*")),
        (b"access-control-max-age", b"600"),
    ]
    return response


def _digest(key: bytes) -> bytes:
    # Digests are of one length, so comparing them does not even tell how long the key is.
    return hashlib.sha256(key).digest()
