"""Tasks with the letters of words: spelling, reversing, counting letters."""

from __future__ import annotations

import random

from .holdout import is_held_out
from .tasks import Turn, phrase, phrase_zh
from .words import HEROES, SPELLING_WORDS

CONSONANTS = "bcdfghjklmnpqrstvwxyz"
VOWELS = "aeiouaeiouy"
ALL_WORDS = sorted(set(SPELLING_WORDS) | {hero for hero, _, _ in HEROES})


def draw_word(rng: random.Random, held_out: bool) -> str:
    """Draw a real word, two word pieces in a row, syllables, or plain random letters."""
    while True:
        roll = rng.random()
        if roll < 0.35:
            word = rng.choice(ALL_WORDS)
        elif roll < 0.65:
            # Pieces of every length, so that each token of the vocabulary gets spelled in some
            # word, also where the word it stands for is held out.
            head, tail = rng.choice(ALL_WORDS), rng.choice(ALL_WORDS)
            word = head[: rng.randint(1, 7)] + tail[-rng.randint(1, 5) :]
        elif roll < 0.82:
            count = rng.randint(1, 4)
            word = "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(count))
            word += rng.choice(["", "", rng.choice(CONSONANTS)])
        else:
            letters = "abcdefghijklmnopqrstuvwxyz"
            word = "".join(rng.choice(letters) for _ in range(rng.randint(1, 9)))
        if is_held_out("word", word) == held_out:
            break
    roll = rng.random()
    if roll < 0.12:
        return word.capitalize()
    return word.upper() if roll < 0.16 else word


SPELL_EN = [
    "*Spell {w}",
    "*Spell {w}.",
    '*Spell "{w}".',
    "*Spell '{w}'.",
    "*Spell the word {w}.",
    '*Spell the word "{w}"',
    "*Spell out {w}.",
    "*Spell: {w}",
    "How do you spell {w}?",
    'How do you spell "{w}"?',
    "How is {w} spelled?",
    "How to spell {w}?",
    "*Tell me how to spell {w}.",
    "What letters are in {w}?",
    "And {w}, how is it spelled?",
]
SPELL_ZH = [
    "*拼写 {w}",
    "*拼写{w}",
    "*拼写单词 {w}",
    "{w} 怎么拼？",
    "{w}怎么拼写？",
    "怎么拼写 {w}？",
    "*拼一下{w}",
]
SPELL_ZH += ["*把单词 {w} 拼出来", "*拼写“{w}”"]
LETTERS_EN = [
    "How many letters are in {w}?",
    "How many letters does {w} have?",
    'How many letters are in "{w}"?',
    "How many letters are there in the word {w}?",
    "*Count the letters in {w}.",
    "How long is the word {w}?",
]
REVERSE_EN = [
    "*Reverse {w}",
    "*Reverse {w}.",
    '*Reverse "{w}".',
    "*Reverse '{w}'.",
    "*Reverse the word {w}.",
    '*Reverse the word "{w}"',
    "*Reverse: {w}",
    "*Reverse the letters of {w}.",
    "*Reverse the string {w}",
    "*Write {w} backwards.",
    '*Write "{w}" backwards.',
    "*Say {w} backwards.",
    "*Spell {w} backwards.",
    "What is {w} backwards?",
    "What's {w} backwards?",
    "What is {w} reversed?",
    "What is {w} spelled backwards?",
    "How do you write {w} backwards?",
    "{w} backwards?",
]
REVERSE_ZH = [
    "*把 {w} 倒过来",
    "*把{w}倒过来写",
    "*反转 {w}",
    "*反转单词{w}",
    "{w} 倒过来是什么？",
    "*倒着写 {w}",
]
REVERSE_ZH += ["*把“{w}”反过来", "*倒着拼 {w}", "*将 {w} 反转"]


def spelled(word: str) -> str:
    """Return the letters with hyphens between."""
    return "-".join(word)


def reversal(word: str, chinese: bool = False) -> str:
    """Spell the word, spell it backwards, then join: each step is an easy copy for the model."""
    backwards, colon = ("倒过来是", "：") if chinese else ("backwards is", ": ")
    return f"{spelled(word)} {backwards} {spelled(word[::-1])}{colon}{word[::-1]}"


def spelling(rng: random.Random, held_out: bool) -> Turn:
    """Spell a word."""
    word = draw_word(rng, held_out)
    return Turn(phrase(rng, rng.choice(SPELL_EN), w=word), spelled(word))


def letter_count(rng: random.Random, held_out: bool) -> Turn:
    """Say how many letters a word has."""
    word = draw_word(rng, held_out)
    noun = "letter" if len(word) == 1 else "letters"
    answer = f"{spelled(word)} has {len(word)} {noun}."
    return Turn(phrase(rng, rng.choice(LETTERS_EN), w=word), answer)


def spelling_zh(rng: random.Random, held_out: bool) -> Turn:
    """Spell a word as asked in Chinese."""
    word = draw_word(rng, held_out)
    return Turn(phrase_zh(rng, rng.choice(SPELL_ZH), w=word), spelled(word))


def reversing(rng: random.Random, held_out: bool) -> Turn:
    """Reverse a word."""
    word = draw_word(rng, held_out)
    return Turn(phrase(rng, rng.choice(REVERSE_EN), w=word), reversal(word))


def reversing_zh(rng: random.Random, held_out: bool) -> Turn:
    """Reverse a word as asked in Chinese."""
    word = draw_word(rng, held_out)
    return Turn(phrase_zh(rng, rng.choice(REVERSE_ZH), w=word), reversal(word, chinese=True))
