"""The plain torch path does nothing that MPS cannot: every operation of whole runs is watched, on the CPU.

MPS has no float64 and no pinned memory here, and copies that do not block read host memory that may be gone. What no
CPU can show is whether MPS has a kernel for each operation, and whether its results are right.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import NEW_TOKENS, CheckpointMaker, load_engine, prompts, serve
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from minisgl.sampling_params import SamplingParams
from minisgl.scheduler_proc import sampler

WISHES: list[dict[str, Any]] = [
    {"temperature": 0.0, "logprobs": 2, "prompt_logprobs_from": 0},
    {"temperature": 0.8, "top_k": 20, "repetition_penalty": 1.3},
    {"temperature": 0.8, "top_p": 0.9, "frequency_penalty": 0.2, "min_new_tokens": 3},
    {"temperature": 1.0, "min_p": 0.02, "logit_bias": ((5, 2.0),)},
]


class Watch(TorchDispatchMode):
    """Notes the operations that MPS would refuse or get wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen += 1
        flat, _ = tree_flatten((args, kwargs, result))
        if any(isinstance(one, torch.Tensor) and one.dtype in (torch.float64, torch.complex128) for one in flat):
            self.found.add(f"{func} in float64")
        if (kwargs or {}).get("non_blocking") or (func is torch.ops.aten.copy_.default and args[2:] == (True,)):
            self.found.add(f"{func} that does not block")
        if "pin_memory" in str(func) or (kwargs or {}).get("pin_memory"):
            self.found.add(f"{func} of pinned memory")
        return result


@pytest.mark.parametrize("family", ["qwen2-windowed", "qwen3", "llama-yarn", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_runs_take_nothing_that_mps_lacks(
    family: str, deterministic: bool, checkpoint: CheckpointMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    if deterministic and family in ("gemma2", "gpt_oss"):
        pytest.skip("the flag is for the native families")
    model = checkpoint(family)
    # As it answers for an MPS tensor.
    monkeypatch.setattr(sampler, "_wide", lambda tensor: torch.float32)
    engine = load_engine(model.spec, enable_deterministic_inference=deterministic)
    requests = [
        (prompt, SamplingParams(max_new_tokens=NEW_TOKENS, seed=seed, **fields))
        for seed, (prompt, fields) in enumerate(zip(prompts(), WISHES, strict=True))
    ]
    with Watch() as watch:
        outputs, _ = serve(engine, model.spec, requests, chunked_prefill_size=7)
    assert [len(output) for output in outputs] == [NEW_TOKENS] * 4
    assert watch.seen > 1000
    assert watch.found == set()


def test_the_watch_notices() -> None:
    with Watch() as watch:
        torch.ones(2).to(torch.float64)
        torch.ones(2, dtype=torch.int32).to("cpu", dtype=torch.float32, non_blocking=True)
        torch.empty(2).copy_(torch.ones(2), non_blocking=True)
    assert len(watch.found) == 3
