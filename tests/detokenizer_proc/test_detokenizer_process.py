"""The detokenizer: its service driven directly, and the real process on real pipes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import sample_tokenizers
from worker_process import Wiring, WorkerProcess, demo_model_spec, take

from minisgl import timeline
from minisgl.channels import Inbox
from minisgl.demo_model import demo_model_dir
from minisgl.detokenizer_proc.incremental import TokenTexts
from minisgl.detokenizer_proc.main import DetokenizerService
from minisgl.messages import (
    NO_TOKEN,
    AbortRequest,
    DeltaBatch,
    FinishReason,
    GenerateRequest,
    Logprobs,
    RequestError,
    StreamOpen,
    TokenBatch,
    WorkerDown,
    WorkerUp,
    encode,
    make_request_id,
)
from minisgl.sampling_params import SamplingParams
from minisgl.tokenizer_proc.tokenizer_files import load_tokenizer

NONE, STOP, LENGTH, ABORT = FinishReason
TEXTS = TokenTexts(sample_tokenizers.byte_level())
IM_END = 2


def rid(counter: int, http_index: int = 0) -> int:
    return make_request_id(http_index, 1, counter)


def ids(text: str) -> list[int]:
    token_ids: list[int] = TEXTS.tokenizer.encode(text).ids
    return token_ids


def opening(request: int, stop: list[str] | None = None) -> StreamOpen:
    return StreamOpen(request, 7, 3, stop or [], True, False, [10, 20])


def batch(
    *rows: tuple[int, int, FinishReason], opened: list[StreamOpen] | None = None, replica: int = 0, epoch: int = 1
) -> TokenBatch:
    columns = [list(column) for column in zip(*rows, strict=True)] or [[], [], []]
    return TokenBatch(replica, epoch, 1, 0, 0, opened or [], *columns)


@pytest.fixture
def wiring() -> Iterator[Wiring]:
    wiring = Wiring()
    yield wiring
    wiring.close()


class Bench:
    """A DetokenizerService in this process, with two http workers and two schedulers as peers."""

    def __init__(self, wiring: Wiring, narrate: bool = False) -> None:
        spec = wiring.spec(
            "detokenizer", demo_model_spec(demo_model_dir()), replicas=2, http_workers=2, narrate=narrate
        )
        self.service = DetokenizerService(spec, TEXTS)
        self.http = [wiring.inbox(f"http-{i}", 1, DeltaBatch, RequestError) for i in range(2)]
        self.schedulers = [wiring.inbox(f"scheduler-{i}", 1, AbortRequest) for i in range(2)]
        for index, inbox in enumerate(self.http):
            self.service.handle(WorkerUp(f"http-{index}", 1, inbox.address))
        for index, inbox in enumerate(self.schedulers):
            self.service.handle(WorkerUp(f"scheduler-{index}", 1, inbox.address))

    def round(self, *messages: TokenBatch | RequestError | WorkerDown | WorkerUp) -> None:
        for message in messages:
            self.service.handle(message)
        self.service.send_deltas()

    def stat(self, name: str) -> int:
        return int(self.service.stats().get(name, 0))


def nothing_in(inbox: Inbox) -> bool:
    return not inbox.wait(50)


def test_a_round_is_one_message_a_worker_and_one_row_a_request(wiring: Wiring) -> None:
    bench = Bench(wiring)
    first, second, third = rid(1), rid(2), rid(3, http_index=1)
    hello, world = ids("hello"), ids("world")
    bench.round(
        batch((first, hello[0], NONE), (third, world[0], NONE), opened=[opening(first), opening(third)]),
        batch((second, world[0], NONE), *((first, token, NONE) for token in hello[1:]), opened=[opening(second)]),
        batch(*((second, token, NONE) for token in world[1:]), (first, IM_END, STOP)),
    )
    (deltas,) = take(bench.http[0])
    assert deltas.rids == [first, second]
    assert deltas.texts == ["hello", "world"]
    assert deltas.finishes == [STOP, NONE]
    assert deltas.matched == {0: IM_END}
    assert deltas.token_counts == [len(hello) + 1, len(world)]
    assert deltas.token_ids == [*hello, IM_END, *world]
    assert [(o.row, o.prompt_tokens, o.cached_tokens) for o in deltas.openings] == [(0, 7, 3), (1, 7, 3)]
    (deltas,) = take(bench.http[1])
    assert (deltas.rids, deltas.token_ids) == ([third], world[:1])
    assert bench.stat("streams") == 2


def test_the_opening_goes_with_the_first_text_and_is_stamped_once(wiring: Wiring) -> None:
    bench = Bench(wiring)
    before = timeline.now()
    smile = ids("𓀀")
    for index, token in enumerate(smile):
        bench.round(batch((rid(1), token, NONE), opened=[opening(rid(1))] if index == 0 else []))
    bench.round(batch((rid(1), ids("x")[0], LENGTH)))
    with_text, last = take(bench.http[0], 2)
    (opened,) = with_text.openings
    assert (with_text.texts, with_text.token_ids) == (["𓀀"], smile)
    assert opened.stamps[:2] == [10, 20]
    assert before <= opened.stamps[2] <= opened.stamps[3] <= timeline.now()
    assert last.openings == []


def test_a_stop_string_ends_the_request_and_aborts_it_at_its_replica(wiring: Wiring) -> None:
    bench = Bench(wiring)
    rows = [(rid(1), token, NONE) for token in ids("hello world")]
    bench.round(batch(*rows, opened=[opening(rid(1), ["world"])], replica=1))
    bench.round(batch((rid(1), 5, NONE), replica=1))
    assert bench.stat("streams") == 1
    bench.round(batch((rid(1), NO_TOKEN, ABORT), replica=1))
    (deltas,) = take(bench.http[0])
    assert (deltas.texts, deltas.finishes, deltas.matched) == (["hello "], [STOP], {0: "world"})
    assert take(bench.schedulers[1]) == [AbortRequest(rid(1))]
    assert nothing_in(bench.http[0])
    assert nothing_in(bench.schedulers[0])
    assert bench.stat("streams") == 0


def test_a_stop_string_in_the_last_row_needs_no_abort(wiring: Wiring) -> None:
    bench = Bench(wiring)
    *rows, last = [(rid(1), token, NONE) for token in ids("hello world")]
    bench.round(batch(*rows, (*last[:2], LENGTH), opened=[opening(rid(1), ["world"])]))
    (deltas,) = take(bench.http[0])
    assert (deltas.finishes, deltas.matched) == ([STOP], {0: "world"})
    assert nothing_in(bench.schedulers[0])
    assert bench.stat("streams") == 0


def test_an_error_follows_the_text_before_it_and_is_the_only_end(wiring: Wiring) -> None:
    bench = Bench(wiring)
    failed, stopped, unknown = rid(1), rid(2), rid(3)
    rows = [(failed, ids("hello")[0], NONE), *((stopped, token, NONE) for token in ids("world"))]
    errors = [RequestError(request, 500, "engine_failure", "lost") for request in (failed, stopped, unknown)]
    bench.round(batch(*rows, opened=[opening(failed), opening(stopped, ["world"])]), *errors)
    deltas, *forwarded = take(bench.http[0], 3)
    assert (deltas.rids, deltas.finishes) == ([failed, stopped], [NONE, STOP])
    assert forwarded == [errors[0], errors[2]]
    assert bench.stat("streams") == 0


def test_rows_of_unknown_requests_are_counted_and_dropped(wiring: Wiring) -> None:
    bench = Bench(wiring)
    bench.round(
        batch((rid(1), 5, LENGTH), (rid(1), 5, NONE), (rid(9), 5, NONE), opened=[opening(rid(1))]),
        batch((rid(1, http_index=7), 5, NONE), opened=[opening(rid(1, http_index=7))]),
        batch((rid(2), 5, NONE), opened=[opening(rid(2))], replica=99),
    )
    (deltas,) = take(bench.http[0])
    assert (deltas.rids, deltas.token_counts) == ([rid(1)], [1])
    assert (bench.stat("unknown_rows"), bench.stat("stale_rows"), bench.stat("streams")) == (3, 1, 0)


def test_a_dead_replica_takes_its_streams_along_and_its_late_batches_are_dropped(wiring: Wiring) -> None:
    bench = Bench(wiring)
    lost, kept = rid(1), rid(2)
    bench.round(
        batch((lost, 5, NONE), opened=[opening(lost)]), batch((kept, 5, NONE), opened=[opening(kept)], replica=1)
    )
    bench.round(WorkerDown("scheduler-0", 1, "killed"))
    assert bench.stat("streams") == 1
    # What the dead process had still sent arrives now; a stream it opened would never end.
    bench.round(batch((rid(3), 5, NONE), opened=[opening(rid(3))]), batch((kept, 5, NONE), replica=1))
    assert (bench.stat("streams"), bench.stat("stale_rows")) == (1, 1)
    # The next life's first batch may overtake its WorkerUp.
    bench.round(batch((rid(4), 5, NONE), opened=[opening(rid(4))], epoch=2))
    bench.round(WorkerUp("scheduler-0", 2, bench.schedulers[0].address), WorkerDown("scheduler-0", 1, "said twice"))
    bench.round(batch((rid(4), 5, LENGTH), epoch=2))
    rounds = take(bench.http[0], 4)
    assert [deltas.rids for deltas in rounds] == [[lost, kept], [kept], [rid(4)], [rid(4)]]


def test_one_poisoned_stream_harms_no_other(wiring: Wiring) -> None:
    bench = Bench(wiring)
    # No validated request has an empty stop string; a defective peer could send one.
    poisoned, well = rid(1), rid(2)
    bench.round(
        batch((poisoned, 5, NONE), (well, ids("x")[0], NONE), opened=[opening(poisoned, [""]), opening(well)]),
    )
    bench.round(batch((poisoned, 5, NONE), (well, ids("y")[0], LENGTH)), batch((poisoned, NO_TOKEN, ABORT)))
    error, first, second = take(bench.http[0], 3)
    assert (error.rid, error.status, error.code) == (poisoned, 500, "detokenizer_error")
    assert (first.texts, second.texts) == (["x"], ["y"])
    assert take(bench.schedulers[0]) == [AbortRequest(poisoned)]
    assert bench.stat("streams") == 0


def test_no_stream_is_evicted_however_many_there_are(wiring: Wiring) -> None:
    """sglang#2812: past 65536 states the oldest was dropped and its next token killed the detokenizer."""
    bench = Bench(wiring)
    requests = [rid(counter) for counter in range(70_000)]
    *half_a_character, rest = ids("𓀀")
    rows = [(requests[0], token, NONE) for token in half_a_character] + [(r, IM_END, NONE) for r in requests[1:]]
    bench.service.handle(batch(*rows, opened=[opening(r) for r in requests]))
    bench.service.send_deltas()
    bench.round(batch((requests[0], rest, LENGTH)))
    (deltas,) = take(bench.http[0])
    assert deltas.texts == ["𓀀"]


