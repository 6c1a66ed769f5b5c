"""Log probabilities token by token, as the wires show them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from minisgl.messages import Logprobs

LEAST = -9999.0
"""Stands for minus infinity, for which JSON has no number; OpenAI's API says it so."""
_RESYNC_BYTES = 16


class Candidate(NamedTuple):
    """A token that could have come, and the natural logarithm of its probability."""

    token_id: int
    piece: bytes
    value: float


class TokenLogprob(NamedTuple):
    """A token that came.

    Attributes:
        value: None for the first token of a prompt, which nothing predicts.
        top: the likeliest tokens at this place, the likeliest first; may be none.
    """

    token_id: int
    piece: bytes
    value: float | None
    top: list[Candidate]


def each_token(parts: Iterable[Logprobs]) -> Iterator[TokenLogprob]:
    """The tokens of these parts, one after the other."""
    for part in parts:
        count = len(part.token_ids)
        width = len(part.top_ids) // count if count else 0
        values = [max(value, LEAST) for value in part.top_values]
        top = [Candidate(*one) for one in zip(part.top_ids, part.pieces[count:], values, strict=True)]
        for index, (token_id, piece, value) in enumerate(zip(part.token_ids, part.pieces, part.values, strict=False)):
            if math.isnan(value):
                yield TokenLogprob(token_id, piece, None, [])
            else:
                begin = index * width
                yield TokenLogprob(token_id, piece, max(value, LEAST), top[begin : begin + width])


def text_of(piece: bytes) -> str:
    """The text of a token alone; parts of a character show as U+FFFD."""
    return piece.decode("utf-8", "replace")


def distinct_text_of(piece: bytes) -> str:
    """The same, but parts of characters keep apart: they are spelt as OpenAI's completions do it."""
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


class TextOffsets:
    """Finds where each token begins in a text that comes in pieces, in characters.

    The text is not simply that of its tokens: special tokens may be left out of it, a stop string cuts it, what could
    become one comes later than its tokens, and bytes that are no UTF-8 are replaced. A token of which nothing is shown
    begins where the next one does.
    """

    def __init__(self) -> None:
        self._characters = 0
        self._ahead = b""

    def take(self, text: str, pieces: Iterable[bytes]) -> list[int]:
        """The offsets of the tokens that came with a piece of the text; `pieces` are the bytes of these tokens."""
        shown = text.encode()
        at = self._skip_ahead(shown)
        offsets = []
        boundary, characters = 0, self._characters
        for piece in pieces:
            begin, at = self._place(shown, piece, at)
            while begin < len(shown) and shown[begin] & 0xC0 == 0x80:
                begin -= 1
            if begin > boundary:
                characters += len(shown[boundary:begin].decode())
                boundary = begin
            offsets.append(characters)
        self._characters += len(text)
        return offsets

    def _skip_ahead(self, shown: bytes) -> int:
        """The length of what belongs to tokens of earlier pieces."""
        if self._ahead.startswith(shown):
            self._ahead = self._ahead[len(shown) :]
            return len(shown)
        skipped = len(self._ahead) if shown.startswith(self._ahead) else 0
        self._ahead = b""
        return skipped

    def _place(self, shown: bytes, piece: bytes, at: int) -> tuple[int, int]:
        """Where a token begins that follows what ends at `at`, and where it ends."""
        if shown.startswith(piece, at):
            return at, at + len(piece)
        rest = len(shown) - at
        if rest < len(piece) and piece.startswith(shown[at:]):
            self._ahead += piece[rest:]
            return at, len(shown)
        found = shown.find(piece, at, at + len(piece) + _RESYNC_BYTES)
        return (at, at) if found < 0 else (found, found + len(piece))
