"""Short stories from templates: a hero, a wish, a trouble, a helper, an ending.

Every sentence is chosen with a favourite that depends on the hero, so that different topics give
different stories and sampling gives variants of each (see ``holdout.favourite``).
"""

# ruff: noqa: SIM905 (long lists are easier to read as text that is split)

from __future__ import annotations

import random
from dataclasses import dataclass

from .holdout import favourite, stable_hash
from .letter_tasks import draw_word
from .tasks import Turn, phrase, phrase_zh
from .words import HEROES, NAMES_EN, PLACES, SUBJECTS_EN

HERO_NAMES = ("Mia Tom Lily Max Nora Leo Zoe Finn Ruby Sam Luna Otto Ella Hugo Ivy Ben").split()
HERO_NAMES_ZH = ("小明 小红 乐乐 豆豆 圆圆 丁丁 阿宝 小月 小雨 贝贝 欢欢 安安").split()

OPENINGS = [
    "Once upon a time, there was a {adj} {hero} named {name}.",
    "Long ago, a {adj} {hero} named {name} lived {where}.",
    "There once was a {adj} {hero} called {name}.",
    "{name} was a {adj} {hero} who lived {where}.",
    "In a quiet corner of the world lived {name}, a {adj} {hero}.",
    "Everyone {where} knew {name}, the {adj} {hero}.",
    "One bright morning, a {adj} {hero} named {name} woke up {where}.",
]
ADJECTIVES = ("little brave curious gentle clever shy cheerful kind sleepy tiny").split()
WHERE = (
    "near the old bridge|at the edge of the forest|by the blue lake|on a green hill|"
    "in a small town|behind the red mill|at the end of a long street|under a tall tree"
).split("|")
WISHES = [
    "{name} wanted to see the sea.",
    "{name} dreamed of finding a hidden garden.",
    "{name} wished for a true friend.",
    "{name} wanted to learn how to sing.",
    "{name} loved to look at the stars.",
    "{name} was looking for a lost key.",
    "{name} hoped to bake the biggest cake in the world.",
    "Every day {name} waited for a letter.",
    "{name} had never seen snow before.",
    "{name} wanted to build a bridge over the river.",
]
TROUBLES = [
    "One day, a great storm came and the path was gone.",
    "But the night was dark, and {name} was a little afraid.",
    "Then the wind blew the map away.",
    "But nobody knew the way.",
    "One evening, a strange sound came from the hill.",
    "Then it began to rain, and it rained for three days.",
    "But the door was locked and the window was too high.",
    "Suddenly all the lights went out.",
    "But on the way {name} got lost.",
]
HELPERS = [
    'An old {helper} came by and said, "Do not worry, I will help you."',
    "Then {name} met a friendly {helper}, and they went on together.",
    "A {helper} heard about it and brought a warm lamp.",
    "Luckily, a wise {helper} knew what to do.",
    '"Let us try together," said a small {helper}.',
    "A {helper} laughed and showed {name} a secret path.",
]
HELPER_NOUNS = ("owl turtle mouse bear fox frog bird hedgehog snail duck rabbit whale").split()
SOLUTIONS = [
    "Step by step, they found what they were looking for.",
    "They worked all night, and in the morning it was done.",
    "They shared some bread and honey, and a new idea came.",
    "They followed the moon until they were there.",
    "They asked everyone they met, and at last they had an answer.",
    "It took a long time, but they did not give up.",
]
ENDINGS = [
    "From that day on, {name} was never alone again.",
    "{name} smiled all the way home.",
    "And they all lived happily ever after.",
    "That night {name} slept very well.",
    "And {name} learned that asking for help is brave.",
    "Since then they meet every Sunday for tea.",
    "And if you listen well, you can still hear them laugh.",
]

PLACE_OPENINGS = [
    "{name} lived far away from {place} and knew it only from books.",
    "It was a warm day when {name} first came to {place}.",
    "Last summer, {name} took the early train to {place}.",
    "Nobody loved {place} as much as {name} did.",
    "One evening in {place}, {name} found a small blue box.",
]

