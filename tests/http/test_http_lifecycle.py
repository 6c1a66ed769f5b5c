"""The worker among its kin: health, admission, drain, shutdown, garbage in its inbox, books that balance, its log."""

from __future__ import annotations

import json
import random
import threading
import time
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import pytest
import zmq
from http_rig import WAIT_SECONDS, Rig, lines, running
from worker_process import ONE_OF_EACH

from minisgl.config import ModelSpec, ServerConfig, WorkerSpec
from minisgl.http.accounting import OUTCOMES, Accounts, Call
from minisgl.http.answers import EventStream, Stream
from minisgl.http.health import HealthView
from minisgl.http.native import JsonLines
from minisgl.http.protocol import STALL_SECONDS, Ingress
from minisgl.http.streaming import MAX_HELD_BYTES, Streams
from minisgl.http.writer import ResponseWriter
from minisgl.messages import (
    AbortRequest,
    Drain,
    Failed,
    FinishReason,
    GenerateRequest,
    Health,
    RequestError,
    TokenizedRequest,
    WorkerUp,
    encode,
)
from minisgl.sampling_params import SamplingParams
from minisgl.timeline import now


def test_health_tells_what_the_supervisor_says_and_when_it_is_silent() -> None:
    with running() as rig:
        workers = {"scheduler-0": {"state": "up", "epoch": 1}}
        sick = "scheduler-0 died 0.1 s ago: killed"

        def told(report: Health) -> tuple[int, Any]:
            """The first answer of a look at /health that follows such a report closely enough."""
            seconds, deadline = 1.0, time.monotonic() + 20
            while True:
                rig.ring.send(report)
                began = time.monotonic()
                status, body = rig.get("/health")
                seconds = min(seconds, time.monotonic() - began)
                if body["problems"] == report.problems:
                    assert seconds < 0.2
                    return status, body
                assert time.monotonic() < deadline, body

        assert told(Health([], workers)) == (200, {"status": "ok", "problems": [], "workers": workers})
        assert told(Health([sick], {})) == (503, {"status": "unhealthy", "problems": [sick], "workers": {}})
        assert told(Health([], workers))[0] == 200
        time.sleep(1.1)
        # After a rest the supervisor has a second to come round, too.
        told_at = time.monotonic()
        while (answer := rig.get("/health"))[0] == 200:
            assert time.monotonic() < told_at + 20
            time.sleep(0.05)
        status, body = answer
        assert status == 503
        assert body["problems"][0].startswith("the supervisor has been silent for 1.")
        time.sleep(0.7)
        assert rig.get("/health")[0] == 503, "it does not rest in the meantime"


def test_health_before_the_first_report() -> None:
    view = HealthView(list)
    assert view.problems() == ["the supervisor has not reported yet"]
    assert not view.may_rest()
    view.take(Health([], {"http-0": {}}))
    assert (view.problems(), view.workers()) == ([], {"http-0": {}})
    assert view.may_rest()


def test_health_is_the_last_word_by_whichever_way_it_came() -> None:
    left = [Health([], {"http-0": {"pid": 1}}), Health([], {"http-0": {"pid": 2}})]
    news = Health(["scheduler-0 died"], {})
    waiting = [*left]

    def take() -> list[Health]:
        taken = waiting[:]
        waiting.clear()
        return taken

    view = HealthView(take)
    view.take(news)
    assert view.problems() == ["scheduler-0 died"], "what was left before it is older"
    waiting.append(Health([], {"http-0": {"pid": 3}}))
    assert (view.problems(), view.workers()) == ([], {"http-0": {"pid": 3}})


def test_a_silent_supervisor_is_given_time_when_a_rest_ends() -> None:
    now = time.monotonic_ns()
    view = HealthView(list)
    view.take(Health([], {}, now - 30 * 10**9))
    assert view.problems()[0].startswith("the supervisor has been silent for 30.")
    view.awake()
    assert view.problems() == [] and not view.may_rest()


def test_the_first_answer_after_a_rest_tells_the_present_time() -> None:
    with running() as rig:
        deadline = time.monotonic() + WAIT_SECONDS
        rig.pulse.take()
        while not any(beat.rests for beat in rig.pulse.take()):
            assert time.monotonic() < deadline, "without a connection it rests"
            rig.healthy()
            time.sleep(0.9)
        time.sleep(2.5)
        answer, asked_at = rig.post({}), time.time()
        date = answer.getresponse().headers["date"]
        assert asked_at - 1.5 < parsedate_to_datetime(date).timestamp() <= asked_at + 1.0


def test_model_info_names_the_model() -> None:
    with running() as rig:
        for path in ("/get_model_info", "/model_info"):
            status, info = rig.get(path)
            assert status == 200
            assert (info["served_model_name"], info["tokenizer_path"]) == ("demo", "models/demo")
            assert info["is_generation"] is True


