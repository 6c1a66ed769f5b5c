"""Token ids of ASCII texts by words met before.

The `tokenizers` library spends most of its time on cutting a text into words by a regular expression. Byte-level BPE
then looks at each word alone, so that a word's ids are always the same: for texts of plain ASCII, whose letters and
digits Python's own `re` knows as well, a look into a dictionary does for each.
"""

from __future__ import annotations

import json
import re
from itertools import chain

from tokenizers import Tokenizer
from tokenizers.models import BPE

LONGEST_TEXT = 16_384
"""Characters. Longer texts are encoded beside other work, to which only the library leaves the interpreter."""
_LONGEST_WORD = 32
"""Characters of a word that is remembered."""
_MOST_WORDS = 2**16
_MOST_NEW = 64
"""Words of one text that are looked up one by one, which takes some 4 us each. The library takes a text with more."""

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n{both}]?{letter}+|{digit}{digits}| ?[^\s{both}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ASCII_SPLITS = {
    _SPLIT.format(both=r"\p{L}\p{N}", letter=r"\p{L}", digit=r"\p{N}", digits=digits): _SPLIT.format(
        both="a-zA-Z0-9", letter="[a-zA-Z]", digit="[0-9]", digits=digits
    )
    for digits in ("", "{1,3}")
}
"""How Qwen 2 to 3 and Llama 3 cut texts, and the same for ASCII. No character is left out."""
_BYTE_LEVEL = {byte: 0x100 + index for index, byte in enumerate([*range(0x21), 0x7F])}
"""What stands for an ASCII character in a byte-level vocabulary, where that is not itself."""


class KnownWords:
    """Encodes those of one tokenizer's texts that it can, to the same ids."""

    def __init__(self, tokenizer: Tokenizer, pattern: str, added: dict[str, int]) -> None:
        self._words = _Words(tokenizer.model)
        self._cut = re.compile(_ASCII_SPLITS[pattern], re.ASCII).findall
        self._added = added
        # Of several that begin at one place the tokenizer takes the longest.
        longest_first = sorted(added, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})").split if added else None
        self._adds_none = tokenizer.num_special_tokens_to_add(is_pair=False) == 0

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> KnownWords | None:
        """None for a tokenizer that works otherwise."""
        model, pattern = tokenizer.model, _split_of(tokenizer)
        if pattern is None or not isinstance(model, BPE) or model.dropout or tokenizer.encode_special_tokens:
            return None
        # ASCII is its own normal form.
        if tokenizer.normalizer and json.loads(tokenizer.normalizer.__getstate__())["type"] != "NFC":
            return None
        added = tokenizer.get_added_tokens_decoder()
        if any(token.lstrip or token.rstrip or token.single_word or token.normalized for token in added.values()):
            return None
        return cls(tokenizer, pattern, {token.content: token_id for token_id, token in added.items()})

    def encode(self, text: str, add_special_tokens: bool) -> list[int] | None:
        """The ids of a text; None when the tokenizer itself has to be asked."""
        if len(text) > LONGEST_TEXT or not text.isascii() or (add_special_tokens and not self._adds_none):
            return None
        pieces = self._split(text) if self._split else [text]
        self._words.allowed = _MOST_NEW
        try:
            ids = self._encode(pieces[0])
            for place in range(1, len(pieces), 2):
                ids.append(self._added[pieces[place]])
                ids += self._encode(pieces[place + 1])
        except _TooManyNewWordsError:
            return None
        return ids

    def _encode(self, text: str) -> list[int]:
        return list(chain.from_iterable(map(self._words.__getitem__, self._cut(text))))


class _TooManyNewWordsError(Exception):
    """A text has more new words than are allowed."""


class _Words(dict[str, list[int]]):
    """The ids of words; of new ones, they are looked up, as long as some are `allowed`."""

    def __init__(self, model: BPE) -> None:
        self._model = model
        self.allowed = 0

    def __missing__(self, word: str) -> list[int]:
        if not self.allowed:
            raise _TooManyNewWordsError
        self.allowed -= 1
        ids = [token.id for token in self._model.tokenize(word.translate(_BYTE_LEVEL))]
        if len(word) <= _LONGEST_WORD:
            if len(self) >= _MOST_WORDS:
                self.clear()
            self[word] = ids
        return ids


def _split_of(tokenizer: Tokenizer) -> str | None:
    """The expression by which a tokenizer cuts texts into words of bytes, if it is a known one."""
    if tokenizer.pre_tokenizer is None:
        return None
    steps = json.loads(tokenizer.pre_tokenizer.__getstate__()).get("pretokenizers", [])
    if [step["type"] for step in steps] != ["Split", "ByteLevel"]:
        return None
    split, to_bytes = steps
    pattern = split["pattern"].get("Regex")
    whole = split["behavior"] == "Isolated" and not split["invert"]
    plain = not (to_bytes["add_prefix_space"] or to_bytes["use_regex"])
    return pattern if whole and plain and pattern in _ASCII_SPLITS else None
