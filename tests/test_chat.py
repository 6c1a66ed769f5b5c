"""The terminal client: against a small real server, in a real terminal, and with the whole stack behind it."""

from __future__ import annotations

import io
import os
import pty
import random
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from fake_hubs import closed_port_url
from fake_server import FakeServer, running

from minisgl.terminal import Terminal

MINISGL = [sys.executable, "-m", "minisgl.chat"]
ANSWER = "Hello, 世界 👋"


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with running(FakeServer()) as server:
        yield server


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the history file out of the real home directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def minisgl(*arguments: str, stdin: str = "", timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MINISGL, *arguments], input=stdin, capture_output=True, text=True, timeout=timeout)


# ---- chat through a pipe --------------------------------------------------------------------------------------------


def test_every_line_of_a_pipe_gets_an_answer(fake: FakeServer) -> None:
    done = minisgl("chat", "--url", fake.url, stdin="one\n\ntwo\n")

    assert done.returncode == 0
    assert done.stdout == f"{ANSWER}\n{ANSWER}\n"
    assert re.fullmatch(r"(4 tokens \(stop\), \d+\.\d tokens/s, TTFB \d+\.\d ms\n){2}", done.stderr)
    assert [body["messages"] for body in fake.bodies] == [
        [{"role": "user", "content": "one"}],
        [{"role": "user", "content": "two"}],
    ]


def test_a_conversation_is_remembered_until_reset(fake: FakeServer) -> None:
    arguments = ["--multi-turn", "--system", "Be kind.", "--temperature", "0", "--max-new-tokens", "9", "--seed", "3"]
    done = minisgl("chat", "--url", fake.url, *arguments, stdin="one\ntwo\n/reset\nthree\n/exit\nfour\n")

    assert done.returncode == 0
    system = {"role": "system", "content": "Be kind."}
    one = [{"role": "user", "content": "one"}, {"role": "assistant", "content": ANSWER}]
    assert [body["messages"] for body in fake.bodies] == [
        [system, one[0]],
        [system, *one, {"role": "user", "content": "two"}],
        [system, {"role": "user", "content": "three"}],
    ]
    sampling = {"temperature": 0.0, "max_new_tokens": 9, "seed": 3, "stream": True}
    assert all(body.items() >= sampling.items() for body in fake.bodies)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"error": "worker scheduler-0 was lost"}, "worker scheduler-0 was lost"),
        ({"refusal": (400, {"error": {"message": "lower max_new_tokens"}})}, "lower max_new_tokens"),
        ({"refusal": (502, "plain text")}, "answered 502"),
        ({"hang_up": True}, "in the middle of the answer"),
    ],
)
@pytest.mark.parametrize("command", ["chat", "generate"])
def test_a_failed_answer_is_told_and_fails_the_command(fake: FakeServer, fault: dict, words: str, command: str) -> None:
    for name, value in fault.items():
        setattr(fake, name, value)
    done = minisgl(*{"chat": ["chat"], "generate": ["generate", "Hello"]}[command], "--url", fake.url, stdin="hello\n")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 1


def test_a_failed_answer_leaves_no_trace_in_the_conversation(fake: FakeServer) -> None:
    fake.refusal = (503, {"error": {"message": "try again"}})
    process = subprocess.Popen(
        [*MINISGL, "chat", "--multi-turn", "--url", fake.url],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdin is not None and process.stderr is not None
        process.stdin.write("one\n")
        process.stdin.flush()
        assert "try again" in process.stderr.readline()
        fake.refusal = None
        process.stdin.write("two\n")
        process.stdin.close()
        process.wait(timeout=60)
    assert fake.bodies[-1]["messages"] == [{"role": "user", "content": "two"}]


# ---- generate -------------------------------------------------------------------------------------------------------


def test_generate_prints_the_text_and_a_summary(fake: FakeServer) -> None:
    done = minisgl("generate", "Hello", "--max-new-tokens", "32", "--url", fake.url)
    assert (done.returncode, done.stdout) == (0, f"{ANSWER}\n")
    assert done.stderr.startswith("4 tokens (stop), ")
    assert fake.bodies == [{"prompt": "Hello", "max_new_tokens": 32, "temperature": 0.0, "stream": True}]


def test_nobody_listens() -> None:
    url = closed_port_url()
    done = minisgl("generate", "Hello", "--url", url)
    assert done.returncode == 1
    refused = r"minisgl: no answer from \S+ \(\[Errno \d+\] Connection refused\): is the server running\?\n"
    assert re.fullmatch(refused, done.stderr)


def test_a_reader_that_leaves_ends_it_quietly(fake: FakeServer) -> None:
    fake.deltas = ["x" * 1000] * 1000
    command = f"{' '.join(MINISGL)} generate Hello --url {fake.url} | head -c 5"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("xxxxx", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required"),
        (["generate"], "required: prompt"),
        (["generate", "x", "--temprature", "1"], "--temprature"),
        (["chat", "--url", "http://127.0.0.1:1", "--model", "demo"], "leave out one or the other"),
        (["chat", "--dp-size", "0"], "--dp-size must be at least 1, got 0"),
        (["serve", "--port", "70000"], "--port must be between 0 and 65535"),
    ],
)
def test_a_wrong_command_line_is_refused_with_a_sentence(arguments: list[str], words: str) -> None:
    done = minisgl(*arguments)
    assert done.returncode == 2
    assert words in done.stderr.splitlines()[-1]


