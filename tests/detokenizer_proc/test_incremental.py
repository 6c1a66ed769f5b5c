"""Incremental text against the tokenizer's own decode, for every kind of tokenizer and every way of cutting."""

from __future__ import annotations

import functools
import time
from typing import Any

import pytest
import sample_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from minisgl.demo_model import demo_model_dir
from minisgl.detokenizer_proc.incremental import MAX_BYTE_RUN, TokenTexts
from minisgl.tokenizer_proc.tokenizer_files import load_tokenizer

KINDS = [*sample_tokenizers.ALL, "demo"]
HARD_TEXTS = [
    "天地玄黄，宇宙洪荒。",
    "👨‍👩‍👧‍👦 👩🏽‍💻 👍🏿",  # joiners and skin tones
    "🇩🇪🇯🇵🇧🇷",  # flags are pairs of characters
    "e\u0301 n\u0303 क्षि ท้",  # combining marks
    "legal \ufffd replacement \ufffd\ufffd characters \ufffd",
    "line\nbreaks\r\n\u2028\u2029\x85 and \x00 control",
    "  two spaces  around  ",
]


@functools.cache
def texts_of(kind: str) -> TokenTexts:
    tokenizer = load_tokenizer(demo_model_dir()) if kind == "demo" else sample_tokenizers.ALL[kind]()
    return TokenTexts(tokenizer)


def tokenizer_of(kind: str) -> Tokenizer:
    return texts_of(kind).tokenizer


def pieces(kind: str, token_ids: list[int], cuts: list[int], skip_special_tokens: bool = True) -> list[str]:
    """The text after each batch, the batches' sizes being `cuts` (then single tokens), and the tail."""
    text = texts_of(kind).open(skip_special_tokens)
    sizes, result, done = iter(cuts), [], 0
    while done < len(token_ids):
        size = next(sizes, 1)
        result.append(text.push(token_ids[done : done + size]))
        done += size
    return [*result, text.flush()]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150)
@given(data=st.data(), cuts=st.lists(st.integers(1, 7), max_size=20), skip=st.booleans())
def test_any_ids_in_any_batches(kind: str, data: st.DataObject, cuts: list[int], skip: bool) -> None:
    vocabulary = tokenizer_of(kind).get_vocab_size()
    # Ids just beyond the vocabulary are those of padded embeddings.
    token_ids = data.draw(st.lists(st.integers(0, vocabulary + 2), max_size=MAX_BYTE_RUN - 1))
    expected = tokenizer_of(kind).decode(token_ids, skip_special_tokens=skip)
    assert "".join(pieces(kind, token_ids, cuts, skip)) == expected


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(text=st.one_of(st.sampled_from(HARD_TEXTS), st.text(max_size=30)), cut=st.integers(0, 200), data=st.data())
def test_real_text_cut_anywhere_with_special_tokens_in_the_middle(
    kind: str, text: str, cut: int, data: st.DataObject
) -> None:
    tokenizer = tokenizer_of(kind)
    token_ids = tokenizer.encode(text, add_special_tokens=False).ids[:cut]
    specials = sorted(texts_of(kind).special_ids)
    for position in data.draw(st.lists(st.integers(0, len(token_ids)), max_size=3)):
        token_ids.insert(position, data.draw(st.sampled_from(specials)))
    for skip in (True, False):
        expected = tokenizer.decode(token_ids, skip_special_tokens=skip)
        assert "".join(pieces(kind, token_ids, [], skip)) == expected


@settings(max_examples=200)
@given(token_ids=st.lists(st.integers(0, 2559), max_size=60), skip=st.booleans())
def test_equals_transformers_on_the_demo_model(token_ids: list[int], skip: bool) -> None:
    assert "".join(pieces("demo", token_ids, [], skip)) == transformers_tokenizer().decode(
        token_ids, skip_special_tokens=skip
    )


@functools.cache
def transformers_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo_model_dir())


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_whole_characters_come_at_once_and_only_once(text: str) -> None:
    """sglang#31598 repeats a character that was cut ("A 世世ab"); others hold finished text back."""
    tokenizer = tokenizer_of("byte_level")
    token_ids = tokenizer.encode(text).ids
    shown = ""
    for count, piece in enumerate(pieces("byte_level", token_ids, [])[:-1], 1):
        shown += piece
        so_far = tokenizer.decode(token_ids[:count], skip_special_tokens=False)
        assert so_far.startswith(shown)
        # What is held back is at most one cut character.
        assert set(so_far[len(shown) :]) <= {"\ufffd"}
        assert len(so_far) - len(shown) <= 1
    assert shown == tokenizer.decode(token_ids)


def test_endless_broken_bytes_are_shown_as_they_come() -> None:
    """sglang PR 34852: a window that waits for the end of U+FFFD shows nothing and costs O(n^2)."""
    continuation = next(t for t, data in enumerate_bytes("byte_level") if data == b"\x80")
    assert pieces("byte_level", [continuation] * 1000, []) == ["\ufffd"] * 1000 + [""]


def test_output_that_begins_inside_a_character_shows_nothing_of_the_prompt() -> None:
    """vLLM#48853: with the prompt as context, a prompt that ends inside a character leaks."""
    tail_of_character = [
        t for byte in "世".encode()[1:] for t, data in enumerate_bytes("byte_level") if data == bytes([byte])
    ]
    shown = "".join(pieces("byte_level", tail_of_character, []))
    assert shown == tokenizer_of("byte_level").decode(tail_of_character) == "\ufffd\ufffd"


