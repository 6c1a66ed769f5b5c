"""The command line of a server, made from ServerConfig: `--help`, defaults, environment variables, clear refusals."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, get_type_hints

from minisgl.config import ConfigError, ServerConfig
from minisgl.foreign_flags import foreign_flag

_EPILOG = """\
examples:
  python launch.py                                    Qwen2.5-0.5B-Instruct, or the demo model without a network
  python launch.py --model demo                       the embedded demo model, on any machine
  python launch.py --model Qwen/Qwen3-8B --port 8000
  python launch.py --model ./my-model --api-key KEY --host 0.0.0.0

Whole numbers take the suffixes k and m (8k = 8192). Flags that sglang has too mean what they mean there.
"""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """A line for a flag and its aliases, without their value repeated at each."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flags = ", ".join(action.option_strings)
        if not flags or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{flags} {self._format_args(action, self._get_default_metavar_for_optional(action))}"


def make_parser(env: Mapping[str, str] | None = None) -> argparse.ArgumentParser:
    """The parser of `python launch.py`."""
    parser = argparse.ArgumentParser(
        prog="launch.py",
        usage="python launch.py [--model NAME] [--port PORT] [setting ...]",
        description="Serve a language model: tokenizer, schedulers, detokenizer and HTTP, each in its own process.",
        epilog=_EPILOG,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    add_arguments(parser, env)
    return parser


def add_arguments(parser: argparse.ArgumentParser, env: Mapping[str, str] | None = None) -> None:
    """Add one flag per ServerConfig field; environment variables named in the fields replace the defaults."""
    env = os.environ if env is None else env
    hints = get_type_hints(ServerConfig)
    group: Any = parser
    for spec in dataclasses.fields(ServerConfig):
        meta = spec.metadata
        if meta["group"]:
            group = parser.add_argument_group(meta["group"])
        flags = ["--" + spec.name.replace("_", "-"), *meta["aliases"]]
        default = env.get(meta["env"]) or spec.default if meta["env"] else spec.default
        help_text = _help_text(spec).replace("%", "%%")
        kind = _value_type(hints[spec.name])
        if kind is bool:
            group.add_argument(*flags, dest=spec.name, action="store_true", default=default, help=help_text)
            continue
        group.add_argument(
            *flags,
            dest=spec.name,
            type=_converter(kind, meta["spellings"]),
            default=default,
            choices=meta["choices"] or None,
            metavar=None if meta["choices"] else {int: "N", float: "X"}.get(kind, spec.name.split("_")[-1].upper()),
            help=help_text,
        )


def from_namespace(namespace: argparse.Namespace) -> ServerConfig:
    """The config of parsed arguments; raises ConfigError."""
    names = {spec.name for spec in dataclasses.fields(ServerConfig)}
    return ServerConfig(**{name: value for name, value in vars(namespace).items() if name in names})


def parse_args(argv: Sequence[str] | None = None, env: Mapping[str, str] | None = None) -> ServerConfig:
    """Parse a command line; argparse's own errors and ConfigErrors both exit with status 2 and one sentence."""
    parser = make_parser(env)
    namespace, unknown = parser.parse_known_args(argv)
    try:
        for note in notes_on_unknown(unknown, _flags_of(parser)):
            print(f"launch.py: {note}", file=sys.stderr)
        return from_namespace(namespace)
    except ConfigError as error:
        parser.error(str(error))


def notes_on_unknown(arguments: Sequence[str], known: Sequence[str]) -> list[str]:
    """What is to be said of arguments that are no flag of this server but ask for nothing it would not do anyway.

    Raises ConfigError for the first one that asks for more.
    """
    notes: list[str] = []
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        flag = foreign_flag(name)
        if flag is None:
            raise ConfigError(_unknown(name, known))
        if not equals and flag.takes_value and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        asked = f"{name} {value}".rstrip()
        if value not in flag.harmless:
            raise ConfigError(f"{asked}: sglang has this flag and this server does not; {flag.instead}")
        notes.append(f"{asked} changes nothing: {flag.instead}")
    return notes


def _unknown(name: str, known: Sequence[str]) -> str:
    if not name.startswith("-"):
        return f"unexpected argument {name!r}; a setting is given as --flag value (see --help)"
    similar = difflib.get_close_matches(name, known, n=1)
    return f"unknown flag {name}; " + (f"did you mean {similar[0]}?" if similar else "--help lists the flags")


def _flags_of(parser: argparse.ArgumentParser) -> list[str]:
    return [flag for flag in parser._option_string_actions if flag.startswith("--")]


def _help_text(spec: dataclasses.Field[Any]) -> str:
    text: str = spec.metadata["help"]
    if "(default" not in text:
        default = "not set" if spec.default is None else "off" if spec.default is False else spec.default
        text += f" (default: {default})"
    return f"{text} [env {spec.metadata['env']}]" if spec.metadata["env"] else text


def _value_type(hint: Any) -> Any:
    """int for `int | None`."""
    return next(kind for kind in getattr(hint, "__args__", (hint,)) if kind is not type(None))


def _converter(kind: Any, spellings: Mapping[str, str]) -> Any:
    """What argparse is to make of a value."""
    if spellings:
        return lambda text: spellings.get(text, text)
    return _human_int if kind is int else kind


def _human_int(text: str) -> int:
    """An int, with an optional k or m suffix as sglang accepts it (8k = 8192)."""
    scale = {"k": 2**10, "m": 2**20}.get(text[-1:].lower(), 1)
    return int(text[:-1] if scale > 1 else text) * scale


_human_int.__name__ = "int"
