"""Fetches one model repository from one hub, in a process of its own: `python -m minisgl.hub_download <job as JSON>`.

The hub clients are slow to import, draw their own progress bars and cannot be interrupted in mid-download; a process
can be killed. It answers with one JSON object a line on stdout, in this order:

    {"event": "cached", "directory": ...}     a complete copy is on this machine; the end
    {"event": "not_cached"}                   the hub is being asked
    {"event": "found", "bytes": n}            the repository is there; waits for a line on stdin
    {"event": "progress", "done": n}          bytes so far, again and again
    {"event": "done", "directory": ...}       the end
    {"event": "failed", "reason": ..., "fatal": bool}    instead of any of these; fatal: no other hub can do better

When stdin ends, the process ends: it never outlives the one that asked.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import re
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from minisgl.model_files import ModelNotFound, check_directory, needed_files

HUGGING_FACE = "huggingface"
MODELSCOPE = "modelscope"
PROGRESS_SECONDS = 0.3
MAX_REASON_CHARS = 300


@dataclass(frozen=True)
class Job:
    """What to fetch.

    Attributes:
        revision: branch, tag or commit; None is the hub's default branch.
        cache_dir: None is the hub client's own cache.
        weights: False leaves the safetensors out.
        code: True takes the repository's own Python files along.
        offline: True looks into the cache only.
    """

    hub: str
    repo: str
    revision: str | None
    cache_dir: str | None
    weights: bool
    code: bool
    offline: bool


class Hub(Protocol):
    """One hub's client."""

    def cached(self) -> Path | None:
        """The directory an earlier download left, complete or not."""

    def list_files(self) -> dict[str, int]:
        """Every file of the repository with its size in bytes; raises ModelNotFound with the hub's reason."""

    def download(self, names: list[str]) -> Path:
        """Fetch these files into the cache; returns their directory."""

    def bytes_present(self, names: list[str]) -> int:
        """Bytes of these files that are on the disk by now."""


class HuggingFace:
    """huggingface.co, or what HF_ENDPOINT names; HF_TOKEN, HF_HOME and the like are the client's own business."""

    def __init__(self, job: Job) -> None:
        from huggingface_hub import constants

        self._job = job
        self._storage = Path(job.cache_dir or constants.HF_HUB_CACHE) / f"models--{job.repo.replace('/', '--')}"
        self._blobs: dict[str, str] = {}
        self._present = 0

    def cached(self) -> Path | None:
        revision = self._job.revision or "main"
        with contextlib.suppress(OSError):
            revision = (self._storage / "refs" / revision).read_text().strip()
        directory = self._storage / "snapshots" / revision
        return directory if directory.is_dir() else None

    def list_files(self) -> dict[str, int]:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        try:
            info = HfApi().model_info(self._job.repo, revision=self._job.revision, files_metadata=True)
        except RevisionNotFoundError:
            raise ModelNotFound(f"has the repository, but no revision {self._job.revision!r} of it") from None
        except GatedRepoError as error:
            raise ModelNotFound(self._gated(error)) from None
        except RepositoryNotFoundError:
            raise ModelNotFound("has no such repository (a private one needs HF_TOKEN)") from None
        except HfHubHTTPError as error:
            raise ModelNotFound(f"answered {error.response.status_code} {error.response.reason_phrase}") from None
        sizes = {}
        for file in info.siblings or []:
            sizes[file.rfilename] = file.size or 0
            self._blobs[file.rfilename] = (file.lfs.sha256 if file.lfs else file.blob_id) or file.rfilename
        return sizes

    def download(self, names: list[str]) -> Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError

        try:
            directory = snapshot_download(
                self._job.repo,
                revision=self._job.revision,
                cache_dir=self._job.cache_dir,
                allow_patterns=[glob.escape(name) for name in names],
            )
        except GatedRepoError as error:
            raise ModelNotFound(self._gated(error)) from None
        return Path(directory)

    def bytes_present(self, names: list[str]) -> int:
        present = 0
        for name in names:
            for path in (self._storage / "blobs").glob(f"{self._blobs[name]}*"):
                # A file that is complete by now has another name.
                with contextlib.suppress(FileNotFoundError):
                    present += path.stat().st_size
        self._present = max(self._present, present)
        return self._present

    def _gated(self, error: Any) -> str:
        page = f"https://huggingface.co/{self._job.repo}"
        return (
            f"answered {error.response.status_code}: the repository is gated; accept its terms at {page} "
            "and set HF_TOKEN to a token of that account"
        )