def test_admission_is_bounded() -> None:
    with running(max_queued_requests=3) as rig:
        open_requests = [rig.ask({"prompt": str(index)}) for index in range(3)]
        connection = rig.post({"prompt": "one too many"})
        response = connection.getresponse()
        assert response.status == 503
        assert response.headers["Retry-After"] == "1"
        error = json.loads(response.read())["error"]
        assert error["code"] == "queue_full"
        assert "3 requests" in error["message"]
        # A client that left still counts until the scheduler has let go of its request.
        leaver, left_request = open_requests.pop()
        leaver.close()
        rig.from_http(AbortRequest)
        assert rig.error({"prompt": "x"})[0] == 503
        rig.delta(left_request, "", [], FinishReason.ABORT)
        rig.stats(streams=2)
        open_requests.append(rig.ask({"prompt": "x"}))
        for connection, request in open_requests:
            rig.answer(request, "ok")
            assert connection.getresponse().status == 200
        rig.stats(rejected=2, ok=3, aborted=1, in_flight=0)


def test_admission_counts_the_requests_of_the_other_http_workers() -> None:
    with running(max_queued_requests=3, http_workers=2) as rig:

        def tell(streams: int) -> None:
            stats = {"http-0": {"streams": 7}, "http-1": {"streams": streams}}
            rig.ring.send(Health([], {name: {"state": "ready", "stats": told} for name, told in stats.items()}))
            while rig.get("/health")[1]["workers"].get("http-1", {}).get("stats") != stats["http-1"]:
                time.sleep(0.01)

        tell(streams=3)
        assert rig.error({"prompt": "x"})[1]["code"] == "queue_full"
        tell(streams=2)
        connection, request = rig.ask({"prompt": "x"})
        assert rig.error({"prompt": "y"})[0] == 503
        rig.answer(request, "ok")
        assert connection.getresponse().status == 200


def test_drain_finishes_what_runs_and_takes_nothing_new() -> None:
    with running() as rig:
        connection, request = rig.ask({"prompt": "Hi"})
        rig.healthy()
        rig.ring.send(Drain())
        rig.stats(draining=1, in_flight=1)
        refused = rig.post({"prompt": "new"}).getresponse()
        assert (refused.status, refused.headers["Retry-After"]) == (503, "1")
        assert json.loads(refused.read())["error"]["code"] == "draining"
        status, body = rig.get("/health")
        assert (status, body["problems"]) == (503, ["the server is draining"])
        rig.answer(request, "a", "b")
        assert [line.get("text_delta") for line in lines(connection.getresponse())] == ["a", "b", None]
        rig.stats(in_flight=0, ok=1, rejected=1)
        assert rig.process.is_alive()
        assert rig.stop() == 0


def test_shutdown_ends_every_request_with_an_error() -> None:
    rig = Rig()
    shown, shown_request = rig.ask({"prompt": "shown"})
    rig.delta(shown_request, "a", opens=True)
    response = shown.getresponse()
    response.readline()
    fresh, _ = rig.ask({"prompt": "fresh"})
    whole, whole_request = rig.ask({"prompt": "whole", "stream": False})
    rig.delta(whole_request, "a", opens=True)
    uploading = rig.raw_connection()
    uploading.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    rig.stats(in_flight=4)
    began = time.monotonic()
    assert rig.stop() == 0
    # Nobody waits for the rest of the upload.
    assert time.monotonic() - began < 8
    (error,) = lines(response)
    assert (error["event"], error["code"]) == ("error", "shutting_down")
    for connection in (fresh, whole):
        refused = connection.getresponse()
        assert refused.status == 503
        assert json.loads(refused.read())["error"]["code"] == "shutting_down"
    uploading.close()


def test_a_failing_dispatcher_leaves_no_hole_in_a_stream() -> None:
    rig = Rig()
    connection, request = rig.ask({"prompt": "Hi"})
    rig.delta(request, "a", opens=True)
    response = connection.getresponse()
    response.readline()
    rig.ring.send(WorkerUp("tokenizer-0", 99, "no://address"))
    rig.delta(request, "never to be shown")
    (error,) = lines(response)
    assert (error["event"], error["code"]) == ("error", "internal_error")
    assert "ZMQError" in rig.from_worker(Failed).cause
    assert rig.stop() == 1


def parked_writers(*clients: tuple[str, float, int]) -> tuple[Streams, dict[str, ResponseWriter]]:
    """A table with clients of (name, seconds for which it has been parked, bytes that its socket has not taken)."""
    spec = WorkerSpec(
        "http-0", "http", 0, 1, "", "", 1, ServerConfig(**ONE_OF_EACH), ModelSpec("", "", "", 1, 1, (), "")
    )
    streams, writers = Streams(spec), {}

    async def never_sent(message: object) -> None:
        raise AssertionError(message)

    for name, parked_for, unsent in clients:
        writer = ResponseWriter(Ingress(0, name, never_sent, lambda: None, lambda unsent=unsent: unsent))
        call = Call(Accounts(), name, now())
        sink = EventStream(JsonLines())
        stream = Stream(call=call, writer=writer, sink=sink, prompt="", sampling=SamplingParams(), name=name)
        streams.submit([stream])
        writer.parked_since_ns = parked_for and now() - int(parked_for * 1e9)
        writers[name] = writer
    return streams, writers