@pytest.mark.parametrize("narrate", [True, False])
def test_narration_tells_every_step(wiring: Wiring, caplog: pytest.LogCaptureFixture, narrate: bool) -> None:
    bench = Bench(wiring, narrate)
    token = ids(" world")[0]
    with caplog.at_level(logging.DEBUG, logger="minisgl"):
        bench.round(batch((rid(1), token, NONE), (rid(1), IM_END, STOP), opened=[opening(rid(1))]))
    told = [
        f"request {rid(1)}: decode step 1: token id {token} -> {TEXTS.describe(token)}",
        f'request {rid(1)}: decode step 2: token id {IM_END} -> "<|im_end|>"',
    ]
    assert [record.getMessage() for record in caplog.records] == (told if narrate else [])


def test_the_process_survives_garbage_and_goes_on(wiring: Wiring) -> None:
    tokenizer = load_tokenizer(demo_model_dir())
    http = wiring.inbox("http-0", 1, DeltaBatch, RequestError)
    scheduler = wiring.inbox("scheduler-0", 1, AbortRequest)
    wrong_type = GenerateRequest(rid(1), "hello", SamplingParams(), [])
    with WorkerProcess(wiring, wiring.spec("detokenizer", demo_model_spec(demo_model_dir()))) as worker:
        worker.announce(http, "http-0")
        worker.announce(scheduler, "scheduler-0")
        worker.send_frames(b"")
        worker.send_frames(os.urandom(1000))
        worker.send_frames(encode(batch((rid(1), 5, NONE)))[:-1])
        worker.send_frames(b"two", b"frames")
        worker.send(wrong_type)
        assert worker.wait_stats(lambda stats: stats["frames_dropped"] == 5)
        token_ids = tokenizer.encode("one two three").ids
        worker.send(batch(*((rid(1), t, NONE) for t in token_ids), opened=[opening(rid(1), ["three"])]))
        (deltas,) = take(http)
        assert (deltas.texts, deltas.matched) == (["one two "], {0: "three"})
        assert take(scheduler) == [AbortRequest(rid(1))]
        worker.send(batch((rid(1), NO_TOKEN, ABORT)), RequestError(rid(2), 400, "code", "message"))
        assert take(http) == [RequestError(rid(2), 400, "code", "message")]
        assert worker.wait_stats(lambda stats: stats.get("streams") == 0)


