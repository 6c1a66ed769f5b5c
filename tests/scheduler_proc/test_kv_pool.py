"""The pool's memory on the host, touched before steps need it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minisgl.scheduler_proc.attention import kv_pool
from minisgl.scheduler_proc.attention.kv_pool import KVPool, KVShape

MIB = 2**20
SLOTS, PAGE_SIZE, LAYERS, USED = 64 * 1024, 16, 3, 1000


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> KVPool:
    """96 MiB."""
    monkeypatch.setattr(kv_pool, "AHEAD_BYTES", 24 * MIB)
    monkeypatch.setattr(kv_pool, "BYTES_AT_ONCE", 4 * MIB)
    return KVPool([KVShape(2, 64)] * LAYERS, SLOTS // PAGE_SIZE, PAGE_SIZE, torch.bfloat16, torch.device("cpu"))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def touch_all(pool: KVPool, used: int) -> int:
    """How many calls it took."""
    calls = 0
    while pool.touch_next(used):
        calls += 1
    return calls


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from Linux's /proc")
def test_memory_ahead_of_the_slots_in_use_is_touched_bit_by_bit(pool: KVPool) -> None:
    before = resident_bytes()
    # 24 MiB, 8 of each layer, 4 at a time.
    assert touch_all(pool, 0) == LAYERS * 2
    assert 20 * MIB < resident_bytes() - before < 40 * MIB
    assert touch_all(pool, 0) == 0
    assert touch_all(pool, USED) == LAYERS
    assert touch_all(pool, SLOTS - 1) == LAYERS * 6 and touch_all(pool, SLOTS) == 0


def test_busy_steps_find_memory_touched_though_nobody_is_idle(pool: KVPool) -> None:
    """24 MiB of all layers ahead at first; steps of 64 slots, 96 KiB, then never use what is untouched."""
    touch_all(pool, 0)
    steps = 0
    for used in range(0, SLOTS, 64):
        before = list(pool._touched)
        pool.stay_ahead(used)
        assert min(pool._touched) >= min(used + 64, SLOTS)
        grown = [now - then for now, then in zip(pool._touched, before, strict=True) if now > then]
        assert len(grown) <= 1 and sum(grown) * 512 <= kv_pool.BYTES_BETWEEN_STEPS
        steps += bool(grown)
    assert steps < SLOTS / 64 / 10, "most steps need not wait for it"


def test_slots_in_use_are_left_alone(pool: KVPool) -> None:
    for layer in pool.layers:
        layer[:USED] = 1.0
    touch_all(pool, USED // 2)
    for _ in range(100):
        pool.stay_ahead(USED + 12 * MIB // 512)
    for layer in pool.layers:
        assert (layer[:USED] == 1.0).all() and not layer[USED:].any()
