"""Compiled steps against decoder.py, by all instructions that this CPU has: servers mostly have some, laptops none."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import cpu_instructions, load_engine

pytest.importorskip("numba", reason="steps are compiled by numba, which is installed on x86 Linux")

from minisgl.config import ConfigError
from minisgl.sampling_params import SamplingParams
from minisgl.scheduler_proc.attention.kv_pool import KVPool
from minisgl.scheduler_proc.attention.torch_sdpa import TorchSdpaAttention
from minisgl.scheduler_proc.cpu.compiler import place_to_keep
from minisgl.scheduler_proc.cpu.instructions import NAMES
from minisgl.scheduler_proc.cpu.team import Team
from minisgl.scheduler_proc.cpu.tiled_decoder import CACHED_BYTES, STEPS_WITHOUT, TiledDecoder, TiledForward, tiles_fit
from minisgl.scheduler_proc.models.config import parse_config
from minisgl.scheduler_proc.models.decoder import Decoder
from minisgl.scheduler_proc.models.forward_batch import make_forward_batch
from minisgl.scheduler_proc.models.loader import load_model
from minisgl.scheduler_proc.request import Request, StepPlan, StepRow

CPU = torch.device("cpu")
PAGES, PAGE_SIZE, CONTEXT = 96, 16, 700
SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 160,
    "intermediate_size": 224,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": CONTEXT,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 128,
        "num_attention_heads": 4,
        "attention_bias": True,
    },
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": 32,
        "num_attention_heads": 20,
        "num_key_value_heads": 1,
        "attention_bias": True,
        "mlp_bias": True,
        "vocab_size": 333,
    },
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 40,
        "head_dim": 96,
        "num_attention_heads": 2,
    },
}

Forward = Callable[[StepPlan], torch.Tensor]


def load(directory: Path, family: str, dtype: torch.dtype = torch.bfloat16) -> Decoder:
    (directory / "config.json").write_text(json.dumps({**SHAPE, **FAMILIES[family]}))
    model = load_model(
        directory,
        dtype=dtype,
        device=CPU,
        context_length=CONTEXT,
        dummy_seed=1,
        trust_remote_code=False,
        progress=lambda done, total: None,
    )
    assert isinstance(model, Decoder)
    return model


@pytest.fixture(params=list(NAMES))
def instructions(request: pytest.FixtureRequest) -> str:
    if request.param not in cpu_instructions():
        pytest.skip("this CPU does not have them, or the system does not permit them")
    return str(request.param)


def tiled(model: Decoder, instructions: str, threads: int = 2, large: bool = False) -> TiledDecoder:
    decoder = TiledDecoder(
        model,
        threads,
        lambda tokens: threads,
        instructions,
        lambda done, total: None,
        cached_bytes=0 if large else CACHED_BYTES,
    )
    assert decoder.screens == large
    assert decoder.narrowed == (4 * model.config.num_layers + 1 if large and instructions == "amx" else 0)
    return decoder


def on_tiles(
    model: Decoder, instructions: str, threads: int = 2, page_size: int = PAGE_SIZE, large: bool = False
) -> TiledForward:
    pool = KVPool(model.kv_shapes, PAGES * PAGE_SIZE // page_size, page_size, torch.bfloat16, CPU)
    return tiled(model, instructions, threads, large).over(pool)


def tiled_forward(model: Decoder, instructions: str, threads: int = 2, page_size: int = PAGE_SIZE) -> Forward:
    return on_tiles(model, instructions, threads, page_size).logits


def plain_forward(model: Decoder, page_size: int = PAGE_SIZE) -> Forward:
    pool = KVPool(model.kv_shapes, PAGES * PAGE_SIZE // page_size, page_size, model.weights.norm.dtype, CPU)
    attention = TorchSdpaAttention(pool)

    def forward(plan: StepPlan) -> torch.Tensor:
        batch, _ = make_forward_batch(plan, page_size, CPU)
        return model.forward(batch, attention.begin_step(batch))

    return forward


def plan_of(rows: list[StepRow]) -> StepPlan:
    """Rows of one token come first."""
    return StepPlan(1, rows, sum(row.length == 1 for row in rows))


def run(forward: Forward, rows: list[StepRow]) -> torch.Tensor:
    """Logits of a step."""
    with torch.inference_mode():
        return forward(plan_of(rows)).float().clone()


def new_requests(chance: random.Random, lengths: list[int], page_size: int = PAGE_SIZE) -> list[Request]:
    """Requests with random tokens, and pages in random order."""
    pages = list(range(PAGES * PAGE_SIZE // page_size))
    chance.shuffle(pages)
    made = []
    for index, length in enumerate(lengths):
        count = -(-length // page_size)
        own, pages = pages[:count], pages[count:]
        tokens = [chance.randrange(SHAPE["vocab_size"]) for _ in range(length)]
        sampling = SamplingParams(temperature=0.0)
        made.append(Request(index, tokens, length, sampling, 1, frozenset(), [], pages=own))
    return made


def random_steps(chance: random.Random, requests: list[Request]) -> list[list[StepRow]]:
    """Every request's tokens, cut into prompt chunks and decode rows at random, beside each other."""
    done = [0] * len(requests)
    steps = []
    while any(begin < len(request.token_ids) for begin, request in zip(done, requests, strict=True)):
        rows = []
        for index, request in enumerate(requests):
            left = len(request.token_ids) - done[index]
            if left and chance.random() < 0.8:
                length = min(left, chance.choice((1, 1, chance.randint(2, 40), chance.randint(41, 400))))
                rows.append(StepRow(request, done[index], length, chance.random() < 0.9))
                done[index] += length
        if rows:
            steps.append(sorted(rows, key=lambda row: row.length != 1))
    return steps


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("threads", "page_size"), [(1, 16), (3, 32)])
def test_logits_are_as_near_to_float32_as_plain_bfloat16(
    family: str, threads: int, page_size: int, instructions: str, tmp_path: Path
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    half = load(tmp_path, family)
    tiled, plain = (
        tiled_forward(load(tmp_path, family), instructions, threads, page_size),
        plain_forward(half, page_size),
    )
    exact = load(tmp_path, family, torch.float32)
    for (_, target), (_, source) in zip(exact.weights.named_tensors(), half.weights.named_tensors(), strict=True):
        target.copy_(source)
    reference = plain_forward(exact, page_size)
    requests = new_requests(chance, [1, 17, 64, *(chance.randint(2, 400) for _ in range(3))], page_size)
    errors, plain_errors = [], []
    for rows in random_steps(chance, requests):
        found, expected = run(tiled, rows), run(reference, rows)
        assert found.shape == expected.shape
        errors.append((found - expected).flatten())
        plain_errors.append((run(plain, rows) - expected).flatten())
    error, plain_error = torch.cat(errors).norm(), torch.cat(plain_errors).norm()
    assert error < 1.1 * plain_error, f"error {error}, that of plain bfloat16 {plain_error}"


def test_a_row_is_the_same_alone_and_beside_others_chunked_or_not(instructions: str, tmp_path: Path) -> None:
    """To the bit: every sum is made in the same order, whatever else is computed."""
    chance = random.Random(3)
    model = load(tmp_path, "qwen2")
    forward = tiled_forward(model, instructions)
    requests = new_requests(chance, [300, *(chance.randint(1, 30) for _ in range(40))])
    request = requests[0]
    whole = run(forward, [StepRow(request, 0, 300, True)])
    for rows in random_steps(chance, requests):
        # The row of the long request is the last one that samples in the last of its steps.
        found = run(forward, rows)
        mine = [row for row in rows if row.sample]
        for row, logits in zip(mine, found, strict=True):
            if row.request is request and row.start + row.length == 300:
                assert torch.equal(logits, whole[0])
                break
        alone = [StepRow(row.request, row.start, row.length, True) for row in rows if row.length == 1]
        for row in alone:
            beside = [logits for other, logits in zip(mine, found, strict=True) if other.request is row.request]
            if beside:
                assert torch.equal(run(forward, [row])[0], beside[0])


def test_what_overflows_stays_with_its_request(instructions: str, tmp_path: Path) -> None:
    model = load(tmp_path, "qwen2")
    model.weights.embedding[7] = float("inf")
    forward = tiled_forward(model, instructions)
    pages = [3, 4]
    sampling = SamplingParams(temperature=0.0)
    good = Request(0, [1, 2, 3], 3, sampling, 1, frozenset(), [], pages=pages)
    bad = Request(1, [7] * 32, 32, sampling, 1, frozenset(), [], pages=pages)
    before = run(forward, [StepRow(good, 0, 3, True)])
    # Token 7 is in the tied head, too: its own logit overflows in every answer.
    assert not torch.isfinite(run(forward, [StepRow(bad, 0, 32, True)])[0, :7]).any()
    after = run(forward, [StepRow(good, 0, 3, True)])
    assert torch.isfinite(before[0, :7]).all() and torch.equal(before[0, :7], after[0, :7])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_large_models_logits_are_the_same_to_the_bit(family: str, instructions: str, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    small, large = (on_tiles(load(tmp_path, family), instructions, large=large).logits for large in (False, True))
    for rows in random_steps(chance, new_requests(chance, [1, 33, 500, *(chance.randint(2, 100) for _ in range(9))])):
        assert torch.equal(run(small, rows), run(large, rows))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("threads", "large"), [(1, False), (3, False), (1, True), (3, True)])
def test_the_likeliest_tokens_are_those_of_the_largest_logits(
    family: str, threads: int, large: bool, instructions: str, tmp_path: Path
) -> None:
    """The first of several that are equal; vocabularies of 300 and 333 do not fill the last columns."""
    chance = random.Random(5)
    model = load(tmp_path, family)
    # Every token has a twin, so that every largest logit is there twice.
    half = len(model.weights.head) // 2
    model.weights.head[half : 2 * half] = model.weights.head[:half]
    forward = on_tiles(model, instructions, threads, large=large)
    compared = 0
    for rows in random_steps(chance, new_requests(chance, [chance.randint(1, 30) for _ in range(45)])):
        tokens, finite = forward.likeliest(plan_of(rows))
        logits = run(forward.logits, rows)
        assert tokens.tolist() == [row.tolist().index(row.max()) for row in logits]
        assert finite.tolist() == [1] * len(logits)
        compared += len(logits)
    assert compared > 40


@pytest.mark.parametrize("large", [False, True])
def test_likeliest_of_logits_that_are_not_numbers(large: bool, instructions: str, tmp_path: Path) -> None:
    model = load(tmp_path, "llama")
    model.weights.head[7] = float("nan")
    forward = on_tiles(model, instructions, large=large)
    request = new_requests(random.Random(6), [3])[0]
    assert forward.likeliest(plan_of([StepRow(request, 0, 3, True)])).tolist() == [[7], [0]]
    assert forward.likeliest(plan_of([StepRow(request, 0, 2, False)])).tolist() == [[], []]
    model = load(tmp_path, "llama")
    model.weights.norm[:] = float("nan")
    forward = on_tiles(model, instructions, large=large)
    tokens, finite = forward.likeliest(plan_of([StepRow(request, 0, 3, True)])).tolist()
    assert (tokens, finite) == ([0], [0])


def test_a_screen_that_rules_nothing_out_is_left_out_for_a_while(instructions: str, tmp_path: Path) -> None:
    model = load(tmp_path, "llama")
    model.weights.head[:] = model.weights.head[0]
    decoder = tiled(model, instructions, large=True)
    forward = decoder.over(KVPool(decoder.kv_shapes, PAGES, PAGE_SIZE, torch.bfloat16, CPU))
    rows = [StepRow(new_requests(random.Random(7), [3])[0], 0, 3, True)]
    for left in (*range(STEPS_WITHOUT, -1, -1), STEPS_WITHOUT):
        assert forward.likeliest(plan_of(rows)).tolist() == [[0], [1]]
        assert decoder.unscreened_steps == left
    run(forward.logits, rows)
    assert forward.likeliest(plan_of([StepRow(rows[0].request, 0, 2, False)])).tolist() == [[], []]


@pytest.mark.parametrize("backend", list(NAMES))
@pytest.mark.parametrize("settings", [{"dtype": "float32"}, {"dtype": "bfloat16", "page_size": 8}])
def test_compiled_steps_that_cannot_be_are_refused(backend: str, settings: dict[str, Any], checkpoint: Any) -> None:
    with pytest.raises(ConfigError, match=f"--attention-backend {backend} needs"):
        load_engine(checkpoint("qwen2").spec, attention_backend=backend, **settings)


def test_shapes_that_are_not_whole_tiles_do_not_fit() -> None:
    for change in ({"hidden_size": 176}, {"intermediate_size": 240}, {"head_dim": 48}):
        config = parse_config({**SHAPE, **FAMILIES["qwen2"], **change})
        assert config is not None
        assert not tiles_fit(config, 16)


def test_compiled_code_is_kept_apart_for_each_text_of_the_sources(tmp_path: Path) -> None:
    sources, home, file = tmp_path / "sources", tmp_path / "home", tmp_path / "file"
    sources.mkdir()
    file.write_text("not a folder")
    (sources / "one.py").write_text("ONE = 1")
    (sources / "other.py").write_text("OTHER = 1")
    first = place_to_keep(sources, [file / "below", home])
    assert first is not None and first.is_dir() and first.parent == home
    assert place_to_keep(sources, [home]) == first
    (sources / "other.py").write_text("OTHER = 2")
    assert place_to_keep(sources, [home]) not in (first, None)
    assert place_to_keep(sources, [file / "below"]) is None


def test_a_team_runs_every_share_and_reports_failures() -> None:
    team = Team(3)
    seen: set[tuple[int, int]] = set()
    for _ in range(20):
        seen.clear()
        team.run(lambda thread: seen.add((thread, threading.get_ident())), 3)
        assert sorted(thread for thread, _ in seen) == [0, 1, 2]
        assert len({ident for _, ident in seen}) == 3

    def fail(culprit: int, thread: int) -> None:
        if thread == culprit:
            raise MemoryError("no room")

    for culprit in (2, 0):
        with pytest.raises(MemoryError, match="no room"):
            team.run(partial(fail, culprit), 3)
        seen.clear()
        team.run(lambda thread: seen.add((thread, 0)), 2)
        assert seen == {(0, 0), (1, 0)}
