"""A thread for long prompts, so that short ones are not stuck behind them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

from minisgl.messages import GenerateRequest
from minisgl.tokenizer_proc.encode import PromptEncoder, PromptText


class SlowLane:
    """Tokenizes one prompt after the other in a thread of its own (the tokenizer releases the interpreter lock)."""

    def __init__(self, encoder: PromptEncoder) -> None:
        self._encoder = encoder
        self._jobs: queue.SimpleQueue[tuple[int, PromptText]] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tuple[int, list[int] | BaseException]] = queue.SimpleQueue()
        self.requests: dict[int, GenerateRequest] = {}
        """The requests in this lane by id, until `finished` hands them over or `cancel` takes them out."""
        threading.Thread(target=self._run, name="slow-lane", daemon=True).start()

    def submit(self, request: GenerateRequest, prompt: PromptText) -> None:
        self.requests[request.rid] = request
        self._jobs.put((request.rid, prompt))

    def cancel(self, rid: int) -> bool:
        """Forget a request; False if it is not in this lane."""
        return self.requests.pop(rid, None) is not None

    def finished(self) -> Iterator[tuple[GenerateRequest, list[int] | BaseException]]:
        """Each request that is done, once, with its token ids or what went wrong. Never blocks."""
        while not self._results.empty():
            rid, result = self._results.get()
            request = self.requests.pop(rid, None)
            if request is not None:
                yield request, result

    def _run(self) -> None:
        while True:
            rid, prompt = self._jobs.get()
            if rid not in self.requests:
                continue
            result: list[int] | BaseException
            try:
                result = self._encoder.tokenize(prompt)
            except BaseException as error:  # a panic of the native library is no Exception
                result = error
            self._results.put((rid, result))
