"""The client processes against a real HTTP server that speaks each wire and misbehaves on purpose."""

from __future__ import annotations

import pytest
from bench_stub_server import DELTA_SECONDS, stub_server
from benchlib.load import Load, LoadGenerator
from benchlib.stats import inter_token_gaps
from benchlib.target import Target
from benchlib.workloads import Session, Turn


@pytest.fixture(scope="module")
def generator():
    with LoadGenerator(2) as pool:
        yield pool


@pytest.fixture
def server():
    with stub_server() as stub:
        yield stub


def ask(generator, server, prompts, wire="minisgl", concurrency=1, tokens=6, **options):
    sessions = [Session((Turn(prompt, tokens),)) for prompt in prompts]
    return generator.run(Load(Target("127.0.0.1", server.port, wire), sessions, concurrency, **options))


@pytest.mark.parametrize("wire", ["minisgl", "sglang"])
@pytest.mark.parametrize("mode", ["good", "merged"])
def test_tokens_are_counted_whatever_the_chunks(generator, server, wire, mode):
    result = ask(generator, server, [mode], wire)
    (record,) = result.records
    assert record.problem == ""
    assert record.output_tokens == 6
    assert sum(tokens for _, tokens in record.arrivals) == 6
    assert record.prompt_tokens == 3
    assert len(record.token_ids) == 6
    assert 0 < record.ttft_ms <= record.first_text_ms < record.e2e_ms
    assert record.e2e_ms >= (len(record.arrivals) - 1) * DELTA_SECONDS * 1000
    assert sum(inter_token_gaps(record.arrivals)) <= record.e2e_ms - record.ttft_ms + 0.001


def test_lines_split_over_packets_are_whole_again(generator, server):
    (record,) = ask(generator, server, ["split"]).records
    assert record.problem == ""
    assert record.text == "é"
    assert record.arrivals[0][1] == 6


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("refused", "HTTP 503"),
        ("garbage", "malformed HTTP"),
        ("cut", "connection lost"),
        ("error", "the engine failed"),
        ("empty", "no tokens"),
        ("mute", "no text"),
        ("short", "asked for exactly 6 tokens, got 5"),
        ("miscounted", "6 tokens were streamed but usage says 7"),
        ("endless", "without its end event"),
    ],
)
def test_every_way_to_misbehave_is_a_problem_with_its_reason(generator, server, mode, reason):
    (record,) = ask(generator, server, [mode]).records
    assert reason in record.problem
    assert record.ttft_ms == record.output_tokens == 0


@pytest.mark.parametrize(
    ("mode", "reason"), [("error", "without completion_tokens"), ("aborted", "aborted"), ("endless", "end event")]
)
def test_sglang_streams_that_end_badly_are_problems(generator, server, mode, reason):
    (record,) = ask(generator, server, [mode], "sglang").records
    assert reason in record.problem


def test_a_silent_server_is_a_problem_after_the_timeout(generator, server):
    (record,) = ask(generator, server, ["silent"], request_timeout=0.3).records
    assert "no complete answer within 0.3 s" in record.problem


def test_nobody_listening_is_a_problem(generator):
    class Nobody:
        port = 1

    (record,) = ask(generator, Nobody, ["good"]).records
    assert "refused" in record.problem.lower()


def test_nothing_more_is_asked_after_a_broken_answer(generator, server):
    result = ask(generator, server, ["good", "good", "cut", "cut"] + ["good"] * 20, concurrency=2)
    assert sum(bool(record.problem) for record in result.records) == 2
    assert len(result.records) < 10


@pytest.mark.parametrize("concurrency", [1, 3, 5])
def test_a_closed_loop_keeps_its_concurrency_and_its_connections(generator, server, concurrency):
    ended = []
    result = generator.run(
        Load(
            Target("127.0.0.1", server.port, "minisgl"),
            [Session((Turn(f"good {number}", 30),)) for number in range(15)],
            concurrency,
        ),
        ended.append,
    )
    assert len(result.records) == sum(ended) == 15
    assert not [record.problem for record in result.records if record.problem]
    assert server.most_running == concurrency
    assert server.connections == concurrency
    assert sorted(server.prompts) == sorted(f"good {number}" for number in range(15))
    assert 0 < result.client_busy < 2


def test_fresh_connections_are_fresh_and_their_connect_is_timed(generator, server):
    records = ask(generator, server, ["good"] * 5, fresh_connections=True).records
    assert server.connections == 5
    assert all(record.connected_ns > record.started_ns for record in records)
    assert all(record.connected_ns < record.first_byte_ns < record.finished_ns for record in records)


def test_an_open_loop_starts_on_time_whatever_the_server_does(generator, server):
    arrivals = [0.02 * number for number in range(10)]
    result = ask(generator, server, ["good"] * 10, concurrency=0, tokens=20, arrivals=arrivals)
    records = result.records
    assert not [record.problem for record in records if record.problem]
    # One answer takes four gaps between arrivals, so they must have overlapped.
    assert server.most_running >= 3
    spread = (records[-1].started_ns - records[0].started_ns) / 1e9
    assert 0.17 < spread < 1


def test_a_conversation_keeps_its_context(generator, server):
    turns = (Turn("good start", 2), Turn(" more", 2), Turn(" end", 2))
    load = Load(Target("127.0.0.1", server.port, "minisgl"), [Session(turns)], concurrency=1)
    assert len(generator.run(load).records) == 3
    assert server.prompts == ["good start", "good startt0 t1  more", "good startt0 t1  moret0 t1  end"]


@pytest.mark.parametrize("url", ["https://x:1", "http://", "ftp://a"])
def test_a_url_that_cannot_be_measured_is_refused(url):
    with pytest.raises(ValueError, match="expected a URL such as"):
        Target.of_url(url, "minisgl")
