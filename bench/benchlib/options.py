"""Command line options that several scripts share, and what is made of them."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

from benchlib import bandwidth
from benchlib.servers import REPOSITORY, SYSTEMS, Setup
from benchlib.workloads import Lengths


def add_model_options(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--model", type=Path, help="model directory (default: minisgl's demo model)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda", "mps"), help="default: cpu")
    parser.add_argument("--dtype", choices=sorted(bandwidth.DTYPE_BYTES), help="default: the checkpoint's own")


def add_server_options(parser: argparse._ArgumentGroup, systems: tuple[str, ...] = SYSTEMS) -> None:
    for system in systems:
        parser.add_argument(f"--{system}-url", help="measure a server that runs already")
        parser.add_argument(
            f"--{system}-args", default="", help="more flags for the server started here, in one string"
        )
    parser.add_argument("--ready-timeout", type=float, default=600.0, help="seconds a server may take to start")
    parser.add_argument("--request-timeout", type=float, default=300.0, help="seconds one request may take")
    processes = max(1, min(4, (os.cpu_count() or 1) // 4))
    parser.add_argument(
        "--client-processes",
        type=int,
        default=processes,
        help=f"processes that share the load (default here: {processes})",
    )


def add_output_options(parser: argparse._ArgumentGroup, name: str) -> None:
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder (default: bench/results)")
    parser.add_argument("--name", default=name, help=f"file name without its ending (default: {name})")
    parser.add_argument("--title", help="heading of the report")


def make_setup(arguments: argparse.Namespace, systems: tuple[str, ...] = SYSTEMS) -> Setup:
    """The Setup of parsed options; exits with a sentence when the model directory is none."""
    model_dir: Path | None = arguments.model
    if model_dir is None:
        model_dir = REPOSITORY / "minisgl" / "demo_model"
    if not (model_dir / "config.json").is_file():
        sys.exit(f"--model: {model_dir} has no config.json; give a model directory (bench/make_model.py makes one)")
    options = vars(arguments)
    extra = {system: shlex.split(options.get(f"{system}_args", "")) for system in systems}
    urls = {system: options.get(f"{system}_url") for system in systems}
    return Setup(
        model_dir=model_dir.resolve(),
        device=arguments.device,
        dtype=arguments.dtype or bandwidth.checkpoint_dtype(bandwidth.model_config(model_dir)),
        log_dir=arguments.out / "logs",
        extra_args={system: words for system, words in extra.items() if words},
        urls={system: url for system, url in urls.items() if url},
        sglang_site=options.get("sglang_site"),
        ready_timeout=options.get("ready_timeout", 600.0),
    )


def model_facts(setup: Setup) -> dict[str, Any]:
    """The model as reports name it: its shape, dtype, and the bytes one decode step must read."""
    config = bandwidth.model_config(setup.model_dir)
    facts: dict[str, Any] = {
        "name": setup.model_dir.name,
        "dtype": setup.dtype,
        "layers": config.get("num_hidden_layers"),
        "hidden": config.get("hidden_size"),
        "vocabulary": config.get("vocab_size"),
    }
    cost = bandwidth.DecodeCost.of_config(config, setup.dtype)
    if cost:
        facts |= {"weight_bytes_per_step": cost.weight_bytes, "kv_bytes_per_token": cost.kv_bytes_per_token}
    return facts


def exit_on_sigterm() -> None:
    """Let SIGTERM unwind the stack, so that the servers started here end too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def integers(text: str) -> list[int]:
    """An argparse type: positive integers separated by commas."""
    numbers = [int(word) for word in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers of at least 1, got {text}")
    return numbers


def rates(text: str) -> list[float]:
    """An argparse type: positive numbers separated by commas."""
    numbers = [float(word) for word in text.split(",")]
    if min(numbers) <= 0:
        raise argparse.ArgumentTypeError(f"expected rates above 0, got {text}")
    return numbers


def lengths(text: str) -> Lengths:
    """An argparse type: a distribution of token counts."""
    try:
        return Lengths(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def several_lengths(text: str) -> list[Lengths]:
    """An argparse type: distributions of token counts separated by commas."""
    return [lengths(word) for word in text.split(",")]


def system_names(text: str) -> list[str]:
    """An argparse type: names of systems separated by commas."""
    names = text.split(",")
    unknown = [name for name in names if name not in SYSTEMS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown system {unknown[0]!r}; choose from {','.join(SYSTEMS)}")
    return names
