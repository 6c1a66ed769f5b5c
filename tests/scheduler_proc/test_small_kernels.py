"""The kernels for few rows against plain torch on fresh random inputs: on a CUDA device or in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds; the interpreter needs it too")

from minisgl.scheduler_proc.kernels.elementwise import rotate_and_store  # noqa: E402
from minisgl.scheduler_proc.kernels.paged_attention import decode_attention  # noqa: E402
from minisgl.scheduler_proc.kernels.small_attention import rotate_attend  # noqa: E402
from minisgl.scheduler_proc.kernels.small_head import logits_and_best  # noqa: E402
from minisgl.scheduler_proc.kernels.small_linear import linear_add, norm_gate_up, norm_linear  # noqa: E402
from minisgl.scheduler_proc.kernels.small_output import add_attention  # noqa: E402

# Each case is compiled anew on a GPU, so there it is few of what a GPU runs, at Qwen2.5-0.5B's shape; the interpreter
# emulates bfloat16 only slowly and takes small shapes that are no multiples of the tiles.
ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
# Alone in their tensor core operand, sharing it by two or four, filling one, filling two.
ROWS = [1, 2, 8, 13] if ON_GPU else [1, 2, 3, 8, 13]
SHAPES = [(896, 4864)] if ON_GPU else [(200, 100), (1100, 12)]
pytestmark = [pytest.mark.gpu] if ON_GPU else []
PDL = ON_GPU and torch.cuda.get_device_capability() >= (9, 0)
EPS = 1e-6


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within the type's rounding of the largest value: sums are taken in another order."""
    limit = (2e-2 if ON_GPU else 1e-5) * expected.abs().max().item()
    assert (actual.float() - expected).abs().max().item() <= limit


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), EPS)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("hidden", "width"), SHAPES)
def test_norm_and_linear(rows: int, hidden: int, width: int) -> None:
    residual, norm = draw(rows, hidden), draw(hidden, dtype=DTYPE)
    weight, bias = draw(width, hidden, dtype=DTYPE, scale=0.1), draw(width, dtype=DTYPE)
    plain = F.linear(rms_norm(residual, norm), weight.float())
    assert_close(norm_linear(residual, norm, weight, None, EPS, PDL), plain)
    assert_close(norm_linear(residual, norm, weight, bias, EPS, PDL), plain + bias.float())


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("hidden", "width"), SHAPES)
def test_norm_gate_and_up(rows: int, hidden: int, width: int) -> None:
    residual, norm = draw(rows, hidden), draw(hidden, dtype=DTYPE)
    weight = draw(2 * width, hidden, dtype=DTYPE, scale=0.1)
    gate, up = F.linear(rms_norm(residual, norm), weight.float()).chunk(2, dim=-1)
    assert_close(norm_gate_up(residual, norm, weight, EPS, PDL), F.silu(gate) * up)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("k", "width"), [(4864, 896)] if ON_GPU else [(96, 40), (2500, 36)])
def test_linear_added_to_the_residual(rows: int, k: int, width: int) -> None:
    x, weight, residual = draw(rows, k, dtype=DTYPE), draw(width, k, dtype=DTYPE, scale=0.1), draw(rows, width)
    expected = residual + F.linear(x.float(), weight.float())
    linear_add(x, weight, residual, PDL)
    assert_close(residual, expected)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("hidden", "vocab"), [(896, 151_936)] if ON_GPU else [(200, 100)])