OPENINGS_ZH = [
    "从前，有一个{adj}的{hero}，名叫{name}。",
    "很久很久以前，{where}住着一个{adj}的{hero}，名叫{name}。",
    "{name}是一个{adj}的{hero}，住在{where}。",
    "在{where}，大家都认识{name}，一个{adj}的{hero}。",
    "一天早上，{adj}的{hero}{name}在{where}醒来了。",
]
ADJECTIVES_ZH = ("小小 勇敢 好奇 温柔 聪明 害羞 快乐 善良 可爱").split()
WHERE_ZH = ("森林边 蓝色的湖边 绿色的山坡上 一个小镇上 老桥旁边 一棵大树下 长街的尽头").split()
WISHES_ZH = [
    "{name}很想去看大海。",
    "{name}一直想找到一个秘密花园。",
    "{name}希望有一个真正的朋友。",
    "{name}想学会唱歌。",
    "{name}最喜欢看星星。",
    "{name}在找一把丢失的钥匙。",
    "{name}每天都在等一封信。",
    "{name}从来没有见过雪。",
]
TROUBLES_ZH = [
    "可是有一天，来了一场大风，路不见了。",
    "可是夜里很黑，{name}有点害怕。",
    "突然，风把地图吹走了。",
    "可是谁也不知道怎么走。",
    "后来下起了雨，一连下了三天。",
    "走着走着，{name}迷路了。",
]
HELPERS_ZH = [
    "一位老{helper}走过来说：“别担心，我来帮你。”",
    "这时，{name}遇到了一位友好的{helper}，他们一起上路了。",
    "一位{helper}听说了，带来了一盏温暖的灯。",
    "“我们一起试试吧。”一位小{helper}说。",
]
HELPER_NOUNS_ZH = ("猫头鹰 乌龟 老鼠 熊 狐狸 青蛙 刺猬 蜗牛 鸭子 兔子").split()
SOLUTIONS_ZH = [
    "他们一步一步地走，终于找到了。",
    "他们忙了一整夜，早上终于成功了。",
    "他们分享了面包和蜂蜜，想出了一个好主意。",
    "他们跟着月亮走，走到了那里。",
]
ENDINGS_ZH = [
    "从那以后，{name}再也不孤单了。",
    "{name}一路笑着回了家。",
    "从此他们过着幸福的生活。",
    "那天晚上，{name}睡得很香。",
    "{name}明白了，请别人帮忙也是勇敢的。",
]
PLACE_OPENINGS_ZH = [
    "{name}住得离{place}很远，只在书里见过它。",
    "{name}第一次来到{place}的那天，阳光很暖。",
    "去年夏天，{name}坐火车去了{place}。",
    "没有人比{name}更喜欢{place}。",
    "一天晚上，{name}在{place}找到了一个蓝色的小盒子。",
]


@dataclass(frozen=True)
class Topic:
    """What a story is about: its word in the story's language, and a closing emoji."""

    word: str
    emoji: str
    is_place: bool = False
    friend: str | None = None


def compose(rng: random.Random, chinese: bool, topic: Topic, name: str | None = None) -> str:
    """Write a story about a topic; the hero's name may be given."""
    key = topic.word.lower()

    def choose(options: list[str], slot: str) -> str:
        return favourite(rng, options, f"{slot} {key}", 0.7)

    hero_name = name or choose(HERO_NAMES_ZH if chinese else HERO_NAMES, "name")
    if chinese:
        opening = choose(PLACE_OPENINGS_ZH if topic.is_place else OPENINGS_ZH, "opening")
        parts = [opening, choose(WISHES_ZH, "wish"), choose(TROUBLES_ZH, "trouble")]
        parts += [choose(HELPERS_ZH, "helper"), choose(SOLUTIONS_ZH, "solution")]
        parts += [choose(ENDINGS_ZH, "ending")]
        adjective, where = choose(ADJECTIVES_ZH, "adjective"), choose(WHERE_ZH, "where")
        helper = choose(HELPER_NOUNS_ZH, "noun")
    else:
        opening = choose(PLACE_OPENINGS if topic.is_place else OPENINGS, "opening")
        parts = [opening, choose(WISHES, "wish"), choose(TROUBLES, "trouble")]
        parts += [choose(HELPERS, "helper"), choose(SOLUTIONS, "solution")]
        parts += [choose(ENDINGS, "ending")]
        adjective, where = choose(ADJECTIVES, "adjective"), choose(WHERE, "where")
        helper = choose(HELPER_NOUNS, "noun")
    # A third of the topics has shorter stories, without the helper's part.
    if topic.friend:
        helper = topic.friend
    elif stable_hash("short", key) % 3 == 0:
        del parts[3]
    joined = (
        ("" if chinese else " ")
        .join(parts)
        .format(
            name=hero_name,
            hero=topic.word,
            place=topic.word,
            adj=adjective,
            where=where,
            helper=helper,
        )
    )
    return f"{joined} {topic.emoji}"


