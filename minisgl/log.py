"""Log lines of all processes: one format, to standard error, each line naming its process."""

from __future__ import annotations

import logging
import sys


def setup_logging(process: str, level: str = "info") -> None:
    """Send this process's log to standard error as `[12:30:01.042 scheduler-0] text`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"[%(asctime)s.%(msecs)03d {process}] %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("minisgl").setLevel(level.upper())
