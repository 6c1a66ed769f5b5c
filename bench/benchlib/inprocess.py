"""The three systems without HTTP, each inside a process of its own that does nothing else.

    python -m benchlib.inprocess minisgl|sglang|hf     reads JSON lines from standard input, answers each with one

The first line is the setup {"model_dir", "device", "dtype"}, answered when the model is loaded. Every further line is a
turn {"messages", "max_new_tokens"}, answered with a TurnResult.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from benchlib.servers import REPOSITORY, ServerError, Setup, environment

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class TurnResult:
    """One answer: milliseconds from the call to its first token and to its end, and what it consisted of."""

    ttft_ms: float
    total_ms: float
    prompt_tokens: int
    output_tokens: int
    text: str

    @property
    def tokens_per_second(self) -> float:
        return self.output_tokens / self.total_ms * 1e3

    @property
    def step_ms(self) -> float:
        """Mean milliseconds per token after the first."""
        return (self.total_ms - self.ttft_ms) / max(self.output_tokens - 1, 1)

    def problem(self, asked_tokens: int) -> str:
        """Why this answer must not count, empty when it may."""
        if self.output_tokens != asked_tokens:
            return f"asked for exactly {asked_tokens} tokens, got {self.output_tokens}"
        if not self.text:
            return "the answer has no text"
        return "" if self.ttft_ms > 0 else "time to first token is 0"


class System(Protocol):
    """A loaded model that answers one turn at a time, greedily and past EOS."""

    versions: dict[str, str]

    def answer(self, messages: Messages, max_new_tokens: int) -> TurnResult: ...


class Minisgl:
    def __init__(self, model_dir: str, device: str, dtype: str) -> None:
        import minisgl

        self._engine = minisgl.Engine(model_dir, device=device, dtype=dtype)
        self.versions = {"minisgl": minisgl.__version__, **_torch_version()}

    def answer(self, messages: Messages, max_new_tokens: int) -> TurnResult:
        began = time.perf_counter()
        first = 0.0
        stream = self._engine.generate(
            messages, stream=True, max_new_tokens=max_new_tokens, temperature=0.0, ignore_eos=True
        )
        for _ in stream:
            first = first or time.perf_counter()
        ended = time.perf_counter()
        result = stream.result()
        usage = result.usage
        return TurnResult(
            (first - began) * 1e3,
            (ended - began) * 1e3,
            usage["prompt_tokens"],
            usage["completion_tokens"],
            result.text,
        )


class HuggingFace:
    def __init__(self, model_dir: str, device: str, dtype: str) -> None:
        import transformers

        from benchlib.hf_model import HfModel

        self._hf = HfModel.load(Path(model_dir), device, dtype)
        self.versions = {"transformers": transformers.__version__, **_torch_version()}

    def answer(self, messages: Messages, max_new_tokens: int) -> TurnResult:
        began = time.perf_counter()
        first = 0.0
        tokens = 0
        texts: list[str] = []
        text = self._hf.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        input_ids = self._hf.tokenizer(text, add_special_tokens=False).input_ids
        for ids, piece in self._hf.stream(input_ids, max_new_tokens):
            first = first or time.perf_counter()
            tokens += len(ids)
            texts.append(piece)
        ended = time.perf_counter()
        return TurnResult((first - began) * 1e3, (ended - began) * 1e3, len(input_ids), tokens, "".join(texts))


class Sglang:
    def __init__(self, model_dir: str, device: str, dtype: str) -> None:
        import sglang  # type: ignore[import-not-found]
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(model_dir)
        self._engine: Any = sglang.Engine(model_path=model_dir, device=device, dtype=dtype, log_level="error")
        self.versions = {"sglang": sglang.__version__, **_torch_version()}

    def answer(self, messages: Messages, max_new_tokens: int) -> TurnResult:
        began = time.perf_counter()
        first = 0.0
        chunk: dict[str, Any] = {}
        prompt = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        sampling = {"temperature": 0.0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        for chunk in self._engine.generate(prompt=prompt, sampling_params=sampling, stream=True):
            if not first and chunk["meta_info"]["completion_tokens"] > 0:
                first = time.perf_counter()
        ended = time.perf_counter()
        meta = chunk["meta_info"]
        return TurnResult(
            (first - began) * 1e3,
            (ended - began) * 1e3,
            meta["prompt_tokens"],
            meta["completion_tokens"],
            chunk["text"],
        )


def _torch_version() -> dict[str, str]:
    import torch

    return {"torch": torch.__version__}


_KINDS: dict[str, type[System]] = {"minisgl": Minisgl, "sglang": Sglang, "hf": HuggingFace}


class Remote:
    """A system in its own process, as a context manager that is entered when the model is loaded."""

    def __init__(self, system: str, setup: Setup) -> None:
        self.system = system
        self.ready_seconds = 0.0
        self.versions: dict[str, str] = {}
        self._setup = setup
        self._process: subprocess.Popen[str]
        self._log: IO[str]

    def __enter__(self) -> Remote:
        began = time.monotonic()
        self._setup.log_dir.mkdir(parents=True, exist_ok=True)
        log_path = self._setup.log_dir / f"{self.system}.inprocess.log"
        self._log = log_path.open("w")
        paths = [str(REPOSITORY / "bench"), environment(self.system, self._setup)["PYTHONPATH"]]
        self._process = subprocess.Popen(
            [self._setup.python, "-W", "ignore", "-m", "benchlib.inprocess", self.system],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**environment(self.system, self._setup), "PYTHONPATH": os.pathsep.join(paths)},
        )
        setup = {"model_dir": str(self._setup.model_dir), "device": self._setup.device, "dtype": self._setup.dtype}
        try:
            self.versions = self._ask(setup)["versions"]
        except BaseException:
            self.__exit__()
            raise
        self.ready_seconds = time.monotonic() - began
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def answer(self, messages: Messages, max_new_tokens: int) -> TurnResult:
        """Answer one turn; raises ServerError when the process has died."""
        return TurnResult(**self._ask({"messages": messages, "max_new_tokens": max_new_tokens}))

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            words = Path(self._log.name).read_text(errors="replace").strip().splitlines()[-3:]
            raise ServerError(f"{self.system} ended by itself (status {code}); its last words: {' | '.join(words)}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def main() -> None:
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    system = _KINDS[sys.argv[1]](**json.loads(sys.stdin.readline()))
    print(json.dumps({"versions": system.versions}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(dataclasses.asdict(system.answer(**json.loads(line)))), file=answers, flush=True)


if __name__ == "__main__":
    main()
