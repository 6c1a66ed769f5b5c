"""Log lines of all processes: one format, to standard error, each line naming its process."""

from __future__ import annotations

import logging
import sys


class _StderrHandler(logging.Handler):
    """Writes to what sys.stderr is at the moment: progress bars replace it while they are on the screen."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:  # a log line must not end what it tells of
            self.handleError(record)


def setup_logging(process: str, level: str = "info") -> None:
    """Send this process's log to standard error as `[12:30:01.042 scheduler-0] text`."""
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter(f"[%(asctime)s.%(msecs)03d {process}] %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("minisgl").setLevel(level.upper())
