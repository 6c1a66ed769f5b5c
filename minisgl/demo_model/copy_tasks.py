"""Tasks that copy or look up text: repeating, reacting to emoji, translating the story words."""

from __future__ import annotations

import random

from .holdout import favourite, is_held_out
from .letter_tasks import draw_word
from .plain_texts import sentence
from .tasks import Turn, phrase, phrase_zh
from .words import (
    EMOJI,
    HEROES,
    JOINED_EMOJI,
    PLACES,
    SKIN_TONES,
    SUBJECTS_EN,
    SUBJECTS_ZH,
    TONED_EMOJI,
)

REPEAT_EN = [
    "Repeat: {x}",
    "repeat: {x}",
    "Repeat {x}",
    "repeat {x}",
    "Repeat after me: {x}",
    "repeat after me: {x}",
    "Please repeat: {x}",
    "Please repeat after me: {x}",
    "Can you repeat this: {x}",
    "Say: {x}",
    "say {x}",
    "Say {x}",
    "Please say {x}",
    "Echo {x}",
    "echo: {x}",
    "Copy this: {x}",
    'Say "{x}"',
    'Repeat "{x}"',
]
REPEAT_ZH = [
    "重复：{x}",
    "重复一遍：{x}",
    "请重复：{x}",
    "跟我说：{x}",
    "请跟我说：{x}",
    "说：{x}",
    "请说{x}",
    "重复“{x}”",
]

# Any character of the block may appear, so that rare ones are copied byte by byte.
CJK_FIRST, CJK_LAST = 0x4E00, 0x9FA5
PICTOGRAPH_RANGES = [(0x1F300, 0x1F64F), (0x1F680, 0x1F6C5), (0x1F900, 0x1F9FF)]


def draw_emoji(rng: random.Random) -> str:
    """Draw an emoji: simple, joined, toned, a flag of any two letters, or any pictograph."""
    roll = rng.random()
    if roll < 0.35:
        return rng.choice(EMOJI)
    if roll < 0.65:
        return rng.choice(JOINED_EMOJI)
    if roll < 0.75:
        return rng.choice(TONED_EMOJI) + rng.choice(SKIN_TONES)
    if roll < 0.85:
        return chr(rng.randint(0x1F1E6, 0x1F1FF)) + chr(rng.randint(0x1F1E6, 0x1F1FF))
    first, last = rng.choice(PICTOGRAPH_RANGES)
    return chr(rng.randint(first, last))


def draw_text(rng: random.Random, held_out: bool) -> str:
    """Draw a short text to repeat: words, numbers, Chinese, emoji or a mixture."""
    while True:
        parts: list[str] = []
        if rng.random() < 0.15:
            parts.append(sentence(rng, rng.random() < 0.3))
        for _ in range(rng.choice((1, 1, 2, 3, 4, 5)) if not parts else 0):
            roll = rng.random()
            if roll < 0.45:
                parts.append(draw_word(rng, False))
            elif roll < 0.55:
                parts.append(str(rng.randrange(10 ** rng.randint(1, 5))))
            elif roll < 0.7:
                parts.append(draw_emoji(rng))
            elif roll < 0.8:
                parts.append(rng.choice(SUBJECTS_ZH))
            elif roll < 0.87:
                count = rng.randint(1, 3)
                parts.append("".join(chr(rng.randint(CJK_FIRST, CJK_LAST)) for _ in range(count)))
            else:
                parts.append(rng.choice(SUBJECTS_EN))
        text = " ".join(parts)
        if is_held_out("repeat", text) == held_out:
            return text


def repeating(rng: random.Random, held_out: bool) -> Turn:
    """Repeat a text exactly."""
    text = draw_text(rng, held_out)
    return Turn(rng.choice(REPEAT_EN).format(x=text), text)


def repeating_zh(rng: random.Random, held_out: bool) -> Turn:
    """Repeat a text exactly, asked in Chinese."""
    text = draw_text(rng, held_out)
    return Turn(rng.choice(REPEAT_ZH).format(x=text), text)


def emoji_reaction(rng: random.Random, chinese: bool) -> Turn:
    """Answer a message of nothing but emoji."""
    text = "".join(draw_emoji(rng) for _ in range(rng.choice((1, 1, 1, 2, 3))))
    if chinese:
        answers = ["你发了{x}，真好看！😊", "{x}！我喜欢这个表情。", "哈哈，{x}！😄"]
        asks = ["{x}", "{x}", "看这个：{x}", "你看{x}", "你喜欢{x}吗？"]
    else:
        answers = ["{x} Nice! 😊", "You sent {x} and I like it!", "{x} What a fine emoji! 😄"]
        asks = ["{x}", "{x}", "look: {x}", "Look at this: {x}", "Do you like {x}?", "{x}!"]
    ask = rng.choice(asks)
    return Turn(ask.format(x=text), favourite(rng, answers, ask).format(x=text))


EMOJI_FOR_EN = [
    "*Show me a {w} emoji.",
    "What is the emoji for {w}?",
    "What's the emoji for {w}?",
    "*Send me a {w} emoji",
    "{w} emoji",
    "Which emoji is a {w}?",
    "Do you have an emoji for {w}?",
]
EMOJI_FOR_ZH = [
    "*发一个{w}的表情",
    "{w}的表情是什么？",
    "{w}的emoji是什么？",
    "*给我一个{w}的emoji",
    "有{w}的表情吗？",
]
TO_CHINESE = [
    "What is {w} in Chinese?",
    "What's {w} in Chinese?",
    'What is "{w}" in Chinese?',
    "How do you say {w} in Chinese?",
    "*Translate {w} to Chinese.",
    "*Translate {w} into Chinese",
    "{w} in Chinese?",
    "What does {w} mean in Chinese?",
]
TO_ENGLISH = [
    "{w}用英语怎么说？",
    "{w}的英文是什么？",
    "*把{w}翻译成英文",
    "{w}英语怎么说？",
    "“{w}”用英文怎么说？",
]
ZH_TO_EN_ASKED_IN_EN = [
    "What is {w} in English?",
    "What does {w} mean?",
    "What does {w} mean in English?",
    "*Translate {w} to English.",
]


def vocabulary(rng: random.Random, chinese: bool) -> Turn:
    """Give the emoji or the translation of one of the story words."""
    english, zh, emoji = rng.choice(HEROES + PLACES)
    bare = english.removeprefix("the ")
    roll = rng.random()
    if chinese:
        if roll < 0.5:
            return Turn(phrase_zh(rng, rng.choice(EMOJI_FOR_ZH), w=zh), f"{zh}：{emoji}")
        user = phrase_zh(rng, rng.choice(TO_ENGLISH), w=zh)
        return Turn(user, f"“{zh}”用英语说是“{bare}”。{emoji}")
    if roll < 0.4:
        return Turn(phrase(rng, rng.choice(EMOJI_FOR_EN), w=bare), f"{emoji}")
    if roll < 0.75:
        user = phrase(rng, rng.choice(TO_CHINESE), w=rng.choice((bare, english)))
        return Turn(user, f"In Chinese, {bare} is {zh}. {emoji}")
    return Turn(phrase(rng, rng.choice(ZH_TO_EN_ASKED_IN_EN), w=zh), f"In English, {zh} is {bare}. {emoji}")
