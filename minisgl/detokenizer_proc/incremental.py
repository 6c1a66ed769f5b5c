"""Token ids to text, piece by piece: the pieces, joined, equal the tokenizer's own decode of all the ids.

Two ways, chosen by the tokenizer's decoder:

- Byte-level BPE (GPT-2, Llama 3, Qwen, ...): a token is a fixed string of bytes, so the text is a UTF-8 stream. A table
  gives the text of every token that is whole characters; only cut characters meet a UTF-8 decoder. O(1) a token.
- Any other decoder (Metaspace, byte fallback, WordPiece, ...): a token's text depends on the token before it, so
  a small window of tokens is decoded and what it adds to the window's already known part is the new text.

Text that was given out is never taken back. Held back are only bytes that do not end a character yet; see WindowText
for the one case in which the tokenizer's own decode would need an unbounded hold.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer

MAX_BYTE_RUN = 64
"""Consecutive byte-fallback tokens that WindowText holds back at most before it shows their whole characters."""
_MAX_CHARACTER_BYTES = 4


class IncrementalText(Protocol):
    """The text of one request's tokens so far."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens; return the text that is certain now. Ids outside the vocabulary have no text."""

    def flush(self) -> str:
        """No token follows: the text of what was held back (U+FFFD for a cut character)."""


class TokenTexts:
    """What all requests share of one tokenizer: built once (some 5 us a vocabulary entry), then only read."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.special_ids = frozenset(
            token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        decoders = decoder_types(tokenizer)
        self._byte_level: dict[bool, _ByteLevelTable] = {}
        if decoders == ["ByteLevel"]:
            everything = _ByteLevelTable.of(vocabulary)
            self._byte_level = {False: everything, True: everything.without(self.special_ids)}
        self.known_ids = frozenset(vocabulary.values())
        byte_pieces = {
            token_id: bytes([int(token[3:5], 16)])
            for token, token_id in vocabulary.items()
            if "ByteFallback" in decoders and _is_byte_token(token)
        }
        self.byte_ids = frozenset(byte_pieces)
        added = {token_id: token.content.encode() for token_id, token in tokenizer.get_added_tokens_decoder().items()}
        self._pieces = {**byte_pieces, **added}
        self._context: tuple[list[int], str] | None = None

    def open(self, skip_special_tokens: bool) -> IncrementalText:
        """A fresh text."""
        if self._byte_level:
            return ByteLevelText(self._byte_level[skip_special_tokens])
        return WindowText(self, skip_special_tokens)

    def piece(self, token_id: int) -> bytes:
        """The bytes that a token stands for inside a text; special tokens stand for their names.

        Unlike the text of an answer they have parts of characters and a first word's leading space. An id outside the
        vocabulary has none.
        """
        if self._byte_level:
            return self._byte_level[False].data.get(token_id, b"")
        if token_id not in self._pieces:
            self._pieces[token_id] = self._added_text(token_id).encode() if token_id in self.known_ids else b""
        return self._pieces[token_id]

    def _added_text(self, token_id: int) -> str:
        """What a token adds to a text that has begun: alone it would lose its leading space."""
        if self._context is None:
            self._context = self._find_context()
        context, context_text = self._context
        text = self.tokenizer.decode([*context, token_id], skip_special_tokens=False)
        if text.startswith(context_text):
            return text[len(context_text) :]
        return self.tokenizer.decode([token_id], skip_special_tokens=False)

    def _find_context(self) -> tuple[list[int], str]:
        """A token that is a plain word or part of one, and its text; none if there is no such token."""
        for token_id in sorted(self.known_ids - self._pieces.keys()):
            text = self.tokenizer.decode([token_id], skip_special_tokens=False)
            if text.isascii() and text.isalpha():
                return [token_id], text
        return [], ""

    def describe(self, token_id: int) -> str:
        """One token's own text as a JSON string, special tokens included: for people who watch."""
        text = self.tokenizer.decode([token_id], skip_special_tokens=False) if token_id in self.known_ids else ""
        return json.dumps(text, ensure_ascii=False)


# ---- byte-level BPE -------------------------------------------------------------------------------------------------


class _ByteLevelTable:
    """Token id to text for tokens that are whole characters, and token id to bytes for all."""

    def __init__(self, texts: dict[int, str], data: dict[int, bytes]) -> None:
        self.texts = texts
        self.data = data

    @classmethod
    def of(cls, vocabulary: dict[str, int]) -> _ByteLevelTable:
        byte_of = {char: byte for byte, char in enumerate(_byte_level_alphabet())}
        texts: dict[int, str] = {}
        data: dict[int, bytes] = {}
        for token, token_id in vocabulary.items():
            # A token with any character outside the alphabet (added tokens) stands for itself.
            if byte_of.keys() >= set(token):
                data[token_id] = bytes(map(byte_of.__getitem__, token))
            else:
                data[token_id] = token.encode()
            try:
                texts[token_id] = data[token_id].decode()
            except UnicodeDecodeError:
                continue
        return cls(texts, data)

    def without(self, token_ids: frozenset[int]) -> _ByteLevelTable:
        """The same table with these tokens' texts empty."""
        return _ByteLevelTable(
            {**self.texts, **dict.fromkeys(token_ids, "")}, {**self.data, **dict.fromkeys(token_ids, b"")}
        )