def test_logits_and_the_best_of_them(rows: int, hidden: int, vocab: int) -> None:
    residual, norm = draw(rows, hidden), draw(hidden, dtype=DTYPE)
    weight = draw(vocab, hidden, dtype=DTYPE, scale=0.1)
    # Ties, in one tile and far apart, for a row that likes none more.
    weight[vocab // 2] = weight[7] = weight[3] = (residual[-1] * norm).to(DTYPE)
    logits, tokens, finite = logits_and_best(residual, norm, weight, EPS, PDL)
    assert_close(logits, F.linear(rms_norm(residual, norm), weight.float()))
    assert tokens[-1] == 3 and finite.all()
    assert torch.equal(logits.gather(1, tokens[:, None])[:, 0], logits.amax(-1))


def test_rows_without_a_finite_best_logit_say_so() -> None:
    residual, norm = draw(4, 64), torch.ones(64, device=DEVICE)
    residual[0, 5] = float("nan")
    weight = draw(40, 64)
    weight[20] = float("nan")
    _, tokens, finite = logits_and_best(residual, norm, weight, EPS, PDL)
    assert not finite.any() and ((tokens >= 0) & (tokens < 40)).all()
    weight[20] = 0
    assert logits_and_best(residual, norm, weight, EPS, PDL)[2].tolist() == [False, True, True, True]


@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "head_dim", "norm", "window"),
    [
        ([300], 6, 2, 64, False, None),
        ([1, 17, 90], 3, 1, 64, True, 50),
        ([40, 64], 12, 1, 128, True, None),
        pytest.param([1, 17, 64, 65, 130], 16, 8, 128, True, None, marks=pytest.mark.gpu),
        pytest.param([9, 1, 70, 8, 5, 16, 33, 2, 31, 90], 32, 8, 64, False, 40, marks=pytest.mark.gpu),
    ],
)
def test_attention(
    lengths: list[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    norm: bool,
    window: int | None,
) -> None:
    """The two fused kernels are rotation, KV write, attention and projection one after another."""
    check_attention(lengths, heads, kv_heads, head_dim, norm, window, page_size=4, hidden=200)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("longest", [256, 2048, 9000])
def test_attention_of_long_contexts(rows: int, longest: int) -> None:
    """More keys than all parts take at once, at Qwen2.5-0.5B's shape."""
    lengths = [longest // (row + 1) for row in range(rows)]
    check_attention(lengths, 14, 2, 64, False, None, page_size=16, hidden=896)


def check_attention(
    lengths: list[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    norm: bool,
    window: int | None,
    page_size: int,
    hidden: int,
) -> None:
    rows, pages = len(lengths), max(lengths) // page_size + 2
    qkv = draw(rows, heads + 2 * kv_heads, head_dim, dtype=DTYPE)
    pool = draw(rows * pages * page_size, 2, kv_heads, head_dim, dtype=DTYPE)
    table = torch.randperm(rows * pages, device=DEVICE).int()
    stride = torch.tensor([pages], dtype=torch.int32, device=DEVICE)
    positions = torch.tensor(lengths, dtype=torch.int32, device=DEVICE) - 1
    pages_of = table.view(rows, pages)[torch.arange(rows), positions // page_size]
    slots = (pages_of * page_size + positions % page_size).int()
    angles = draw(max(lengths), head_dim // 2)
    tables = (angles.cos().to(DTYPE), angles.sin().to(DTYPE))
    norm_weight = draw(heads + kv_heads, head_dim, dtype=DTYPE) if norm else None
    weight, residual = draw(hidden, heads * head_dim, dtype=DTYPE, scale=0.1), draw(rows, hidden)
    rotated, expected_pool = qkv.clone(), pool.clone()
    rotate_and_store(rotated, positions, slots, tables, norm_weight, EPS, expected_pool)
    attended = decode_attention(
        rotated,
        expected_pool,
        table,
        stride,
        positions + 1,
        page_size=page_size,
        scale=head_dim**-0.5,
        window=window,
        splits=1,
    )
    expected = residual + F.linear(attended.flatten(1).float(), weight.float())
    parts = rotate_attend(
        qkv,
        positions,
        slots,
        tables,
        norm_weight,
        EPS,
        pool,
        table,
        stride,
        page_size=page_size,
        window=window,
        pdl=PDL,
    )
    add_attention(parts, positions, weight, residual, window=window, pdl=PDL)
    assert_close(residual, expected)
    assert_close(pool, expected_pool.float())
