"""How fast a device copies memory, and how many bytes one decode step has to move: the floor under every decode figure.

python -m benchlib.bandwidth cpu|cuda|mps      prints {"device": ..., "name": ..., "copy_bytes_per_s": ...}
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class DecodeCost:
    """Bytes that one decode step must read: every weight once, and the keys and values of every token in context.

    `weight_bytes` leaves out an input embedding that is not tied to the LM head (a step reads one row a request of it).
    Gated-MLP decoders only (Llama, Mistral, Qwen2, Qwen3); `of_config` gives None for others.
    """

    weight_bytes: int
    kv_bytes_per_token: int

    @classmethod
    def of_config(cls, config: dict[str, Any], dtype: str) -> DecodeCost | None:
        if config.get("model_type") not in ("llama", "mistral", "qwen2", "qwen3"):
            return None
        hidden, layers = config["hidden_size"], config["num_hidden_layers"]
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        head_dim = config.get("head_dim") or hidden // heads
        q_size, kv_size = heads * head_dim, kv_heads * head_dim
        attention = hidden * (q_size + 2 * kv_size) + q_size * hidden
        if config["model_type"] == "qwen2":
            attention += q_size + 2 * kv_size
        elif config["model_type"] == "qwen3":
            attention += 2 * head_dim
        mlp = 3 * hidden * config["intermediate_size"]
        weights = layers * (attention + mlp + 2 * hidden) + hidden + config["vocab_size"] * hidden
        size = DTYPE_BYTES[dtype]
        return cls(weights * size, 2 * layers * kv_size * size)

    def step_bytes(self, batch: float, context: float) -> float:
        """Bytes of a step that decodes `batch` requests of `context` tokens each on average."""
        return self.weight_bytes + batch * context * self.kv_bytes_per_token


def model_config(model_dir: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((model_dir / "config.json").read_text())
    return config


def checkpoint_dtype(config: dict[str, Any]) -> str:
    """The dtype a checkpoint was saved in, float32 when its config names none."""
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def copy_bandwidth(device: str) -> dict[str, Any]:
    """Measure a large device-to-device copy, counting bytes read plus bytes written; the best of eight.

    Keys: device, name, copy_bytes_per_s, buffer_bytes, torch. Needs torch; run it in a process of its own
    (`measure`), so that the benchmark itself holds no device memory.
    """
    import torch

    buffer_bytes = 4 * 2**30 if device == "cuda" else 256 * 2**20
    source = torch.ones(buffer_bytes, dtype=torch.int8, device=device)
    target = torch.empty_like(source)

    def synchronize() -> None:
        if device != "cpu":
            getattr(torch, device).synchronize()

    best = float("inf")
    for repeat in range(10):
        synchronize()
        begin = time.perf_counter()
        target.copy_(source)
        synchronize()
        if repeat >= 2:
            best = min(best, time.perf_counter() - begin)
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    return {
        "device": device,
        "name": name,
        "copy_bytes_per_s": 2 * buffer_bytes / best,
        "buffer_bytes": buffer_bytes,
        "torch": torch.__version__,
    }


def cpu_name() -> str:
    """The processor's model name and its number of usable cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in _lines(cpuinfo) if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {cores} cores"


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def measure(python: str, device: str, timeout: float = 120.0) -> dict[str, Any]:
    """`copy_bandwidth` in a process of its own; raises RuntimeError with its last line when it fails."""
    command = [python, "-m", "benchlib.bandwidth", device]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the copy bandwidth could not be measured: {done.stderr.strip().splitlines()[-1:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


if __name__ == "__main__":
    print(json.dumps(copy_bandwidth(sys.argv[1])))
