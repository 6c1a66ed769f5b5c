"""Forgetting the prefix cache: only when idle, completely, and without losing a page; the message's way through."""

from __future__ import annotations

from scheduler_fakes import make_scheduler, tokenized
from test_scheduler import run_out, step
from worker_process import Wiring, WorkerProcess, demo_model_spec, take

from minisgl.demo_model import demo_model_dir
from minisgl.messages import CacheFlushed, DeltaBatch, RequestError, make_request_id

PROMPT = list(range(1, 10))


def test_a_flushed_prefix_is_computed_again() -> None:
    scheduler, engine = make_scheduler(num_pages=16, page_size=4, caches=True)
    for rid in (1, 2):
        scheduler.submit(tokenized(rid, PROMPT, ignore_eos=True, max_new_tokens=3))
        run_out(scheduler, engine)
    assert scheduler.cache is not None and scheduler.cache.cached_pages
    assert scheduler.flush_cache()
    assert (scheduler.cache.cached_pages, scheduler.pages.free, scheduler.leaked_pages()) == (0, 16, 0)
    scheduler.submit(tokenized(3, PROMPT, ignore_eos=True, max_new_tokens=3))
    plan = scheduler.plan()
    assert plan is not None and plan.rows[0].start == 0, "the prefix was still cached"


def test_nothing_is_flushed_while_requests_run_or_wait() -> None:
    scheduler, engine = make_scheduler(num_pages=16, page_size=4, caches=True)
    scheduler.submit(tokenized(1, PROMPT, ignore_eos=True, max_new_tokens=3))
    assert not scheduler.flush_cache()
    for _ in range(2):
        step(scheduler, engine)
    assert scheduler.cache is not None
    cached = scheduler.cache.cached_pages
    assert cached and not scheduler.flush_cache()
    assert scheduler.cache.cached_pages == cached


def test_pages_of_a_flushed_cache_come_free_after_the_step_in_flight() -> None:
    scheduler, engine = make_scheduler(num_pages=16, page_size=4, caches=True)
    scheduler.submit(tokenized(1, PROMPT, ignore_eos=True, max_new_tokens=5))
    step(scheduler, engine)
    plan = scheduler.plan()
    assert plan is not None
    launched = engine.launch(plan)
    scheduler.abort(1)
    assert scheduler.flush_cache()
    assert scheduler.pages.free < 16 and scheduler.leaked_pages() == 0
    scheduler.retire(plan, engine.retire(launched))
    assert scheduler.pages.free == 16


def test_without_a_prefix_cache_there_is_nothing_to_do() -> None:
    scheduler, _ = make_scheduler(caches=False)
    assert scheduler.flush_cache()


def test_the_detokenizer_passes_the_answer_on_to_the_http_worker_that_asked() -> None:
    wiring = Wiring()
    spec = wiring.spec("detokenizer", demo_model_spec(demo_model_dir()), http_workers=2)
    with WorkerProcess(wiring, spec) as process:
        inboxes = [wiring.inbox(f"http-{index}", 1, DeltaBatch, RequestError, CacheFlushed) for index in range(2)]
        for index, inbox in enumerate(inboxes):
            process.announce(inbox, f"http-{index}")
        answers = [CacheFlushed(make_request_id(index, 1, 5), 0, index == 1) for index in (1, 0)]
        process.send(CacheFlushed(make_request_id(7, 1, 5), 0, True), *answers)
        assert [take(inbox) for inbox in inboxes] == [[answers[1]], [answers[0]]]
    wiring.close()
