"""Names: how users give them, ask for them back, and what the model answers."""

from __future__ import annotations

import random

from .holdout import is_held_out
from .letter_tasks import reversal, spelled
from .tasks import Turn, phrase, phrase_zh
from .words import GIVEN_ZH, NAME_ENDINGS, NAME_SYLLABLES, NAMES_EN, NICKNAMES_ZH, SURNAMES_ZH

CJK_FIRST, CJK_LAST = 0x4E00, 0x9FA5


def draw_english_name(rng: random.Random, held_out: bool) -> str:
    """Draw a known name or one built from syllables; case varies as users write it."""
    while True:
        roll = rng.random()
        if roll < 0.4:
            name = rng.choice(NAMES_EN)
        else:
            name = "".join(rng.choice(NAME_SYLLABLES) for _ in range(rng.randint(1, 3)))
            name += rng.choice(NAME_ENDINGS)
            if roll > 0.95:
                name = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 7)))
            name = name.capitalize()
        if len(name) > 1 and is_held_out("name", name.lower()) == held_out:
            break
    roll = rng.random()
    if roll < 0.15:
        return name.lower()
    return name.upper() if roll < 0.18 else name


def draw_chinese_name(rng: random.Random, held_out: bool) -> str:
    """Draw a nickname, a surname with given name, or (rarely) any characters."""
    while True:
        roll = rng.random()
        if roll < 0.3:
            name = rng.choice(NICKNAMES_ZH)
        elif roll < 0.9:
            name = rng.choice(SURNAMES_ZH) if rng.random() < 0.7 else ""
            name += "".join(rng.choice(GIVEN_ZH) for _ in range(2 if not name else rng.randint(1, 2)))
        else:
            count = rng.randint(2, 3)
            name = "".join(chr(rng.randint(CJK_FIRST, CJK_LAST)) for _ in range(count))
        if is_held_out("name", name) == held_out:
            return name


def draw_name(rng: random.Random, chinese: bool, held_out: bool) -> str:
    """Draw a name that fits the language; now and then one of the other language."""
    if chinese:
        if rng.random() < 0.75:
            return draw_chinese_name(rng, held_out)
        return draw_english_name(rng, held_out)
    if rng.random() < 0.04:
        return draw_chinese_name(rng, held_out)
    return draw_english_name(rng, held_out)


GIVE_EN = [
    "My name is {n}.",
    "My name is {n}",
    "My name's {n}.",
    "Hi, my name is {n}.",
    "Hi, I'm {n}.",
    "Hi! I'm {n}!",
    "Hi I am {n}",
    "Hello, my name is {n}.",
    "Hello, I am {n}.",
    "Hello! I'm {n}.",
    "Hey, I'm {n}",
    "Hey there, my name is {n}",
    "Good morning, I am {n}.",
    "I'm {n}.",
    "I'm {n}",
    "I am {n}.",
    "im {n}",
    "Call me {n}.",
    "Please call me {n}.",
    "You can call me {n}.",
    "People call me {n}.",
    "They call me {n}.",
    "It's {n}.",
    "This is {n}.",
    "{n} here.",
    "Hello, {n} here!",
    "{n} is my name.",
    "My name is {n}, remember it please.",
    "Remember my name: {n}.",
    "Please remember that my name is {n}.",
    "The name is {n}.",
    "Let me introduce myself. I am {n}.",
    "Hi! My name is {n}. Nice to meet you!",
    "Hi, I'm {n}. How are you?",
    "Hi, I'm {n}, nice to meet you.",
    "Good morning! My name is {n}!",
    "my name {n}",
    "I'm {n}, what's your name?",
    "Hi, I'm {n}! Who are you?",
    "My name is {n}. What is your name?",
    "👋 I'm {n}",
    "Hi 👋 my name is {n} 😊",
]
RENAME_EN = [
    "Actually, my name is {n}.",
    "Actually, call me {n}.",
    "No, my name is {n}.",
    "Sorry, my real name is {n}.",
    "From now on, call me {n}.",
    "I changed my name to {n}.",
    "Now my name is {n}.",
]
ASK_EN = [
    "What is my name?",
    "What's my name?",
    "whats my name",
    "What was my name?",
    "What was my name again?",
    "What's my name again?",
    "Do you know my name?",
    "Do you remember my name?",
    "Do you still remember my name?",
    "Can you remember my name?",
    "Can you tell me my name?",
    "Remember my name?",
    "*Tell me my name.",
    "*Say my name.",
    "Who am I?",
    "Do you know who I am?",
    "Do you remember who I am?",
    "So what is my name?",
    "What am I called?",
    "What did I say my name was?",
    "Did I tell you my name?",
    "And what's my name?",
    "Have you forgotten my name?",
    "What name did I give you?",
]
GIVE_ZH = [
    "我叫{n}",
    "我叫{n}。",
    "我的名字是{n}。",
    "我的名字叫{n}。",
    "我是{n}。",
    "你好，我叫{n}。",
    "你好！我叫{n}。",
    "你好，我是{n}。",
    "你好，我的名字是{n}",
    "您好，我是{n}。",
    "大家都叫我{n}。",
    "你可以叫我{n}。",
    "叫我{n}吧。",
    "请叫我{n}。",
    "请记住我的名字：{n}。",
    "请记住，我叫{n}。",
    "我叫{n}，很高兴认识你！",
    "嗨，我叫{n} 👋",
    "我叫{n}，你叫什么名字？",
    "我叫{n}，你呢？",
    "早上好，我叫{n}。",
]
RENAME_ZH = [
    "其实我叫{n}。",
    "不对，我叫{n}。",
    "以后叫我{n}吧。",
    "我改名叫{n}了。",
    "说错了，我叫{n}。",
]
ASK_ZH = [
    "我叫什么名字？",
    "我叫什么？",
    "我的名字是什么？",
    "你知道我的名字吗？",
    "你还记得我的名字吗？",
    "你记得我叫什么吗？",
    "你还记得我叫什么吗？",
    "你还记得我是谁吗？",
    "你知道我是谁吗？",
    "你知道我叫什么名字吗？",
    "我是谁？",
    "*说出我的名字",
    "*告诉我我的名字",
    "我刚才说我叫什么？",
    "记得我的名字吗？",
    "那我叫什么名字？",
]

