"""How weights are kept for matrix products, against torch's own product with the plain weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import CheckpointMaker, load_engine, prompts, serve

from minisgl.sampling_params import SamplingParams
from minisgl.scheduler_proc.models.linear import PACKED, PLAIN, LinearMakers, PackedLinear, exact_linears
from minisgl.scheduler_proc.models.loader import load_model

packs = exact_linears(torch.device("cpu"), torch.bfloat16) is PACKED
needs_packing = pytest.mark.skipif(not packs, reason="this CPU or this torch cannot pack bfloat16 weights")


@needs_packing
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 33, 100])
def test_packed_products_are_plain_ones_to_the_bit(rows: int) -> None:
    torch.manual_seed(rows)
    for outputs, inputs in ((96, 64), (130, 48), (64, 96)):
        weight, hidden = torch.randn(outputs, inputs).bfloat16(), torch.randn(rows, inputs).bfloat16()
        assert torch.equal(PackedLinear(weight, None)(hidden), F.linear(hidden, weight))


@needs_packing
def test_a_bias_is_added_before_the_one_rounding() -> None:
    torch.manual_seed(0)
    weight, bias, hidden = torch.randn(64, 48).bfloat16(), torch.randn(64).bfloat16(), torch.randn(9, 48).bfloat16()
    exact = hidden.double() @ weight.double().T + bias.double()
    error = (PackedLinear(weight, bias)(hidden).double() - exact).abs()
    # Half a unit in the last place of 8 bits, and what float32 accumulation adds.
    assert bool((error <= exact.abs() * 2.0**-8 + 1e-5).all())


def test_float32_and_other_devices_stay_plain() -> None:
    assert exact_linears(torch.device("cpu"), torch.float32) is PLAIN
    assert exact_linears(torch.device("cuda"), torch.bfloat16) is PLAIN


@needs_packing
@pytest.mark.parametrize("family", ["qwen2", "llama", "llama-biased", "qwen3-untied", "phi", "olmo2"])
def test_models_with_packed_weights_answer_as_plain_ones(
    family: str, checkpoint: CheckpointMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Native and generic families, heads tied and not; a bias may round otherwise, which few tokens notice."""
    spec = checkpoint(family).spec
    requests = [(prompt, SamplingParams(max_new_tokens=4, temperature=0.0)) for prompt in prompts()]
    packed = load_engine(spec, dtype="bfloat16")
    monkeypatch.setattr("minisgl.scheduler_proc.engine.choose_linears", lambda *_: PLAIN)
    plain = load_engine(spec, dtype="bfloat16")
    ours, theirs = (np.array(serve(engine, spec, requests)[0]) for engine in (packed, plain))
    assert (ours == theirs).mean() >= 0.75, (ours, theirs)


@needs_packing
def test_packed_weights_do_not_stay_in_memory_twice(checkpoint: CheckpointMaker) -> None:
    def load(family: str, linears: LinearMakers) -> Any:
        directory = Path(checkpoint(family).directory)
        options: dict[str, Any] = {"device": torch.device("cpu"), "context_length": 128, "dummy_seed": None}
        options |= {"trust_remote_code": False, "progress": lambda done, total: None}
        return load_model(directory, dtype=torch.bfloat16, linears=linears, **options)

    for family in ("qwen3-untied", "phi"):
        plain, packed = load(family, PLAIN), load(family, PACKED)
        # oneDNN pads what is not a multiple of its blocks, and such small matrices are.
        assert packed.weight_bytes < 2 * plain.weight_bytes
    assert all(layer.gate_up.numel() == 0 for layer in load("qwen3-untied", PACKED).weights.layers)
