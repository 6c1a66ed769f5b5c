"""What a client is told when something goes wrong: one error type, one JSON shape, on every route."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

from minisgl.messages import JsonObject, RequestError


class ApiError(Exception):
    """A request ends with this HTTP status; `message` says what to change or what to do next.

    Attributes:
        code: a stable word for programs, such as "invalid_json" or "queue_full".
        param: the request field at fault, where there is one.
        retry_after: seconds after which a retry makes sense; sent as the Retry-After header.
    """

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after = retry_after

    @classmethod
    def from_ring(cls, error: RequestError) -> ApiError:
        """The error that another process found."""
        status = error.status if 400 <= error.status < 600 else 500
        return cls(status, error.code, error.message)

    @classmethod
    def of_bug(cls) -> ApiError:
        """What a client is told of an exception that nobody expected."""
        return cls(500, "internal_error", "the server failed to handle this request; its log says why")

    @property
    def type(self) -> str:
        if self.status < 500:
            return "invalid_request_error"
        return "service_unavailable_error" if self.status == 503 else "server_error"

    @property
    def outcome(self) -> str:
        """How a request refused with this error is counted (see accounting.OUTCOMES)."""
        if self.status < 500:
            return "client_error"
        return "rejected" if self.code in ("queue_full", "draining") else "failed"

    def body(self) -> JsonObject:
        return {"error": {"message": self.message, "type": self.type, "code": self.code, "param": self.param}}

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"retry-after": str(self.retry_after)}

    def response(self) -> Response:
        return json_response(self.status, self.body(), self.headers())


_encode = json.JSONEncoder(separators=(",", ":")).encode


def to_json(value: Any) -> str:
    """Compact JSON in pure ASCII, so that no client's idea of a line end (U+2028, U+0085, ...) can cut it."""
    return _encode(value)


def json_response(status: int, value: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(value), status, headers, "application/json")
