"""The web pages at `/` and `/docs`: files, each under its own path, and the headers that keep them to themselves.

The files hold no secret and are served without the API key; what the pages ask of the server needs the key as ever.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from importlib.resources import files

from starlette.responses import Response

_HTML, _CSS, _JAVASCRIPT = "text/html", "text/css", "text/javascript"
_FILES = {
    "/": ("index.html", _HTML),
    "/docs": ("docs.html", _HTML),
    "/web/style.css": ("style.css", _CSS),
    "/web/docs.css": ("docs.css", _CSS),
    "/web/docs.js": ("docs.js", _JAVASCRIPT),
    "/web/page.js": ("page.js", _JAVASCRIPT),
    "/web/api.js": ("api.js", _JAVASCRIPT),
    "/web/key.js": ("key.js", _JAVASCRIPT),
    "/web/live.js": ("live.js", _JAVASCRIPT),
    "/web/markdown.js": ("markdown.js", _JAVASCRIPT),
    "/web/store.js": ("store.js", _JAVASCRIPT),
    "/web/timeline.js": ("timeline.js", _JAVASCRIPT),
}
PATHS = tuple(_FILES)
"""The routes of the pages, all of them GET."""

# Nothing but this server's own files runs or is asked, and no script can turn a string into markup.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}


def endpoints() -> Iterator[tuple[str, Callable[[], Awaitable[Response]]]]:
    """The paths and what answers them; the files are read now."""
    folder = files("minisgl.http") / "web"
    for path, (name, media_type) in _FILES.items():
        yield path, _endpoint((folder / name).read_bytes(), media_type)


def _endpoint(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def serve() -> Response:
        return Response(content, headers=_HEADERS, media_type=media_type)

    return serve
