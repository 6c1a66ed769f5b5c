"""How long a GPU takes for a step: Qwen2.5-0.5B's shape on an H200, as bench/ENGINE_LOG.md has it (entry 1)."""

from __future__ import annotations

SLOWDOWN = "PACED_SLOWDOWN"
"""Environment variable: every step takes this many times as long as on the GPU."""

_DECODE_MS = ((16, 1.0), (32, 1.05), (64, 1.15), (128, 1.27), (256, 1.57))
_PREFILL_MS = ((16, 0.97), (256, 1.37), (512, 1.79), (1024, 3.02))
"""(rows or tokens, milliseconds) of each graph; a step takes the smallest that holds it."""
_PART_TOKENS, _PART_ROWS = _PREFILL_MS[-1][0], 64


def decode_ms(rows: int) -> float:
    return _graph_ms(_DECODE_MS, rows) if rows else 0.0


def prefill_ms(lengths: list[int]) -> float:
    """Prompts run in parts, each of at most so many tokens and rows."""
    total, tokens, rows = 0.0, 0, 0
    for length in lengths:
        while length:
            if tokens == _PART_TOKENS or rows == _PART_ROWS:
                total += _graph_ms(_PREFILL_MS, tokens)
                tokens = rows = 0
            taken = min(length, _PART_TOKENS - tokens)
            tokens, rows, length = tokens + taken, rows + 1, length - taken
    return total + (_graph_ms(_PREFILL_MS, tokens) if tokens else 0.0)


def _graph_ms(graphs: tuple[tuple[int, float], ...], size: int) -> float:
    return next((milliseconds for bound, milliseconds in graphs if size <= bound), graphs[-1][1])
