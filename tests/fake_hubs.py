"""Small local stand-ins for the Hugging Face hub and ModelScope, speaking enough of their APIs for the real clients."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def safetensors(floats: int = 4) -> bytes:
    """A whole safetensors file with one tensor."""
    header = json.dumps({"weight": {"dtype": "F32", "shape": [floats], "data_offsets": [0, 4 * floats]}}).encode()
    return struct.pack("<Q", len(header)) + header + b"\0" * (4 * floats)


def tiny_repo() -> dict[str, bytes]:
    """A repository as hubs hold them: what serving needs, and as much that it does not."""
    objects = {
        "config.json": {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "vocab_size": 10,
            "max_position_embeddings": 512,
            "eos_token_id": 3,
        },
        "generation_config.json": {"eos_token_id": [3, 4]},
        "tokenizer.json": {"added_tokens": [{"id": 7, "content": "<|im_end|>"}], "model": {"vocab": {"a": 0}}},
        "tokenizer_config.json": {"eos_token": "<|im_end|>"},
        "original/params.json": {"dim": 1},
    }
    return {name: json.dumps(value).encode() for name, value in objects.items()} | {
        "model.safetensors": safetensors(),
        "consolidated.safetensors": safetensors(),
        "pytorch_model.bin": b"pickled",
        "model.gguf": b"GGUF",
        "README.md": b"# tiny",
    }


@dataclass
class FakeHub:
    """One hub: its repositories, the faults to show, and what it was asked.

    Attributes:
        repos: name -> path -> content.
        sizes: sizes to announce instead of the true ones, by path.
        gated: repositories whose files answer 403.
        status: answer everything with this status.
        silent: take connections and requests, and never answer.
        seconds_per_file: how long a safetensors file takes to send.
    """

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    status: int = 200
    silent: bool = False
    seconds_per_file: float = 0.0
    requests: list[str] = field(default_factory=list)
    url: str = ""

    def fetched(self) -> set[str]:
        """The files whose content was asked for."""
        return {path.removeprefix("GET-FILE ") for path in self.requests if path.startswith("GET-FILE ")}


@contextmanager
def serving(hub: FakeHub, handler: type[BaseHTTPRequestHandler]) -> Iterator[FakeHub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.hub = hub
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def closed_port_url() -> str:
    """An address where nobody listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


class _HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> FakeHub:
        return self.server.hub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.hub.requests.append(f"{self.command} {url.path}")
        if self.hub.silent:
            time.sleep(60)
        elif self.hub.status != 200:
            self.answer({"error": "fault"}, status=self.hub.status)
        else:
            self.route(unquote(url.path).strip("/").split("/"), parse_qs(url.query))

    def answer(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_file(self, path: str, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        for name, text in headers.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.hub.requests.append(f"GET-FILE {path}")
        if self.hub.seconds_per_file and path.endswith(".safetensors"):
            step = max(1, len(content) // 10)
            for start in range(0, len(content), step):
                self.wfile.write(content[start : start + step])
                self.wfile.flush()
                time.sleep(self.hub.seconds_per_file / 10)
        else:
            self.wfile.write(content)

    def size(self, path: str, content: bytes) -> int:
        return self.hub.sizes.get(path, len(content))

    def route(self, path: list[str], query: dict[str, list[str]]) -> None:
        raise NotImplementedError


class HuggingFaceHandler(_HubHandler):
    def route(self, path: list[str], query: dict[str, list[str]]) -> None:
        api = path[:2] == ["api", "models"]
        name, rest = "/".join(path[2:4] if api else path[:2]), path[4:] if api else path[2:]
        repo = self.hub.repos.get(name)
        if repo is None:
            # The real hub says 401 to strangers, whether the repository is absent or private.
            self.answer({"error": "Repository not found"}, status=401, headers={"X-Error-Code": "RepoNotFound"})
        elif api and (not rest or rest[0] == "revision") and rest[1:] in ([], ["main"], [COMMIT]):
            siblings = [
                {"rfilename": file, "size": self.size(file, content), "blobId": _blob_id(content)}
                for file, content in repo.items()
            ]
            self.answer({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": []})
        elif api and rest[0] == "revision":
            self.answer({"error": "Invalid rev id"}, status=404, headers={"X-Error-Code": "RevisionNotFound"})
        elif api and rest[0] == "tree":
            self.answer(
                [
                    {"type": "file", "path": file, "size": self.size(file, content), "oid": _blob_id(content)}
                    for file, content in repo.items()
                ]
            )
        elif rest[:1] == ["resolve"] and name in self.hub.gated:
            self.answer({"error": "gated"}, status=403, headers={"X-Error-Code": "GatedRepo"})
        elif rest[:1] == ["resolve"]:
            file = "/".join(rest[2:])
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_blob_id(repo[file])}"'}
            headers["X-Linked-Size"] = str(self.size(file, repo[file]))
            self.send_file(file, repo[file], headers)
        else:
            self.answer({"error": "no such page"}, status=404)


class ModelScopeHandler(_HubHandler):
    def route(self, path: list[str], query: dict[str, list[str]]) -> None:
        name = "/".join(path[3:5])
        repo = self.hub.repos.get(name)
        if path[:3] != ["api", "v1", "models"]:
            self.answer({"Code": 200, "Data": {}})
        elif repo is None:
            self.answer({"Code": 10010205001, "Message": "Not found", "Success": False}, status=404)
        elif path[5:] == ["repo", "files"]:
            files = [
                {
                    "Path": file,
                    "Name": file.rpartition("/")[2],
                    "Size": self.size(file, content),
                    "Sha256": hashlib.sha256(content).hexdigest(),
                    "Type": "blob",
                }
                for file, content in repo.items()
            ]
            self.answer({"Code": 200, "Data": {"Files": files}, "Success": True})
        elif path[5:] == ["repo"]:
            file = query["FilePath"][0]
            self.send_file(file, repo[file], {})
        else:
            self.answer({"Code": 404}, status=404)


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