def test_a_url_needs_no_scheme_and_must_be_one(fake: FakeServer) -> None:
    assert minisgl("generate", "x", "--url", fake.url.removeprefix("http://") + "/").returncode == 0
    assert "is not a URL" in minisgl("generate", "x", "--url", "ftp://somewhere").stderr


# ---- in a terminal --------------------------------------------------------------------------------------------------


class PseudoTerminal:
    """A program on a terminal of its own, 80 columns wide."""

    def __init__(self, *arguments: str) -> None:
        self.screen = ""
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.environ |= {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
            # Whoever runs the tests in the background has it ignored.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.execv(MINISGL[0], [*MINISGL, *arguments])

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait_for(self, text: str) -> None:
        """Until the text appears; what stood before it is forgotten."""
        assert self._appears(text, 60), f"no {text!r} in {self.screen!r}"

    def interrupt_until(self, text: str) -> None:
        """Type Ctrl-C until the text appears.

        Python's readline loses one that comes just before it waits, and needs a letter after one that takes the letter
        away which it was about to read; nobody types that fast.
        """
        for _ in range(30):
            self.type("\x03")
            if self._appears(text, 1):
                return
            self.type("x")
        raise AssertionError(f"no {text!r} in {self.screen!r}")

    def _appears(self, text: str, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while text not in self.screen:
            left = deadline - time.monotonic()
            if left < 0 or not select.select([self._fd], [], [], left)[0]:
                return False
            self.screen += os.read(self._fd, 65536).decode(errors="replace")
        self.screen = self.screen.partition(text)[2]
        return True

    def exit_status(self, timeout: float = 60) -> int:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if select.select([self._fd], [], [], 0.05)[0]:
                try:
                    os.read(self._fd, 65536)
                except OSError:
                    break
        os.close(self._fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_ctrl_c_stops_the_answer_and_not_the_session(fake: FakeServer, home: Path) -> None:
    fake.deltas, fake.pause = ["word "] * 10_000, 0.01
    terminal = PseudoTerminal("chat", "--multi-turn", "--url", fake.url)
    terminal.wait_for("fake-model at http://127.0.0.1")
    terminal.wait_for("> ")
    terminal.type("talk\r")
    terminal.wait_for("word word word")
    terminal.type("\x03")
    terminal.wait_for("stopped")
    assert fake.disconnected.wait(30)
    fake.deltas, fake.pause = ["short"], 0.0
    terminal.wait_for("> ")
    terminal.type("again\r")
    terminal.wait_for("short")
    terminal.wait_for("1 token (stop)")
    terminal.wait_for("> ")
    terminal.type("half a line")
    terminal.wait_for("half a line")
    terminal.interrupt_until("/exit leaves")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.exit_status() == 0

    talk, stopped, again = fake.bodies[-1]["messages"]
    assert (talk["content"], again["content"]) == ("talk", "again")
    assert stopped["role"] == "assistant" and stopped["content"].startswith("word word word")
    assert (home / ".minisgl_history").read_text() == "talk\nagain\n"


class Screen(io.StringIO):
    """A terminal of a few columns, with the control sequences that Terminal uses; scrolled lines are kept."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns = columns
        self.rows = [""]
        self.row = self.column = 0

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        for up, control, char in re.findall(r"\x1b\[(\d+)A|(\x1b\[[\dm]*[mJ])|([\s\S])", text):
            if up:
                self.row -= int(up)
                assert self.row >= 0
            elif control.endswith("J"):
                assert self.column == 0
                self.rows[self.row :] = [""]
            elif char == "\r":
                self.column = 0
            elif char == "\n":
                self._next_row()
            elif char:
                width = 2 if ord(char) > 0x2E80 else 1
                if self.column + width > self.columns:
                    self._next_row()
                self.rows[self.row] += char
                self.column += width
        return len(text)

    def _next_row(self) -> None:
        self.row += 1
        self.column = 0
        if self.row == len(self.rows):
            self.rows.append("")


def wrapped(text: str, columns: int) -> list[str]:
    screen = Screen(columns)
    screen.write(text)
    return screen.rows


@pytest.mark.parametrize("seed", range(20))
def test_log_lines_never_cut_an_answer(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(seed)
    columns = chance.choice([7, 20])
    screen = Screen(columns)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", "1000")
    terminal = Terminal()
    answer, logged = "", []
    for number in range(60):
        if chance.random() < 0.5:
            piece = chance.choice(["a", "bc ", "世界", "\n", "x" * columns, "longer words "])
            answer += piece
            terminal.answer(piece)
        else:
            logged.append(f"log line {number}")
            terminal.log([logged[-1]])
    terminal.end_answer()
    assert screen.rows == [row for line in logged for row in wrapped(line, columns)] + wrapped(answer, columns) + [""]


def test_an_answer_longer_than_the_screen_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(20)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("LINES", "5")
    terminal = Terminal()
    words = [f"w{number}" for number in range(300)]
    for number, word in enumerate(words):
        terminal.answer(f"{word} ")
        if number % 7 == 0:
            terminal.log([f"log{number}"])
    terminal.end_answer()
    shown = [word for row in screen.rows if not row.startswith("log") for word in row.split()]
    assert "".join(shown) == "".join(words)
    assert [row for row in screen.rows if row.startswith("log")] == [f"log{number}" for number in range(0, 300, 7)]


def test_an_answer_cannot_drive_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(80)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    terminal = Terminal()
    terminal.answer("a\x1b]0;title\x07b\x9b2Jc\rd\te")
    assert screen.rows == ["a\ufffd]0;title\ufffdb\ufffd2Jc\ufffdd    e"]


# ---- with the whole stack -------------------------------------------------------------------------------------------


def all_gone(processes: list[psutil.Process], timeout: float = 30) -> bool:
    return not psutil.wait_procs(processes, timeout=timeout)[1]


def test_the_smoke_run() -> None:
    done = minisgl("generate", "Hello", "--max-new-tokens", "8", "--model", "demo", timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    for words in ("EOS ids", "prefill", "decode step 8", "sends chunk", "summary"):
        assert words in done.stderr
    # The server's own last lines come from other processes, so they may follow the client's.
    summary = re.compile(r"8 tokens \(length\), \d+\.\d tokens/s, TTFB \d+\.\d ms")
    assert any(summary.match(line) for line in done.stderr.splitlines())


def test_a_server_that_cannot_start_says_why_last(tmp_path: Path) -> None:
    done = minisgl("generate", "Hello", "--model-local-dir", str(tmp_path / "nowhere"), "--quiet")
    assert done.returncode == 1
    assert done.stderr == f"minisgl: --model-local-dir {tmp_path / 'nowhere'} is not a directory\n"


def test_a_conversation_with_the_demo_model_and_its_sudden_end() -> None:
    chat = subprocess.Popen(
        [
            *MINISGL,
            "chat",
            "--multi-turn",
            "--quiet",
            "--model",
            "demo",
            "--temperature",
            "0",
            "--max-new-tokens",
            "24",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with chat:
        assert chat.stdin is not None and chat.stdout is not None
        chat.stdin.write("My name is Bob.\nWhat is my name?\n")
        chat.stdin.flush()
        chat.stdout.readline()
        assert "Bob" in chat.stdout.readline()
        processes = psutil.Process(chat.pid).children(recursive=True)
        assert len(processes) >= 5
        chat.send_signal(signal.SIGKILL)
        assert all_gone(processes)
