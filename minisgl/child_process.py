"""Starting another program of this package."""

from __future__ import annotations

import os
from pathlib import Path


def package_environment() -> dict[str, str]:
    """The environment in which `python -m minisgl...` finds this very package, installed or in a checkout."""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    # Safe path: a working directory of minisgl/ itself would hide the standard library's http.
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