def _byte_level_alphabet() -> list[str]:
    """The character that GPT-2's byte-level BPE writes for each byte: itself if it is printable, else one above 255."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


class ByteLevelText:
    """The text of byte-level BPE tokens: a UTF-8 stream, with U+FFFD for what is not UTF-8."""

    __slots__ = ("_data", "_pending", "_texts")

    def __init__(self, table: _ByteLevelTable) -> None:
        self._texts = table.texts
        self._data = table.data
        self._pending = b""

    def push(self, token_ids: Sequence[int]) -> str:
        if not self._pending:
            if len(token_ids) == 1:
                text = self._texts.get(token_ids[0])
                if text is not None:
                    return text
            texts = list(map(self._texts.get, token_ids))
            if None not in texts:
                return "".join(texts)  # type: ignore[arg-type]
        return "".join([self._push_one(token_id) for token_id in token_ids])

    def _push_one(self, token_id: int) -> str:
        if not self._pending:
            text = self._texts.get(token_id)
            if text is not None:
                return text
        data = self._pending + self._data.get(token_id, b"")
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return text

    def flush(self) -> str:
        pending, self._pending = self._pending, b""
        return pending.decode("utf-8", "replace")


# ---- every other decoder --------------------------------------------------------------------------------------------


class WindowText:
    """The text of tokens under any decoder.

    `_window` holds the last token(s) whose text was given out, as context, and the tokens held back. What a token adds
    under every decoder of the tokenizers library depends on the tokens before it only through the one directly before
    (is there one, has a leading space been stripped already), and on the run of byte-fallback tokens it is part of.

    A run of byte-fallback tokens is one unit: the tokenizer turns the whole run into U+FFFD when any part of it is not
    UTF-8. So the run is held until it ends. That hold is bounded: from MAX_BYTE_RUN tokens on, whole characters are
    given out, and if such a long run breaks later, the characters already shown stay (the only difference from the
    tokenizer's own decode).
    """

    def __init__(self, texts: TokenTexts, skip_special_tokens: bool) -> None:
        self._decode = texts.tokenizer.decode
        self._known_ids = texts.known_ids
        self._skipped_ids = texts.special_ids if skip_special_tokens else frozenset()
        self._byte_ids = texts.byte_ids
        self._window: list[int] = []
        self._context_chars = 0
        self._held = 0
        self._hold_limit = MAX_BYTE_RUN

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join([self._push_one(token_id) for token_id in token_ids])

    def _push_one(self, token_id: int) -> str:
        if token_id not in self._known_ids or token_id in self._skipped_ids:
            return ""
        self._window.append(token_id)
        self._held += 1
        if token_id not in self._byte_ids:
            self._hold_limit = MAX_BYTE_RUN
            return self._give_out(context=1)
        if self._held < self._hold_limit:
            return ""
        return self._give_out_characters()

    def _give_out_characters(self) -> str:
        """Inside a long run of byte tokens: give out what is held if it ends with a whole character."""
        text = self._decode(self._window, skip_special_tokens=False)
        whole = not text.endswith("\ufffd")
        if not whole and self._held < self._hold_limit + _MAX_CHARACTER_BYTES - 1:
            return ""
        self._hold_limit = 1
        return self._give_out(context=len(text[-1:].encode()) if whole else 1)

    def _give_out(self, context: int) -> str:
        """Everything the window adds to its context; its last `context` tokens, or more, become the new context."""
        new_text = self._decode(self._window, skip_special_tokens=False)[self._context_chars :]
        context_text = self._decode(self._window[-context:], skip_special_tokens=False)
        # A context without text, such as one space, would leave the decoder waiting to strip a leading space.
        while not context_text and context < len(self._window):
            context += 1
            context_text = self._decode(self._window[-context:], skip_special_tokens=False)
        self._window = self._window[-context:]
        self._context_chars = len(context_text)
        self._held = 0
        return new_text

    def flush(self) -> str:
        return self._give_out(context=1) if self._held else ""


def decoder_types(tokenizer: Tokenizer) -> list[str]:
    """The type names of the tokenizer's decoder and of its parts."""
    if tokenizer.decoder is None:
        return []
    return _type_names(json.loads(tokenizer.decoder.__getstate__()))


def _type_names(decoder: dict[str, Any]) -> list[str]:
    if decoder["type"] != "Sequence":
        return [decoder["type"]]
    return [name for part in decoder["decoders"] for name in _type_names(part)]


def _is_byte_token(token: str) -> bool:
    """Whether the ByteFallback decoder reads this token as a byte, such as `<0xE4>`."""
    if len(token) != 6 or not (token.startswith("<0x") and token.endswith(">")):
        return False
    return all(char in "0123456789abcdefABCDEF" for char in token[3:5])
