"""Grammars that several parts of the server write; no torch, no xgrammar."""

from __future__ import annotations

from collections.abc import Sequence

from minisgl.sampling_params import Grammar


def choice_grammar(choices: Sequence[str]) -> Grammar:
    """The grammar of answers that are exactly one of `choices`, in EBNF; raises ValueError when there are none."""
    if not choices:
        raise ValueError("choice needs at least one string")
    return Grammar("ebnf", "root ::= " + " | ".join(map(ebnf_literal, choices)))


def ebnf_literal(text: str) -> str:
    """`text` as a string of xgrammar's EBNF, whatever characters are in it."""
    return '"' + "".join(map(_ebnf_character, text)) + '"'


def _ebnf_character(char: str) -> str:
    return char if char.isascii() and (char.isalnum() or char in " _-") else f"\\U{ord(char):08x}"