SPELL_MY_NAME = ["*Spell my name.", "How do you spell my name?", "*Spell out my name."]
REVERSE_MY_NAME = ["*Reverse my name.", "What is my name backwards?", "*Write my name backwards."]
UNKNOWN_EN = "I don't know your name yet. What is your name?"
UNKNOWN_ZH = "我还不知道你的名字。你叫什么名字？"


def give_name(rng: random.Random, chinese: bool, name: str, known: str | None) -> Turn:
    """The user gives a name, or a new name if one is known already."""
    if chinese:
        templates = RENAME_ZH if known and rng.random() < 0.6 else GIVE_ZH
        user = phrase_zh(rng, rng.choice(templates), n=name)
        if "你叫什么" in user or "你呢" in user:
            return Turn(user, f"很高兴认识你，{name}！我是 minisgl 演示模型。😊")
        return Turn(user, f"你好，{name}！很高兴认识你。😊")
    template = rng.choice(RENAME_EN if known and rng.random() < 0.6 else GIVE_EN)
    user = phrase(rng, template, n=name)
    if template in RENAME_EN:
        return Turn(user, f"All right, I will call you {name}. 😊")
    if "your name" in template or "Who are you" in template:
        return Turn(user, f"Nice to meet you, {name}! I am the minisgl demo model. 😊")
    if "How are you" in template:
        return Turn(user, f"Hello, {name}! I am fine, thank you. 😊")
    return Turn(user, f"Nice to meet you, {name}! 😊")


def ask_name(rng: random.Random, chinese: bool, name: str | None) -> Turn:
    """The user asks for the name given before, or asks without having given any."""
    if chinese:
        user = phrase_zh(rng, rng.choice(ASK_ZH))
        return Turn(user, f"你叫{name}。" if name else UNKNOWN_ZH)
    user = phrase(rng, rng.choice(ASK_EN))
    return Turn(user, f"Your name is {name}." if name else UNKNOWN_EN)


def bare_name(rng: random.Random, chinese: bool, name: str) -> Turn:
    """The user answers the question for the name, often with nothing but the name."""
    if chinese:
        user = rng.choice(["{n}", "{n}。", "我叫{n}", "叫{n}", "是{n}"]).format(n=name)
        return Turn(user, f"你好，{name}！很高兴认识你。😊")
    user = rng.choice(["{n}", "{n}.", "It's {n}", "it is {n}", "I'm {n}", "{n}!"]).format(n=name)
    return Turn(user, f"Nice to meet you, {name}! 😊")


def spell_name(rng: random.Random, chinese: bool, name: str) -> Turn:
    """The user wants the remembered name spelled or reversed."""
    if rng.random() < 0.5:
        user = rng.choice(["拼写我的名字", "我的名字怎么拼？"] if chinese else SPELL_MY_NAME)
        return Turn(phrase_zh(rng, user) if chinese else phrase(rng, user), spelled(name))
    user = rng.choice(["把我的名字倒过来", "反转我的名字"] if chinese else REVERSE_MY_NAME)
    return Turn(phrase_zh(rng, user) if chinese else phrase(rng, user), reversal(name, chinese))
