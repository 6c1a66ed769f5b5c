"""The command `minisgl`: chat with a model in the terminal, generate once, or serve.

minisgl chat --multi-turn            a conversation, with a server of its own unless one runs already
minisgl generate "Hello"             one answer; the exit status says whether it came
minisgl serve --model demo           the same as `python launch.py --model demo`
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from minisgl.client import Client, Generation, RequestFailed
from minisgl.command_line import add_arguments, from_namespace
from minisgl.config import ConfigError, ServerConfig
from minisgl.launch_view import LaunchView, open_view
from minisgl.log import setup_logging
from minisgl.own_server import OwnServer, ServerDidNotStart
from minisgl.terminal import Terminal

DEFAULT_URL = "http://127.0.0.1:30000"
HISTORY_FILE = ".minisgl_history"
_PROMPT = "> "
_HELP = ["Ctrl-C stops an answer, /reset forgets the conversation, /exit or Ctrl-D leaves; --quiet shows no log."]


def main(argv: Sequence[str] | None = None) -> int:
    """The console script; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["serve"]:
        from minisgl import serve

        return serve.main(arguments[1:])
    commands: dict[str, Callable[[argparse.Namespace, Terminal, Client], int]] = {"chat": _chat, "generate": _generate}
    options, config, own = _parse(arguments)
    try:
        terminal = Terminal()
        with _server(options, config, own, terminal) as client:
            return commands[options.command](options, terminal, client)
    except RequestFailed as error:
        print(f"minisgl: {error}", file=sys.stderr)
        return 1
    except ServerDidNotStart:
        return 1
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


# ---- command line ---------------------------------------------------------------------------------------------------


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, ServerConfig, bool]:
    """The options, the settings of a server of our own, and whether any of these was given."""
    parser = argparse.ArgumentParser(
        prog="minisgl", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{chat,generate,serve}")
    chat = _add_command(commands, "chat", "talk with a model", temperature=0.7)
    chat.add_argument("--multi-turn", action="store_true", help="the model sees the whole conversation")
    chat.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    generate = _add_command(commands, "generate", "continue one text", temperature=0.0)
    generate.add_argument("prompt", help="the text to continue")
    commands.add_parser("serve", help="run a server; see `minisgl serve --help`", add_help=False)
    options = parser.parse_args(arguments)

    command = {"chat": chat, "generate": generate}[options.command]
    settings = {spec.name: getattr(options, spec.name) for spec in dataclasses.fields(ServerConfig)}
    # The API key is as much the client's as the server's.
    given = any(value != command.get_default(name) for name, value in settings.items() if name != "api_key")
    if given and options.url:
        command.error("a server that runs already (--url) cannot be given settings: leave out one or the other")
    quiet = {"log_level": "warning"} if options.quiet else {"narrate": True}
    free_port = {} if options.port else {"port": 0}
    try:
        config = from_namespace(argparse.Namespace(**{**settings, **quiet, **free_port}))
    except ConfigError as error:
        command.error(str(error))
    return options, config, given


def _add_command(commands: Any, name: str, help: str, temperature: float) -> argparse.ArgumentParser:
    description = (
        f"{help[0].upper()}{help[1:]}: on the server at --url, or the one at {DEFAULT_URL} if it runs, else on a "
        "server of its own, which takes the server settings below and ends with this program."
    )
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help, description=description, allow_abbrev=False)
    parser.add_argument("--url", help="use this running server")
    parser.add_argument("--quiet", action="store_true", help="show no log of the server's inner life")
    parser.add_argument("--max-new-tokens", type=int, help="longest answer (default: what the context length allows)")
    parser.add_argument(
        "--temperature", type=float, default=temperature, help=f"0 is greedy decoding (default: {temperature:g})"
    )
    parser.add_argument("--top-p", type=float, help="sample from the likeliest tokens with this total probability")
    parser.add_argument("--seed", type=int, help="the same seed gives the same answer")
    add_arguments(parser)
    # None tells that no port was asked for, so that two chats never fight over the default one.
    parser.set_defaults(port=None)
    return parser


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    sampling: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature}
    for name in ("top_p", "seed"):
        if getattr(options, name) is not None:
            sampling[name] = getattr(options, name)
    return sampling


