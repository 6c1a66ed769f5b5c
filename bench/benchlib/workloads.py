"""What is asked: sessions of one or more turns with prompts of exact token lengths, all from one seed.

Prompts are text, because text is what users send and tokenizing it is part of the work. Their lengths are exact in the
model's own tokenizer. No two prompts share a beginning unless the workload says so.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_WORDS = (
    "river stone cloud garden winter letter window market silver engine bridge forest candle harbor mirror planet "
    "orange pepper blanket ticket camera doctor summer valley pocket button carpet guitar hammer island jacket "
    "kitchen ladder magnet needle ocean pencil quarter rabbit saddle tunnel umbrella violin wagon yellow zebra anchor "
    "basket circle dragon eagle feather giant helmet iron jungle kettle lemon meadow north olive paper quiet rocket "
    "shadow temple under velvet water young about before carry decide every follow gather happen inside journey know "
    "listen morning never often perhaps question remember several together usually village without yesterday because"
)


class Lengths:
    """A distribution of token counts: `128`, `uniform:LOW:HIGH` or `lognormal:MEDIAN:SIGMA` (capped at 8 medians)."""

    def __init__(self, spec: str) -> None:
        self.spec = spec
        kind, *numbers = spec.split(":")
        try:
            if kind.isdigit() and not numbers:
                self._low = self._high = int(kind)
            elif kind == "uniform" and len(numbers) == 2:
                self._low, self._high = (int(number) for number in numbers)
            elif kind == "lognormal" and len(numbers) == 2:
                self._median, self._sigma = float(numbers[0]), float(numbers[1])
                self._low, self._high = 1, math.ceil(8 * self._median)
            else:
                raise ValueError
            if not 1 <= self._low <= self._high:
                raise ValueError
        except ValueError:
            raise ValueError(
                f"lengths are N, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA with tokens of at least 1, got {spec!r}"
            ) from None
        self._lognormal = kind == "lognormal"

    @property
    def longest(self) -> int:
        return self._high

    def draw(self, rng: random.Random) -> int:
        if not self._lognormal:
            return rng.randint(self._low, self._high)
        return min(max(1, round(self._median * math.exp(rng.gauss(0, self._sigma)))), self._high)


@dataclass(frozen=True)
class Turn:
    """One request of a session: its text follows everything said before in the session."""

    text: str
    max_new_tokens: int


@dataclass(frozen=True)
class Session:
    """Turns that depend on each other; turn k's prompt is all earlier texts and answers, then its own text."""

    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Workload:
    """A named recipe for sessions.

    kind `random` makes independent prompts; `shared-prefix` gives each of `groups` groups of requests the same first
    `prefix` tokens; `multi-turn` makes conversations of `turns` turns that keep their context.
    """

    kind: str
    input_lengths: Lengths
    output_lengths: Lengths
    prefix: int = 256
    groups: int = 4
    turns: int = 3

    @property
    def name(self) -> str:
        sizes = f"{self.input_lengths.spec} in, {self.output_lengths.spec} out"
        if self.kind == "shared-prefix":
            return f"shared prefix {self.prefix} ({self.groups} groups) + {sizes}"
        return f"{self.turns} turns of {sizes}" if self.kind == "multi-turn" else sizes

    @property
    def longest(self) -> int:
        """The most tokens of context one request can need."""
        turn = self.input_lengths.longest + self.output_lengths.longest
        if self.kind == "multi-turn":
            return turn * self.turns
        return turn + (self.prefix if self.kind == "shared-prefix" else 0)

    def sessions(self, count: int, tokenizer: Tokenizer, seed: int) -> list[Session]:
        """`count` sessions; the same arguments give the same sessions."""
        rng = random.Random(f"{seed} {self.kind} {self.name}")
        make = PromptMaker(tokenizer, rng).make
        prefixes = [make(self.prefix) for _ in range(self.groups)] if self.kind == "shared-prefix" else [""]
        turns_each = self.turns if self.kind == "multi-turn" else 1
        sessions: list[Session] = []
        for index in range(count):
            turns: list[Turn] = []
            for turn in range(turns_each):
                text = make(self.input_lengths.draw(rng))
                # Later turns and prefixed prompts continue a text, so they start with a space of their own.
                start = prefixes[index % len(prefixes)] if turn == 0 else ""
                joint = " " if start or turn else ""
                turns.append(Turn(start + joint + text, self.output_lengths.draw(rng)))
            sessions.append(Session(tuple(turns)))
        return sessions


class PromptMaker:
    """Texts of random words that are exactly n tokens long in one tokenizer (special tokens it adds included)."""

    def __init__(self, tokenizer: Tokenizer, rng: random.Random) -> None:
        self._tokenizer = tokenizer
        self._rng = rng
        self._words = _WORDS.split()

    def make(self, tokens: int) -> str:
        """A text of exactly `tokens` tokens; raises ValueError when the tokenizer cannot give one."""
        for _ in range(20):
            text = self._text_of_at_least(tokens)
            for cut in self._cuts(text, tokens):
                if self._count(cut) == tokens:
                    return cut
        raise ValueError(f"no text of exactly {tokens} tokens was found with this tokenizer; choose another length")

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text).ids)

    def _text_of_at_least(self, tokens: int) -> str:
        words: list[str] = []
        while True:
            words.extend(self._rng.choice(self._words) for _ in range(max(4, tokens // 2)))
            text = " ".join(words)
            if self._count(text) >= tokens:
                return text

    def _cuts(self, text: str, tokens: int) -> Iterator[str]:
        """Beginnings of the text near the wanted length: cut where the tokenizer itself ends a token."""
        ends = [end for _, end in self._tokenizer.encode(text).offsets]
        for index in range(tokens - 1, max(tokens - 4, -1), -1):
            yield text[: ends[index]]
        for index in range(tokens, min(tokens + 4, len(ends))):
            yield text[: ends[index]]


def load_tokenizer(model_dir: Path) -> Tokenizer:
    """The fast tokenizer in a model directory; raises FileNotFoundError with a sentence when there is none."""
    from tokenizers import Tokenizer

    path = model_dir / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{model_dir} has no tokenizer.json, which is needed to make prompts of exact lengths")
    return Tokenizer.from_file(str(path))


def poisson_arrivals(count: int, rate: float, seed: int) -> list[float]:
    """`count` arrival times in seconds from 0, with exponential gaps of mean 1 / rate."""
    if rate <= 0:
        raise ValueError(f"a request rate must be above 0, got {rate}")
    rng = random.Random(f"{seed} arrivals {rate}")
    now = 0.0
    arrivals = []
    for _ in range(count):
        now += rng.expovariate(rate)
        arrivals.append(now)
    return arrivals
