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
from minisgl.scheduler_proc.kernels.small_attention import rotate_attend, small_splits  # noqa: E402
from minisgl.scheduler_proc.kernels.small_linear import linear_add, norm_gate_up, norm_linear  # noqa: E402

# bfloat16 is what a GPU runs, and finds type changes that float32 hides; the interpreter only emulates it slowly.
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
PDL = DEVICE.type == "cuda" and torch.cuda.get_device_capability() >= (9, 0)
EPS = 1e-6


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Within the type's rounding of the largest value: sums are taken in another order."""
    limit = (1e-5 if dtype == torch.float32 else 2e-2) * expected.abs().max().item()
    assert (actual.float() - expected).abs().max().item() <= limit


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 8, 13])
@pytest.mark.parametrize(("hidden", "width"), [(128, 72), (200, 100)])
def test_norm_and_linear(dtype: torch.dtype, rows: int, hidden: int, width: int) -> None:
    residual, norm = draw(rows, hidden), draw(hidden, dtype=dtype)
    weight, bias = draw(width, hidden, dtype=dtype, scale=0.1), draw(width, dtype=dtype)
    plain = F.linear(rms_norm(residual, norm), weight.float())
    assert_close(norm_linear(residual, norm, weight, None, EPS, PDL), plain, dtype)
    assert_close(norm_linear(residual, norm, weight, bias, EPS, PDL), plain + bias.float(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 8, 13])
@pytest.mark.parametrize(("hidden", "width"), [(128, 72), (200, 100)])
def test_norm_gate_and_up(dtype: torch.dtype, rows: int, hidden: int, width: int) -> None:
    residual, norm = draw(rows, hidden), draw(hidden, dtype=dtype)
    weight = draw(2 * width, hidden, dtype=dtype, scale=0.1)
    gate, up = F.linear(rms_norm(residual, norm), weight.float()).chunk(2, dim=-1)
    assert_close(norm_gate_up(residual, norm, weight, EPS, PDL), F.silu(gate) * up, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 8, 13])
@pytest.mark.parametrize(("k", "width"), [(96, 40), (200, 100), (2500, 36)])
def test_linear_added_to_the_residual(dtype: torch.dtype, rows: int, k: int, width: int) -> None:
    x, weight, residual = draw(rows, k, dtype=dtype), draw(width, k, dtype=dtype, scale=0.1), draw(rows, width)
    expected = residual + F.linear(x.float(), weight.float())
    linear_add(x, weight, residual, PDL)
    assert_close(residual, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[1], [300], [1, 17, 64, 65, 130]])
@pytest.mark.parametrize(("norm", "window"), [(False, None), (True, 50)])
def test_attention(dtype: torch.dtype, lengths: list[int], norm: bool, window: int | None) -> None:
    """One fused pass is rotation, KV write and attention one after another."""
    rows, heads, kv_heads, head_dim, page_size, pages = len(lengths), 6, 2, 32, 4, 80
    context = max(lengths)
    qkv = draw(rows, heads + 2 * kv_heads, head_dim, dtype=dtype)
    pool = draw(rows * pages * page_size, 2, kv_heads, head_dim, dtype=dtype)
    table = torch.randperm(rows * pages, device=DEVICE).int()
    stride = torch.tensor([pages], dtype=torch.int32, device=DEVICE)
    positions = torch.tensor(lengths, dtype=torch.int32, device=DEVICE) - 1
    pages_of = table.view(rows, pages)[torch.arange(rows), positions // page_size]
    slots = (pages_of * page_size + positions % page_size).int()
    angles = draw(context, head_dim // 2)
    tables = (angles.cos().to(dtype), angles.sin().to(dtype))
    norm_weight = draw(heads + kv_heads, head_dim, dtype=dtype) if norm else None
    expected_qkv, expected_pool = qkv.clone(), pool.clone()
    rotate_and_store(expected_qkv, positions, slots, tables, norm_weight, EPS, expected_pool)
    expected = decode_attention(
        expected_qkv,
        expected_pool,
        table,
        stride,
        positions + 1,
        page_size=page_size,
        scale=head_dim**-0.5,
        window=window,
        splits=1,
    )
    for splits in {2, small_splits(rows)}:
        attended = rotate_attend(
            qkv.clone(),
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
            splits=splits,
            pdl=PDL,
        )
        assert_close(attended, expected.flatten(1).float(), dtype)
        assert_close(pool, expected_pool.float(), dtype)
