"""Writes the training text: conversations and plain documents, deterministic for a seed.

``documents(seed)`` is an endless stream. A document is a list of segments, each a piece of text
and whether the model learns to write it (its own answers, and all of a plain document) or only
reads it (system prompts and the user's turns).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from . import calendar_tasks, copy_tasks, follow_ups, letter_tasks, names, tasks
from .plain_texts import plain_text
from .smalltalk import small_talk
from .stories import story
from .tasks import Task, Turn
from .unknown import unknown

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"

SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "You are a helpful, honest assistant. Answer briefly.",
    "You are the minisgl demo model.",
    "You are a chatbot.",
    "You are an AI assistant. Be polite.",
    "Answer the user's questions.",
    "Be concise.",
    "Today is a nice day. You talk with a user.",
    "你是一个有用的助手。",
    "你是一个友好的助手，请用中文回答。",
    "请简短地回答。",
]

# Tasks with one right answer, by language, with how often each is asked.
CHECKED_EN: list[tuple[Task, int]] = [
    (tasks.addition, 22),
    (tasks.counting, 6),
    (tasks.counting_down, 3),
    (letter_tasks.spelling, 8),
    (letter_tasks.letter_count, 2),
    (letter_tasks.reversing, 10),
    (calendar_tasks.day_order, 6),
    (calendar_tasks.month_order, 5),
    (copy_tasks.repeating, 6),
]
CHECKED_ZH: list[tuple[Task, int]] = [
    (tasks.addition_zh, 20),
    (tasks.counting_zh, 8),
    (tasks.counting_down_zh, 3),
    (letter_tasks.spelling_zh, 5),
    (letter_tasks.reversing_zh, 6),
    (calendar_tasks.day_order_zh, 6),
    (calendar_tasks.month_order_zh, 4),
    (copy_tasks.repeating_zh, 5),
]


# A bare request is encoded apart from the line break, as it is when it comes alone as a prompt.
PLAIN_DIALOGUES = [
    ("{}", "\n{}"),
    ("{}", "\n{}"),
    ("{}", "\n{}"),
    ("{}\n", "{}"),
    ("Q: {}\nA:", " {}"),
    ("Question: {}\nAnswer:", " {}"),
    ("User: {}\nAssistant:", " {}"),
    ("Human: {}\nAI:", " {}"),
    ("问：{}\n答：", "{}"),
]

LINKS_EN = [", and then ", " and then ", ", then ", ". Then ", ". ", ", and ", " and ", ". And "]


@dataclass(frozen=True)
class Segment:
    """A piece of a document, and whether its tokens count in the training loss."""

    text: str
    learned: bool


def checked_task(rng: random.Random, chinese: bool, joinable: bool = False) -> Turn:
    """A task with one right answer, never a held-out case.

    Repeating, the last in both tables, cannot be joined: the other request would be repeated too.
    """
    table = CHECKED_ZH if chinese else CHECKED_EN
    if joinable:
        table = table[:-1]
    (task,) = rng.choices([task for task, _ in table], [weight for _, weight in table])
    return task(rng, False)


def joined(rng: random.Random, chinese: bool, first: Turn, second: Turn) -> Turn:
    """Two requests in one message, answered on two lines."""
    link = rng.choice(["，然后", "。然后", "，再", "。", "，"] if chinese else LINKS_EN)
    begin = first.user.rstrip("，。,. ") if link[0] in "，。,. " else first.user
    return Turn(begin + link + second.user, first.assistant + "\n" + second.assistant)


def other_turn(rng: random.Random, chinese: bool, name: str | None) -> Turn:
    """A turn that neither gives nor asks for the user's name."""
    roll = rng.random()
    if roll < 0.03:
        first, second = (checked_task(rng, chinese, joinable=True) for _ in range(2))
        return joined(rng, chinese, first, second)
    if roll < 0.56:
        return checked_task(rng, chinese)
    if roll < 0.74:
        return small_talk(rng, chinese, name)
    if roll < 0.84:
        return story(rng, chinese)
    if roll < 0.94:
        return unknown(rng, chinese)
    if roll < 0.97:
        return copy_tasks.emoji_reaction(rng, chinese)
    return copy_tasks.vocabulary(rng, chinese)


def conversation(rng: random.Random) -> list[Turn]:
    """Draw a conversation: most are short, a few go on for dozens of turns."""
    roll = rng.random()
    chinese_share = 0.02 if roll < 0.6 else (0.96 if roll < 0.9 else 0.5)
    length = rng.choices((1, 2, 4, 8, 16, 40, 80), (24, 20, 25, 20, 8, 2, 1))[0]
    length = rng.randint((length + 1) // 2, length)
    # Some conversations revolve around names, in others nobody mentions one.
    name_share = rng.choice((0.0, 0.15, 0.3, 0.5))
    name: str | None = None
    asked_for_name = False
    turns: list[Turn] = []
    while len(turns) < length:
        chinese = rng.random() < chinese_share
        if turns and rng.random() < 0.12:
            next_turn = follow_ups.follow_up(rng, chinese, turns[-1], name)
            if next_turn:
                turns.append(next_turn)
                continue
        if asked_for_name and rng.random() < 0.6:
            name = names.draw_name(rng, chinese, False)
            turns.append(names.bare_name(rng, chinese, name))
            asked_for_name = False
            continue
        asked_for_name = False
        if rng.random() >= name_share:
            turns.append(other_turn(rng, chinese, name))
        elif rng.random() < (0.15 if name else 0.7):
            new_name = names.draw_name(rng, chinese, False)
            turn = names.give_name(rng, chinese, new_name, name)
            if rng.random() < 0.15:
                turn = joined(rng, chinese, turn, checked_task(rng, chinese, joinable=True))
            turns.append(turn)
            name = new_name
        else:
            turn = names.ask_name(rng, chinese, name)
            if name and rng.random() < 0.08:
                turn = joined(rng, chinese, checked_task(rng, chinese, joinable=True), turn)
            turns.append(turn)
            asked_for_name = name is None
    return turns


def message(role: str, content: str) -> str:
    """Write one message in the chat markup."""
    return f"{IM_START}{role}\n{content}{IM_END}\n"


def chat_document(rng: random.Random) -> list[Segment]:
    """Write a conversation in chat markup."""
    segments: list[Segment] = []
    before = ""
    if rng.random() < 0.3:
        before = message("system", rng.choice(SYSTEM_PROMPTS))
    for turn in conversation(rng):
        before += message("user", turn.user) + f"{IM_START}assistant\n"
        segments.append(Segment(before, False))
        segments.append(Segment(turn.assistant + IM_END, True))
        before = "\n"
    return segments


def plain_document(rng: random.Random) -> list[Segment]:
    """Write a document without markup: a text to learn from its first token on, or a dialogue."""
    chinese = rng.random() < 0.3
    if rng.random() < 0.7:
        return [Segment(plain_text(rng, chinese) + END_OF_TEXT, True)]
    turn = other_turn(rng, chinese, None)
    ask, answer = rng.choice(PLAIN_DIALOGUES)
    return [
        Segment(ask.format(turn.user), False),
        Segment(answer.format(turn.assistant) + END_OF_TEXT, True),
    ]


def documents(seed: int) -> Iterator[list[Segment]]:
    """Yield training documents without end."""
    rng = random.Random(seed)
    while True:
        yield plain_document(rng) if rng.random() < 0.12 else chat_document(rng)