# ---- the server -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _server(options: argparse.Namespace, config: ServerConfig, own: bool, terminal: Terminal) -> Iterator[Client]:
    """A client of the server to use: the one named, else the default one if it runs, else one of our own."""
    if options.url:
        yield Client(options.url, config.api_key)
        return
    running = Client(DEFAULT_URL, config.api_key)
    if not own and running.healthy():
        yield running
        return
    with contextlib.ExitStack() as stack:
        view = _open_view(options.quiet)
        stack.callback(view.close)
        server = stack.enter_context(OwnServer(config, terminal.log, view.progress))
        view.close()
        yield Client(server.url, config.api_key)


class _NoView:
    """Shows nothing of a server's start."""

    def progress(self, who: str, stage: str, done: int, total: int) -> None:
        pass

    def close(self) -> None:
        pass


def _open_view(quiet: bool) -> LaunchView:
    # On a terminal the bars disappear again; elsewhere each stage would be a log line.
    if quiet and not sys.stderr.isatty():
        return _NoView()
    setup_logging("minisgl")
    return open_view()


# ---- generate -------------------------------------------------------------------------------------------------------


def _generate(options: argparse.Namespace, terminal: Terminal, client: Client) -> int:
    generation = Generation()
    try:
        for text in client.stream({"prompt": options.prompt, **_sampling(options)}, generation):
            terminal.answer(text)
    finally:
        terminal.end_answer()
    terminal.log([generation.summary()])
    return 0


# ---- chat -----------------------------------------------------------------------------------------------------------


def _chat(options: argparse.Namespace, terminal: Terminal, client: Client) -> int:
    """The conversation; 1 when an answer failed and nobody was there to try again."""
    name = client.model_name()
    interactive = sys.stdin.isatty()
    if interactive:
        kind = "it sees the whole conversation" if options.multi_turn else "each question is on its own"
        terminal.log([f"{name} at {client.url}; {kind}.", *_HELP])
    chat = Conversation(client, terminal, options.multi_turn, options.system, _sampling(options))
    failed = False
    with _prompt_history() if interactive else contextlib.nullcontext():
        while True:
            try:
                line = terminal.ask(_PROMPT if interactive else "").strip()
            except KeyboardInterrupt:
                terminal.log(["", "(Ctrl-D or /exit leaves)"])
                continue
            except EOFError:
                if interactive:
                    terminal.end_answer()
                break
            match line:
                case "":
                    pass
                case "/exit" | "/quit":
                    break
                case "/reset":
                    chat.reset()
                    terminal.log(["the conversation starts anew"])
                case "/help":
                    terminal.log(_HELP)
                case _:
                    failed = not chat.say(line) or failed
    return int(failed and not interactive)


class Conversation:
    """The messages so far, and how one more is answered."""

    def __init__(
        self, client: Client, terminal: Terminal, multi_turn: bool, system: str | None, sampling: dict[str, Any]
    ) -> None:
        self._client = client
        self._terminal = terminal
        self._multi_turn = multi_turn
        self._system = [{"role": "system", "content": system}] if system else []
        self._sampling = sampling
        self._turns: list[dict[str, str]] = []

    def reset(self) -> None:
        self._turns = []

    def say(self, text: str) -> bool:
        """Send the user's message and show the answer as it comes; False when it failed.

        Ctrl-C ends the answer; what had come of it stays in the conversation. A message without any answer does not.
        """
        question = {"role": "user", "content": text}
        body = {"messages": [*self._system, *self._turns, question], **self._sampling}
        generation = Generation()
        outcome = ""
        failed = False
        try:
            with self._terminal.no_echo(), contextlib.closing(self._client.stream(body, generation)) as stream:
                for delta in stream:
                    self._terminal.answer(delta)
        except KeyboardInterrupt:
            outcome = "stopped"
        except RequestFailed as error:
            outcome, failed = f"error: {error}", True
        if generation.text or not outcome:
            self._terminal.end_answer()
        self._terminal.log([outcome or generation.summary()])
        if self._multi_turn and generation.text:
            self._turns += [question, {"role": "assistant", "content": generation.text}]
        return not failed


@contextlib.contextmanager
def _prompt_history() -> Iterator[None]:
    """Line editing, with the questions of earlier sessions at the arrow keys."""
    try:
        import readline
    except ImportError:
        yield
        return
    path = Path.home() / HISTORY_FILE
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            readline.write_history_file(path)


if __name__ == "__main__":
    raise SystemExit(main())
