"""Weights in 8 and 4 bits: how far products are off, the two ways of computing them, what is refused, what is saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import CheckpointMaker, load_engine, prompts, serve, server_config
from tokenizers import Tokenizer

import minisgl.demo_model
from minisgl.config import ConfigError, ModelSpec
from minisgl.sampling_params import SamplingParams
from minisgl.scheduler_proc.device import choose_linears
from minisgl.scheduler_proc.models.config import ModelError
from minisgl.scheduler_proc.models.quantized import (
    INT4_MANY_ROWS,
    INT8_MANY_ROWS,
    ExpandedWeights,
    Int4Linear,
    Int8Linear,
)

DEMO = ModelSpec(str(Path(minisgl.demo_model.__path__[0])), "demo", "demo", 4096, 2560, (2,), "Qwen2ForCausalLM")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("kind", "many"), [(Int8Linear, INT8_MANY_ROWS), (Int4Linear, INT4_MANY_ROWS)])
def test_weights_are_off_by_half_a_step_at_most(
    kind: type[Int8Linear] | type[Int4Linear], many: int, dtype: torch.dtype
) -> None:
    """Rows of the identity bring the stored weights to light: few through the kernel, all expanded."""
    torch.manual_seed(0)
    outputs, inputs = 128, 2 * many - many % 64 + 64
    inputs -= inputs % 64
    weight = torch.randn(outputs, inputs).to(dtype)
    weight[5] = 0.0
    linear = kind(weight, None, ExpandedWeights())
    identity = torch.eye(inputs, dtype=dtype)
    expanded = linear(identity).float()
    few = linear(identity[: many - 1]).float()
    if kind is Int8Linear:
        step = weight.float().abs().amax(dim=1) / 127
    else:
        groups = weight.float().view(outputs, -1, 64)
        step = (groups.amax(-1) - groups.amin(-1)).amax(-1) / 15
    # Scales and products are rounded to the model's precision besides.
    rounding = weight.float().abs().amax() * (2.0**-7 if dtype == torch.bfloat16 else 1e-6)
    assert bool(((expanded.T - weight.float()).abs() <= step[:, None] * 0.5 + rounding).all())
    assert (few - expanded[: many - 1]).abs().max() <= rounding
    assert linear.own_bytes < weight.nbytes * (0.6 if kind is Int8Linear else 0.32)


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
def test_a_bias_is_added(kind: type[Int8Linear] | type[Int4Linear]) -> None:
    torch.manual_seed(0)
    weight, bias, hidden = torch.randn(64, 64), torch.randn(64), torch.randn(120, 64)
    without, with_bias = kind(weight, None, ExpandedWeights()), kind(weight, bias, ExpandedWeights())
    for rows in (1, 120):
        assert torch.allclose(with_bias(hidden[:rows]), without(hidden[:rows]) + bias, atol=1e-5)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_the_demo_model_still_calculates(quantization: str) -> None:
    """A short question, and one after a talk long enough that its matrices are expanded."""
    tokenizer = Tokenizer.from_file(f"{DEMO.directory}/tokenizer.json")
    question = "<|im_start|>user\nWhat is 23 + 45?<|im_end|>\n<|im_start|>assistant\n"
    talk = "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\nHello! How can I help you?<|im_end|>\n"
    short, long = (tokenizer.encode(text, add_special_tokens=False).ids for text in (question, talk * 6 + question))
    assert len(short) < INT8_MANY_ROWS < INT4_MANY_ROWS < len(long)
    engine = load_engine(DEMO, dtype="bfloat16", max_total_tokens=2048, quantization=quantization)
    exact = load_engine(DEMO, dtype="bfloat16", max_total_tokens=2048)
    embedding = 2560 * 256 * 2
    assert engine.weight_bytes - embedding < (exact.weight_bytes - embedding) * (0.6 if quantization == "int8" else 0.4)
    greedy = SamplingParams(max_new_tokens=12, temperature=0.0)
    for prompt in (short, long):
        answer = tokenizer.decode(serve(engine, DEMO, [(prompt, greedy)])[0][0])
        assert "68" in answer


def test_what_cannot_be_quantised_is_refused(checkpoint: CheckpointMaker) -> None:
    config = server_config(quantization="int8")
    with pytest.raises(ConfigError, match="--quantization int8 runs on the CPU only"):
        choose_linears(config, torch.device("cuda", 0), torch.bfloat16)
    with pytest.raises(ModelError, match="not for Phi3ForCausalLM"):
        load_engine(checkpoint("phi3").spec, quantization="int8")
    with pytest.raises(ModelError, match=r"int4 needs matrices .* 32 x 48; use --quantization int8"):
        load_engine(checkpoint("qwen3-untied").spec, quantization="int4")


def test_any_shape_runs_in_eight_bits(checkpoint: CheckpointMaker) -> None:
    spec = checkpoint("qwen3-untied").spec
    engine = load_engine(spec, quantization="int8")
    requests = [(prompt, SamplingParams(max_new_tokens=4, temperature=0.0)) for prompt in prompts()]
    assert [len(output) for output in serve(engine, spec, requests)[0]] == [4] * 4
