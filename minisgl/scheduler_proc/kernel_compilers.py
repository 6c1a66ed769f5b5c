"""Processes that compile Triton kernels on a machine that has none of a model's on disk yet.

Half of a compilation is Python, for which threads wait for each other (bench/ENGINE_LOG.md, entry S1). Processes do
not, but have to import torch first, so they are started before this process does the same. They leave what they have
compiled in Triton's cache on disk; whatever they do not is compiled by whoever needs it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from minisgl.child_process import package_environment
from minisgl.config import ModelSpec, ServerConfig

_DRIVER = Path("/dev/nvidiactl")
MOST_PROCESSES = 16
KernelName = tuple[str, str, str]
"""Its module, its name there, and Triton's description of the specialization."""


class KernelCompilers:
    """The processes, from `started` to the end of its `with` block.

    Args:
        marker: the file that says that all kernels have been compiled here once.
    """

    def __init__(self, process: subprocess.Popen[str], marker: Path) -> None:
        self._process = process
        self._marker = marker

    def compile(self, kernels: Sequence[KernelName], progress: Callable[[int, int], None]) -> None:
        """Have kernels compiled, the first ones first, and wait until all are, or no process is left."""
        assert self._process.stdin is not None and self._process.stdout is not None
        # What has not come about is no error here: the caller compiles what it does not find.
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(kernels) + "\n")
            self._process.stdin.flush()
            for done, _ in enumerate(self._process.stdout, 1):
                progress(done, len(kernels))

    def all_compiled(self) -> None:
        """Every kernel is on disk now: starts like this one need no processes any more."""
        with contextlib.suppress(OSError):
            self._marker.parent.mkdir(parents=True, exist_ok=True)
            self._marker.touch()


@contextlib.contextmanager
def started(config: ServerConfig, model: ModelSpec) -> Iterator[KernelCompilers | None]:
    """Compilers, if this server may run on CUDA and there is no sign that its kernels are on disk."""
    marker = _marker(config, model)
    if config.device not in ("auto", "cuda") or not _DRIVER.exists() or marker.exists():
        yield None
        return
    processes = max(1, min(MOST_PROCESSES, len(os.sched_getaffinity(0)) // (config.dp_size or 1)))
    command = [sys.executable, "-m", "minisgl.scheduler_proc.kernels.compile_server", str(processes)]
    environment = package_environment()
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield KernelCompilers(process, marker)
    finally:
        process.kill()
        process.wait()
        for pipe in filter(None, (process.stdin, process.stdout)):
            # A request may be in there that nobody has taken.
            with contextlib.suppress(OSError):
                pipe.close()


def _marker(config: ServerConfig, model: ModelSpec) -> Path:
    """In Triton's cache, named by what decides which kernels there are; that this GPU is another is not seen."""
    seen = hashlib.sha256()
    for file in (*sorted((Path(__file__).parent / "kernels").glob("*.py")), Path(model.directory) / "config.json"):
        with contextlib.suppress(OSError):
            seen.update(file.read_bytes())
    versions = []
    for package in ("torch", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(importlib.metadata.version(package))
    settings = (config.dtype, config.page_size, config.context_length, config.max_running_requests)
    seen.update(repr((versions, settings)).encode())
    home = Path(os.environ.get("TRITON_HOME", Path.home()))
    cache = Path(os.environ.get("TRITON_CACHE_DIR", home / ".triton" / "cache"))
    return cache / f"minisgl-{seen.hexdigest()[:16]}"
