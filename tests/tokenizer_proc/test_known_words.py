"""Token ids by known words: those of the tokenizer itself, or none."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_tokenizers import CORPUS, byte_level, llama_style, unigram
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from minisgl.tokenizer_proc import known_words
from minisgl.tokenizer_proc.known_words import LONGEST_TEXT, KnownWords

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
SPECIALS = ["<|im_start|>", "<|im_start|>x", "<|im_end|>"]
PIECES = [*SPECIALS, "<|im", "|>", "'s", "'LL", "don't", "  ", "\r\n", "\t ", "hello", " world", "1234567", "!!\n"]


def make(pattern: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*CORPUS, "12 123 1234 don't we'LL"] * 3, trainer)
    return tokenizer


TOKENIZERS = {pattern: make(pattern) for pattern in (QWEN, LLAMA_3)}
KNOWN = {pattern: KnownWords.of(tokenizer) for pattern, tokenizer in TOKENIZERS.items()}


@pytest.mark.parametrize("pattern", TOKENIZERS)
@settings(max_examples=400)
@given(parts=st.lists(st.one_of(st.characters(max_codepoint=127), st.sampled_from(PIECES)), max_size=30))
def test_every_ascii_text_has_the_tokenizers_own_ids(pattern: str, parts: list[str]) -> None:
    known, text = KNOWN[pattern], "".join(parts)
    assert known is not None
    for _ in range(2):
        assert known.encode(text, True) == TOKENIZERS[pattern].encode(text).ids


def test_the_tokenizer_is_asked_about_other_and_long_texts() -> None:
    known = KNOWN[QWEN]
    assert known is not None
    assert known.encode("é", True) is None
    assert known.encode("a" * LONGEST_TEXT, True) and known.encode("a" * (LONGEST_TEXT + 1), True) is None


def test_a_text_of_new_words_is_the_librarys_until_most_are_known() -> None:
    tokenizer = TOKENIZERS[QWEN]
    known = KnownWords.of(tokenizer)
    assert known is not None
    text = " ".join(f"{chr(97 + one)}{chr(97 + other)}" for one in range(10) for other in range(15))
    found = [known.encode(text, True) for _ in range(4)]
    assert found == [None, None, *[tokenizer.encode(text).ids] * 2]


def test_texts_without_special_tokens_do_where_the_tokenizer_adds_some() -> None:
    tokenizer = make(LLAMA_3)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|im_end|> $A", special_tokens=[("<|im_end|>", 2)])
    known = KnownWords.of(tokenizer)
    assert known is not None and known.encode("hello", True) is None
    assert known.encode("hello", False) == tokenizer.encode("hello", add_special_tokens=False).ids


def test_words_are_forgotten_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_words, "_MOST_WORDS", 5)
    tokenizer = TOKENIZERS[QWEN]
    known = KnownWords.of(tokenizer)
    assert known is not None
    text = " ".join(f"word{chr(97 + number)}" for number in range(20)) + "x" * 100
    for _ in range(2):
        assert known.encode(text, True) == tokenizer.encode(text).ids
        assert len(known._words) <= 5 and not any(len(word) > 32 for word in known._words)


def test_other_tokenizers_are_left_alone() -> None:
    others = [byte_level(), llama_style(), unigram(), make(QWEN.replace("'s|", "")), *(make(QWEN) for _ in range(4))]
    others[-1].add_tokens([AddedToken("<tool>", rstrip=True)])
    others[-2].encode_special_tokens = True
    others[-3].normalizer = normalizers.Lowercase()
    others[-4].pre_tokenizer = pre_tokenizers.Split(Regex(QWEN), "isolated")
    assert [KnownWords.of(tokenizer) for tokenizer in others] == [None] * len(others)
