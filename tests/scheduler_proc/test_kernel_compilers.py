"""Kernels compiled by other processes: how they are asked and how they end; on a GPU, that they find what is needed."""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
from tiny_models import server_config

from minisgl.child_process import package_environment
from minisgl.config import ModelSpec
from minisgl.scheduler_proc import kernel_compilers
from minisgl.scheduler_proc.kernel_compilers import KernelCompilers, KernelName

SERVER = [sys.executable, "-m", "minisgl.scheduler_proc.kernels.compile_server"]
SHAPE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 2000,
    "hidden_size": 320,
    "intermediate_size": 640,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def model_spec(directory: Path) -> ModelSpec:
    (directory / "config.json").write_text(json.dumps(SHAPE))
    return ModelSpec(str(directory), "tiny", "tiny", 2048, 2000, (), "Qwen2ForCausalLM")


def serve(processes: int) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([*SERVER, str(processes)], stdin=pipe, stdout=pipe, text=True, env=package_environment())


def test_every_kernel_is_found_by_its_name() -> None:
    pytest.importorskip("triton")
    from minisgl.scheduler_proc import kernels

    found = 0
    for info in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        for kernel in vars(importlib.import_module(info.name)).values():
            # Compiled, or by Triton's interpreter.
            if type(kernel).__module__.startswith("triton.runtime."):
                assert getattr(importlib.import_module(kernel.fn.__module__), kernel.fn.__name__) is kernel
                found += 1
    assert found > 20


def test_what_cannot_be_compiled_is_reported_as_done_and_left_to_others(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    process = serve(3)
    told: list[tuple[int, int]] = []
    names = [("minisgl.scheduler_proc.kernels.elementwise", "_embed", "{}"), ("no.such.module", "x", "{}")] * 4
    KernelCompilers(process, tmp_path / "marker").compile(names, lambda *progress: told.append(progress))
    assert told == [(done, 8) for done in range(1, 9)]
    assert process.wait(10) == 0


def test_processes_that_are_gone_are_no_error(tmp_path: Path) -> None:
    process = serve(1)
    process.kill()
    process.wait(10)
    told: list[tuple[int, int]] = []
    names = [("some.module", "kernel", "x" * 1000)] * 200
    KernelCompilers(process, tmp_path / "marker").compile(names, lambda *progress: told.append(progress))
    assert told == []


@pytest.mark.parametrize("how", ["nothing asked", "killed"])
def test_no_process_is_left(how: str) -> None:
    pytest.importorskip("triton")
    process = serve(3)
    deadline = time.monotonic() + 60
    while len(children := psutil.Process(process.pid).children()) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    assert process.stdin is not None
    if how == "killed":
        process.kill()
    process.stdin.close()
    process.wait(10)
    assert not psutil.wait_procs(children, timeout=10)[1]


def test_without_a_gpu_or_with_all_on_disk_nothing_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_compilers, "_DRIVER", tmp_path / "driver")
    spec, config = model_spec(tmp_path), server_config(device="auto")
    with kernel_compilers.started(config, spec) as compilers:
        assert compilers is None, "there is no driver"
    (tmp_path / "driver").touch()
    with kernel_compilers.started(server_config(device="cpu"), spec) as compilers:
        assert compilers is None
    with kernel_compilers.started(config, spec) as compilers:
        assert compilers is not None
        compilers.all_compiled()
    with kernel_compilers.started(config, spec) as compilers:
        assert compilers is None, "all is on disk"
    with kernel_compilers.started(server_config(device="auto", max_running_requests=3), spec) as compilers:
        assert compilers is not None, "other settings, other kernels"


class Counted(KernelCompilers):
    """Counts what is on disk when the processes are done."""

    asked = on_disk = 0

    def __init__(self, compilers: KernelCompilers, cache: Path) -> None:
        self._compilers, self._cache = compilers, cache

    def compile(self, kernels: Sequence[KernelName], progress: Callable[[int, int], None]) -> None:
        self._compilers.compile(kernels, progress)
        self.asked, self.on_disk = len(kernels), len(list(self._cache.rglob("*.cubin")))

    def all_compiled(self) -> None:
        self._compilers.all_compiled()


@pytest.mark.gpu
def test_the_processes_compile_all_that_an_engine_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minisgl.scheduler_proc.engine import StepEngine

    cache = tmp_path / "cache"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    spec = model_spec(tmp_path)
    config = server_config(device="cuda", dtype="bfloat16", load_format="dummy", max_total_tokens=8192)
    with kernel_compilers.started(config, spec) as compilers:
        assert compilers is not None
        counted = Counted(compilers, cache)
        StepEngine.load(config, spec, 0, lambda *stage: None, counted).warm_up()
    assert counted.on_disk == counted.asked > 10
    assert list(cache.glob("minisgl-*"))
