"""Starting another program of this package, and being one that does not outlive who started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path


def package_environment() -> dict[str, str]:
    """The environment in which `python -m minisgl...` finds this very package, installed or in a checkout."""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    # Safe path: a working directory of minisgl/ itself would hide the standard library's http.
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def die_with_parent() -> None:
    """Have the system kill this process when the thread that started it ends. Linux only; elsewhere nothing is done."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
