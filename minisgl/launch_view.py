"""What the user sees of a start: progress bars on a terminal, else one log line per stage; then the ready notice."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any, Protocol

from minisgl.config import ModelSpec

logger = logging.getLogger(__name__)

READY_LINE = "The server is fired up and ready to roll!"
"""The last line of a start; scripts wait for it."""

DOWNLOADING = "downloading"
"""The stage whose units are bytes."""


class LaunchView(Protocol):
    """Shows how far each worker's start is."""

    def progress(self, who: str, stage: str, done: int, total: int) -> None:
        """`who` has done `done` of `total` units of `stage` (total 0: unknown)."""

    def close(self) -> None:
        """The start is over; leave the terminal as it was."""


class LogView:
    """One log line whenever somebody enters a new stage."""

    def __init__(self) -> None:
        self._stages: dict[str, str] = {}

    def progress(self, who: str, stage: str, done: int, total: int) -> None:
        if self._stages.get(who) != stage:
            self._stages[who] = stage
            logger.info("%s: %s", who, stage)

    def close(self) -> None:
        self._stages.clear()


class TerminalView:
    """One line with a bar per worker, drawn on standard error while the start lasts."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TaskProgressColumn, TextColumn

        self._bars = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.fields[who]:14}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._stages: dict[str, str] = {}
        self._closed = False
        self._bars.start()

    def progress(self, who: str, stage: str, done: int, total: int) -> None:
        if self._closed:
            return
        if who not in self._tasks:
            self._tasks[who] = self._bars.add_task(stage, who=who, total=None)
        if self._stages.get(who) != stage:
            self._stages[who] = stage
            self._bars.reset(self._tasks[who])
        amount = f" ({done / 1e6:.0f} of {total / 1e6:.0f} MB)" if stage == DOWNLOADING else ""
        self._bars.update(self._tasks[who], description=stage + amount, completed=done, total=total or None)

    def close(self) -> None:
        self._closed = True
        self._bars.stop()


def open_view() -> LaunchView:
    return TerminalView() if sys.stderr.isatty() else LogView()


def ready_notice(model: ModelSpec, url: str, info: dict[str, Any], replicas: int, seconds: float) -> str:
    """The text printed when the server answers: what it serves, where, and a command to try it.

    Args:
        info: what a scheduler said of itself when it became ready.
        seconds: how long the start took.
    """
    device = info.get("device", "an unknown device")
    on = f"{device} in {info['dtype']}" if "dtype" in info else device
    if replicas > 1:
        on = f"{replicas} replicas, the first on {on}"
    question = '"messages": [{"role": "user", "content": "Hello!"}]' if _chats(model) else '"prompt": "Hello"'
    return (
        f"\nminisgl serves {model.name} on {on}: {url} (ready in {seconds:.1f} s)\n"
        f"\n  curl -N {url}/generate -H 'Content-Type: application/json' -d '{{{question}, \"stream\": true}}'\n"
        f"\n{READY_LINE}"
    )


def _chats(model: ModelSpec) -> bool:
    """Whether the model brings a chat template."""
    directory = Path(model.directory)
    tokenizer_config = directory / "tokenizer_config.json"
    return (directory / "chat_template.jinja").exists() or (
        tokenizer_config.exists() and '"chat_template"' in tokenizer_config.read_text(encoding="utf-8")
    )
