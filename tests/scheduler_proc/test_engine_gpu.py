"""The engine on a CUDA device, with plain torch attention and with what it chooses by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import NEW_TOKENS, CheckpointMaker, load_engine, prompts, serve
from transformers import AutoModelForCausalLM, AutoTokenizer

import minisgl.demo_model
from minisgl.config import ConfigError, ModelSpec
from minisgl.sampling_params import SamplingParams

pytestmark = pytest.mark.gpu

GREEDY = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0)
FAMILIES = ["llama", "mistral", "qwen2-windowed", "qwen3", "gpt2", "gemma2", "gpt_oss"]


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_output_equals_transformers_on_the_cpu(family: str, checkpoint: CheckpointMaker) -> None:
    model = checkpoint(family)
    requests = [(prompt, GREEDY) for prompt in prompts()]
    expected = [model.generate(prompt) for prompt in prompts()]
    engine = load_engine(model.spec, device="cuda", attention_backend="torch_sdpa")
    assert serve(engine, model.spec, requests)[0] == expected
    assert serve(engine, model.spec, requests, chunked_prefill_size=7)[0] == expected


@pytest.mark.parametrize("backend", ["auto", "torch_sdpa"])
def test_the_demo_model_in_bfloat16(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    """bfloat16 rounds differently in other kernels, so a few tokens may differ; the model's logits are peaked."""
    directory = Path(minisgl.demo_model.__path__[0])
    tokenizer = AutoTokenizer.from_pretrained(directory)
    module = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval().cuda()
    questions = ["Hello, my name is Maria.", "What is 123 + 456?", "Spell the word house.", "你好"] * 4
    texts = [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in questions]
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    eos_id = tokenizer.eos_token_id
    expected = [
        module.generate(torch.tensor([prompt], device="cuda"), max_new_tokens=24, do_sample=False, eos_token_id=eos_id)[
            0
        ].tolist()[len(prompt) :]
        for prompt in ids
    ]
    spec = ModelSpec(str(directory), "demo", "demo", 4096, module.config.vocab_size, (eos_id,), "Qwen2ForCausalLM")
    engine = load_engine(
        spec, device="cuda", dtype="auto", page_size=16, max_total_tokens=8192, attention_backend=backend
    )
    assert engine.dtype_name == "bfloat16" and engine.device_name.startswith("cuda:0 (")
    engine.warm_up()
    outputs, _ = serve(engine, spec, [(prompt, SamplingParams(max_new_tokens=24, temperature=0.0)) for prompt in ids])
    pairs = [pair for output, right in zip(outputs, expected, strict=True) for pair in zip(output, right, strict=False)]
    wrong = sum(token != right for token, right in pairs)
    with capsys.disabled():
        print(f"\n{backend}, bfloat16: {wrong} of {len(pairs)} tokens differ from transformers'")
    assert wrong <= len(pairs) // 10


def test_sampling_is_the_same_alone_and_together(checkpoint: CheckpointMaker) -> None:
    model = checkpoint("qwen2")
    fields = [{}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.02, "min_new_tokens": 3}]
    requests = [
        (prompt, SamplingParams(max_new_tokens=10, temperature=0.8, seed=seed, **fields[seed]))
        for seed, prompt in enumerate(prompts())
    ]
    engine = load_engine(model.spec, device="cuda", attention_backend="torch_sdpa")
    alone = [serve(engine, model.spec, [request])[0][0] for request in requests]
    assert serve(engine, model.spec, requests)[0] == alone
    assert serve(load_engine(model.spec), model.spec, requests)[0] == alone


def test_kv_memory_takes_its_share_of_the_device(checkpoint: CheckpointMaker) -> None:
    model = checkpoint("qwen2")
    total = torch.cuda.get_device_properties(0).total_memory
    before, _ = torch.cuda.mem_get_info(0)
    settings = {"device": "cuda", "attention_backend": "torch_sdpa", "max_total_tokens": None}
    engine = load_engine(model.spec, **settings, mem_fraction_static=0.5)
    after, _ = torch.cuda.mem_get_info(0)
    assert 0.4 * total < before - after < 0.55 * total
    outputs, _ = serve(engine, model.spec, [(prompts()[1], GREEDY)])
    assert outputs[0] == model.generate(prompts()[1])
    with pytest.raises(ConfigError, match="no room for the KV cache on cuda:0"):
        load_engine(model.spec, **settings, mem_fraction_static=1e-6)


def test_a_device_beyond_the_last_is_refused(checkpoint: CheckpointMaker) -> None:
    with pytest.raises(ConfigError, match=r"needs CUDA device 99, but there are \d+"):
        load_engine(checkpoint("qwen2").spec, device="cuda", base_gpu_id=99)
