"""Prompts, lengths and arrivals."""

from __future__ import annotations

import random
import statistics
from pathlib import Path

import pytest
from benchlib.workloads import Lengths, PromptMaker, Workload, load_tokenizer, poisson_arrivals

import minisgl

DEMO = Path(minisgl.__file__).parent / "demo_model"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEMO)


def make(kind="random", inputs="16", outputs="8", **options):
    return Workload(kind, Lengths(inputs), Lengths(outputs), **options)


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 16, 17, 100, 512])
def test_prompts_have_exactly_the_length_asked_for(tokenizer, tokens):
    maker = PromptMaker(tokenizer, random.Random(1))
    for _ in range(5):
        assert len(tokenizer.encode(maker.make(tokens)).ids) == tokens


def test_the_same_seed_gives_the_same_sessions_and_another_seed_others(tokenizer):
    workload = make(inputs="uniform:4:40", outputs="lognormal:20:0.5")
    assert workload.sessions(8, tokenizer, 3) == workload.sessions(8, tokenizer, 3)
    assert workload.sessions(8, tokenizer, 3) != workload.sessions(8, tokenizer, 4)


def test_random_prompts_share_no_beginning(tokenizer):
    texts = [session.turns[0].text for session in make(inputs="64").sessions(64, tokenizer, 0)]
    assert len({text[:24] for text in texts}) == len(texts)


def test_prefixes_are_shared_inside_groups_alone(tokenizer):
    workload = make("shared-prefix", prefix=32, groups=2)
    texts = [session.turns[0].text for session in workload.sessions(6, tokenizer, 0)]
    shared = [text[:60] for text in texts]
    assert shared[0] == shared[2] == shared[4]
    assert shared[1] == shared[3] == shared[5]
    assert shared[0] != shared[1]
    assert len(set(texts)) == 6


def test_conversations_have_their_turns(tokenizer):
    workload = make("multi-turn", turns=3)
    sessions = workload.sessions(2, tokenizer, 0)
    assert [len(session.turns) for session in sessions] == [3, 3]
    assert sessions[0].turns[1].text.startswith(" ")
    assert workload.longest == 3 * (16 + 8)


def test_length_distributions_stay_in_their_bounds():
    rng = random.Random(0)
    uniform = [Lengths("uniform:5:9").draw(rng) for _ in range(300)]
    assert set(uniform) == {5, 6, 7, 8, 9}
    lognormal = [Lengths("lognormal:100:0.6").draw(rng) for _ in range(3000)]
    assert 90 <= statistics.median(lognormal) <= 110
    assert min(lognormal) >= 1
    assert max(lognormal) <= Lengths("lognormal:100:0.6").longest == 800
    assert {Lengths("7").draw(rng) for _ in range(5)} == {7}


@pytest.mark.parametrize("spec", ["", "0", "-3", "x", "uniform:5", "uniform:9:5", "uniform:0:5", "normal:1:2", "8:9"])
def test_a_wrong_length_is_refused_with_the_ways_to_write_it(spec):
    with pytest.raises(ValueError, match="lognormal:MEDIAN:SIGMA"):
        Lengths(spec)


def test_poisson_arrivals_have_their_rate_and_memoryless_gaps():
    arrivals = poisson_arrivals(4000, rate=50.0, seed=2)
    gaps = [after - before for before, after in zip([0.0, *arrivals], arrivals, strict=False)]
    assert min(gaps) >= 0
    assert arrivals[-1] == pytest.approx(4000 / 50, rel=0.05)
    # The standard deviation of exponential gaps equals their mean.
    assert statistics.stdev(gaps) == pytest.approx(statistics.mean(gaps), rel=0.1)
    assert arrivals == poisson_arrivals(4000, rate=50.0, seed=2)
    with pytest.raises(ValueError, match="above 0"):
        poisson_arrivals(1, 0.0, 0)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
