"""Importing xgrammar in a third of a second: what it imports for parts that are not used here takes several."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


def import_xgrammar_alone() -> Any:
    """xgrammar, imported without torch and transformers unless they are imported already.

    Only for a process whose other threads import neither meanwhile: they would find a module without contents.
    """
    if "xgrammar" in sys.modules:
        return sys.modules["xgrammar"]
    absent = [name for name in ("torch", "transformers") if name not in sys.modules]
    try:
        # apache-tvm-ffi does without torch when there is none.
        sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]
        import tvm_ffi  # noqa: F401

        sys.modules.update((name, _StandIn(name)) for name in absent)
        import xgrammar
    except Exception:  # another version of it may look closer
        for name in [name for name in sys.modules if name.split(".")[0] in ("xgrammar", "tvm_ffi", *absent)]:
            del sys.modules[name]
        import xgrammar
    else:
        for name in absent:
            del sys.modules[name]
    return xgrammar


class _StandIn(ModuleType):
    """A module of which everything can be had and nothing used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing


class _Nothing:
    def __init__(self, *arguments: object, **options: object) -> None:
        pass
