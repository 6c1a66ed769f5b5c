"""What the scripts show: progress and remarks on standard error, tables on standard output."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

_terminal = sys.stderr.isatty()
console = Console(stderr=True, highlight=False, width=None if _terminal else 160)
output = Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def progress_bar() -> Progress:
    """A progress display for steps longer than a few seconds; silent where standard error is no terminal."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not _terminal)


def say(text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)
