"""The hops of a request: their sum, what spoils it, and the trace."""

from __future__ import annotations

from itertools import pairwise

import pytest
from benchlib.anatomy import HOPS, SERVER_HOPS, NoAnatomy, anatomy_of, chrome_trace, spoiled, summarize_hops
from benchlib.load import RequestRecord

from minisgl import timeline

MS = 10**6


def record(start=1000 * MS, scale=1, **timing):
    """A request whose server stamps are 1, 2, ... 11 ms after its connection, `scale` times as slow."""
    stamps = [start + scale * (1 + number) * MS for number in range(11)]
    return RequestRecord(
        started_ns=start - scale * MS,
        connected_ns=start,
        first_byte_ns=stamps[-1] + scale * MS // 2,
        finished_ns=stamps[-1] + scale * 20 * MS,
        problem="",
        ttft_ms=12.5 * scale,
        prompt_tokens=16,
        output_tokens=4,
        arrivals=tuple((stamps[-1] + scale * (1 + 5 * number) * MS, 1) for number in range(4)),
        timing={"hops_us": timeline.hops_us(stamps), "stamps_ns": stamps, **timing},
    )


def test_the_hops_are_the_servers_own_in_their_order():
    assert timeline.HOPS == SERVER_HOPS
    assert len(timeline.STAMPS) == len(SERVER_HOPS) + 1


def test_hops_add_up_to_the_clients_time_to_first_byte():
    anatomy = anatomy_of(record())
    assert list(anatomy.hops_us) == [name for name, _, _ in HOPS]
    assert anatomy.hops_us["connect"] == anatomy.hops_us["send"] == 1000.0
    assert anatomy.hops_us["receive"] == 500.0
    assert anatomy.sum_us == pytest.approx(anatomy.ttfb_us) == 12500.0
    assert anatomy.deviation == pytest.approx(0.0)


def test_a_hop_that_the_server_miscounts_shows():
    good = record()
    hops = {**good.timing["hops_us"], "prefill": good.timing["hops_us"]["prefill"] + 300.0}
    wrong = anatomy_of(record(hops_us=hops))
    assert wrong.deviation == pytest.approx(300 / 12500)
    assert spoiled([anatomy_of(good), wrong]) == 1
    barely = anatomy_of(record(hops_us={**hops, "prefill": hops["prefill"] - 60.0}))
    assert spoiled([barely]) == 0


def test_a_server_without_hops_or_on_another_clock_has_no_anatomy():
    with pytest.raises(NoAnatomy, match="only minisgl reports its hops"):
        anatomy_of(record(stamps_ns=[1, 2, 3]))
    with pytest.raises(NoAnatomy, match="only minisgl reports its hops"):
        anatomy_of(record(hops_us={"prefill": 1.0}))
    with pytest.raises(NoAnatomy, match="on the server's own host"):
        anatomy_of(record(stamps_ns=[number * MS for number in range(11)]))


def test_means_of_the_hops_add_up_to_the_mean_time():
    anatomies = [anatomy_of(record(scale=scale)) for scale in (1, 2, 6)]
    summaries = summarize_hops(anatomies)
    assert sum(hop.mean_us for hop in summaries) == pytest.approx(12500 * 3)
    prefill = next(hop for hop in summaries if hop.name == "prefill")
    assert (prefill.mean_us, prefill.p50_us) == (3000.0, 2000.0)
    assert prefill.p99_us == pytest.approx(5920.0)


def test_a_trace_has_a_track_a_process_and_a_flow_a_request():
    start = 1000 * MS
    steps = [start + 6 * MS, start + 7 * MS, start + 7 * MS, start + 9 * MS]
    overlapping = [anatomy_of(record(start=start + offset * MS, steps_ns=steps)) for offset in (0, 10)]
    later = anatomy_of(record(start=start + 500 * MS))
    events = chrome_trace([*overlapping, later])["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert sorted(names.values()) == ["client", "detokenizer", "http", "scheduler", "tokenizer"]
    slices = [event for event in events if event["ph"] == "X"]
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in slices)
    requests = [event for event in slices if event["name"].startswith("request")]
    assert [event["tid"] for event in requests] == [1, 2, 1]
    # The two requests share their steps, which therefore appear once.
    assert [
        (event["name"], event["dur"]) for event in slices if names[event["pid"]] == "scheduler" and event["tid"] == 0
    ] == [
        ("step of 2", 1000.0),
        ("step of 2", 2000.0),
    ]
    assert sum(event["name"].startswith("arrival") for event in slices) == 9
    flows = [event for event in events if event["ph"] in "stf"]
    for number in {event["id"] for event in flows}:
        own = [event for event in flows if event["id"] == number]
        assert [event["ph"] for event in own] == ["s"] + ["t"] * 6 + ["f"]
        assert all(before["ts"] <= after["ts"] for before, after in pairwise(own))
        # Each step of a flow must lie within a slice, or no arrow is drawn.
        for event in own:
            assert any(
                s["pid"] == event["pid"] and s["tid"] == event["tid"] and s["ts"] <= event["ts"] <= s["ts"] + s["dur"]
                for s in slices
            )
