"""minisgl as a library: the server's own tokenizer, scheduler, engine and detokenizer, in this process.

    from minisgl import Engine

    with Engine("demo") as engine:
        for delta in engine.generate("Hello", stream=True, max_new_tokens=32):
            print(delta, end="", flush=True)

Nothing runs in the background: whoever waits for text runs the steps, and each step advances all requests. So streams
may be read in turns, and from several threads.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Literal, TypeAlias, overload

from minisgl import timeline
from minisgl.config import ServerConfig
from minisgl.detokenizer_proc.incremental import TokenTexts
from minisgl.detokenizer_proc.shown_logprobs import ShownLogprobs
from minisgl.detokenizer_proc.stream import StreamDecoder
from minisgl.messages import NO_TOKEN, FinishReason, JsonObject, Logprobs, TokenBatch, TokenizedRequest
from minisgl.model_source import resolve_model
from minisgl.sampling_params import SamplingParams
from minisgl.scheduler_proc.core import ReplicaCore
from minisgl.scheduler_proc.engine import StepEngine
from minisgl.tokenizer_proc.encode import PromptEncoder

logger = logging.getLogger(__name__)

Prompt: TypeAlias = "str | list[int] | list[JsonObject]"
"""Text, token ids, or chat messages such as {"role": "user", "content": "Hello"}."""
Prompts: TypeAlias = "list[str] | list[list[int]] | list[list[JsonObject]]"


class RequestRefused(ValueError):
    """A request that can never run; the message says what to change, `code` is one word for programs."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class EngineError(RuntimeError):
    """The request is lost: the engine was closed, or one of its steps failed."""


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with its log probability under the model's own distribution (before penalties and temperature).

    Attributes:
        data: the token's bytes; maybe a part of a character.
        logprob: NaN for the first token of a prompt.
        top: the likeliest tokens in its place, as many as were asked for, with their bytes and log probabilities.
    """

    token_id: int
    data: bytes
    logprob: float
    top: list[tuple[int, bytes, float]]


@dataclasses.dataclass(frozen=True, slots=True)
class Completion:
    """A finished answer.

    Attributes:
        token_ids: generated tokens, the EOS or stop token that ended them included.
        finish_reason: "stop", "length" or "abort".
        matched: the token id or stop string that ended the text, when finish_reason is "stop".
        usage: prompt_tokens, completion_tokens, total_tokens, cached_tokens.
        timing: ttft_us (call to first token) and the hops_us it consists of, total_ms, tokens_per_second.
        logprobs: one for each of token_ids, if the request asked with `logprobs`.
        prompt_logprobs: one for each prompt token from `prompt_logprobs_from` on, if the request asked.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    matched: int | str | None
    usage: dict[str, int]
    timing: JsonObject
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None


