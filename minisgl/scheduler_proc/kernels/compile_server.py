"""python -m minisgl.scheduler_proc.kernels.compile_server N: compiles kernels in N processes; see kernel_compilers.py.

One line of JSON comes in, a list of kernels (module, name, specialization); an empty line goes out for each that is
done. What fails is left to the one who asks, who will find out why.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import struct
import sys
import tempfile
from typing import Any

import triton

from minisgl.child_process import die_with_parent
from minisgl.scheduler_proc import kernels

_TASK = struct.Struct("i")


def main() -> None:
    die_with_parent()
    for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        importlib.import_module(module.name)
    processes = int(sys.argv[1])
    results = os.dup(1)
    # Nothing else is to end up among the results.
    os.dup2(2, 1)
    # All take the numbers of the kernels out of one pipe, and look into one file what these are.
    source, sink = os.pipe()
    with tempfile.TemporaryFile() as listed:
        # Forked, which takes no second import; nothing here has begun a thread.
        for _ in range(processes):
            if os.fork() == 0:
                try:
                    die_with_parent()
                    os.close(sink)
                    _work(source, listed.fileno(), results)
                finally:
                    os._exit(0)
        line = sys.stdin.readline() or "[]"
        listed.write(line.encode())
        listed.flush()
        for number in range(len(json.loads(line))):
            os.write(sink, _TASK.pack(number))
        os.close(sink)
        for _ in range(processes):
            os.wait()


def _work(source: int, listed: int, results: int) -> None:
    while task := os.read(source, _TASK.size):
        wanted = json.loads(os.pread(listed, os.fstat(listed).st_size, 0))
        with contextlib.suppress(Exception):
            _compile(*wanted[_TASK.unpack(task)[0]])
        os.write(results, b"\n")


def _compile(module: str, name: str, specialization: str) -> None:
    """Without a context on the device, which would take time there and memory that the model may need."""
    kernel: Any = getattr(importlib.import_module(module), name)
    compiled = kernel.preload(specialization)
    # What calls it, a small library.
    triton.runtime.driver.active.launcher_cls(compiled.src, compiled.metadata)


if __name__ == "__main__":
    main()