def dropped(writers: dict[str, ResponseWriter]) -> set[str]:
    return {name for name, writer in writers.items() if writer.dropped}


def test_a_client_that_stalls_for_long_is_given_up() -> None:
    streams, writers = parked_writers(("fast", 0, 0), ("slow", STALL_SECONDS - 1, 0), ("stalled", STALL_SECONDS + 1, 0))
    streams.drop_stalled()
    assert dropped(writers) == {"stalled"}
    assert "did not read" in writers["stalled"].dropped


def test_clients_that_do_not_read_are_given_up_when_they_cost_too_much_together() -> None:
    third = MAX_HELD_BYTES // 3
    clients = (("fast", 0, 0), ("new", 1, third), ("old", 9, third), ("middle", 5, third))
    streams, writers = parked_writers(*clients)
    streams.drop_stalled()
    assert dropped(writers) == set()
    writers["new"].write("x" * 1000)
    streams.drop_stalled()
    assert dropped(writers) == {"old"}
    assert writers["old"].held_bytes() == 0
    streams.drop_stalled()
    assert dropped(writers) == {"old"}


def test_garbage_in_the_inbox_is_dropped_and_counted() -> None:
    with running() as rig:
        connection, request = rig.ask({"prompt": "Hi"})
        rng = random.Random(7)
        frames = [rng.randbytes(rng.randrange(60)) for _ in range(300)]
        valid = encode(RequestError(request.rid, 500, "cut", "cut"))
        frames += [valid[:length] for length in range(len(valid))]
        frames += [encode(TokenizedRequest(request.rid, [1], request.sampling, [1])), encode(AbortRequest(request.rid))]
        with zmq.Context() as context, context.socket(zmq.PUSH) as garbage:
            garbage.connect(rig.ring.address)
            for frame in frames:
                garbage.send(frame)
            garbage.send_multipart([valid, valid])
            rig.stats(frames_dropped=len(frames) + 1)
        rig.answer(request, "still", " here")
        assert [line.get("text_delta") for line in lines(connection.getresponse())] == ["still", " here", None]


def test_the_books_balance_after_mixed_traffic() -> None:
    with running() as rig, rig.answering():

        def client(seed: int) -> None:
            rng = random.Random(seed)
            for _ in range(25):
                kind = rng.randrange(4)
                body = {"prompt": "Hi" * rng.randrange(1, 50), "stream": bool(rng.randrange(2))}
                connection = rig.post({**body, "top_k": 0} if kind == 0 else body)
                if kind == 1:
                    connection.close()
                    continue
                response = connection.getresponse()
                assert response.status == (400 if kind == 0 else 200)
                assert (body["prompt"] in response.read().decode()) == (kind != 0)
                connection.close()

        threads = [threading.Thread(target=client, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = rig.stats(in_flight=0, streams=0, requests_total=150)
        assert sum(stats[outcome] for outcome in OUTCOMES) == 150
        assert stats["client_error"] > 0
        assert stats["ok"] > 0
        assert stats["failed"] == stats["rejected"] == 0


@pytest.mark.parametrize("narrate", [False, True])
def test_the_log(capfd: pytest.CaptureFixture[str], narrate: bool) -> None:
    with running(narrate=narrate, start_method="spawn") as rig:
        connection = rig.post({"prompt": "Hi"}, **{"X-Request-Id": "find-me"})
        request = rig.from_http(GenerateRequest)
        rig.delta(request, "secret-text", opens=True)
        response = connection.getresponse()
        response.readline()
        rig.delta(request, "", [2], FinishReason.STOP)
        response.read()
        rig.error({"prompt": ""}, **{"X-Request-Id": "bad-one"})
        rig.stats(in_flight=0, ok=1, client_error=1)
    logged = capfd.readouterr().err.splitlines()
    found = [line for line in logged if "find-me" in line]
    refused = [line for line in logged if "bad-one" in line]
    assert len(refused) == 1
    assert "400 invalid_value" in refused[0]
    assert "200 stop prompt=7 completion=2 ttfb=" in found[-1]
    if narrate:
        assert any("secret-text" in line for line in found)
        assert any("7 prompt tokens (2 cached), 2 answer tokens" in line and "prefill" in line for line in found)
    else:
        assert len(found) == 1
        assert "secret-text" not in "\n".join(logged)


def test_nothing_heavy_is_imported() -> None:
    with running(start_method="spawn") as rig:
        loaded = Path(f"/proc/{rig.process.pid}/maps").read_text()
    assert "uvloop" in loaded
    assert "libtorch" not in loaded
    assert "tokenizers" not in loaded


def _eventually(condition: object, seconds: float = 5.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.02)