class Engine:
    """One model on one device.

    Args:
        model: a hub name, a local directory, or "demo" for the embedded model; None as for the server.
        settings: fields of ServerConfig, such as device="cpu", dtype="float32", max_total_tokens=8192.

    Raises:
        ConfigError: a setting is wrong.
        ModelNotFound: there is no such model.
    """

    def __init__(self, model: str | None = None, **settings: Any) -> None:
        config = ServerConfig(model=model, **settings)
        self.config = config
        self.model = resolve_model(config, _note_progress)
        self._encoder = PromptEncoder.from_directory(
            self.model.directory, self.model.context_length, self.model.vocab_size, config.trust_remote_code
        )
        self._texts = TokenTexts(self._encoder.tokenizer)
        engine = StepEngine.load(config, self.model, 0, _note_progress)
        engine.warm_up()
        # Nobody runs this engine between requests.
        while engine.prepare_next():
            pass
        self._core: ReplicaCore | None = ReplicaCore(engine, config, self.model)
        self._lock = threading.Lock()
        self._last_rid = 0
        self._generations: dict[int, _Generation] = {}
        self._abandoned: deque[int] = deque()

    @overload
    def generate(self, prompt: Prompt, *, stream: Literal[False] = False, **sampling: Any) -> Completion: ...

    @overload
    def generate(self, prompt: Prompt, *, stream: Literal[True], **sampling: Any) -> TextStream: ...

    @overload
    def generate(self, prompt: Prompts, *, stream: Literal[False] = False, **sampling: Any) -> list[Completion]: ...

    @overload
    def generate(self, prompt: Prompts, *, stream: Literal[True], **sampling: Any) -> list[TextStream]: ...

    def generate(self, prompt: Prompt | Prompts, *, stream: bool = False, **sampling: Any) -> Any:
        """Answer one prompt, or several together.

        Args:
            prompt: one prompt, or a list of prompts of one kind.
            stream: give back a TextStream at once instead of the finished Completion.
            sampling: fields of SamplingParams. Without a seed each request draws its own.

        Returns:
            A Completion or TextStream; for a list of prompts the list of theirs.

        Raises:
            PromptRefused, InvalidSamplingParams, RequestRefused: the request cannot be served (all are ValueErrors).
            EngineError: the engine was closed meanwhile.
        """
        params = _sampling_params(sampling)
        several = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], (str, list))
        received_ns = timeline.now()
        prompts: list[Any] = list(prompt) if several else [prompt]
        # All are encoded before one is submitted: a refused prompt then costs the others nothing.
        encoded = [self._encoder.encode(each, params.max_new_tokens) for each in prompts]
        streams = [TextStream(self, self._submit(input_ids, params, received_ns)) for input_ids in encoded]
        answers = streams if stream else [each.result() for each in streams]
        return answers if several else answers[0]

    def stats(self) -> JsonObject:
        """Requests running and waiting, KV pages free, preemptions, tokens generated."""
        with self._lock:
            return self._living_core().stats()

    def close(self) -> None:
        """Let go of the model; requests still running are lost."""
        with self._lock:
            if self._core is not None:
                self._core.close()
            self._core = None
            self._lose_all(EngineError("the engine was closed"))

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self, input_ids: list[int], params: SamplingParams, received_ns: int) -> _Generation:
        if params.seed is None:
            params = dataclasses.replace(params, seed=random.getrandbits(63))
        with self._lock:
            self._last_rid += 1
            stamps = [received_ns, received_ns, received_ns, timeline.now()]
            message = TokenizedRequest(self._last_rid, input_ids, params, stamps)
            refusal = self._living_core().submit(message)
            if refusal is not None:
                raise RequestRefused(refusal.code, refusal.message)
            generation = _Generation(message.rid, self._texts, params, len(input_ids), stamps)
            self._generations[message.rid] = generation
            return generation

    # ---- used by TextStream ----

    def _run(self, generation: _Generation, enough: Callable[[], bool]) -> None:
        """Run steps until a request has ended or `enough` says so; raises EngineError when the request is lost."""
        while True:
            with self._lock:
                if enough() or generation.finish:
                    return
                if isinstance(generation.failure, RequestRefused):
                    raise generation.failure
                if generation.failure is not None:
                    raise EngineError(f"the request was lost: {generation.failure}") from generation.failure
                self._step()

    def _abandon(self, generation: _Generation) -> None:
        """End a request that nobody reads any more; at once, or before the next step when one is running now."""
        self._abandoned.append(generation.rid)
        # Never wait here: a garbage collection within a step may have called this.
        if self._lock.acquire(blocking=False):
            try:
                self._end_abandoned()
            finally:
                self._lock.release()

    # ---- the rest is called with the lock held ----

    def _step(self) -> None:
        """Run one step for all requests."""
        self._end_abandoned()
        core = self._living_core()
        try:
            batch = core.step()
        except BaseException as error:
            # A step cut short, be it by Ctrl-C, leaves the scheduler half-way: every request is lost, and a new core
            # takes the next ones.
            core.close()
            self._core = ReplicaCore(core.engine, self.config, self.model)
            self._lose_all(error)
            raise
        for refusal in core.take_refused():
            generation = self._generations.pop(refusal.rid, None)
            if generation is not None:
                generation.failure = RequestRefused(refusal.code, refusal.message)
        if batch is not None:
            self._take(batch, core)

    def _take(self, batch: TokenBatch, core: ReplicaCore) -> None:
        """Decode a step's tokens."""
        for opened in batch.opened:
            if opened.rid in self._generations:
                self._generations[opened.rid].open(opened.stamps, opened.cached_tokens)
        for part in batch.logprobs:
            if batch.rids[part.row] in self._generations:
                self._generations[batch.rids[part.row]].add_logprobs(part)
        for rid, token_id, finish in zip(batch.rids, batch.token_ids, batch.finishes, strict=True):
            if rid not in self._generations:
                continue
            generation = self._generations[rid]
            generation.take([] if token_id == NO_TOKEN else [token_id], finish)
            if generation.finish:
                del self._generations[rid]
                # Of a stop string the scheduler knows nothing.
                core.abort(rid)

    def _end_abandoned(self) -> None:
        while self._abandoned:
            generation = self._generations.pop(self._abandoned.popleft(), None)
            if generation is not None:
                self._living_core().abort(generation.rid)
                generation.take([], FinishReason.ABORT)

    def _lose_all(self, error: BaseException) -> None:
        for generation in self._generations.values():
            generation.failure = error
        self._generations.clear()

    def _living_core(self) -> ReplicaCore:
        if self._core is None:
            raise EngineError("the engine was closed")
        return self._core