def scores(row: int, *token_ids: int, of_prompt: bool = False, most: int = 0) -> Logprobs:
    values = [-float(token_id) for token_id in token_ids]
    top_ids = [(token_id + place) % 300 for token_id in token_ids for place in range(most)]
    return Logprobs(row, of_prompt, list(token_ids), values, top_ids, [-0.5] * len(top_ids))


def with_pieces(part: Logprobs) -> Logprobs:
    return replace(part, pieces=[TEXTS.piece(token_id) for token_id in (*part.token_ids, *part.top_ids)])


def test_log_probabilities_go_with_the_row_that_shows_their_tokens(wiring: Wiring) -> None:
    bench = Bench(wiring)
    asking, silent = rid(1), rid(2)
    *half, rest = ids("𓀀")
    prompt = scores(1, 7, 8, of_prompt=True, most=1)
    first = batch((silent, half[0], NONE), (asking, half[0], NONE), opened=[opening(silent), opening(asking)])
    first.logprobs = [prompt, scores(1, half[0], most=2)]
    bench.round(first)
    assert nothing_in(bench.http[0])
    for token_id in (*half[1:], rest):
        later = batch((asking, token_id, NONE))
        later.logprobs = [scores(0, token_id, most=2)]
        bench.round(later)
    last = batch((asking, IM_END, STOP), (silent, IM_END, STOP))
    last.logprobs = [scores(0, IM_END, most=2)]
    bench.round(last)
    shown, ended = take(bench.http[0], 2)
    assert shown.texts == ["𓀀"] and shown.token_ids == [*half, rest]
    together = with_pieces(scores(0, *half, rest, most=2))
    assert shown.logprobs == [with_pieces(replace(prompt, row=0)), together]
    assert b"".join(together.pieces[:4]) == "𓀀".encode()
    assert ended.logprobs == [with_pieces(scores(0, IM_END, most=2))]
    assert ended.logprobs[0].pieces[0] == b"<|im_end|>"


