"""The servers under test: their command lines, readiness, versions and end. Each runs in a process group of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from benchlib.target import Target

REPOSITORY = Path(__file__).resolve().parents[2]
SYSTEMS = ("minisgl", "sglang", "hf")
TITLES = {"minisgl": "minisgl", "sglang": "sglang", "hf": "Hugging Face"}

OPENMP_WAIT_POLICY = "PASSIVE"
"""For every system, unless the caller's environment says otherwise: threads that spin while they wait make a CPU step
up to ten times slower beside a busy neighbour, and then the neighbour is what is measured."""

_MINISGL_FACTS = ("load_format", "context_length")
_SGLANG_FACTS = [
    "version",
    "attention_backend",
    "prefill_attention_backend",
    "decode_attention_backend",
    "sampling_backend",
    "dtype",
    "kv_cache_dtype",
    "page_size",
    "mem_fraction_static",
    "max_running_requests",
    "max_total_tokens",
    "chunked_prefill_size",
    "schedule_policy",
    "disable_radix_cache",
    "disable_cuda_graph",
    "cuda_graph_max_bs",
    "cuda_graph_backend_decode",
    "cuda_graph_backend_prefill",
    "disable_overlap_schedule",
    "enable_torch_compile",
    "stream_interval",
]


class ServerError(RuntimeError):
    """A server did not start, or died; the message says which and shows its last words."""


@dataclass(frozen=True)
class Setup:
    """How every system of a run is started.

    Attributes:
        model_dir: local directory with weights and tokenizer.
        device, dtype: given to every system explicitly, so that all compute the same thing.
        extra_args: more command line words by system.
        urls: servers that run already, by system; they are measured but neither started nor stopped.
        sglang_site: directory put on the import path of the sglang process alone.
    """

    model_dir: Path
    device: str
    dtype: str
    log_dir: Path
    python: str = sys.executable
    extra_args: dict[str, list[str]] = field(default_factory=dict)
    urls: dict[str, str] = field(default_factory=dict)
    sglang_site: Path | None = None
    ready_timeout: float = 600.0


def missing_reason(system: str, setup: Setup) -> str:
    """Why a system cannot be measured here, and what to do about it; empty when it can."""
    if system != "sglang" or system in setup.urls:
        return ""
    get_it = (
        "`pip install '.[sglang]'` in its own environment, or measure a running one with server_bench.py --sglang-url"
    )
    if setup.device != "cuda":
        return f"sglang needs a CUDA device; where there is one: {get_it}"
    probe = subprocess.run(
        [setup.python, "-c", "import importlib.util as u; raise SystemExit(u.find_spec('sglang') is None)"],
        env=environment(system, setup),
        check=False,
    )
    if probe.returncode == 0:
        return ""
    return f"sglang is not installed: {get_it}"


def command(system: str, setup: Setup, port: int) -> list[str]:
    """The command line of one server on 127.0.0.1:port."""
    common = ["--port", str(port), "--device", setup.device, "--dtype", setup.dtype]
    words = {
        "minisgl": [str(REPOSITORY / "launch.py"), "--model", str(setup.model_dir), *common],
        "hf": ["-m", "benchlib.hf_server", "--model", str(setup.model_dir), *common],
        "sglang": ["-W", "ignore", "-m", "sglang.launch_server", "--model-path", str(setup.model_dir), *common],
    }[system]
    return [setup.python, *words, *setup.extra_args.get(system, [])]


def environment(system: str, setup: Setup) -> dict[str, str]:
    """The environment of one server: offline, and with only its own packages on the import path."""
    inherited = os.environ.get("PYTHONPATH", "")
    own = {
        "minisgl": [str(REPOSITORY), inherited],
        "hf": [str(REPOSITORY / "bench"), inherited],
        "sglang": [str(setup.sglang_site) if setup.sglang_site else inherited],
    }[system]
    path = os.pathsep.join(part for part in own if part)
    own_settings = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {"OMP_WAIT_POLICY": OPENMP_WAIT_POLICY, **os.environ, **own_settings}


class Server:
    """One server under test, as a context manager that is entered when it is ready."""

    def __init__(self, system: str, setup: Setup) -> None:
        self.system = system
        self.ready_seconds = 0.0
        self.command: list[str] = []
        self._setup = setup
        self._process: subprocess.Popen[bytes] | None = None
        self._log_path = setup.log_dir / f"{system}.log"
        self._log: IO[bytes] | None = None
        url = setup.urls.get(system)
        if url:
            self.target = Target.of_url(url, system)
        else:
            self.target = Target("127.0.0.1", free_port(), system)
            self.command = command(system, setup, self.target.port)

    def __enter__(self) -> Server:
        began = time.monotonic()
        if self.command:
            self._setup.log_dir.mkdir(parents=True, exist_ok=True)
            self._log = self._log_path.open("wb")
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                env=environment(self.system, self._setup),
                start_new_session=True,
            )
        try:
            self._wait_until_ready(began + self._setup.ready_timeout)
        except BaseException:
            self.stop()
            raise
        self.ready_seconds = time.monotonic() - began if self.command else 0.0
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://{self.target.host}:{self.target.port}"

    def death(self) -> str:
        """How the server's process ended; empty while it lives or when it was not started here."""
        code = self._process.poll() if self._process else None
        if code is None:
            return ""
        how = signal.Signals(-code).name if code < 0 else f"status {code}"
        return f"{self.system} ended by itself ({how}); its last words: {self.last_words()}"

    def last_words(self, lines: int = 5) -> str:
        if not self._log_path.exists():
            return "(no log)"
        text = self._log_path.read_text(errors="replace").strip()
        return " | ".join(text.splitlines()[-lines:]) or "(nothing)"

    def describe(self) -> dict[str, Any]:
        """Version, command line, time to ready and what the server says about itself, for the report."""
        return {
            "command": _without_paths(self.command, self._setup),
            "url": None if self.command else self.url,
            "ready_seconds": round(self.ready_seconds, 2),
            "facts": self._facts(),
        }

    def _facts(self) -> dict[str, Any]:
        if self.system == "minisgl":
            info = get_json(f"{self.url}/get_model_info") or {}
            return {"version": minisgl_version(), **{key: info[key] for key in _MINISGL_FACTS if key in info}}
        info = get_json(f"{self.url}/server_info") or get_json(f"{self.url}/get_server_info") or {}
        if self.system == "sglang":
            return {key: info[key] for key in _SGLANG_FACTS if info.get(key) is not None}
        return info

    def stop(self) -> None:
        """SIGTERM, and after 30 s SIGKILL for whatever is left of the process group."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        # Children that outlived their parent would disturb the next system's figures.
        deadline = time.monotonic() + 10
        while _group_exists(process.pid) and time.monotonic() < deadline:
            _signal_group(process.pid, signal.SIGKILL)
            time.sleep(0.1)
        if self._log:
            self._log.close()

    def _wait_until_ready(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            death = self.death()
            if death:
                raise ServerError(death)
            if http_ok(f"{self.url}/health"):
                return
            time.sleep(0.1)
        raise ServerError(
            f"{self.system} was not ready at {self.url} within {self._setup.ready_timeout:g} s; "
            f"its last words: {self.last_words()}"
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def http_ok(url: str, timeout: float = 5.0) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def get_json(url: str, timeout: float = 10.0) -> dict[str, Any] | None:
    """The JSON object at a URL, None when there is none."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            value = json.load(response)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def minisgl_version() -> str:
    """The package's version and, in a checkout, its commit."""
    namespace: dict[str, str] = {}
    for line in (REPOSITORY / "minisgl" / "__init__.py").read_text().splitlines():
        if line.startswith("__version__"):
            namespace["version"] = line.split("=", 1)[1].strip().strip("\"'")
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    commit = f" ({git.stdout.strip()})" if git.returncode == 0 and git.stdout.strip() else ""
    return namespace.get("version", "unknown") + commit


def _without_paths(words: list[str], setup: Setup) -> str:
    """A command line for the report: no directories of the machine that ran it."""
    shown = [Path(word).name if os.sep in word and Path(word).exists() else word for word in words]
    return " ".join(shown)


def _group_exists(pgid: int) -> bool:
    try:
        os.killpg(pgid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _signal_group(pgid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pgid, number)
    except ProcessLookupError:
        return
