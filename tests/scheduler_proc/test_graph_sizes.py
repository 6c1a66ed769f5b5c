"""Which graph runs which step, and what is captured before serving."""

from __future__ import annotations

import pytest

from minisgl.scheduler_proc.graph_sizes import (
    capture_order,
    decode_sizes,
    decodes_join,
    fitting_decode,
    fitting_prefill,
    prefill_sizes,
)


@pytest.mark.parametrize("max_running", [1, 2, 8, 64, 100, 256, 1000])
@pytest.mark.parametrize("context_length", [16, 128, 4096])
def test_few_graphs_serve_every_step_that_all_of_them_serve(max_running: int, context_length: int) -> None:
    decodes, prefills = decode_sizes(max_running), prefill_sizes(context_length)
    order, first = capture_order(decodes, prefills)
    assert sorted(map(str, order)) == sorted(map(str, (*decodes, *prefills)))
    assert 2 <= first <= 16
    few_decodes = [size for size in order[:first] if isinstance(size, int)]
    few_prefills = [size for size in order[:first] if not isinstance(size, int)]
    for rows in range(1, max_running + 1):
        size = fitting_decode(rows, few_decodes)
        assert size is not None and size >= rows
        assert fitting_decode(rows, decodes) == min(size for size in decodes if size >= rows)
    for tokens, rows in prefills:
        assert fitting_prefill(tokens, rows, prefills) == (tokens, rows)
        few = fitting_prefill(tokens, rows, few_prefills)
        assert few is not None and few[0] >= tokens and few[1] >= rows
    assert fitting_decode(max_running + 1, decodes) is None
    assert fitting_prefill(10**6, 1, prefills) is None


def test_the_first_graphs_fit_what_a_server_under_load_runs() -> None:
    order, first = capture_order(decode_sizes(256), prefill_sizes(4096))
    decodes = [size for size in order[:first] if isinstance(size, int)]
    prefills = [size for size in order[:first] if not isinstance(size, int)]
    for rows in range(1, 257):
        size = fitting_decode(rows, decodes)
        assert size is not None and size <= 2 * rows
    # A long prompt's chunk beside 32 and 63 streams.
    for decode_rows in (32, 63):
        assert fitting_prefill(256, 1 + decode_rows, prefills) == (512, 64)


def test_the_largest_of_each_kind_is_captured_before_the_smaller_ones() -> None:
    order, first = capture_order(decode_sizes(256), prefill_sizes(4096))
    decodes = [size for size in order[:first] if isinstance(size, int)]
    prefills = [size for size in order[:first] if not isinstance(size, int)]
    assert decodes == sorted(decodes, reverse=True) and decodes[0] == 256
    assert prefills == sorted(prefills, reverse=True) and prefills[0] == (1088, 64)


@pytest.mark.parametrize(
    ("decodes", "tokens", "rows", "joins"),
    [
        (32, 224, 1, True),
        (63, 16, 1, True),
        (64, 16, 1, False),  # more rows than any graph of chunks has
        (64, 512, 8, False),
        (63, 512, 1, True),
        (56, 1024, 8, True),
        (1, 576, 1, False),  # the next graph is nearly twice as large
        (1, 1088, 2, False),
        (8, 250, 3, True),
    ],
)
def test_decode_rows_join_chunks_where_little_padding_comes_with_them(
    decodes: int, tokens: int, rows: int, joins: bool
) -> None:
    assert decodes_join(decodes, tokens, rows) is joins