class ModelScope:
    """modelscope.cn, or what MODELSCOPE_ENDPOINT names, through modelscope_hub: modelscope itself imports torch."""

    def __init__(self, job: Job) -> None:
        # A large file on a slow line may take longer than the client's own limit of an hour; it is not cut.
        os.environ.setdefault("MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT", str(7 * 24 * 3600))
        # The launcher decides how long to wait for an answer.
        os.environ.setdefault("MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS", "1")
        from modelscope_hub import HubApi

        self._job = job
        self._api = HubApi()
        self._received = 0
        self._lock = threading.Lock()

    def cached(self) -> Path | None:
        from modelscope_hub import CacheNotFound

        try:
            return self._download(local_files_only=True)
        except CacheNotFound:
            return None

    def list_files(self) -> dict[str, int]:
        from modelscope_hub import APIError, AuthenticationError, NotExistError, PermissionDeniedError

        try:
            files = self._api.list_repo_files(self._job.repo, "model", revision=self._job.revision)
        except NotExistError:
            raise ModelNotFound("has no such repository or revision") from None
        except (AuthenticationError, PermissionDeniedError):
            raise ModelNotFound("refuses access to the repository; set MODELSCOPE_API_TOKEN") from None
        except APIError as error:
            raise ModelNotFound(f"answered {error.status_code}") from None
        return {file.path: file.size or 0 for file in files}

    def download(self, names: list[str]) -> Path:
        from modelscope_hub import ProgressCallback

        hub = self

        class CountBytes(ProgressCallback):
            def update(self, size: int) -> None:
                with hub._lock:
                    hub._received += size

        return self._download(allow_patterns=[glob.escape(name) for name in names], progress_callbacks=[CountBytes])

    def bytes_present(self, names: list[str]) -> int:
        return self._received

    def _download(self, **options: Any) -> Path:
        directory: Path = self._api.download_repo(
            self._job.repo, "model", revision=self._job.revision, cache_dir=self._job.cache_dir, **options
        )
        return directory


# ---- the process ----------------------------------------------------------------------------------------------------


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    # The clients print to stdout; give them stderr instead, and keep the real one for the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    go = threading.Event()
    threading.Thread(target=_read_stdin, args=(go,), daemon=True).start()
    for answer in fetch(job, go):
        answers.write(json.dumps(answer) + "\n")
    answers.flush()
    # A client's stuck thread must not keep the process.
    os._exit(0)


def _read_stdin(go: threading.Event) -> None:
    while os.read(0, 1024):
        go.set()
    os._exit(1)


def fetch(job: Job, go: threading.Event) -> Iterator[dict[str, Any]]:
    """The answers of this process, as the module's docstring lists them."""
    try:
        hub: Hub = HuggingFace(job) if job.hub == HUGGING_FACE else ModelScope(job)
        directory = hub.cached()
        if directory is not None and _complete(directory, job):
            yield {"event": "cached", "directory": str(directory)}
            return
        yield {"event": "not_cached"}
        if job.offline:
            raise ModelNotFound("is not asked, because HF_HUB_OFFLINE is set")
        sizes = hub.list_files()
        names = needed_files(sizes, job.weights, job.code)
        yield {"event": "found", "bytes": sum(sizes[name] for name in names)}
        go.wait()
        yield from _download(hub, names)
    except ModelNotFound as error:
        yield {"event": "failed", "reason": str(error), "fatal": False}
    except Exception as error:
        causes = list(_causes(error))
        full = any(getattr(cause, "errno", None) == errno.ENOSPC for cause in causes)
        network = any(isinstance(cause, ConnectionError | TimeoutError | socket.gaierror) for cause in causes)
        what = "the download broke off" if go.is_set() else f"cannot be {'reached' if network else 'used'}"
        reason = "the disk is full" if full else f"{what} ({_plainly(causes)})"
        yield {"event": "failed", "reason": reason, "fatal": full}


def _complete(directory: Path, job: Job) -> bool:
    try:
        check_directory(directory, job.weights)
    except ModelNotFound:
        return False
    return True


def _download(hub: Hub, names: list[str]) -> Iterator[dict[str, Any]]:
    """Fetch the files, config.json last: a snapshot that has it is complete, also after a kill at any moment."""
    outcome: list[Path | BaseException] = []

    def work() -> None:
        try:
            hub.download([name for name in names if name != "config.json"])
            outcome.append(hub.download(["config.json"]))
        except BaseException as error:
            outcome.append(error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    while worker.is_alive():
        worker.join(PROGRESS_SECONDS)
        yield {"event": "progress", "done": hub.bytes_present(names)}
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    yield {"event": "done", "directory": str(outcome[0])}


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and the errors of single files that ModelScope's client collects."""
    seen: list[BaseException] = [error]
    while seen:
        current = seen.pop()
        yield current
        seen.extend(cause for cause in (current.__cause__, current.__context__) if cause is not None)
        failed_files = getattr(current, "failed_files", None)
        if isinstance(failed_files, dict):
            seen.extend(failed_files.values())


def _plainly(causes: list[BaseException]) -> str:
    """The innermost reason, in one line: clients wrap "Connection refused" into a page of text."""
    strerrors = [cause.strerror for cause in causes if isinstance(cause, OSError) and cause.strerror]
    text = strerrors[-1] if strerrors else str(causes[-1]) or type(causes[-1]).__name__
    return re.sub(r"\s+", " ", text)[:MAX_REASON_CHARS]


if __name__ == "__main__":
    main()