def test_log_probabilities_end_with_the_token_that_completes_a_stop_string(wiring: Wiring) -> None:
    bench = Bench(wiring)
    token_ids = ids("hello world, the end")
    arriving = batch(*((rid(1), token_id, NONE) for token_id in token_ids), opened=[opening(rid(1), ["world"])])
    arriving.logprobs = [scores(row, token_id) for row, token_id in enumerate(token_ids)]
    bench.round(arriving)
    late = batch((rid(1), 9, NONE), (rid(1), NO_TOKEN, ABORT))
    late.logprobs = [scores(0, 9)]
    bench.round(late)
    (deltas,) = take(bench.http[0])
    assert deltas.matched == {0: "world"}
    assert deltas.logprobs == [with_pieces(scores(0, *deltas.token_ids))]
    assert len(deltas.token_ids) < len(token_ids)
    assert bench.stat("streams") == 0


def test_a_stop_string_before_min_new_tokens_does_not_count(wiring: Wiring) -> None:
    bench = Bench(wiring)
    token_ids = ids("hello hello")
    opened = opening(rid(1), ["hello"])
    opened.min_new_tokens = len(ids("hello"))
    bench.round(batch(*((rid(1), token_id, NONE) for token_id in token_ids), opened=[opened]))
    (deltas,) = take(bench.http[0])
    assert (deltas.texts, deltas.matched) == (["hello "], {0: "hello"})