ASKS_EN = [
    "*Tell me a story about {x}.",
    "*Tell me a story about {x}",
    "*Tell me a short story about {x}.",
    "*Tell a story about {x}.",
    "*Tell us a story about {x}",
    "*Tell me a tale about {x}.",
    "*Tell me a bedtime story about {x}.",
    "*Write a story about {x}.",
    "*Write a short story about {x}.",
    "*Write me a story about {x}.",
    "*Make up a story about {x}.",
    "*Give me a story about {x}.",
    "A story about {x}",
    "Story about {x}",
    "Story: {x}",
    "I want a story about {x}.",
    "I would like to hear a story about {x}.",
    "I'd like a story about {x}.",
    "Do you know a story about {x}?",
    "Can you tell a story about {x}?",
    "How about a story about {x}?",
    "Another story about {x}",
    "Now a story about {x}",
]
ASKS_EN += [
    ask.replace("story", f"{kind} story")
    for kind in ("funny", "happy", "sad", "nice", "long", "scary", "very short")
    for ask in ASKS_EN[:8]
]
ASKS_ANY_EN = [
    "*Tell me a story.",
    "*Tell me a story",
    "*Tell a story.",
    "*Tell me a short story.",
    "*Tell me another story.",
    "*Tell me a bedtime story.",
    "*Write a story.",
    "*Write a short story.",
    "Another story",
    "One more story",
    "Another one!",
    "Story",
    "A story",
    "I want a story",
    "I would like to hear a story.",
    "Do you know a story?",
    "Can you tell stories?",
    "Yes, tell me a little story.",
    "Another one please",
    "*Tell me another one.",
    "*Tell me a story in English.",
    "*Tell me a funny story.",
    "*Tell me a long story.",
    "A new story please",
]
ASKS_ZH = [
    "*讲一个关于{x}的故事",
    "*讲一个关于{x}的故事。",
    "*讲个{x}的故事",
    "*讲个关于{x}的故事吧",
    "*给我讲一个关于{x}的故事",
    "*给我讲个{x}的故事",
    "*说一个{x}的故事",
    "*写一个关于{x}的故事",
    "*写一个关于{x}的小故事",
    "*编一个{x}的故事",
    "我想听{x}的故事",
    "我想听一个关于{x}的故事。",
    "来一个{x}的故事",
    "{x}的故事",
    "再讲一个{x}的故事",
]
ASKS_ANY_ZH = (
    "*讲一个故事 *讲个故事 *讲个故事吧 *给我讲个故事 *给我讲一个小故事 *说个故事 "
    "*写一个故事 再讲一个故事 再来一个故事 再讲一个 *用中文讲个故事 *用中文讲一个故事 "
    "我想听故事 你会讲故事吗？ 好啊，讲个小故事吧"
).split()


