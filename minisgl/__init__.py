"""minisgl: a small, readable, fast LLM serving stack.

A request goes once round a ring of processes: http -> tokenizer_proc -> scheduler_proc -> detokenizer_proc -> http.
Read `main.py` of each in that order; `messages.py` is everything they say to each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minisgl.engine_api import Engine

__version__ = "0.1.0"
__all__ = ["Engine", "__version__"]


def __getattr__(name: str) -> Any:
    # Engine pulls in torch, which http, tokenizer, detokenizer and launch.py must never import.
    if name == "Engine":
        from minisgl.engine_api import Engine

        return Engine
    raise AttributeError(f"module 'minisgl' has no attribute {name!r}")
