"""Tasks about the order of days and months, in English and Chinese."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .holdout import is_held_out
from .tasks import Turn, phrase, phrase_zh
from .words import DAYS_EN, DAYS_ZH, MONTHS_EN, MONTHS_ZH

# How far to go, how the answer says it, and templates in which {u} is "day" or "month".
STEPS_EN: list[tuple[int, str, list[str]]] = [
    (
        1,
        "The {u} after {x} is {y}.",
        [
            "What {u} comes after {x}?",
            "Which {u} comes after {x}?",
            "What {u} follows {x}?",
            "Which {u} follows {x}?",
            "What {u} is after {x}?",
            "What is the {u} after {x}?",
            "What's the {u} after {x}?",
            "What's after {x}?",
            "What comes after {x}?",
            "What is the next {u} after {x}?",
            "*Tell me the {u} after {x}.",
            "*Name the {u} that follows {x}.",
            "{u} after {x}?",
            "And after {x}?",
            "Do you know which {u} comes after {x}?",
            "If this is {x}, what comes next?",
        ],
    ),
    (
        -1,
        "The {u} before {x} is {y}.",
        [
            "What {u} comes before {x}?",
            "Which {u} comes before {x}?",
            "What {u} precedes {x}?",
            "Which {u} precedes {x}?",
            "What {u} is before {x}?",
            "Which {u} is right before {x}?",
            "What is the {u} before {x}?",
            "What's the {u} before {x}?",
            "What's before {x}?",
            "What comes before {x}?",
            "*Tell me the {u} before {x}.",
            "*Name the {u} that precedes {x}.",
            "{u} before {x}?",
            "And before {x}?",
            "Do you know which {u} comes before {x}?",
        ],
    ),
    (
        2,
        "Two {u}s after {x} comes {y}.",
        [
            "What {u} is two {u}s after {x}?",
            "What {u} is 2 {u}s after {x}?",
            "Which {u} comes two {u}s after {x}?",
            "Which {u} comes 2 {u}s after {x}?",
            "What comes two {u}s after {x}?",
        ],
    ),
    (
        3,
        "Three {u}s after {x} comes {y}.",
        [
            "What {u} is three {u}s after {x}?",
            "What {u} is 3 {u}s after {x}?",
            "Which {u} comes three {u}s after {x}?",
            "Which {u} comes 3 {u}s after {x}?",
        ],
    ),
    (
        -2,
        "Two {u}s before {x} comes {y}.",
        [
            "What {u} is two {u}s before {x}?",
            "What {u} is 2 {u}s before {x}?",
            "Which {u} comes two {u}s before {x}?",
            "Which {u} is 2 {u}s before {x}?",
        ],
    ),
]
TODAY_EN: list[tuple[int, str, list[str]]] = [
    (
        1,
        "If today is {x}, tomorrow is {y}.",
        [
            "If today is {x}, what day is tomorrow?",
            "Today is {x}. What day is tomorrow?",
            "Today is {x}, so what is tomorrow?",
            "It is {x} today. What day will it be tomorrow?",
            "If it's {x} today, what's tomorrow?",
        ],
    ),
    (
        -1,
        "If today is {x}, yesterday was {y}.",
        [
            "If today is {x}, what day was yesterday?",
            "Today is {x}. What day was yesterday?",
            "It is {x} today. What day was it yesterday?",
            "If it's {x} today, what was yesterday?",
        ],
    ),
]
STEPS_ZH: list[tuple[int, str, list[str]]] = [
    (
        1,
        "{x}的后一{u}是{y}。",
        [
            "{x}的后一{u}是什么？",
            "{x}的下一{u}是什么？",
            "{x}的后一{u}是哪{u}？",
            "{x}后面是什么？",
            "{x}之后是什么？",
            "{x}之后是哪{u}？",
            "{x}的下一{u}是？",
            "*告诉我{x}的后一{u}",
            "那{x}之后呢？",
            "你知道{x}后面是什么吗？",
        ],
    ),
    (
        -1,
        "{x}的前一{u}是{y}。",
        [
            "{x}的前一{u}是什么？",
            "{x}的上一{u}是什么？",
            "{x}的前一{u}是哪{u}？",
            "{x}前面是什么？",
            "{x}之前是什么？",
            "{x}之前是哪{u}？",
            "*告诉我{x}的前一{u}",
            "那{x}之前呢？",
            "你知道{x}前面是什么吗？",
        ],
    ),
]
TODAY_ZH: list[tuple[int, str, list[str]]] = [
    (
        1,
        "今天是{x}，明天就是{y}。",
        [
            "今天是{x}，明天是星期几？",
            "今天{x}，明天星期几？",
            "如果今天是{x}，明天是星期几？",
            "如果今天是{x}，那么明天是什么日子？",
            "今天是{x}，明天呢？",
        ],
    ),
    (
        -1,
        "今天是{x}，昨天就是{y}。",
        [
            "今天是{x}，昨天是星期几？",
            "今天{x}，昨天星期几？",
            "如果今天是{x}，昨天是星期几？",
            "今天是{x}，昨天呢？",
        ],
    ),
    (
        2,
        "今天是{x}，后天就是{y}。",
        ["今天是{x}，后天是星期几？", "今天{x}，后天星期几？", "如果今天是{x}，后天是星期几？"],
    ),
]


def draw_step(
    rng: random.Random,
    held_out: bool,
    kind: str,
    items: Sequence[str],
    steps: list[tuple[int, str, list[str]]],
) -> tuple[str, str, str, str]:
    """Draw an item and a template; return template, answer template, item and its neighbour.

    There are too few days to hold out days, so a pair of a day and a phrasing is held out.
    """
    while True:
        offset, answer, templates = rng.choice(steps if rng.random() < 0.3 else steps[:2])
        template = rng.choice(templates)
        index = rng.randrange(len(items))
        if is_held_out(kind, items[index], template) == held_out:
            return template, answer, items[index], items[(index + offset) % len(items)]


def day_order(rng: random.Random, held_out: bool) -> Turn:
    """Name the day some days after or before a day."""
    steps = TODAY_EN if rng.random() < 0.2 else STEPS_EN
    template, answer, x, y = draw_step(rng, held_out, "day", DAYS_EN, steps)
    shown = x.lower() if rng.random() < 0.3 else x
    return Turn(phrase(rng, template, u="day", x=shown), answer.format(u="day", x=x, y=y))


def month_order(rng: random.Random, held_out: bool) -> Turn:
    """Name the month some months after or before a month."""
    template, answer, x, y = draw_step(rng, held_out, "month", MONTHS_EN, STEPS_EN)
    shown = x.lower() if rng.random() < 0.3 else x
    return Turn(phrase(rng, template, u="month", x=shown), answer.format(u="month", x=x, y=y))


def day_order_zh(rng: random.Random, held_out: bool) -> Turn:
    """Name the day before or after a day, in Chinese; the three words for week are all used."""
    steps = TODAY_ZH if rng.random() < 0.4 else STEPS_ZH
    template, answer, x, y = draw_step(rng, held_out, "day-zh", DAYS_ZH, steps)
    week = rng.choice(["星期", "星期", "周", "礼拜"])
    shown = "天" if x == "日" and week != "周" and rng.random() < 0.6 else x
    user = phrase_zh(rng, template, u="天", x=week + shown)
    return Turn(user, answer.format(u="天", x=week + shown, y=week + y))


def month_order_zh(rng: random.Random, held_out: bool) -> Turn:
    """Name the month before or after a month, in Chinese."""
    template, answer, x, y = draw_step(rng, held_out, "month-zh", MONTHS_ZH, STEPS_ZH)
    return Turn(phrase_zh(rng, template, u="个月", x=x), answer.format(u="个月", x=x, y=y))