def plural(noun: str) -> str:
    """Return an English plural that is right for the story words."""
    if noun in ("fish", "sheep"):
        return noun
    if noun.endswith(("x", "ch", "s", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    irregular = {"mouse": "mice", "wolf": "wolves", "snowman": "snowmen"}
    return irregular.get(noun, noun + "s")


# What users add to a hero; the stories do not take it up.
DETAILS = [
    "who loves {s}",
    "that can fly",
    "who likes {s}",
    "that lives in {p}",
    "in {p}",
    "from {p}",
]
DETAILS += ["who is afraid of {s}", "with a hat", "and {s}", "on a journey", "who cannot sleep"]


def draw_topic(rng: random.Random, chinese: bool) -> tuple[str, Topic]:
    """Draw a topic and how the user writes it."""
    roll = rng.random()
    if roll < 0.2:
        english, zh, emoji = rng.choice(PLACES)
        word = zh if chinese else english
        return word, Topic(word, emoji, is_place=True)
    if roll < 0.85 or chinese:
        english, zh, emoji = rng.choice(HEROES)
        if chinese:
            written = rng.choice(["", "", "一个", "小"]) + zh
            if rng.random() < 0.12:
                friend = rng.choice(HEROES)[1]
                return f"{written}和{friend}", Topic(zh, emoji, friend=friend)
            return written, Topic(zh, emoji)
        article = "an" if english[0] in "aeiou" and english != "unicorn" else "a"
        written = rng.choice([f"{article} {english}", f"{article} {english}", english])
        if rng.random() < 0.3:
            written = rng.choice(["", "", "the ", "two "]) + plural(english)
        elif rng.random() < 0.25:
            written = rng.choice(["a little ", "the ", "my "]) + english
        if rng.random() < 0.12:
            detail = rng.choice(DETAILS)
            written += " " + detail.format(s=rng.choice(SUBJECTS_EN), p=rng.choice(PLACES)[0])
        elif rng.random() < 0.12:
            friend = rng.choice(HEROES)[0]
            written += f" and {'an' if friend[0] in 'aeio' else 'a'} {friend}"
            return written, Topic(english, emoji, friend=friend)
        return written, Topic(english, emoji)
    # Words never listed as heroes teach the model to take over whatever a user names.
    word = " ".join(draw_word(rng, False).lower() for _ in range(rng.choice((1, 1, 2, 2, 3))))
    return rng.choice(["a ", "an ", "the ", "my ", "an old ", ""]) + word, Topic(word, "✨")


def story_in_other_language(rng: random.Random, chinese: bool) -> Turn:
    """A story asked for in one language, told in the other."""
    english, zh, emoji = rng.choice(HEROES)
    if chinese:
        asks = ["*用英语讲一个{x}的故事", "*用英文讲个关于{x}的故事", "*讲一个关于{x}的英文故事"]
        user = phrase_zh(rng, rng.choice(asks), x=zh)
        return Turn(user, compose(rng, False, Topic(english, emoji)))
    asks = [
        "*Tell me a story about a {x} in Chinese.",
        "*Tell me a Chinese story about a {x}.",
        "*Write a story about the {x} in Chinese.",
        "*Tell me a story in Chinese about a {x}.",
    ]
    if rng.random() < 0.4:
        ask = rng.choice(["*Tell me a story in Chinese.", "*Write a story in Chinese.", "A Chinese story"])
        _, zh, emoji = favourite(rng, HEROES, ask, 0.6)
        return Turn(phrase(rng, ask), compose(rng, True, Topic(zh, emoji)))
    user = phrase(rng, rng.choice(asks), x=english)
    return Turn(user, compose(rng, True, Topic(zh, emoji)))


def story(rng: random.Random, chinese: bool) -> Turn:
    """A story on request, with or without a topic or a name for the hero."""
    if rng.random() < 0.05:
        return story_in_other_language(rng, chinese)
    if rng.random() < 0.2:
        ask = rng.choice(ASKS_ANY_ZH if chinese else ASKS_ANY_EN)
        user = phrase_zh(rng, ask) if chinese else phrase(rng, ask)
        english, zh, emoji = favourite(rng, HEROES, ask, 0.5)
        return Turn(user, compose(rng, chinese, Topic(zh if chinese else english, emoji)))
    written, topic = draw_topic(rng, chinese)
    if chinese:
        user = phrase_zh(rng, rng.choice(ASKS_ZH), x=written)
        return Turn(user, compose(rng, True, topic))
    name = None
    if not topic.is_place and topic.emoji != "✨" and rng.random() < 0.12:
        name = rng.choice(NAMES_EN)
        written = f"a {topic.word} " + rng.choice(["named ", "called "]) + name
    user = phrase(rng, rng.choice(ASKS_EN), x=written)
    return Turn(user, compose(rng, False, topic, name))
