"""How far the fused bfloat16 path is from float32, beside transformers' own bfloat16. Prints what it measures.

Random models of the shapes of real ones, cut to a few layers and a small vocabulary; and the demo model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import load_engine, serve
from transformers import AutoConfig, AutoModelForCausalLM

import minisgl.demo_model
from minisgl.config import ModelSpec
from minisgl.sampling_params import SamplingParams
from minisgl.scheduler_proc.attention.kv_pool import KVPool
from minisgl.scheduler_proc.models.decoder import Decoder, DecoderWeights
from minisgl.scheduler_proc.models.loader import load_model
from minisgl.scheduler_proc.request import Request, StepPlan, StepRow

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
LAYERS, VOCAB_SIZE, CONTEXT, PAGE_SIZE = 4, 4096, 1024, 16
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2.5-0.5B": ("qwen2", {"hidden_size": 896, "intermediate_size": 4864, "heads": (14, 2), "head_dim": 64}),
    "Qwen3-0.6B": ("qwen3", {"hidden_size": 1024, "intermediate_size": 3072, "heads": (16, 8), "head_dim": 128}),
    "Llama-3.2-1B": ("llama", {"hidden_size": 2048, "intermediate_size": 8192, "heads": (32, 8), "head_dim": 64}),
}
FINAL_ROUNDING = 2.0**-9
"""What rounding a result to bfloat16 adds at most, relative to it."""


class Pair:
    """One model on disk, and in transformers in bfloat16 and in float32: the same weights."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.half = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval().to(DEVICE)
        self.full = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().to(DEVICE)

    @property
    def spec(self) -> ModelSpec:
        config = self.full.config
        context = min(config.max_position_embeddings, CONTEXT)
        return ModelSpec(str(self.directory), "pair", "pair", context, config.vocab_size, (), config.architectures[0])

    def prompts(self, count: int, longest: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(count)
        lengths = torch.randint(8, longest, (count,), generator=generator).tolist()
        vocab_size = self.full.config.vocab_size
        return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def make_checkpoint(shape: str, directory: Path) -> None:
    model_type, fields = SHAPES[shape]
    heads, kv_heads = fields["heads"]
    config = AutoConfig.for_model(
        model_type,
        **{name: value for name, value in fields.items() if name != "heads"},
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=LAYERS,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(3)
    with torch.device(DEVICE):
        module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                # Larger than usual, so that attention has favourites and layers change what they get.
                parameter.normal_(0.0, 0.04)
    module.save_pretrained(directory)


@pytest.fixture(scope="module", params=[*SHAPES, "demo"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    if request.param == "demo":
        return Pair(Path(minisgl.demo_model.__path__[0]))
    directory = tmp_path_factory.mktemp(request.param)
    make_checkpoint(request.param, directory)
    return Pair(directory)


@pytest.mark.parametrize("count", [1, 12, 64])
def test_greedy_tokens_against_transformers(
    pair: Pair, count: int, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    """Every token of ours against what transformers would choose after the same tokens."""
    new_tokens = 256 if count == 1 else 48
    prompts = pair.prompts(count, 300)
    engine = load_engine(
        pair.spec, device="cuda", dtype="auto", page_size=PAGE_SIZE, max_total_tokens=65536, max_running_requests=64
    )
    assert engine.dtype_name == "bfloat16" and engine.graphs is not None
    while engine.prepare_next():
        pass
    greedy = SamplingParams(max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    outputs, _ = serve(engine, pair.spec, [(prompt, greedy) for prompt in prompts], max_running_requests=64)
    ours = [token for output in outputs for token in output]
    assert len(ours) == count * new_tokens
    ids = padded([prompt + output for prompt, output in zip(prompts, outputs, strict=True)])
    with torch.inference_mode():
        half, full = (chosen(module(ids).logits, prompts, new_tokens) for module in (pair.half, pair.full))

    def other(left: Sequence[int], right: Sequence[int]) -> float:
        return sum(a != b for a, b in zip(left, right, strict=True)) / len(left)

    own, natural = other(ours, full), other(half, full)
    with capsys.disabled():
        print(
            f"\n{request.node.callspec.id}: of {len(ours)} greedy tokens {other(ours, half):.2%} differ from "
            f"transformers' bfloat16, {own:.2%} from its float32; transformers' two differ in {natural:.2%}"
        )
    # So few tokens tell a rate to within three standard deviations of this.
    assert own <= natural + 3 * (natural / len(ours)) ** 0.5 + 0.005


@pytest.mark.parametrize("rows", [1, 8, 48])
def test_hidden_states_of_each_layer_are_within_bfloat16_rounding(
    pair: Pair, rows: int, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    """After each layer our error against float32 is at most about that of transformers' bfloat16."""
    sequences = pair.prompts(rows, 700)
    eps = pair.full.config.rms_norm_eps
    with torch.inference_mode():
        full, half = hidden_states(pair.full, sequences, eps), hidden_states(pair.half, sequences, eps)
        loaded = load_model(
            pair.directory,
            dtype=torch.bfloat16,
            device=DEVICE,
            context_length=pair.spec.context_length,
            dummy_seed=None,
            trust_remote_code=False,
            progress=lambda done, total: None,
        )
        assert isinstance(loaded, Decoder)
        lines = []
        for layers, (exact, theirs) in enumerate(zip(full, half, strict=True), 1):
            ours = fused_hidden_states(loaded, layers, sequences, pair.spec.context_length)
            errors = [[distance(ours[at], exact[at]), distance(theirs[at], exact[at])] for at in (0, 1)]
            lines.append((layers, *errors[0], *errors[1]))
    with capsys.disabled():
        print(f"\n{request.node.callspec.id}: error against float32, ours / transformers' bfloat16")
        for layers, *values in lines:
            print("  layer {}: prefill {:.5f} / {:.5f}, decode {:.5f} / {:.5f}".format(layers, *values))
    for _, prefill, their_prefill, decode, their_decode in lines:
        assert prefill <= 1.1 * their_prefill + FINAL_ROUNDING
        assert decode <= 1.1 * their_decode + FINAL_ROUNDING


def hidden_states(module: Any, sequences: Sequence[Sequence[int]], eps: float) -> list[torch.Tensor]:
    """Per layer float32 [2, sequences, hidden]: what follows it at the last token but one and at the last, normed."""
    row = torch.arange(len(sequences), device=DEVICE)
    last = torch.tensor([len(sequence) - 1 for sequence in sequences], device=DEVICE)
    states: list[torch.Tensor] = []

    def keep(layer: Any, inputs: Any, output: Any) -> None:
        hidden = (output if torch.is_tensor(output) else output[0]).float()
        chosen = torch.stack((hidden[row, last - 1], hidden[row, last]))
        states.append(chosen * (chosen.square().mean(-1, keepdim=True) + eps).rsqrt())

    hooks = [layer.register_forward_hook(keep) for layer in module.model.layers]
    module(padded(sequences))
    for hook in hooks:
        hook.remove()
    return states


def chosen(logits: torch.Tensor, prompts: Sequence[Sequence[int]], count: int) -> list[int]:
    """The likeliest tokens at the `count` positions that follow each prompt, one prompt's after the other's."""
    return [
        token
        for prompt, choices in zip(prompts, logits.argmax(-1).tolist(), strict=True)
        for token in choices[len(prompt) - 1 : len(prompt) - 1 + count]
    ]


def padded(sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    """Token ids [sequences, longest]; what stands behind a sequence does not change what is computed for it."""
    longest = max(len(sequence) for sequence in sequences)
    return torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in sequences], device=DEVICE)


def fused_hidden_states(
    decoder: Decoder, layers: int, sequences: Sequence[list[int]], context_length: int
) -> torch.Tensor:
    """The same after the first `layers` layers of the fused path: prefill up to the last token, and its decode step."""
    from minisgl.scheduler_proc.cuda_graphs import GraphRunner
    from minisgl.scheduler_proc.models.fused_decoder import FusedDecoder

    config, weights = decoder.config, decoder.weights
    # With a norm of ones and a head that changes nothing, the logits are the normed hidden states.
    cut = Decoder(
        replace(config, num_layers=layers, windows=config.windows[:layers]),
        DecoderWeights(
            weights.embedding,
            weights.layers[:layers],
            torch.ones_like(weights.norm),
            torch.eye(config.hidden_size, dtype=torch.bfloat16, device=DEVICE),
        ),
        decoder.rope,
    )
    pages = -(-context_length // PAGE_SIZE)
    pool = KVPool(cut.kv_shapes, len(sequences) * pages + 1, PAGE_SIZE, torch.bfloat16, DEVICE)
    runner = GraphRunner(FusedDecoder(cut, pool, context_length), pool, len(sequences), context_length)
    requests = [
        Request(
            index,
            list(ids),
            len(ids),
            SamplingParams(temperature=0.0),
            1,
            frozenset(),
            [],
            pages=list(range(index * pages, (index + 1) * pages)),
        )
        for index, ids in enumerate(sequences)
    ]
    prefill = StepPlan(1, [StepRow(one, 0, len(one.token_ids) - 1, True) for one in requests], 0)
    decode = StepPlan(2, [StepRow(one, len(one.token_ids) - 1, 1, True) for one in requests], len(requests))
    states = []
    for plan in (prefill, decode):
        parts: list[torch.Tensor] = []
        runner.run(plan, lambda rows, step, parts=parts: parts.append(step.logits[: len(rows)].float()))  # type: ignore[misc]
        states.append(torch.cat(parts))
    return torch.stack(states)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
