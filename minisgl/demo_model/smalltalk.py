"""Small talk turns, in English and Chinese."""

from __future__ import annotations

import random

from .holdout import favourite
from .smalltalk_en import SMALL_TALK_EN
from .smalltalk_zh import SMALL_TALK_ZH
from .tasks import Turn, phrase, phrase_zh

# Places of greeting, how are you, who are you and what can you do in both lists.
COMMON = (0, 5, 8, 10)
BYE_EN, BYE_ZH = "Goodbye! 👋 See you soon.", "再见！👋 下次再聊。"


def small_talk(rng: random.Random, chinese: bool, name: str | None) -> Turn:
    """One small-talk turn; goodbyes use the name where it is known."""
    asks, answers = rng.choice(SMALL_TALK_ZH if chinese else SMALL_TALK_EN)
    if rng.random() < 0.25:
        # Real conversations open with these far more often than with the others.
        asks, answers = (SMALL_TALK_ZH if chinese else SMALL_TALK_EN)[rng.choice(COMMON)]
    ask = rng.choice(asks)
    answer = favourite(rng, answers, ask, 0.9)
    if name and answer == BYE_EN:
        answer = f"Goodbye, {name}! 👋 See you soon."
    if name and answer == BYE_ZH:
        answer = f"再见，{name}！👋 下次再聊。"
    user = phrase_zh(rng, ask) if chinese else phrase(rng, ask)
    return Turn(user if user.strip() else ask, answer)
