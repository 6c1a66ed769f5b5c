"""A small blocking client of the native HTTP API, with nothing but the standard library."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


class RequestFailed(Exception):
    """The server answered with an error, broke off, or is not there; the message is a sentence for the user."""


@dataclass
class Generation:
    """One streamed answer and its figures; times are seconds after the request was begun.

    Attributes:
        text: what has arrived so far.
        done: the final event (finish_reason, usage, timing); empty until it is there.
    """

    text: str = ""
    first_byte: float = 0.0
    total: float = 0.0
    done: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return int(self.done.get("usage", {}).get("completion_tokens", 0))

    @property
    def tokens_per_second(self) -> float:
        """Tokens after the first one over the time they took."""
        return (self.tokens - 1) / max(self.total - self.first_byte, 1e-9) if self.tokens > 1 else 0.0

    def summary(self) -> str:
        """Such as `24 tokens (stop), 310.5 tokens/s, TTFB 8.1 ms`."""
        count = f"{self.tokens} token{'' if self.tokens == 1 else 's'} ({self.done.get('finish_reason')})"
        return f"{count}, {self.tokens_per_second:.1f} tokens/s, TTFB {self.first_byte * 1e3:.1f} ms"


class Client:
    """Talks to one server, a connection a request: closing it is how an answer is cancelled."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RequestFailed(f"{url} is not a URL such as http://127.0.0.1:30000")
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self._connection_type = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._address = (parts.hostname, parts.port)
        self._path = parts.path.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def healthy(self, timeout: float = 1.0) -> bool:
        """Whether the server answers 200 to /health in time."""
        try:
            with self._request("GET", "/health", timeout=timeout):
                return True
        except RequestFailed:
            return False

    def model_name(self) -> str:
        """The name of the model it serves; raises RequestFailed."""
        with self._request("GET", "/get_model_info", timeout=10.0) as response:
            info = self._json(response.read())
        return str(info.get("served_model_name") or info.get("model_path") or "unknown")

    def stream(self, body: dict[str, Any], generation: Generation) -> Generator[str, None, None]:
        """Send a /generate body and yield the answer's text as it comes; `generation` collects text and figures.

        Closing the iterator closes the connection, which ends the request on the server too. Raises RequestFailed.
        """
        started = time.perf_counter()
        with self._request("POST", "/generate", {**body, "stream": True}) as response:
            for line in self._lines(response):
                elapsed = time.perf_counter() - started
                event = self._json(line)
                generation.first_byte = generation.first_byte or elapsed
                generation.total = elapsed
                match event.get("event"):
                    case "done":
                        generation.done = event
                        return
                    case "error":
                        raise RequestFailed(str(event.get("message") or event))
                if event.get("text_delta"):
                    generation.text += event["text_delta"]
                    yield event["text_delta"]
        raise RequestFailed("the server closed the connection in the middle of the answer")

    def _lines(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        try:
            for line in response:
                if line.strip():
                    yield line
        except (OSError, http.client.HTTPException) as error:
            raise RequestFailed(f"the connection broke in the middle of the answer ({error})") from None

    @contextlib.contextmanager
    def _request(
        self, method: str, path: str, body: dict[str, Any] | None = None, timeout: float | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        connection = self._connection_type(*self._address, timeout=timeout)
        try:
            try:
                payload = None if body is None else json.dumps(body).encode()
                connection.request(method, self._path + path, payload, self._headers)
                response = connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                raise RequestFailed(f"no answer from {self.url} ({error}): is the server running?") from None
            if response.status != 200:
                raise RequestFailed(_error_message(response))
            yield response
        finally:
            connection.close()

    def _json(self, data: bytes) -> dict[str, Any]:
        try:
            value = json.loads(data)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise RequestFailed(f"{self.url} does not answer as a minisgl server does (got {data[:80]!r})")
        return value


def _error_message(response: http.client.HTTPResponse) -> str:
    """The sentence in an error body, else its status line."""
    status = f"{response.status} {response.reason}"
    try:
        error = json.loads(response.read(65536)).get("error")
    except (OSError, http.client.HTTPException, ValueError, AttributeError):
        return f"the server answered {status}"
    message = error.get("message") if isinstance(error, dict) else error
    return str(message or f"the server answered {status}")
