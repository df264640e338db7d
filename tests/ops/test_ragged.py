"""Ragged sums against the dense matrix they stand for."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stepdpo_kernels import _dispatch, use_impl
from stepdpo_kernels.ops import ragged
from stepdpo_kernels.ops.ragged import gather_rows, segment_sum, sum_rows
from stepdpo_kernels.types import Ragged

_COLUMNS = 5
_settings = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
_rows = st.lists(st.lists(st.integers(0, _COLUMNS - 1), max_size=4), max_size=6)
_widths = st.sampled_from([(), (3,), (2, 3), (0,)])


@pytest.fixture(autouse=True, params=["torch", "triton"])
def _impl(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "triton":
        pytest.importorskip("triton")
        if not import_module("stepdpo_kernels.ops.ragged_triton").INTERPRETED:
            pytest.skip("for Triton's interpreter")
    with use_impl(segment_sum=request.param):
        yield


def _ragged(rows: list[list[int]], columns: int = _COLUMNS) -> Ragged:
    index = np.array([c for row in rows for c in row], np.int64)
    return Ragged.from_rows(index, np.array([len(row) for row in rows], np.int64), columns)


def _matrix(rows: list[list[int]], columns: int = _COLUMNS) -> torch.Tensor:
    matrix = torch.zeros(len(rows), columns, dtype=torch.float64)
    for r, row in enumerate(rows):
        for c in row:
            matrix[r, c] += 1
    return matrix


def _leaf(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


@_settings
@given(_rows, _widths)
def test_sums_are_the_matrix_product_both_ways(rows: list[list[int]], width: tuple[int, ...]) -> None:
    x, matrix = _leaf(_COLUMNS, *width), _matrix(rows)
    total = sum_rows(x, _ragged(rows))
    assert total.shape == (len(rows), *width)
    torch.testing.assert_close(total, torch.tensordot(matrix, x, 1), rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(total)
    (dx,) = torch.autograd.grad(total, x, grad)
    torch.testing.assert_close(dx, torch.tensordot(matrix.T, grad, 1), rtol=1e-12, atol=1e-12)


@_settings
@given(st.lists(st.integers(0, _COLUMNS - 1), max_size=8), _widths)
def test_gathering_is_indexing_both_ways(columns: list[int], width: tuple[int, ...]) -> None:
    x, rows = _leaf(_COLUMNS, *width), [[c] for c in columns]
    gathered = gather_rows(x, _ragged(rows))
    assert torch.equal(gathered, x[columns])
    grad = torch.randn_like(gathered)
    (dx,) = torch.autograd.grad(gathered, x, grad)
    torch.testing.assert_close(dx, torch.tensordot(_matrix(rows).T, grad, 1), rtol=1e-12, atol=1e-12)


def test_gradients_by_finite_differences() -> None:
    ragged = _ragged([[0, 3, 3], [], [4], [1, 0]])
    assert torch.autograd.gradcheck(lambda x: sum_rows(x, ragged), _leaf(_COLUMNS, 2))
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, _ragged([[2], [0], [2]])), _leaf(_COLUMNS, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_summed_in_float32(dtype: torch.dtype) -> None:
    n = 2000
    ragged = _ragged([[c] for c in [0] * n], columns=1)
    x = torch.ones(1, 1, dtype=dtype, requires_grad=True)
    # 2000 additions of 0.3 in the dtype itself would stop near 128 (bfloat16)
    gather_rows(x, ragged).backward(torch.full((n, 1), 0.3, dtype=dtype))
    expected = n * torch.tensor(0.3, dtype=dtype).double()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert x.grad.double().item() == pytest.approx(expected.item(), rel=torch.finfo(dtype).eps)
    total = sum_rows(torch.full((n,), 0.3, dtype=dtype), _ragged([list(range(n))], columns=n))
    assert total.dtype == dtype
    assert total.double().item() == pytest.approx(expected.item(), rel=torch.finfo(dtype).eps)


def test_the_same_bits_every_time() -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 50, rng.integers(0, 200)).tolist() for _ in range(40)]
    x, grad = torch.randn(50, 33, requires_grad=True), torch.randn(40, 33)
    ragged = _ragged(rows, columns=50)
    first = sum_rows(x, ragged)
    (first_dx,) = torch.autograd.grad(first, x, grad)
    for _ in range(3):
        again = sum_rows(x, ragged)
        assert torch.equal(again, first)
        assert torch.equal(torch.autograd.grad(again, x, grad)[0], first_dx)


def test_inputs_need_not_be_contiguous() -> None:
    ragged = _ragged([[0, 4], [2, 2]])
    x = torch.randn(3, _COLUMNS, dtype=torch.float64).T.requires_grad_()
    total = sum_rows(x, ragged)
    torch.testing.assert_close(total, _matrix([[0, 4], [2, 2]]) @ x)
    (dx,) = torch.autograd.grad(total.sum(), x)  # an expanded gradient
    assert dx.tolist() == _matrix([[0, 4], [2, 2]]).sum(0)[:, None].expand(-1, 3).tolist()


def test_no_rows_and_no_columns() -> None:
    x = _leaf(_COLUMNS, 2)
    assert sum_rows(x, _ragged([])).shape == (0, 2)
    (dx,) = torch.autograd.grad(sum_rows(x, _ragged([[], []])).sum(), x)
    assert not dx.any()
    nothing = _leaf(0)
    assert sum_rows(nothing, _ragged([[], []], columns=0)).tolist() == [0, 0]


def test_what_needs_no_gradient_gets_none() -> None:
    assert not sum_rows(torch.ones(_COLUMNS), _ragged([[1]])).requires_grad
    assert not gather_rows(torch.ones(_COLUMNS), _ragged([[1]])).requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3, 7), (16,), (5, 130), (2, 512)], ids=str)
def test_long_and_empty_segments_of_any_width(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 50, n).tolist() for n in (1, 0, 3, 9, 0, 300, 2)]
    lists = _ragged(rows, columns=50)
    x = torch.randn(50, *shape, dtype=torch.float64).to(dtype)
    exact = torch.tensordot(_matrix(rows, 50), x.double(), 1)
    total = segment_sum(x, lists.index, lists.lengths)
    assert total.dtype == dtype
    assert total.shape == exact.shape
    eps = torch.finfo(dtype).eps
    # a rounding at the end, to which the interpreter gives twice its error, and of 300 float32 (float64) sums
    bound = eps * exact.abs().max() + 300 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * 60
    assert (total.double() - exact).abs().max() <= bound
    assert torch.equal(total[[1, 4]], torch.zeros_like(total[[1, 4]]))


def test_who_sums() -> None:
    x = torch.ones(2, 3)
    assert _dispatch.implementations("segment_sum") == ["triton", "torch"]
    with use_impl(segment_sum="auto"):
        assert ragged._choose(x.device, x.dtype) == "torch"
    reasons = _dispatch._implementations["segment_sum"]["triton"].why_not({"x": x.long()})
    assert reasons[-1] == "it takes float64, float32, bfloat16 and float16, and x is torch.int64"
