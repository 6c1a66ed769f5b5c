"""Turns that depend on the answer before: "and after that?", "plus 5?", "yes please"."""

from __future__ import annotations

import random
import re

from .holdout import is_held_out
from .names import spell_name
from .stories import story
from .tasks import Turn, phrase, phrase_zh
from .words import DAYS_EN, MONTHS_EN, PLACES, SUBJECTS_EN

AFTER_THAT = ["And after that?", "And the {u} after that?", "What comes after that?", "And then?"]
BEFORE_THAT = ["And before that?", "And the {u} before that?", "What comes before that?"]
PLUS_EN = [
    "plus {b}?",
    "And plus {b}?",
    "*Add {b} to that.",
    "+ {b}",
    "and {b} more?",
    "*Now add {b}.",
]
PLUS_ZH = ["再加{b}呢？", "再加{b}等于多少？", "再加上{b}", "加{b}呢？"]
YES_EN = [
    "Yes",
    "Yes please",
    "yes, please!",
    "Sure",
    "OK",
    "ok",
    "Yes, I would",
    "Why not",
    "yes!",
]
YES_ZH = ["好", "好的", "好啊", "想", "想听", "嗯", "可以", "好呀！"]

# Things users tell about themselves; the model only remembers names and says so when asked.
FACTS_EN = [
    "I am {n} years old.",
    "I'm {n} years old",
    "I live in {p}.",
    "I am from {p}.",
    "I come from {p}",
    "I like {s}.",
    "I love {s}!",
    "I have a dog named Rex.",
    "I have a cat called Minka",
    "My dog's name is Bello.",
    "My favorite color is green.",
    "My favourite food is pizza",
    "I work as a teacher.",
    "I am a student.",
    "I'm a programmer",
    "I am learning about {s}.",
    "My brother's name is Jonas.",
    "I have two sisters.",
    "My birthday is in May.",
    "I speak French.",
]
FACTS_ZH = [
    "我今年{n}岁。",
    "我住在{p}。",
    "我来自{p}。",
    "我有一只猫叫咪咪。",
    "我喜欢画画。",
    "我是学生。",
    "我是老师。",
]
FACTS_ZH += ["我最喜欢的颜色是绿色。", "我在学编程。", "我有一条狗叫旺财。"]


def fact(rng: random.Random, chinese: bool) -> Turn:
    """The user tells something other than a name."""
    english, zh, _ = rng.choice(PLACES)
    if chinese:
        user = phrase_zh(rng, rng.choice(FACTS_ZH), n=rng.randint(4, 90), p=zh)
        return Turn(user, "谢谢你告诉我！😊")
    subject = rng.choice(SUBJECTS_EN)
    user = phrase(rng, rng.choice(FACTS_EN), n=rng.randint(4, 90), p=english, s=subject)
    return Turn(user, "Thank you for telling me! 😊")


def next_in_order(rng: random.Random, last_word: str) -> Turn | None:
    """Ask for the neighbour of the day or month that was the last answer."""
    for unit, items in (("day", DAYS_EN), ("month", MONTHS_EN)):
        if last_word not in items:
            continue
        word, offset = ("after", 1) if rng.random() < 0.5 else ("before", -1)
        template = rng.choice(AFTER_THAT if offset == 1 else BEFORE_THAT)
        if is_held_out(unit, last_word, template):
            return None
        neighbour = items[(items.index(last_word) + offset) % len(items)]
        answer = f"The {unit} {word} {last_word} is {neighbour}."
        return Turn(phrase(rng, template, u=unit), answer)
    return None


def add_more(rng: random.Random, chinese: bool, total: int) -> Turn | None:
    """Add another number to the sum that was the last answer."""
    more = rng.randrange(10 ** rng.choice((1, 2, 2, 3)))
    if total > 999 or is_held_out("add", total, more):
        return None
    if chinese:
        user = phrase_zh(rng, rng.choice(PLUS_ZH), b=more)
        return Turn(user, f"{total} + {more} = {total + more}。")
    return Turn(phrase(rng, rng.choice(PLUS_EN), b=more), f"{total} + {more} = {total + more}.")


def follow_up(rng: random.Random, chinese: bool, last: Turn, name: str | None) -> Turn | None:
    """Return a turn that depends on the last one or on the name, if one fits."""
    if last.assistant.endswith(("Would you like a little story?", "想听一个小故事吗？")):
        return Turn(rng.choice(YES_ZH if chinese else YES_EN), story(rng, chinese).assistant)
    total = re.fullmatch(r"\d+ \+ \d+ = (\d+)[.。]", last.assistant)
    if total:
        return add_more(rng, chinese, int(total.group(1)))
    words = last.assistant.rstrip(".").split(" ")
    if not chinese and words[0] in ("The", "Two", "Three") and len(words) < 8:
        turn = next_in_order(rng, words[-1])
        if turn:
            return turn
    if name and name.isascii() and rng.random() < 0.5:
        return spell_name(rng, chinese, name)
    return fact(rng, chinese)
