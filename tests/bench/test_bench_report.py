"""Figures out of records, the refusal of spoiled runs, and the report's two forms."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from benchlib.bandwidth import DecodeCost
from benchlib.load import LoadResult, RequestRecord
from benchlib.report import Report, glance_table, latency_table, merge, not_ahead, number
from benchlib.results import Level, Run, agreement, cell_of
from benchlib.workloads import Lengths, Workload

WORKLOAD = Workload("random", Lengths("16"), Lengths("11"))
ONE = Level(concurrency=1)
COST = DecodeCost(weight_bytes=1_000_000, kv_bytes_per_token=100)


def record(number=0, ttft=10.0, gap=5.0, tokens=11, **changes):
    """A request that started at `number` seconds: `tokens` tokens, one every `gap` milliseconds after `ttft`."""
    start = 1 + number * 10**9
    arrivals = tuple((start + int((ttft + gap * index) * 1e6), 1) for index in range(tokens))
    good = RequestRecord(
        started_ns=start,
        finished_ns=arrivals[-1][0],
        problem="",
        ttft_ms=ttft,
        first_text_ms=ttft,
        e2e_ms=ttft + gap * (tokens - 1),
        tpot_ms=gap,
        arrivals=arrivals,
        prompt_tokens=16,
        output_tokens=tokens,
    )
    return replace(good, **changes)


def run(records, system="minisgl", level=ONE, planned=None, busy=0.1, death=""):
    return Run(system, WORKLOAD, level, planned or len(records), LoadResult(records, busy), death)


def report_of(cells, **changes):
    machine = {"processor": "P", "device": "D", "copy_bandwidth_gb_s": 10.0}
    report = Report(machine, {"name": "m", "dtype": "bfloat16"}, {"order": "alone"}, when="2026-11-22 10:00 UTC")
    report.cells = cells
    return replace(report, **changes)


def test_figures_are_those_of_the_records():
    cell = cell_of([run([record(n, ttft=10.0 + n) for n in range(5)])], COST, 1e9)
    assert cell.requests == 5
    assert cell.refused == ()
    assert (cell.ttft.p50, cell.ttft.max) == (12.0, 14.0)
    assert cell.itl.p50 == cell.tpot.p50 == pytest.approx(5.0)
    assert cell.itl.count == 50
    # Five requests a second apart, the last one 64 ms long.
    assert cell.output_tps == pytest.approx(55 / 4.064)
    assert (cell.prompt_tokens, cell.output_tokens) == (16, 11)


def test_throughput_of_several_runs_is_all_tokens_over_all_time():
    cell = cell_of([run([record(gap=5.0)]), run([record(gap=10.0)])], None, 1e9)
    assert cell.output_tps == pytest.approx(22 / (0.060 + 0.110))
    assert cell.output_tps_runs == pytest.approx((11 / 0.060, 11 / 0.110))


def test_decode_bandwidth_is_weights_and_cache_over_the_step():
    """Eight requests at once, one token per 5 ms each: 8 in a batch at mean context 16 + 11 / 2."""
    records = [record(ttft=0.0001, gap=5.0, tokens=11) for _ in range(8)]
    decode = cell_of([run(records, level=Level(8))], COST, 1e9).decode
    assert decode.batch == pytest.approx(8 * 11 / 10, rel=0.01)
    expected = (COST.weight_bytes + decode.batch * 21.5 * 100) / 0.005
    assert decode.bytes_per_s == pytest.approx(expected)
    assert decode.copy_fraction == pytest.approx(expected / 1e9)


def test_requests_that_wait_in_a_queue_are_no_batch():
    records = [record(n / 10, ttft=40.0, gap=5.0) for n in range(8)]
    cell = cell_of([run([replace(r, started_ns=1) for r in records], "hf", Level(8))], COST, 1e9)
    assert cell.decode.batch == 1.0


@pytest.mark.parametrize(
    ("spoiled", "reason"),
    [
        (run([record(), record(problem="HTTP 500: oh")]), "HTTP 500: oh"),
        (run([record(ttft_ms=0.0)]), "time to first token of 0"),
        (run([record(output_tokens=0)]), "without tokens"),
        (run([]), "no request was made"),
        (run([record()], planned=3), "not sent"),
        (run([record()], death="minisgl ended by itself (SIGKILL)"), "SIGKILL"),
    ],
)
def test_one_bad_request_refuses_the_cell_and_the_report(spoiled, reason):
    cell = cell_of([run([record()]), spoiled], COST, 1e9)
    assert any(reason in why for why in cell.refused)
    assert math.isnan(cell.output_tps)
    assert math.isnan(cell.ttft.p50)
    good = cell_of([run([record()], "sglang")], COST, 1e9)
    report = report_of([good, cell])
    assert report.refused
    text = report.markdown()
    assert "REFUSED: this run is not a result" in text
    assert reason in text
    assert json.loads(report.to_json())["refused"] is True


def test_an_empty_report_and_a_report_with_a_problem_are_refused():
    assert report_of([]).refused
    good = cell_of([run([record()])], COST, 1e9)
    assert not report_of([good]).refused
    assert report_of([good], problems=["hf did not start"]).refused
    assert "hf did not start" in report_of([good], problems=["hf did not start"]).markdown()


def test_a_client_that_was_the_limit_is_a_warning():
    cell = cell_of([run([record()], busy=0.97)], COST, 1e9)
    assert "97%" in cell.warnings[0]
    late = cell_of([run([record(late_ms=50.0)])], COST, 1e9)
    assert "late" in late.warnings[0]
    assert "warning" in report_of([late]).markdown()


def test_a_report_survives_its_json():
    refused = cell_of([run([record(problem="x")], "hf")], COST, 1e9)
    report = report_of([cell_of([run([record()])], COST, 1e9), refused], missing={"sglang": "not installed"})
    again = Report.from_json(report.to_json())
    assert again.to_json() == report.to_json()
    assert again.markdown() == report.markdown()
    assert math.isnan(again.cells[1].ttft.p50)
    with pytest.raises(ValueError, match="not a report"):
        Report.from_json('{"schema": 0}')


def test_reports_of_other_systems_merge_and_of_other_machines_do_not():
    mine = report_of([cell_of([run([record()])], COST, 1e9)], missing={"sglang": "not here", "hf": "not here"})
    mine.probes = {"minisgl": [1, 2, 3]}
    theirs = report_of([cell_of([run([record()], "sglang")], COST, 1e9)], problems=["a problem"])
    theirs.probes = {"sglang": [1, 2, 4]}
    both = merge([mine, theirs])
    assert [cell.system for cell in both.cells] == ["minisgl", "sglang"]
    assert both.missing == {"hf": "not here"}
    assert both.refused
    assert "share their first 2 tokens" in both.markdown()
    with pytest.raises(ValueError, match="device differs"):
        merge([mine, report_of([], machine={"processor": "P", "device": "other", "copy_bandwidth_gb_s": 1.0})])


def test_tables_show_every_system_and_mark_the_best():
    fast = cell_of([run([record(gap=2.0)], "sglang")], COST, 1e9)
    slow = cell_of([run([record(gap=4.0)])], COST, 1e9)
    refused = cell_of([run([record(problem="x")], "hf")], COST, 1e9)
    table = glance_table([slow, fast, refused])
    assert (
        table[0]
        == "| load | minisgl tokens/s (TTFT p50) | sglang tokens/s (TTFT p50) | Hugging Face tokens/s (TTFT p50) |"
    )
    assert table[2] == "| 1 | 220 (10.0 ms) | **367** (10.0 ms) | REFUSED |"
    rows = latency_table([slow, fast, refused])
    assert [row.split(" | ")[1] for row in rows[2:]] == ["minisgl", "sglang", "Hugging Face"]
    assert {row.count("|") for row in rows} == {rows[0].count("|")}


def test_what_minisgl_loses_is_listed_and_nothing_else():
    behind = cell_of([run([record(ttft=20.0, gap=4.0)])], COST, 1e9)
    ahead = cell_of([run([record(ttft=5.0, gap=1.0)])], COST, 1e9)
    other = cell_of([run([record(ttft=10.0, gap=2.0)], "sglang")], COST, 1e9)
    (line,) = not_ahead([behind, other])
    assert "sglang" in line
    assert "TTFT p50 ms 20.0 against 10.0" in line
    assert not_ahead([ahead, other]) == []
    assert "nowhere in this run" in report_of([ahead, other]).markdown()
    equal = replace(ahead, system="sglang")
    assert "tokens/s" in not_ahead([ahead, equal])[0]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.01234, "0.0123"), (0.5, "0.500"), (1.0, "1.00"), (12.34, "12.3"), (123.4, "123"), (12345.6, "12,346")],
)
def test_numbers_keep_three_digits(value, shown):
    assert number(value) == shown
    assert number(math.nan) == "-"


def test_agreement_counts_the_shared_beginning():
    assert agreement([1, 2, 3], [1, 2, 4]) == 2
    assert agreement([1, 2], [1, 2, 3]) == 2
    assert agreement([], [1]) == 0
