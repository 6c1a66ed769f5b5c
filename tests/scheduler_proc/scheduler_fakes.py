"""An engine without a model, for the scheduler's tests: the next token is a hash of all tokens before it.

It keeps a KV memory of its own and reads every token back through the plan's pages, so a page that is freed too early
or shared by mistake changes the output. Steps run when they are retired, as late as a device could run them.
"""

from __future__ import annotations

import zlib
from array import array
from collections import deque
from dataclasses import dataclass

from minisgl.messages import FinishReason, Logprobs, TokenizedRequest
from minisgl.sampling_params import SamplingParams
from minisgl.scheduler_proc.kv_pages import KvPages
from minisgl.scheduler_proc.limits import SchedulerLimits
from minisgl.scheduler_proc.prefix_cache import PrefixCache
from minisgl.scheduler_proc.request import Request, RowLogprobs, StepPlan, scored_positions
from minisgl.scheduler_proc.scheduler import Scheduler

VOCAB_SIZE = 40
EOS = 0


def next_token(token_ids: list[int], banned: frozenset[int] = frozenset()) -> int:
    """A token that depends on every token before it and is none of the banned ones."""
    token = zlib.crc32(array("i", token_ids).tobytes()) % VOCAB_SIZE
    while token in banned:
        token = (token + 1) % VOCAB_SIZE
    return token


def undisturbed(prompt: list[int], sampling: SamplingParams, limit: int) -> tuple[list[int], FinishReason]:
    """What a request answers when it runs alone; `limit` stands in for max_new_tokens None.

    With a presence penalty the fake engine generates no token twice.
    """
    token_ids = list(prompt)
    stop_ids = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else {EOS})
    while True:
        produced = len(token_ids) - len(prompt)
        banned = stop_ids if produced < sampling.min_new_tokens else frozenset[int]()
        if sampling.presence_penalty:
            banned |= frozenset(token_ids[len(prompt) :])
        token_ids.append(next_token(token_ids, banned))
        if token_ids[-1] in stop_ids:
            return token_ids[len(prompt) :], FinishReason.STOP
        if produced + 1 == (sampling.max_new_tokens or limit):
            return token_ids[len(prompt) :], FinishReason.LENGTH


@dataclass
class _LaunchedRow:
    """A row as a device would have it: the page table and the lengths as they were at launch."""

    rid: int
    start: int
    tokens: list[int]
    pages: list[int]
    sample: bool
    prompt_len: int
    min_new_tokens: int
    stop_ids: frozenset[int]
    penalised: frozenset[int]
    seen: int
    request: Request
    scored: range


class FakeEngine:
    """Meets core.StepRunner. `fail_at_step` makes that step raise when it is retired."""

    runs_ahead = False

    device_name = "fake"
    dtype_name = "int"

    def __init__(self, num_pages: int = 64, page_size: int = 4, fail_at_step: int = 0) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.fail_at_step = fail_at_step
        self._memory = [[-1] * page_size for _ in range(num_pages)]
        self._last_sampled: dict[int, int] = {}
        self._in_flight: deque[dict[int, set[int]]] = deque()
        """Per launched step: which requests use a page."""

    def stay_ahead(self, pages_used: int) -> None: ...

    def prepare_next(self, pages_used: int) -> bool:
        return False

    def launch(self, plan: StepPlan) -> tuple[int, list[_LaunchedRow]]:
        launched = []
        writers: dict[int, int] = {}
        readers: dict[int, set[int]] = {}
        for index, row in enumerate(plan.rows):
            request = row.request
            assert row.length >= 1
            assert index >= plan.decode_rows or row.length == 1
            end = row.start + row.length
            assert (
                (end == len(request.token_ids) + request.pending - 1)
                if row.sample
                else (end < len(request.token_ids) + request.pending)
            )
            assert end < request.prompt_len + request.max_new_tokens, "computed past the request's limit"
            assert len(request.pages) * self.page_size >= end
            written = request.pages[row.start // self.page_size : -(-end // self.page_size)]
            for page in request.pages:
                assert writers.get(page, request.rid) == request.rid, "a row writes a page that another one reads"
            for page in written:
                assert page not in readers or readers[page] == {request.rid}, (
                    "a row writes a page that another one reads"
                )
                for step in self._in_flight:
                    assert step.get(page, {request.rid}) == {request.rid}, "a step in flight uses this page"
                writers[page] = request.rid
            for page in request.pages:
                readers.setdefault(page, set()).add(request.rid)
            launched.append(
                _LaunchedRow(
                    request.rid,
                    row.start,
                    request.token_ids[row.start : end],
                    list(request.pages),
                    row.sample,
                    request.prompt_len,
                    request.sampling.min_new_tokens,
                    request.stop_ids,
                    frozenset(request.adjustments.generated.tolist() if request.adjustments else ()),
                    len(request.token_ids),
                    request,
                    scored_positions(row),
                )
            )
        self._in_flight.append(readers)
        return plan.step, launched

    def retire(self, step: tuple[int, list[_LaunchedRow]]) -> list[int]:
        number, rows = step
        self._in_flight.popleft()
        if number == self.fail_at_step:
            raise RuntimeError("the fake device is broken")
        sampled = []
        for row in rows:
            # A decode row launched before its token was known takes it from the step before, as a device would.
            tokens = row.tokens or [self._last_sampled[row.rid]]
            for position, token in enumerate(tokens, row.start):
                self._memory[row.pages[position // self.page_size]][position % self.page_size] = token
            if row.sample:
                end = row.start + len(tokens)
                known = [self._memory[row.pages[p // self.page_size]][p % self.page_size] for p in range(end)]
                banned = row.stop_ids if end - row.prompt_len < row.min_new_tokens else frozenset[int]()
                if row.request.sampling.presence_penalty:
                    # What the host had not seen at launch is penalised on the device.
                    banned |= row.penalised | frozenset(known[row.seen :])
                self._last_sampled[row.rid] = next_token(known, banned)
                sampled.append(self._last_sampled[row.rid])
        return sampled

    def logprobs(self, step: tuple[int, list[_LaunchedRow]]) -> list[RowLogprobs]:
        """The value of a token is its position."""
        found = []
        for row in step[1]:
            request, start = row.request, row.start + len(row.tokens or [0])
            if row.sample and request.sampling.logprobs is not None:
                part = Logprobs(0, False, [self._last_sampled[row.rid]], [float(start)])
                found.append(RowLogprobs(request, start, part))
            if row.scored:
                positions = range(row.scored.start + 1, row.scored.stop + 1)
                token_ids = [request.token_ids[position] for position in positions]
                part = Logprobs(0, True, token_ids, [float(position) for position in positions])
                found.append(RowLogprobs(request, positions.start, part))
        return found


def make_scheduler(
    num_pages: int = 64,
    page_size: int = 4,
    context_length: int = 64,
    max_running: int = 8,
    step_tokens: int = 16,
    caches: bool = False,
    fine_chunk: int | None = None,
) -> tuple[Scheduler, FakeEngine]:
    limits = SchedulerLimits(context_length, max_running, step_tokens, frozenset({EOS}), VOCAB_SIZE, fine_chunk)
    cache = PrefixCache(page_size) if caches else None
    return Scheduler(limits, KvPages(num_pages, page_size), cache), FakeEngine(num_pages, page_size)


def tokenized(rid: int, prompt: list[int], **sampling: object) -> TokenizedRequest:
    return TokenizedRequest(rid, prompt, SamplingParams(**sampling), [1, 2, 3, 4])  # type: ignore[arg-type]
