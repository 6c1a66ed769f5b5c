"""Decides which cases are kept out of the training text, and stable choices in general.

A case (two operands, a word, a name, ...) is held out when a hash of its content says so. Nothing
is stored: the training generator and the evaluation ask the same function.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

HELD_OUT_ONE_IN = 16


def stable_hash(*parts: object) -> int:
    """Return a 32-bit hash that is the same in every process and on every machine."""
    value = zlib.crc32("\x1f".join(str(part) for part in parts).encode("utf-8"))
    # CRC-32 is linear, so neighbouring inputs differ in few bits; the multiply mixes them.
    value = (value ^ (value >> 15)) * 0x2C1B3C6D & 0xFFFFFFFF
    return value ^ (value >> 13)


def is_held_out(kind: str, *parts: object) -> bool:
    """Return whether this case of a task may only be used for evaluation."""
    return stable_hash("held-out", kind, *parts) % HELD_OUT_ONE_IN == 0


def favourite(rng: random.Random, options: Sequence[T], key: str, share: float = 0.8) -> T:
    """Choose an option: mostly the one that ``key`` determines, sometimes any other.

    Texts that always follow one fixed choice would make a dull model; texts that choose evenly
    would leave the model undecided at every branch, so that rounding could change its greedy
    answer. A clear favourite for each key gives both variety and decided greedy answers.
    """
    if rng.random() < share:
        return options[stable_hash("favourite", key) % len(options)]
    return rng.choice(options)