@pytest.mark.parametrize("kind", ["byte_level", "llama_style", "unigram"])
def test_tail_inside_a_character_is_flushed(kind: str) -> None:
    """mini-sglang loses it: 'Hello' instead of 'Hello\\ufffd'."""
    tokenizer = tokenizer_of(kind)
    token_ids = tokenizer.encode("hello 𓀀", add_special_tokens=False).ids[:-1]
    shown = pieces(kind, token_ids, [])
    assert "".join(shown) == tokenizer.decode(token_ids)
    assert set(shown[-1]) == {"\ufffd"}


@pytest.mark.parametrize("kind", ["llama_style", "unigram"])
def test_a_long_run_of_byte_tokens_streams_and_is_linear(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    text = "天😀é" * 2500
    token_ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
    started = time.process_time()
    shown = pieces(kind, token_ids, [])
    assert time.process_time() - started < 2
    assert "".join(shown) == tokenizer.decode(token_ids) == text
    first_shown = next(index for index, piece in enumerate(shown) if piece)
    assert first_shown <= MAX_BYTE_RUN + 3
    assert max(map(len, shown[first_shown + 1 :])) == 1


@pytest.mark.parametrize(
    ("kind", "piece"),
    [
        ("llama_style", "▁"),
        ("llama_style", "<unk>"),
        ("unigram", "▁"),
        ("unigram", "▁the"),
        ("wordpiece", "##"),
        ("bpe_with_suffix", "</w>"),
        ("without_decoder", "the"),
    ],
)
def test_endless_repetition_is_linear(kind: str, piece: str) -> None:
    token_id = tokenizer_of(kind).token_to_id(piece)
    started = time.process_time()
    shown = pieces(kind, [token_id] * 20_000, [])
    assert time.process_time() - started < 2
    assert "".join(shown) == tokenizer_of(kind).decode([token_id] * 20_000)


@pytest.mark.parametrize("kind", ["llama_style", "unigram"])
def test_a_long_run_that_never_is_utf8_still_streams(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    token_ids = [tokenizer.token_to_id("<0xE4>")] * 1000
    shown = pieces(kind, token_ids, [])
    assert "".join(shown) == tokenizer.decode(token_ids)
    assert max(map(len, shown)) <= MAX_BYTE_RUN + 3


@pytest.mark.parametrize("kind", ["byte_level", "llama_style"])
def test_ids_of_no_token_have_no_text(kind: str) -> None:
    world = tokenizer_of(kind).encode("world", add_special_tokens=False).ids
    assert "".join(pieces(kind, [-1, 2**31 - 1, *world, 10**6], [])) == tokenizer_of(kind).decode(world)


def test_describe_shows_special_tokens_and_quotes() -> None:
    texts = texts_of("byte_level")
    assert texts.describe(2) == '"<|im_end|>"'
    assert texts.describe(tokenizer_of("byte_level").token_to_id("Ċ")) == '"\\n"'
    assert texts.describe(10**6) == '""'


def enumerate_bytes(kind: str) -> list[tuple[int, bytes]]:
    """(token id, byte) of the tokens that are one byte."""
    tokenizer = tokenizer_of(kind)
    alphabet = {char: index for index, char in enumerate(byte_characters())}
    return [(t, bytes([alphabet[piece]])) for piece, t in tokenizer.get_vocab().items() if piece in alphabet]


def byte_characters() -> list[str]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    above = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(above)) for byte in range(256)]


@pytest.mark.parametrize("kind", ["byte_level", "demo"])
@settings(max_examples=150)
@given(data=st.data())
def test_the_pieces_of_byte_level_tokens_are_the_bytes_of_their_text(kind: str, data: st.DataObject) -> None:
    vocabulary = tokenizer_of(kind).get_vocab_size()
    token_ids = data.draw(st.lists(st.integers(0, vocabulary + 2), max_size=30))
    joined = b"".join(texts_of(kind).piece(token_id) for token_id in token_ids)
    assert joined.decode("utf-8", "replace") == tokenizer_of(kind).decode(token_ids, skip_special_tokens=False)


@pytest.mark.parametrize("text", ["hello the 世界 𓀀", "the\n world. hello", " two  spaces"])
@pytest.mark.parametrize("kind", ["byte_level", "llama_style", "unigram", "demo"])
def test_pieces_have_parts_of_characters_and_leading_spaces(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    token_ids = tokenizer.encode(text, add_special_tokens=False).ids
    found = [texts_of(kind).piece(token_id) for token_id in token_ids]
    assert b"".join(found) in (text.encode(), b" " + text.encode())
    if "𓀀" in text:
        assert all(len(piece) == 1 for piece in found[-4:])


def test_pieces_of_special_tokens_are_their_names_and_others_have_none() -> None:
    for kind, token in (("byte_level", "<|im_end|>"), ("llama_style", "</s>"), ("wordpiece", "[CLS]")):
        token_id = tokenizer_of(kind).token_to_id(token)
        assert texts_of(kind).piece(token_id) == token.encode()
        for nothing in (-1, tokenizer_of(kind).get_vocab_size() + 7):
            assert texts_of(kind).piece(nothing) == b""
    words = [texts_of("wordpiece").piece(tokenizer_of("wordpiece").token_to_id(word)) for word in ("do", "##re", ".")]
    assert words == [b" do", b"re", b"."]
