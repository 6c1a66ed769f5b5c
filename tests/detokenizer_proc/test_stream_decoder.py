"""One request's stream: finish reasons, the token that ends it, stop strings over real tokens, and token accounting."""

from __future__ import annotations

import pytest
import sample_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from minisgl.detokenizer_proc.incremental import TokenTexts
from minisgl.detokenizer_proc.stream import Delta, StreamDecoder
from minisgl.messages import FinishReason

TEXTS = {kind: TokenTexts(sample_tokenizers.ALL[kind]()) for kind in ("byte_level", "llama_style")}
TOKENIZER = TEXTS["byte_level"].tokenizer
IM_END = 2


def ids(text: str) -> list[int]:
    token_ids: list[int] = TOKENIZER.encode(text).ids
    return token_ids


def run(
    token_ids: list[int], finish: FinishReason, stop: list[str] | None = None, kind: str = "byte_level", **options: bool
) -> tuple[str, list[int], Delta]:
    """Feed token by token; all text, all token ids, the last delta."""
    stream = StreamDecoder(TEXTS[kind], stop or [], **options)
    text, shown_ids = "", []
    for index, token_id in enumerate(token_ids):
        delta = stream.advance([token_id], finish if index == len(token_ids) - 1 else FinishReason.NONE)
        text += delta.text
        shown_ids += delta.token_ids
        if delta.finish:
            break
    return text, shown_ids, delta


def test_the_eos_token_counts_but_has_no_text() -> None:
    for skip in (True, False):  # sglang#1650, #24913 show it when special tokens are not skipped
        text, shown_ids, last = run([*ids("hello"), IM_END], FinishReason.STOP, skip_special_tokens=skip)
        assert (text, shown_ids) == ("hello", [*ids("hello"), IM_END])
        assert (last.finish, last.matched) == (FinishReason.STOP, IM_END)


def test_a_stop_token_that_is_text_is_trimmed_unless_asked_for() -> None:
    token_ids = ids("hello world")
    trimmed, _, last = run(token_ids, FinishReason.STOP)
    assert trimmed == TOKENIZER.decode(token_ids[:-1])
    assert last.matched == token_ids[-1]
    kept, _, _ = run(token_ids, FinishReason.STOP, no_stop_trim=True)
    assert kept == "hello world"


def test_an_eos_after_half_a_character_flushes_it() -> None:
    token_ids = ids("hello 𓀀")[:-1]
    text, shown_ids, _ = run([*token_ids, IM_END], FinishReason.STOP)
    assert text == TOKENIZER.decode(token_ids)
    assert text.endswith("\ufffd")
    assert shown_ids == [*token_ids, IM_END]


def test_tokens_of_a_cut_character_go_with_its_text() -> None:
    token_ids = ids("𓀀")
    assert len(token_ids) == 4
    stream = StreamDecoder(TEXTS["byte_level"])
    deltas = [stream.advance([token_id]) for token_id in token_ids]
    assert deltas == [*[Delta("", [], FinishReason.NONE, None)] * 3, Delta("𓀀", token_ids, FinishReason.NONE, None)]


def test_an_abort_ends_the_stream_without_a_token() -> None:
    stream = StreamDecoder(TEXTS["byte_level"])
    token_ids = ids("hello 𓀀")[:-1]
    shown = stream.advance(token_ids)
    last = stream.advance([], FinishReason.ABORT)
    assert last.finish is FinishReason.ABORT
    assert shown.text + last.text == TOKENIZER.decode(token_ids)


def test_a_stop_string_across_tokens_ends_the_stream() -> None:
    token_ids = ids("hello hello world, the end")
    text, shown_ids, last = run(token_ids, FinishReason.LENGTH, ["lo wor"])
    assert text == "hello hel"
    assert (last.finish, last.matched) == (FinishReason.STOP, "lo wor")
    # Counted up to and including the token that completes the match.
    assert "lo wor" in TOKENIZER.decode(shown_ids)
    assert "lo wor" not in TOKENIZER.decode(shown_ids[:-1])
    assert run(token_ids, FinishReason.LENGTH, ["lo wor"], no_stop_trim=True)[0] == "hello hello wor"


