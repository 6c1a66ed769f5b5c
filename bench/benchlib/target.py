"""Where a server listens; apart from the client, whose parser a peer's own environment may lack."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Target:
    """Where a server listens, and the name of its wire (a key of wires.WIRES)."""

    host: str
    port: int
    wire: str

    @classmethod
    def of_url(cls, url: str, wire: str) -> Target:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"expected a URL such as http://127.0.0.1:30000, got {url!r}")
        return cls(parts.hostname, parts.port or 80, wire)
