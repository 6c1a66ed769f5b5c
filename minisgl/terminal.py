"""Answers on standard output, log lines on standard error, and both on one screen without garbling each other."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import termios
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

_DIM, _RESET = "\x1b[2m", "\x1b[0m"
_TAB = "    "
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


class Terminal:
    """Where the chat client writes. On a screen, log lines appear above the text that is still growing.

    The growing ("live") text is the answer being streamed, or the line being typed: a log line erases it, takes its
    place, and the live text is written again underneath. When it outgrows the screen its upper lines become final.
    """

    def __init__(self) -> None:
        self._on_screen = sys.stdout.isatty() and sys.stderr.isatty()
        self._lock = threading.Lock()
        self._answer = ""
        self._live: Callable[[], str] | None = None

    def answer(self, text: str) -> None:
        """Add to the streamed answer."""
        with self._lock:
            if self._on_screen:
                text = _printable(text)
                self._live = self._current_answer
                self._answer = _last_rows(self._answer + text)
            sys.stdout.write(text)
            sys.stdout.flush()

    def end_answer(self) -> None:
        """The answer is complete: what follows starts on a new line."""
        with self._lock:
            self._answer, self._live = "", None
            sys.stdout.write("\n")
            sys.stdout.flush()

    def log(self, lines: Sequence[str]) -> None:
        """Show log lines, dimmed on a screen."""
        with self._lock:
            live = self._live() if self._live else ""
            shown = [f"{_DIM}{_printable(line)}{_RESET}" if sys.stderr.isatty() else line for line in lines]
            text = "\n".join(shown) + "\n"
            if live:
                up = _rows(live) - 1
                erase = "\r" + (f"\x1b[{up}A" if up else "") + "\x1b[J"
                sys.stdout.write(erase + text + live)
                sys.stdout.flush()
            else:
                sys.stderr.write(text)
                sys.stderr.flush()

    @contextlib.contextmanager
    def no_echo(self) -> Iterator[None]:
        """Keep what the user types ahead out of the answer; it appears at the next prompt."""
        if not (self._on_screen and sys.stdin.isatty()):
            yield
            return
        before = termios.tcgetattr(sys.stdin)
        silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
        termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
        try:
            yield
        finally:
            termios.tcsetattr(sys.stdin, termios.TCSANOW, before)

    def ask(self, prompt: str) -> str:
        """Let the user type a line; raises EOFError and KeyboardInterrupt as `input` does."""
        if not (self._on_screen and sys.stdin.isatty()):
            line = sys.stdin.readline()
            if not line:
                raise EOFError
            return line.rstrip("\n")
        typed = _typed_text()
        with self._lock:
            self._live = lambda: prompt + typed()
        try:
            return input(prompt)
        finally:
            with self._lock:
                self._live = None

    def _current_answer(self) -> str:
        return self._answer


def _typed_text() -> Callable[[], str]:
    """A function that tells what stands in the input line."""
    try:
        import readline
    except ImportError:
        return str
    return readline.get_line_buffer


def _printable(text: str) -> str:
    """The text without control characters, with which a model (or a log line) could drive the terminal."""
    text = text.replace("\t", _TAB)
    return text if text.isprintable() else _CONTROL.sub("\ufffd", text)


@lru_cache(maxsize=4096)
def _width(char: str) -> int:
    from rich.cells import cell_len

    return cell_len(char)


def _screen_size() -> os.terminal_size:
    return shutil.get_terminal_size()


def _row_starts(text: str) -> list[int]:
    """The index at which each screen row of the text begins, as a terminal wraps it."""
    columns = _screen_size().columns
    starts, used = [0], 0
    for index, char in enumerate(text):
        if char == "\n":
            starts.append(index + 1)
            used = 0
            continue
        width = 1 if char < "\x7f" else _width(char)
        used += width
        if used > columns:
            starts.append(index)
            used = width
    return starts


def _rows(text: str) -> int:
    return len(_row_starts(text))


def _last_rows(text: str) -> str:
    """As much of the text's end as can be erased again: rows that scrolled out of the screen are final."""
    limit = max(_screen_size().lines - 1, 1)
    if len(text) <= limit and "\n" not in text:
        return text
    starts = _row_starts(text)
    return text[starts[-limit] :] if len(starts) > limit else text
