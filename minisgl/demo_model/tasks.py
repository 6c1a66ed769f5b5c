"""The frame of all tasks with one right answer, and the tasks with numbers.

Every task draws a case, and redraws until the case is on the wanted side of the hold-out. The
answer is a function of the request alone, so the evaluation can compare it exactly.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from .holdout import is_held_out
from .words import NUMBER_WORDS


@dataclass(frozen=True)
class Turn:
    """One request and its answer."""

    user: str
    assistant: str


Task = Callable[[random.Random, bool], Turn]

POLITE_BEFORE = [
    "Please ",
    "please ",
    "Can you ",
    "can you ",
    "Could you please ",
    "Could you ",
    "Would you ",
    "Now ",
    "Hey, ",
    "OK, now ",
    "ok ",
    "I want you to ",
    "Next: ",
]
POLITE_AFTER = [" please", ", please", " please!", " for me", " now", ", thanks"]
ASK_FIRST_ZH = ["请", "请你", "你能", "帮我", "麻烦你", "现在", "请帮我", "你可以", "能不能"]
ENDINGS = [".", "!", "", "", "", "?", " ?", "...", "!!"]


def decapitalise(text: str) -> str:
    """Lower the first letter, so that the text can follow other words."""
    return text[:1].lower() + text[1:]


def shout(part: str) -> str:
    """Write in capitals, except the name of a field."""
    return part if part.startswith("{") else part.upper()


def phrase(rng: random.Random, template: str, **fields: object) -> str:
    """Fill a request template, with the case, politeness and punctuation people vary.

    A template that starts with ``*`` is a command, which may be made polite.
    """
    command = template.startswith("*")
    text = template.lstrip("*")
    if command and rng.random() < 0.35:
        if rng.random() < 0.6:
            text = rng.choice(POLITE_BEFORE) + decapitalise(text)
        else:
            text = text.rstrip(".") + rng.choice(POLITE_AFTER)
    roll = rng.random()
    if roll < 0.25:
        text = text.lower()
    elif roll < 0.35:
        text = decapitalise(text)
    elif roll < 0.37:
        text = re.sub(r"\{\w+\}|[^{]+", lambda part: shout(part.group()), text)
    roll = rng.random()
    if roll < 0.25:
        text = text.rstrip(".?! ")
    elif roll < 0.4 and text[-1] not in ".?!=":
        text += rng.choice(ENDINGS)
    return text.format(**fields)


def phrase_zh(rng: random.Random, template: str, **fields: object) -> str:
    """Fill a Chinese request template, sometimes polite, with either kind of punctuation."""
    command = template.startswith("*")
    text = template.lstrip("*")
    if command and rng.random() < 0.4:
        text = rng.choice(ASK_FIRST_ZH) + text
    elif not command and rng.random() < 0.06:
        text = rng.choice(["请问", "请问，", "那么", "嗯，", "我想问，"]) + text
    roll = rng.random()
    if roll < 0.35:
        text = text.rstrip("。？！")
    elif roll < 0.5:
        text = text.replace("？", "?").replace("，", ",").replace("。", ".").replace("！", "!")
    elif roll < 0.65 and text[-1] not in "。？！=":
        text += rng.choice(["。", "！", "？", "吧", "吧。", "吗？", "好吗？", "，谢谢"])
    return text.format(**fields)


def chinese_number(number: int) -> str:
    """Write 0 to 199 with Chinese numerals."""
    digits = "零一二三四五六七八九"
    if number >= 100:
        rest = number - 100
        if rest == 0:
            return "一百"
        return (
            "一百"
            + ("零" + digits[rest] if rest < 10 else digits[rest // 10] + "十")
            + (digits[rest % 10] if rest >= 10 and rest % 10 else "")
        )
    if number < 10:
        return digits[number]
    tens, ones = divmod(number, 10)
    return ("" if tens == 1 else digits[tens]) + "十" + (digits[ones] if ones else "")


def draw_operands(rng: random.Random, held_out: bool, limit: int | None = None) -> tuple[int, int]:
    """Draw two operands; sizes are mixed so that short numbers are not rare."""
    while True:
        if limit is None:
            a, b = (rng.randrange(10 ** rng.choice((1, 2, 2, 3, 3, 3))) for _ in range(2))
        else:
            a, b = rng.randrange(limit), rng.randrange(limit)
        if is_held_out("add", a, b) == held_out:
            return a, b


ADD_EN = [
    "What is {a} + {b}?",
    "What is {a}+{b}?",
    "What's {a} + {b}?",
    "What's {a}+{b}?",
    "whats {a} + {b}",
    "What is {a} plus {b}?",
    "What's {a} plus {b}?",
    "What does {a} + {b} equal?",
    "What do you get if you add {a} and {b}?",
    "What is the sum of {a} and {b}?",
    "{a} + {b} = ?",
    "{a} + {b} =",
    "{a}+{b}=",
    "{a}+{b}=?",
    "{a} + {b}",
    "{a} +{b}",
    "{a}+ {b}",
    "{a} + {b} equals?",
    "How much are {a} and {b}?",
    "What is {a} and {b} together?",
    "*Help me add {a} and {b}.",
    "{a} and {b} make?",
    "{a}+{b}",
    "{a} plus {b}",
    "{a} plus {b} is?",
    "*Add {a} and {b}.",
    "*Add {a} to {b}.",
    "*Add {a} + {b}.",
    "*Add the numbers {a} and {b}.",
    "*Calculate {a} + {b}.",
    "*Calculate {a}+{b}",
    "*Compute {a} + {b}.",
    "*Sum {a} and {b}.",
    "*Tell me what {a} + {b} is.",
    "*Tell me {a} plus {b}.",
    "*Solve {a} + {b}.",
    "How much is {a} + {b}?",
    "How much is {a} plus {b}?",
    "And {a} + {b}?",
    "And what is {a} + {b}?",
    "What about {a}+{b}?",
    "Do you know what {a} + {b} is?",
    "I have {a} apples and get {b} more. How many do I have?",
]
ADD_ZH = [
    "{a}加{b}等于多少？",
    "{a}加{b}等于几？",
    "{a} 加 {b} 等于多少？",
    "{a}+{b}等于多少？",
    "{a} + {b} 等于多少？",
    "{a}+{b}等于几",
    "{a}加{b}是多少？",
    "{a}+{b}是多少？",
    "{a}加{b}",
    "{a}和{b}的和是多少？",
    "{a}与{b}相加等于多少？",
    "*计算{a}+{b}",
    "*计算 {a} + {b}",
    "*算一下{a}加{b}",
    "*算一算{a}+{b}",
    "*把{a}和{b}加起来",
    "*告诉我{a}加{b}等于多少",
    "那{a}+{b}呢？",
    "{a}加{b}得多少？",
    "{a}加上{b}是多少？",
    "{a}加上{b}等于几？",
    "{a} + {b} = ?",
    "{a}+{b}=",
    "我有{a}个苹果，又得到{b}个，一共有几个？",
]


def addition(rng: random.Random, held_out: bool) -> Turn:
    """Add two numbers of up to three digits; small ones also as English words."""
    if rng.random() < 0.05:
        a, b = draw_operands(rng, held_out, 21)
        words = {"a": NUMBER_WORDS[a], "b": NUMBER_WORDS[b]}
        template = rng.choice([t for t in ADD_EN if " plus " in t or " and " in t])
        return Turn(phrase(rng, template, **words), f"{a} + {b} = {a + b}.")
    a, b = draw_operands(rng, held_out)
    return Turn(phrase(rng, rng.choice(ADD_EN), a=a, b=b), f"{a} + {b} = {a + b}.")


def addition_zh(rng: random.Random, held_out: bool) -> Turn:
    """Add two numbers asked in Chinese; small ones also with Chinese numerals."""
    template = rng.choice(ADD_ZH)
    if rng.random() < 0.15:
        a, b = draw_operands(rng, held_out, 100)
        na, nb, total = chinese_number(a), chinese_number(b), chinese_number(a + b)
        return Turn(phrase_zh(rng, template, a=na, b=nb), f"{na}加{nb}等于{total}。")
    a, b = draw_operands(rng, held_out)
    return Turn(phrase_zh(rng, template, a=a, b=b), f"{a} + {b} = {a + b}。")


def draw_range(rng: random.Random, held_out: bool, limit: int = 200) -> tuple[int, int]:
    """Draw a first and a last number, at most 100 apart and mostly far less."""
    while True:
        roll = rng.random()
        if roll < 0.4:
            first = 1
            last = rng.randint(2, 30 if roll < 0.3 else 100)
        else:
            first = rng.randrange(30 if roll < 0.75 else 100)
            last = first + rng.randint(1, 25)
        if last <= limit and is_held_out("count", first, last) == held_out:
            return first, last


COUNT_EN = [
    "*Count from {a} to {b}.",
    "*Count from {a} to {b}",
    "*Count {a} to {b}",
    "*Count up from {a} to {b}.",
    "*Count from {a} up to {b}.",
    "*Start at {a} and count to {b}.",
    "*List the numbers from {a} to {b}.",
    "*Write the numbers {a} to {b}.",
    "*Give me the numbers from {a} to {b}.",
    "*Tell me all numbers from {a} to {b}.",
    "Numbers from {a} to {b}?",
]
COUNT_FROM_ONE_EN = [
    "*Count to {b}.",
    "*Count to {b}",
    "*Count up to {b}.",
    "*Count until {b}.",
    "How do you count to {b}?",
    "Do you know how to count to {b}?",
]
COUNT_ZH = [
    "*从{a}数到{b}",
    "*从{a}数到{b}。",
    "*从 {a} 数到 {b}",
    "*从{a}开始数到{b}",
    "*数数，从{a}到{b}",
]
COUNT_ZH += ["*列出{a}到{b}的数字", "*写出从{a}到{b}的数", "*把{a}到{b}数一遍"]
COUNT_FROM_ONE_ZH = ["*数到{b}", "*数到{b}。", "*从头数到{b}", "*数数，数到{b}"]


def counting(rng: random.Random, held_out: bool) -> Turn:
    """Count upwards between two numbers."""
    a, b = draw_range(rng, held_out)
    short = a == 1 and rng.random() < 0.7
    user = phrase(rng, rng.choice(COUNT_FROM_ONE_EN if short else COUNT_EN), a=a, b=b)
    return Turn(user, ", ".join(str(n) for n in range(a, b + 1)) + ".")


def counting_zh(rng: random.Random, held_out: bool) -> Turn:
    """Count upwards as asked in Chinese, in digits or in Chinese numerals."""
    numerals = rng.random() < 0.4
    while True:
        a, b = draw_range(rng, held_out, 99 if numerals else 200)
        if not numerals or b - a <= 30:
            break
    write = chinese_number if numerals else str
    short = a == 1 and rng.random() < 0.7
    template = rng.choice(COUNT_FROM_ONE_ZH if short else COUNT_ZH)
    user = phrase_zh(rng, template, a=write(a), b=write(b))
    return Turn(user, "、".join(write(n) for n in range(a, b + 1)) + "。")


COUNT_DOWN_EN = [
    "*Count from {a} to {b}.",
    "*Count {a} to {b}",
    "*Countdown from {a} to {b}.",
    "Countdown from {a} to {b}",
    "*Count down from {a} to {b}.",
    "*Count backwards from {a} to {b}.",
    "*Count down from {a} to {b}",
    "*Count from {a} down to {b}.",
    "*Count from {a} to {b} backwards.",
]

COUNT_DOWN_TO_ONE_EN = [
    "*Count down from {a}.",
    "*Count backwards from {a}.",
    "*Countdown from {a}",
    "Countdown from {a}!",
    "*Count down {a}",
    "*Start a countdown from {a}.",
]
COUNT_DOWN_ZH = ["*从{a}数到{b}", "*从{a}倒数到{b}", "*从{a}倒着数到{b}", "*倒数，从{a}到{b}"]


def counting_down(rng: random.Random, held_out: bool) -> Turn:
    """Count downwards between two numbers."""
    while True:
        b = rng.choice((0, 1, 1, 1, rng.randrange(50)))
        a = b + rng.randint(2, 20)
        if is_held_out("count-down", a, b) == held_out:
            break
    if b == 1 and rng.random() < 0.5:
        user = phrase(rng, rng.choice(COUNT_DOWN_TO_ONE_EN), a=a)
    else:
        user = phrase(rng, rng.choice(COUNT_DOWN_EN), a=a, b=b)
    return Turn(user, ", ".join(str(n) for n in range(a, b - 1, -1)) + ".")


def counting_down_zh(rng: random.Random, held_out: bool) -> Turn:
    """Count downwards as asked in Chinese, in digits or in Chinese numerals."""
    while True:
        b = rng.choice((0, 1, 1, 1, rng.randrange(50)))
        a = b + rng.randint(2, 20)
        if is_held_out("count-down", a, b) == held_out:
            break
    write = chinese_number if rng.random() < 0.4 else str
    if b == 1 and rng.random() < 0.4:
        user = phrase_zh(rng, rng.choice(["*从{a}倒数", "*从{a}开始倒数"]), a=write(a))
    else:
        user = phrase_zh(rng, rng.choice(COUNT_DOWN_ZH), a=write(a), b=write(b))
    return Turn(user, "、".join(write(n) for n in range(a, b - 1, -1)) + "。")
