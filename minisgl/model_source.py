"""Finds the model to serve: a local directory, the embedded demo model, or a hub (Hugging Face, then ModelScope).

Runs in the launcher before any worker starts. Each hub is asked by a process of its own (hub_download.py), both at
once, so that a dead network costs seconds and a Ctrl-C ends a download at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from minisgl.child_process import package_environment
from minisgl.config import DEFAULT_MODEL, DEMO_MODEL, ModelSpec, ServerConfig
from minisgl.hub_download import HUGGING_FACE, MODELSCOPE, Job
from minisgl.model_files import ModelNotFound, read_model_spec

__all__ = ["ModelNotFound", "resolve_model"]

logger = logging.getLogger(__name__)

Report: TypeAlias = Callable[[str, int, int], None]

PATIENCE_SECONDS = 2.5
"""How long the hubs have to say whether they hold a model that nobody named, and Hugging Face has before ModelScope
is taken instead."""
NAMED_PATIENCE_SECONDS = 8.0
"""The same for a model that the user named, where giving up means an error."""

_TICK_SECONDS = 0.2
_LABELS = {HUGGING_FACE: "Hugging Face", MODELSCOPE: "ModelScope"}
_ENDPOINTS = {
    HUGGING_FACE: ("HF_ENDPOINT", "https://huggingface.co"),
    MODELSCOPE: ("MODELSCOPE_ENDPOINT", "https://modelscope.cn"),
}
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def resolve_model(config: ServerConfig, report: Report) -> ModelSpec:
    """Find the model's directory, fetching it if need be, and read its facts.

    Args:
        config: names the model; a model that it names never becomes another one.
        report: called several times a second with (stage, done, total): `resolving` (0, 0) while the hubs are asked,
            `downloading` in bytes. What it raises ends the search, and the download with it.

    Raises:
        ModelNotFound: there is no usable model; the message says what was tried and what to do.
        ConfigError: a setting does not fit the model.
    """
    if config.model_local_dir is not None:
        directory = Path(config.model_local_dir).expanduser()
        if not directory.is_dir():
            raise ModelNotFound(f"--model-local-dir {config.model_local_dir} is not a directory")
        return read_model_spec(directory, config, config.model or directory.resolve().name, source=str(directory))
    if config.model == DEMO_MODEL:
        return _demo_model(config)
    if config.model is None:
        return _default_model(config, report)
    directory = Path(config.model).expanduser()
    if directory.is_dir():
        return read_model_spec(directory, config, directory.resolve().name, source=config.model)
    if not _HUB_NAME.fullmatch(config.model):
        raise ModelNotFound(
            f"--model {config.model} is neither an existing directory nor a hub name (owner/name); "
            f"check the path, or use '{DEMO_MODEL}' for the embedded model"
        )
    try:
        directory = _fetch(config.model, config, NAMED_PATIENCE_SECONDS, report)
    except _NoHubHasIt as error:
        raise ModelNotFound(
            f"the model {config.model} cannot be had: {error}. Check its name and the network (HF_ENDPOINT takes a "
            f"mirror), give a directory with --model-local-dir, or use the embedded one with --model {DEMO_MODEL}."
        ) from None
    return read_model_spec(directory, config, config.model, source=config.model)


def _demo_model(config: ServerConfig) -> ModelSpec:
    from minisgl.demo_model import demo_model_dir

    return read_model_spec(demo_model_dir(), config, DEMO_MODEL, source=DEMO_MODEL)


def _default_model(config: ServerConfig, report: Report) -> ModelSpec:
    try:
        directory = _fetch(DEFAULT_MODEL, config, PATIENCE_SECONDS, report)
        return read_model_spec(directory, config, DEFAULT_MODEL, source=DEFAULT_MODEL)
    except (_NoHubHasIt, ModelNotFound) as error:
        logger.warning(
            "No model was named, and the default %s cannot be had: %s.\nServing the small embedded demo model instead. "
            "To serve another, name it with --model, or give its directory with --model-local-dir.",
            DEFAULT_MODEL,
            error,
        )
        return _demo_model(config)


# ---- the hubs -------------------------------------------------------------------------------------------------------


class _NoHubHasIt(Exception):
    """Neither hub delivered the model; the message says why, hub by hub."""


class _HubProcess:
    """One hub_download process and what it said last."""

    def __init__(self, job: Job, answers: queue.Queue[tuple[str, dict[str, Any]]]) -> None:
        self.hub = job.hub
        self.last: dict[str, Any] = {"event": "starting"}
        self._answers = answers
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "minisgl.hub_download", json.dumps(dataclasses.asdict(job))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=package_environment() | {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            # A Ctrl-C in the terminal is the launcher's to handle.
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name=f"{job.hub}-answers", daemon=True)
        self._reader.start()

    @property
    def event(self) -> str:
        return str(self.last["event"])

    def download(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(b"go\n")
            self._process.stdin.flush()

    def stop(self) -> None:
        self._process.kill()
        self._reader.join()
        with self._process, self._stderr:
            pass  # closes its pipes and waits for it

    def _read(self) -> None:
        assert self._process.stdout is not None
        answer: dict[str, Any] = {}
        for line in self._process.stdout:
            answer = json.loads(line)
            self._answers.put((self.hub, answer))
        if answer.get("event") not in ("cached", "done", "failed"):
            self._stderr.seek(0)
            last_words = self._stderr.read().decode(errors="replace").strip().splitlines()[-1:] or ["no word"]
            self._answers.put((self.hub, {"event": "failed", "reason": f"died ({last_words[0]})", "fatal": False}))


def _fetch(name: str, config: ServerConfig, patience: float, report: Report) -> Path:
    """The local directory of a hub model: from a cache, else from Hugging Face, else from ModelScope."""
    answers: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()
    cache_dir = str(Path(config.download_dir).expanduser().resolve()) if config.download_dir else None
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    repos = {HUGGING_FACE: name, MODELSCOPE: config.modelscope_model_name or name}
    hubs: dict[str, _HubProcess] = {}
    try:
        for hub, repo in repos.items():
            job = Job(
                hub=hub,
                repo=repo,
                revision=config.revision,
                cache_dir=cache_dir,
                weights=config.load_format != "dummy",
                code=config.trust_remote_code,
                offline=offline,
            )
            hubs[hub] = _HubProcess(job, answers)
        return _choose(hubs, answers, patience, report)
    finally:
        for process in hubs.values():
            process.stop()


def _choose(
    hubs: dict[str, _HubProcess],
    answers: queue.Queue[tuple[str, dict[str, Any]]],
    patience: float,
    report: Report,
) -> Path:
    """Follow both processes until one delivers a directory; raises _NoHubHasIt when neither can."""
    started = time.monotonic()
    source: _HubProcess | None = None
    total = 0
    while True:
        with contextlib.suppress(queue.Empty):
            hub, answer = answers.get(timeout=_TICK_SECONDS)
            hubs[hub].last = answer
        if source is None:
            report("resolving", 0, 0)
            if any(process.event == "starting" for process in hubs.values()):
                # A busy machine imports the clients slowly; that is not the network's fault.
                started = time.monotonic()
            waited = time.monotonic() - started
            source = _next_source(hubs, waited)
            if source is not None and source.event == "found":
                total = source.last["bytes"]
                source.download()
            elif source is None and (waited > patience or all(process.event == "failed" for process in hubs.values())):
                raise _NoHubHasIt(_reasons(hubs, patience))
        elif source.event == "progress":
            report("downloading", min(source.last["done"], total), total)
        elif source.event == "failed":
            if source.last["fatal"]:
                raise ModelNotFound(
                    f"the download from {_LABELS[source.hub]} failed: {source.last['reason']}; free some space, or "
                    "keep downloads elsewhere with --download-dir"
                )
            source, started = None, time.monotonic()
        if source is not None and source.event in ("cached", "done"):
            return Path(source.last["directory"])


def _next_source(hubs: dict[str, _HubProcess], waited: float) -> _HubProcess | None:
    """The process to take now: a cached copy before any network, Hugging Face before ModelScope; None: wait on."""
    first, second = hubs[HUGGING_FACE], hubs[MODELSCOPE]
    if first.event == "cached":
        return first
    if "starting" in (first.event, second.event):
        return None
    if second.event == "cached":
        return second
    if first.event == "found":
        return first
    if second.event == "found" and (first.event == "failed" or waited > PATIENCE_SECONDS):
        return second
    return None


def _reasons(hubs: dict[str, _HubProcess], patience: float) -> str:
    reasons = []
    for hub, process in hubs.items():
        variable, default = _ENDPOINTS[hub]
        reason = process.last["reason"] if process.event == "failed" else f"did not answer within {patience:g} s"
        reasons.append(f"{_LABELS[hub]} ({os.environ.get(variable) or default}) {reason}")
    return "; ".join(reasons)