def test_a_held_back_prefix_of_a_stop_string_comes_out_at_the_end() -> None:
    text, shown_ids, last = run([*ids("hello wor"), IM_END], FinishReason.STOP, ["world"])
    assert text == "hello wor"
    assert (last.finish, last.matched) == (FinishReason.STOP, IM_END)
    assert shown_ids == [*ids("hello wor"), IM_END]


def test_nothing_but_a_prefix_of_a_stop_string_is_held_back() -> None:
    """dynamo#14375 and smg#2203 hold a constant window back, as long as the longest stop string."""
    stream = StreamDecoder(TEXTS["byte_level"], ["a stop string of some length"])
    for token_id in ids("hello hello"):
        assert stream.advance([token_id]).text


@settings(max_examples=150)
@given(
    data=st.data(),
    kind=st.sampled_from(sorted(TEXTS)),
    finish=st.sampled_from([FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT]),
    stop=st.lists(st.sampled_from(["he", "lo w", "世界", "the end", "\ufffd", " ", "o"]), max_size=3),
    keep=st.booleans(),
    cuts=st.lists(st.integers(0, 5), max_size=20),
)
def test_any_split_gives_the_same_stream(
    data: st.DataObject, kind: str, finish: FinishReason, stop: list[str], keep: bool, cuts: list[int]
) -> None:
    texts = TEXTS[kind]
    vocabulary = texts.tokenizer.get_vocab_size()
    words = texts.tokenizer.encode("hello hello world, the end 世界", add_special_tokens=False).ids
    token_ids = data.draw(
        st.lists(st.one_of(st.sampled_from(words), st.integers(0, vocabulary)), min_size=1, max_size=40)
    )
    visible = token_ids if finish is not FinishReason.STOP or keep else token_ids[:-1]
    expected = texts.tokenizer.decode(visible)
    matches = [(start + len(s), start, s) for s in stop if (start := expected.find(s)) >= 0]
    if matches:
        end, start, matched = min(matches)
        expected = expected[: end if keep else start]

    stream = StreamDecoder(texts, stop, no_stop_trim=keep)
    text, shown_ids, rest, sizes = "", [], token_ids, iter(cuts)
    while True:
        size = next(sizes, 1)
        batch, rest = rest[:size], rest[size:]
        delta = stream.advance(batch, FinishReason.NONE if rest else finish)
        text += delta.text
        shown_ids += delta.token_ids
        assert delta.text or delta.finish or not delta.token_ids
        if delta.finish:
            break
    assert text == expected
    if matches:
        assert (delta.finish, delta.matched) == (FinishReason.STOP, matched)
        assert shown_ids == token_ids[: len(shown_ids)]
    else:
        assert delta.finish is finish
        assert shown_ids == token_ids
        assert delta.matched == (token_ids[-1] if finish is FinishReason.STOP else None)


@pytest.mark.parametrize("finish", [FinishReason.NONE, FinishReason.LENGTH])
def test_rows_after_a_match_in_the_same_batch_are_not_part_of_it(finish: FinishReason) -> None:
    stream = StreamDecoder(TEXTS["byte_level"], ["world"])
    delta = stream.advance(ids("hello world, the end"), finish)
    assert (delta.text, delta.finish, delta.matched) == ("hello ", FinishReason.STOP, "world")
    assert TOKENIZER.decode(delta.token_ids) == "hello world"


def test_stop_strings_do_not_count_in_the_first_tokens() -> None:
    token_ids = ids("stop stop stop here")
    sizes = [len(TOKENIZER.decode(token_ids[:count])) for count in range(len(token_ids) + 1)]
    for least in range(len(token_ids) + 1):
        stream = StreamDecoder(TEXTS["byte_level"], ["top"], min_new_tokens=least)
        text, taken = "", 0
        for token_id in token_ids:
            delta = stream.advance([token_id])
            text, taken = text + delta.text, taken + len(delta.token_ids)
            if delta.finish:
                break
        else:
            text += stream.advance([], FinishReason.LENGTH).text
        whole = TOKENIZER.decode(token_ids)
        end = whole.find("top", sizes[least])
        assert text == (whole if end < 0 else whole[:end])
        assert taken >= least
