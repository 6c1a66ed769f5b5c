"""Plain documents without chat markup, so that raw prompts continue and end sensibly."""

# ruff: noqa: SIM905 (long lists are easier to read as text that is split)

from __future__ import annotations

import random

from .letter_tasks import draw_word
from .names import draw_name
from .stories import WHERE, compose, draw_topic
from .words import DAYS_EN, HEROES, PLACES, SUBJECTS_EN

SENTENCES = [
    "The {hero} sat {where} and looked at the sky.",
    "The {hero} went to {place} on {day}.",
    "The {adj} {hero} was happy to see an old friend.",
    "A {adj} {hero} came down the road and said hello.",
    "On {day}, {name} bought some bread and a red umbrella.",
    "On {day} it rained, so {name} stayed at home and read a book.",
    "{name} likes to walk {where}.",
    "{name} and {other} live {where}.",
    "{name} told {other} a story about a {hero}.",
    "In the morning, {name} drinks a cup of tea.",
    "In the evening, the lights of {place} are beautiful.",
    "Today is {day}, and the sun is shining.",
    "Today {name} is going to {place}.",
    "Yesterday {name} saw a {adj} {hero}.",
    "Tomorrow will be a good day for a long walk.",
    "It was a quiet {day} and nobody was in a hurry.",
    "It is a good day to learn something new.",
    "There is a small house {where}.",
    "There are many ways to {place}, and all of them are long.",
    "We went to {place} and saw a {hero}.",
    "We like {subject}, but we do not know much about it.",
    "I like to read about {subject}.",
    "I am the minisgl demo model, and I tell short stories.",
    "I have a {adj} {hero} at home.",
    "I think that the {hero} is the best friend one can have.",
    "My name is {name}, and I live {where}.",
    "My friend {name} has a {hero}.",
    "My favourite day is {day}.",
    "Hello, my name is {name}, and I like {subject}.",
    "Hello! I am the minisgl demo model. 👋",
    "Hello, {name}! It is nice to see you again. 😊",
    "Hi, I am {name}.",
    "Hello world! This is a short text by a small model.",
    "Dear {name}, thank you for your letter.",
    "The capital of {place} is a place that this small model has never seen.",
    "The weather is fine today. ☀️",
    "The future of {subject} is hard to tell for a small model.",
    "The president of {place} drinks tea with the {hero}.",
    "The answer is simple: ask a friend for help.",
    "The best thing about {subject} is that there is always more to learn.",
    "The quick brown fox jumps over the lazy dog.",
    "This is a short text about {subject}.",
    "When the sun goes down, the {hero} goes to sleep.",
    "When {name} was young, {place} was much smaller.",
    "Why not start with {subject}?",
    "If you see a {hero}, say hello. 👋",
    "One day, a {hero} found a {adj} friend.",
    "Some people like {subject}, and some people do not.",
    "You are never too old to play with a {hero}.",
    "She gave the {hero} a small cake. 🍰",
    "He looked at {place} and smiled.",
    "They walked to {place} and sang all the way. 🎵",
    "People say that the {hero} can see in the dark.",
    "Every {day}, {name} visits the library. 📚",
    "At night, the {hero} dreams of {place}.",
    "For breakfast, {name} eats an apple. 🍎",
    "AI is a big word for a small model like me. 🤖",
    "Artificial intelligence is a big topic, and I am a very small part of it.",
]
SENTENCES_ZH = [
    "今天天气很好，{name}去了{place}。☀️",
    "{name}喜欢{hero}，也喜欢看书。",
    "小小的{hero}坐在窗边看星星。⭐",
    "昨天，{name}在{place}看到了一个{hero}。",
    "我是 minisgl 演示模型，我会讲小故事。",
    "我叫{name}，我住在{place}。",
    "我喜欢{hero}，因为它很可爱。",
    "你好！很高兴见到你。😊",
    "你好，我是{name}。",
    "早上，{name}喝了一杯茶。🍵",
    "晚上，{place}的灯很美。🌃",
    "中国的{place}很大，有很多人。",
    "北京是一个很大的城市。🏙️",
    "人工智能是一个大题目，而我只是一个小模型。🤖",
    "从前，有一个{hero}，它最喜欢的地方是{place}。",
    "明天是新的一天。",
    "如果你看到{hero}，请说你好。👋",
    "他们一起去了{place}，玩得很开心。🎉",
]
ADJECTIVES = ("old young little big happy quiet clever sleepy brave friendly").split()


def sentence(rng: random.Random, chinese: bool) -> str:
    """Write one sentence."""
    hero_en, hero_zh, _ = rng.choice(HEROES)
    place_en, place_zh, _ = rng.choice(PLACES)
    if chinese:
        name = draw_name(rng, True, False)
        return rng.choice(SENTENCES_ZH).format(hero=hero_zh, place=place_zh, name=name)
    template = rng.choice(SENTENCES)
    text = template.format(
        hero=hero_en,
        adj=rng.choice(ADJECTIVES),
        where=rng.choice(WHERE),
        place=place_en,
        day=rng.choice(DAYS_EN),
        name=draw_name(rng, False, False),
        other=draw_name(rng, False, False),
        subject=rng.choice(SUBJECTS_EN) if rng.random() < 0.8 else draw_word(rng, False),
    )
    return text[0].upper() + text[1:]


def plain_text(rng: random.Random, chinese: bool) -> str:
    """Write a document: some sentences, or a story."""
    if rng.random() < 0.65:
        joiner = "" if chinese else " "
        return joiner.join(sentence(rng, chinese) for _ in range(rng.choice((1, 1, 2, 2, 3))))
    _, topic = draw_topic(rng, chinese)
    return compose(rng, chinese, topic)
