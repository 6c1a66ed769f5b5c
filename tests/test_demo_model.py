"""The embedded demo model: its files, its text generator and its held-out skills."""

from __future__ import annotations

import itertools
import re

import pytest
from tokenizers import Tokenizer

from minisgl.demo_model import demo_model_dir
from minisgl.demo_model.holdout import is_held_out
from minisgl.demo_model.text_generator import Segment, documents

TEXTS = [
    "Hello! What's 123 + 456?",
    "  two  spaces\n\nand\ttabs \r\n",
    "你好，我叫小明。从1数到20！",
    "👨‍👩‍👧‍👦 🇯🇵 👍🏽 1️⃣ 𠮷 é",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
]


def text_of(document: list[Segment]) -> str:
    return "".join(segment.text for segment in document)


def test_files_are_small() -> None:
    sizes = [path.stat().st_size for path in demo_model_dir().iterdir() if path.is_file()]
    assert sum(sizes) <= 16_000_000


def test_tokenizer_file_and_auto_tokenizer_agree() -> None:
    transformers = pytest.importorskip("transformers")
    plain = Tokenizer.from_file(str(demo_model_dir() / "tokenizer.json"))
    auto = transformers.AutoTokenizer.from_pretrained(demo_model_dir())
    texts = TEXTS + [text_of(document) for document in itertools.islice(documents(3), 200)]
    for text in texts:
        ids = plain.encode(text).ids
        assert auto(text)["input_ids"] == ids
        assert auto.decode(ids) == plain.decode(ids, skip_special_tokens=False)
    assert auto.eos_token == "<|im_end|>"
    assert auto.pad_token == "<|endoftext|>"
    assert all(token.content.isascii() for token in plain.get_added_tokens_decoder().values())


def test_digits_stand_alone() -> None:
    plain = Tokenizer.from_file(str(demo_model_dir() / "tokenizer.json"))
    assert plain.encode("2026").tokens == ["2", "0", "2", "6"]


def test_chat_template() -> None:
    transformers = pytest.importorskip("transformers")
    auto = transformers.AutoTokenizer.from_pretrained(demo_model_dir())
    messages = [{"role": "user", "content": "Hi"}]
    assert (
        auto.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    messages = [
        {"role": "system", "content": "Be nice."},
        *messages,
        {"role": "assistant", "content": "Yo"},
    ]
    assert auto.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>system\nBe nice.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"
    )


def test_generator_is_deterministic() -> None:
    first, again, other = (list(itertools.islice(documents(seed), 50)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_generator_never_writes_held_out_cases() -> None:
    found = 0
    for document in itertools.islice(documents(5), 4000):
        # Spelling or reversing one's own name is not a case of the tasks with words.
        if "my name" in text_of(document).lower() or "我的名字" in text_of(document):
            continue
        for segment in document:
            if not segment.learned:
                continue
            answer = segment.text
            for a, b in re.findall(r"(?m)^(\d+) \+ (\d+) = ", answer):
                assert not is_held_out("add", int(a), int(b)), answer
                found += 1
            for letters in re.findall(r"(?m)^((?:[a-z]-)+[a-z])(?: backwards| 倒过来| has|<|$)", answer):
                assert not is_held_out("word", letters.replace("-", "")), answer
                found += 1
            for name in re.findall(r"(?:Nice to meet you|Your name is|很高兴认识你), (\S+?)[.!！]", answer):
                assert not is_held_out("name", name.lower()), answer
                found += 1
    assert found > 1000


def test_held_out_cases_are_solved() -> None:
    pytest.importorskip("transformers")
    from minisgl.demo_model.evaluate import CASE_MAKERS, Case, answer, load, make_cases

    model, tokenizer = load(demo_model_dir())

    def is_short(case: Case) -> bool:
        return sum(len(message["content"]) for message in case.messages()) < 250 and len(case.turn.assistant) < 50

    # Long histories and answers (counting to 100) say no more than short ones and take most of the time.
    cases = [case for task in CASE_MAKERS for case in itertools.islice(filter(is_short, make_cases(task, 40, 0)), 3)]
    assert len(cases) == 3 * len(CASE_MAKERS)
    answers = answer(model, tokenizer, cases, 60)
    wrong = [(case.turn, text) for case, text in zip(cases, answers, strict=True) if text != case.turn.assistant]
    assert not wrong