class TextStream(Iterator[str]):
    """The text of one request, piece by piece as it is generated. Closing or dropping it early ends the request."""

    def __init__(self, engine: Engine, generation: _Generation) -> None:
        self._engine = engine
        self._generation = generation

    def __next__(self) -> str:
        """The next piece of text; runs steps until there is one. Raises EngineError when the request is lost."""
        deltas = self._generation.deltas
        self._engine._run(self._generation, lambda: bool(deltas))
        if not deltas:
            raise StopIteration
        return deltas.popleft()

    def result(self) -> Completion:
        """Run to the end; the whole answer, whether or not its pieces have been read."""
        self._engine._run(self._generation, lambda: False)
        return self._generation.completion()

    def close(self) -> None:
        """End the request if it still runs; text that has been generated can still be read."""
        self._engine._abandon(self._generation)

    def __enter__(self) -> TextStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class _Generation:
    """What is known of one request. The engine writes it, its TextStream reads it.

    Attributes:
        deltas: pieces of text that nobody has read yet.
        finish: NONE while it runs.
        failure: why it was lost, if it was.
    """

    def __init__(
        self, rid: int, texts: TokenTexts, params: SamplingParams, prompt_tokens: int, stamps: list[int]
    ) -> None:
        self.rid = rid
        self.deltas: deque[str] = deque()
        self.finish = FinishReason.NONE
        self.failure: BaseException | None = None
        self._texts = texts
        self._decoder = StreamDecoder(
            texts, params.stop, params.skip_special_tokens, params.no_stop_trim, params.min_new_tokens
        )
        self._arrived_logprobs = ShownLogprobs()
        self._logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []
        self._prompt_logprobs: list[TokenLogprob] | None = None if params.prompt_logprobs_from is None else []
        self._prompt_tokens = prompt_tokens
        self._cached_tokens = 0
        self._stamps = stamps
        self._shown: list[str] = []
        self._token_ids: list[int] = []
        self._matched: int | str | None = None
        self._ended_ns = 0

    def open(self, stamps: list[int], cached_tokens: int) -> None:
        """Its first token is there."""
        self._stamps = stamps
        self._cached_tokens = cached_tokens

    def add_logprobs(self, part: Logprobs) -> None:
        """Log probabilities of the prompt, or of the tokens that `take` gets next."""
        self._arrived_logprobs.add(part)

    def take(self, token_ids: list[int], finish: FinishReason) -> None:
        """Decode its next tokens; it ends when the scheduler ended it or a stop string matches."""
        delta = self._decoder.advance(token_ids, finish)
        self._token_ids += delta.token_ids
        for part in (
            self._arrived_logprobs.show(len(delta.token_ids), self._texts) if delta.text or delta.finish else ()
        ):
            logprobs = self._prompt_logprobs if part.of_prompt else self._logprobs
            if logprobs is not None:
                logprobs += _token_logprobs(part)
        if delta.text:
            self._shown.append(delta.text)
            self.deltas.append(delta.text)
        if delta.finish:
            self.finish, self._matched = delta.finish, delta.matched
            self._ended_ns = timeline.now()

    def completion(self) -> Completion:
        tokens, seconds = len(self._token_ids), (self._ended_ns - self._stamps[0]) / 1e9
        return Completion(
            text="".join(self._shown),
            token_ids=self._token_ids,
            finish_reason=self.finish.name.lower(),
            matched=self._matched,
            usage={
                "prompt_tokens": self._prompt_tokens,
                "completion_tokens": tokens,
                "total_tokens": self._prompt_tokens + tokens,
                "cached_tokens": self._cached_tokens,
            },
            timing={
                "hops_us": timeline.hops_us(self._stamps),
                "ttft_us": timeline.total_us(self._stamps),
                "total_ms": round(seconds * 1e3, 3),
                "tokens_per_second": round(tokens / seconds, 2),
            },
            logprobs=self._logprobs,
            prompt_logprobs=self._prompt_logprobs,
        )


def _token_logprobs(part: Logprobs) -> list[TokenLogprob]:
    count = len(part.token_ids)
    most = len(part.top_ids) // max(count, 1)
    top = list(zip(part.top_ids, part.pieces[count:], part.top_values, strict=True))
    return [
        # The very first token of a prompt has no likeliest ones: nothing comes before it.
        TokenLogprob(
            token_id, data, value, [one for one in top[index * most : (index + 1) * most] if one[0] != NO_TOKEN]
        )
        for index, (token_id, data, value) in enumerate(
            zip(part.token_ids, part.pieces[:count], part.values, strict=True)
        )
    ]


def _sampling_params(fields: dict[str, Any]) -> SamplingParams:
    """SamplingParams from keyword arguments; one stop string or id need not be in a list, logit_bias may be a dict."""
    fields = dict(fields)
    if isinstance(fields.get("logit_bias"), dict):
        fields["logit_bias"] = tuple(fields["logit_bias"].items())
    for name in ("stop", "stop_token_ids"):
        value = fields.get(name)
        if isinstance(value, (str, int)):
            value = (value,)
        fields[name] = () if value is None else tuple(value)
    params = SamplingParams(**fields)
    params.validate()
    return params


def _note_progress(stage: str, done: int, total: int) -> None:
    logger.debug("%s: %d of %d", stage, done, total)
