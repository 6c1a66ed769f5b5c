"""What each step computes: admission, batching, preemption, finishing. Plain Python on the CPU; no torch.

`plan` makes the next step, `retire` takes its tokens. Plans may overlap: step n + 1 can be planned and launched before
step n is retired, as long as steps retire in order. A request that ends while a step in flight still computes it is
found out late: that row's token is dropped, and its pages are free only after the last step that was planned.

Requests are served strictly first come, first served: every running request arrived before every waiting one, both in
order of arrival. From that follow the two promises: nobody starves, and the oldest request always runs to its end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from minisgl import timeline
from minisgl.messages import FinishReason, Logprobs, RequestError, TokenizedRequest
from minisgl.scheduler_proc.adjustments import Refusal, TokenMask
from minisgl.scheduler_proc.kv_pages import KvPages
from minisgl.scheduler_proc.limits import SchedulerLimits
from minisgl.scheduler_proc.prefix_cache import PrefixCache
from minisgl.scheduler_proc.request import Request, RowLogprobs, StepPlan, StepRow

LEAST_PREFILL = 8
"""Prompt tokens of one step at least. At 16,000 positions twice as many took longer than two quiet steps on a CPU."""
SCORED_TOKENS = 256
"""Prompt positions of one step at most whose logits are computed for log probabilities: each is a whole vocabulary."""


@dataclass(slots=True)
class SampledTokens:
    """What a retired step brought: one row per new token, as columns. `opened` are the requests with their first.

    `logprobs` are in row order; those of a prompt go with its request's first row, before those of the row's token.
    """

    opened: list[Request] = field(default_factory=list)
    rids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finishes: list[FinishReason] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)


class Scheduler:
    """Decides which requests run on one replica.

    Attributes:
        pages: the KV page accounting.
        cache: prefixes whose pages later requests can share; None when that is switched off.
        preemptions: how often a running request had to give its pages back.
    """

    def __init__(self, limits: SchedulerLimits, pages: KvPages, cache: PrefixCache | None = None) -> None:
        self.limits = limits
        self.pages = pages
        self.cache = cache
        self.preemptions = 0
        self._requests: dict[int, Request] = {}
        self._waiting: deque[Request] = deque()
        self._held: list[Request] = []
        self._refused: list[RequestError] = []
        self._running: list[Request] = []
        self._to_share: list[tuple[Request, int]] = []
        self._planned_step = 0
        # Prompts advance even when decode rows alone fill the step.
        self._least_prefill = min(limits.step_tokens, pages.page_size, LEAST_PREFILL)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting) + len(self._held)

    def waiting_for_each(self) -> float:
        """Requests that wait, for each that runs; 0 if their prompts are more than one step takes."""
        tokens = 0
        for request in self._waiting:
            tokens += len(request.token_ids)
            if tokens > self.limits.step_tokens:
                return 0.0
        return len(self._waiting) / max(len(self._running), 1)

    @property
    def held(self) -> int:
        """How many of the waiting ones wait for their token masks alone."""
        return len(self._held)

    def rids(self) -> Iterator[int]:
        """Every request that has not ended."""
        return iter(self._requests)

    @property
    def available_pages(self) -> int:
        """Pages that a new request could have: free ones, and cached ones that nobody uses."""
        return self.pages.free + (self.cache.evictable_pages if self.cache else 0)

    def owned_pages(self) -> Iterator[int]:
        """The pages that running requests own, without those that they share with the prefix cache."""
        return (page for request in self._running for page in request.pages[request.shared :])

    def leaked_pages(self) -> int:
        """How many KV pages are unaccounted for; 0 unless there is a bug."""
        cached = self.cache.cached_pages if self.cache else 0
        return self.pages.leaked(cached, owned=sum(len(request.pages) - request.shared for request in self._running))

    # ---- requests come and go ----

    def submit(self, message: TokenizedRequest, token_mask: TokenMask | None = None) -> RequestError | None:
        """Queue a request, or say why it can never run. A request id that is already in use is ignored.

        Args:
            token_mask: enforces the request's grammar, if it has one. Until it is ready the request is held, and holds
                up no other; its place in the queue is where it stands then.
        """
        if message.rid in self._requests:
            return None
        ready = token_mask is None or token_mask.ready
        kv_tokens = self.pages.total * self.pages.page_size
        problem = self.limits.problem_with(message, kv_tokens) or (token_mask.problem if token_mask else None)
        if problem is not None:
            return RequestError(message.rid, *problem)
        sampling, prompt_len = message.sampling, len(message.input_ids)
        request = Request(
            rid=message.rid,
            token_ids=list(message.input_ids),
            prompt_len=prompt_len,
            sampling=sampling,
            max_new_tokens=sampling.max_new_tokens or min(self.limits.context_length, kv_tokens) - prompt_len,
            stop_ids=self.limits.stop_ids(sampling),
            stamps=message.stamps,
            token_mask=token_mask,
        )
        self._requests[request.rid] = request
        if ready:
            self._waiting.append(request)
        else:
            self._held.append(request)
        return None

    def abort(self, rid: int) -> Request | None:
        """End a request in whatever state it is; the request, or None when it is unknown or has ended already."""
        request = self._requests.get(rid)
        if request is None:
            return None
        self._take_out(request)
        self._end(request, FinishReason.ABORT)
        return request

    def take_refused(self) -> list[RequestError]:
        """The requests that could not go on since the last call; nothing else tells of their end."""
        refused, self._refused = self._refused, []
        return refused

    def flush_cache(self) -> bool:
        """Forget every cached prefix; False, and nothing is done, while requests run or wait."""
        if self._requests:
            return False
        if self.cache:
            self._evict(self.cache.cached_pages)
        return True

    # ---- steps ----

    def plan(self, beside_decodes: int | None = None) -> StepPlan | None:
        """The next step: every decoding request first, then as much prompt as the step's budget leaves room for.

        Where requests decode, that is `beside_decodes` tokens at most: none if it is 0, otherwise in any case
        LEAST_PREFILL, or a page if that is less.

        None when there is nothing to compute before a step in flight is retired, or nothing at all.
        """
        self._share_prompts()
        if self._held:
            self._release_held()
        rows: list[StepRow] = []
        self._plan_decodes(rows)
        decode_rows = len(rows)
        budget = self.limits.step_tokens - decode_rows
        if rows and beside_decodes is not None:
            budget = min(budget, beside_decodes)
        if not rows or beside_decodes != 0:
            self._plan_prompts(rows, max(budget, self._least_prefill))
        if not rows:
            return None
        self._planned_step += 1
        return StepPlan(self._planned_step, rows, decode_rows)

    def retire(self, plan: StepPlan, token_ids: list[int], logprobs: Sequence[RowLogprobs] = ()) -> SampledTokens:
        """Take a completed step's tokens, one per row with `sample` in row order, and the log probabilities it found.

        Plans retire in order.
        """
        self.pages.complete(plan.step)
        sampled = SampledTokens()
        tokens = iter(token_ids)
        anyone_ended, runs_on = False, FinishReason.NONE
        for row in plan.rows:
            if not row.sample:
                self._to_share.append((row.request, row.start + row.length))
                continue
            token, request = next(tokens), row.request
            request.pending -= 1
            if request.finish:
                continue
            request.token_ids.append(token)
            if request.keeps_history:
                request.observe(token)
                if request.token_mask and request.token_mask.problem:
                    self._take_out(request)
                    self._refuse(request, request.token_mask.problem)
                    continue
            output_len = len(request.token_ids) - request.prompt_len
            if output_len == 1:
                sampled.opened.append(request)
            if (
                request.token_mask.ended
                if request.token_mask
                else token in request.stop_ids and output_len > request.sampling.min_new_tokens
            ):
                finish = FinishReason.STOP
            elif output_len >= request.max_new_tokens:
                finish = FinishReason.LENGTH
            else:
                finish = runs_on
            if finish:
                anyone_ended = True
                if not request.pages:
                    self._waiting.remove(request)
                self._end(request, finish)
            elif output_len == 1:
                self._to_share.append((request, request.prompt_len))
            sampled.rids.append(request.rid)
            sampled.token_ids.append(token)
            sampled.finishes.append(finish)
        if logprobs or any(request.prompt_logprobs is not None for request in sampled.opened):
            _hand_over(logprobs, sampled)
        if anyone_ended:
            self._running = [request for request in self._running if not request.finish]
        return sampled

    # ---- how a step is made ----

    def _release_held(self) -> None:
        """Queue the requests whose token masks are ready."""
        for request in [request for request in self._held if request.token_mask and request.token_mask.ready]:
            self._held.remove(request)
            if request.token_mask and request.token_mask.problem:
                self._refuse(request, request.token_mask.problem)
            else:
                self._waiting.append(request)

    def _plan_decodes(self, rows: list[StepRow]) -> None:
        """Add a row for every request that decodes, oldest first, as far as KV pages go."""
        running, page_size = self._running, self.pages.page_size
        index = 0
        # Preemption shortens the list from its end while this walks it from its start.
        while index < len(running):
            request = running[index]
            index += 1
            known = len(request.token_ids) + request.pending
            position = request.computed
            if position + 1 != known or known - request.prompt_len >= request.max_new_tokens:
                continue
            if request.pending and request.needs_last_token:
                continue
            if position == len(request.pages) * page_size and not self._grow(request):
                continue
            rows.append(StepRow(request, position, 1, True))
            request.computed = known
            request.pending += 1

    def _grow(self, request: Request) -> bool:
        """Give a decoding request one more page, taken from the newest running requests if need be.

        False when it has to sit this step out: pages come free only after a step in flight, or it was preempted itself.
        """
        while not self.pages.free:
            if self.pages.retiring:
                return False
            if self._evict(1):
                continue
            victim = self._running.pop()
            self._release_pages(victim)
            victim.computed = 0
            self._waiting.appendleft(victim)
            self.preemptions += 1
            if victim is request:
                return False
        request.pages += self.pages.allocate(1)
        return True

    def _plan_prompts(self, rows: list[StepRow], budget: int) -> None:
        """Add prompt chunks of at most `budget` tokens together, admitting waiting requests as far as that goes."""
        decode_rows = len(rows)
        # Prompts fill up in order, so only the newest running request can be in the middle of its prompt.
        if self._running and self._running[-1].computed + 1 < len(self._running[-1].token_ids):
            budget = self._plan_chunk(rows, self._running[-1], budget, decode_rows)
        while budget > 0 and self._waiting and self._admit(self._waiting[0]):
            budget = self._plan_chunk(rows, self._running[-1], budget, decode_rows)

    def _plan_chunk(self, rows: list[StepRow], request: Request, budget: int, decode_rows: int) -> int:
        """Add the next chunk of a prompt that is not computed to its end; what it leaves of the budget."""
        start, known = request.computed, len(request.token_ids)
        fine = self.limits.fine_chunk
        if decode_rows and fine is not None and known > 2 * fine:
            # Few decode rows are computed with the chunk, and together they should fill one graph.
            budget = min(budget, max(fine - decode_rows if 2 * decode_rows <= fine else fine, self._least_prefill))
        if request.prompt_logprobs is not None:
            # Also bounds the chunks that follow, so that all together stay below the limit.
            budget = min(budget, max(request.first_scored - start, 0) + SCORED_TOKENS)
        length = min(known - start, budget)
        request.computed = start + length
        last = request.computed == known
        request.pending += last
        rows.append(StepRow(request, start, length, last))
        return budget - length

    def _admit(self, request: Request) -> bool:
        """Start the first waiting request, if all it has so far fits and every running one can still grow by a page.

        The reserve keeps a newcomer from being preempted at once; with nobody running whatever was accepted fits.
        """
        running, pages, known = self._running, self.pages, len(request.token_ids)
        # A preempted request can have a last token in flight, which belongs to its prompt now.
        if len(running) >= self.limits.max_running or request.pending:
            return False
        cached: list[int] = []
        if self.cache:
            # What logits are wanted of is computed in any case: the last token, and all for log probabilities.
            shareable = known - 1 if request.prompt_logprobs is None else min(known - 1, request.next_scored)
            request.cache_node, cached = self.cache.match(request.token_ids[:shareable])
            self.cache.lock(request.cache_node)
        needed = pages.pages_for(known) - len(cached)
        reserve = max(len(running), pages.total // 100) if running else 0
        if not self._make_room(needed + reserve):
            self._unlock(request)
            return False
        request.pages = cached + pages.allocate(needed)
        request.shared = len(cached)
        request.computed = len(cached) * pages.page_size
        if not request.scheduled_ns:
            request.scheduled_ns = timeline.now()
            request.cached_tokens = request.computed
        running.append(self._waiting.popleft())
        return True

    def _take_out(self, request: Request) -> None:
        """Take a request from where it runs or waits."""
        # Running requests own at least one page, the others none.
        if request.pages:
            self._running.remove(request)
        elif request in self._held:
            self._held.remove(request)
        else:
            self._waiting.remove(request)

    def _refuse(self, request: Request, refusal: Refusal) -> None:
        """End a request that cannot go on and has been taken out."""
        self._end(request, FinishReason.ABORT)
        self._refused.append(RequestError(request.rid, *refusal))

    def _end(self, request: Request, finish: FinishReason) -> None:
        request.finish = finish
        del self._requests[request.rid]
        self._release_pages(request)

    # ---- pages ----

    def _release_pages(self, request: Request) -> None:
        """Take all pages from a request: the full ones go to the prefix cache, the rest become free."""
        own = request.pages[request.shared :]
        if self.cache and request.pages:
            # Steps in flight write what is counted as computed before any later step can read it.
            computed = request.token_ids[request.shared * self.pages.page_size : request.computed]
            _, path = self.cache.insert(computed, own, request.cache_node)
            own = [page for index, page in enumerate(own) if page not in path[index : index + 1]]
        self._unlock(request)
        request.pages, request.shared = [], 0
        if own:
            self.pages.release(own, self._planned_step)

    def _share_prompts(self) -> None:
        """Share what retired steps have computed of prompts: now, when the tokens of those steps are on their way."""
        to_share, self._to_share = self._to_share, []
        for request, computed in to_share:
            if request.pages:
                self._share_prompt(request, computed)

    def _share_prompt(self, request: Request, computed: int) -> None:
        """Put the full pages of a prompt's first tokens, just computed, into the prefix cache for requests that come.

        Chunk by chunk: a whole long prompt at once would hold up the next step.
        """
        shared, size = request.shared, self.pages.page_size
        full = computed // size
        if not self.cache or full <= shared:
            return
        own = request.pages[shared:full]
        node, path = self.cache.insert(request.token_ids[shared * size : full * size], own, request.cache_node)
        self.cache.lock(node, instead_of=request.cache_node)
        # Where another request was first, its copy is used from now on.
        duplicates = [page for page, kept in zip(own, path, strict=True) if page != kept]
        request.shared, request.cache_node = full, node
        if duplicates:
            request.pages = [*request.pages[:shared], *path, *request.pages[full:]]
            self.pages.release(duplicates, self._planned_step)

    def _unlock(self, request: Request) -> None:
        if self.cache and request.cache_node is not None:
            self.cache.unlock(request.cache_node)
        request.cache_node = None

    def _make_room(self, count: int) -> bool:
        """Have `count` free pages, by forgetting cached prefixes if need be; False while there are too few."""
        short = count - self.pages.free
        if short > 0 and count <= self.available_pages:
            self._evict(short)
        return self.pages.free >= count

    def _evict_ahead(self) -> None:
        """Keep a free page for every running request, since evicted ones come free only after a step in flight."""
        self._evict(len(self._running) - self.pages.free - self.pages.retiring)

    def _evict(self, count: int) -> bool:
        """Forget up to `count` cached pages that nobody uses; whether there were any."""
        evicted = self.cache.evict(count) if self.cache and count > 0 else []
        if evicted:
            self.pages.release(evicted, self._planned_step)
        return bool(evicted)


def _hand_over(found: Sequence[RowLogprobs], sampled: SampledTokens) -> None:
    """Bring log probabilities to their rows; those of a prompt wait for its request's first row."""
    rows = {rid: row for row, rid in enumerate(sampled.rids)}
    parts = sampled.logprobs
    for one in found:
        if one.part.of_prompt:
            one.request.collect(one.position, one.part)
        elif one.request.rid in rows:
            one.part.row = rows[one.request.rid]
            parts.append(one.part)
    for request in sampled.opened:
        prompt = request.take_prompt_logprobs()
        if prompt is not None:
            prompt.row = rows[request.rid]
            parts.append(prompt)
    parts.sort(key=lambda part: (part.row, not part.of_prompt))
