"""Stop strings in a text that arrives in pieces: what may be shown already, and where the text ends."""

from __future__ import annotations

from collections.abc import Sequence

_NO_MATCH = -1


class StopMatcher:
    """Cuts a text at the stop string that completes first, holding back no more than could still become a match.

    The result does not depend on how the text is split: every stop string is followed character by character by a
    Knuth-Morris-Pratt automaton, whose state is the length of its longest prefix that ends the text so far. The
    longest of these states is what must be held back. When several stop strings complete at the same character,
    the longest one - the one that starts first - wins.
    """

    def __init__(self, stops: Sequence[str], keep_match: bool = False) -> None:
        self.matched: str | None = None
        """The stop string that ended the text; after it, `feed` must not be called again."""
        self._followers = [_Follower(stop) for stop in stops]
        self._keep_match = keep_match
        self._held = ""

    def feed(self, text: str) -> str:
        """Take the next piece of text; return what can be shown now (on a match: the last of it)."""
        held_back = 0
        first_end, matched = len(text) + 1, ""
        for follower in self._followers:
            end = follower.advance(text)
            if end == _NO_MATCH:
                held_back = max(held_back, follower.state)
            elif end < first_end or (end == first_end and len(follower.stop) > len(matched)):
                first_end, matched = end, follower.stop
        text = self._held + text
        if matched:
            self.matched = matched
            end = len(self._held) + first_end
            self._held = ""
            return text[: end if self._keep_match else end - len(matched)]
        shown = len(text) - held_back
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """The text is over: what was held back is not a stop string after all."""
        held, self._held = self._held, ""
        return held


class _Follower:
    """The Knuth-Morris-Pratt automaton of one stop string."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.state = 0
        self._fallback = _fallbacks(stop)

    def advance(self, text: str) -> int:
        """Follow `text` up to the first match; return the index just behind the match, or _NO_MATCH."""
        stop, fallback, state = self.stop, self._fallback, self.state
        if not state and stop[0] not in text:
            return _NO_MATCH
        index = 0
        while index < len(text):
            if state == 0:
                index = text.find(stop[0], index)
                if index < 0:
                    break
            while state and text[index] != stop[state]:
                state = fallback[state - 1]
            if text[index] == stop[state]:
                state += 1
            index += 1
            if state == len(stop):
                return index
        self.state = state
        return _NO_MATCH


def _fallbacks(stop: str) -> list[int]:
    """For each prefix of `stop`, the length of its longest proper prefix that is also its suffix."""
    table = [0]
    for char in stop[1:]:
        length = table[-1]
        while length and char != stop[length]:
            length = table[length - 1]
        table.append(length + 1 if char == stop[length] else 0)
    return table
