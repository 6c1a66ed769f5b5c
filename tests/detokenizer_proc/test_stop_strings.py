"""Stop strings against an offline cut of the whole text."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minisgl.detokenizer_proc.stop_strings import StopMatcher

ALPHABET = "ab\n世"
STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=5), min_size=1, max_size=4)
PIECES = st.lists(st.text(ALPHABET, max_size=4), max_size=15)


def offline(text: str, stops: list[str]) -> tuple[int, int, str | None]:
    """(start, end, stop) of the match that completes first and, among those, starts first; or the text's end."""
    matches = [(start + len(stop), start, stop) for stop in stops if (start := text.find(stop)) >= 0]
    if not matches:
        return len(text), len(text), None
    end, start, stop = min(matches)
    return start, end, stop


@settings(max_examples=500)
@given(pieces=PIECES, stops=STOPS, keep_match=st.booleans())
@example(pieces=["a", "a", "ba", "b"], stops=["aba", "ab"], keep_match=False)
@example(pieces=["aab", "aabaa"], stops=["aabaaa", "b\n"], keep_match=False)
def test_equals_the_offline_cut_however_the_text_is_split(
    pieces: list[str], stops: list[str], keep_match: bool
) -> None:
    matcher = StopMatcher(stops, keep_match)
    fed = shown = ""
    for piece in pieces:
        fed += piece
        shown += matcher.feed(piece)
        if matcher.matched is not None:
            break
        held = fed[len(shown) :]
        assert fed.startswith(shown)
        # Nothing is held but a proper prefix of a stop string, and as much of it as there is.
        longest = max((k for stop in stops for k in range(len(stop)) if fed.endswith(stop[:k])), default=0)
        assert len(held) == longest
    else:
        shown += matcher.flush()
    start, end, stop = offline("".join(pieces), stops)
    assert matcher.matched == stop
    assert shown == "".join(pieces)[: end if keep_match else start]


def test_the_tie_goes_to_the_match_that_starts_first() -> None:
    matcher = StopMatcher(["d", "bcd", "cd"])
    assert matcher.feed("abcd") == "a"
    assert matcher.matched == "bcd"


@pytest.mark.parametrize("text", ["a" * 200_000, "ab" * 100_000])
def test_hostile_stop_strings_cost_linear_time(text: str) -> None:
    stops = [("a" * 1023 + "b")[-n:] + "c" for n in range(1000, 1020)]
    matcher = StopMatcher(stops[:4])
    started = time.process_time()
    for index in range(0, len(text), 4):
        matcher.feed(text[index : index + 4])
    assert time.process_time() - started < 3
