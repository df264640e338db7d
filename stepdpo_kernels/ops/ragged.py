"""Sums over ragged lists of rows, deterministic forward and backward.

`index_select` and `index_add` accumulate gradients of repeated rows with atomics on CUDA, in arrival order, and in
the input's own dtype. Both directions here are one ordered float32 sum per segment, because a `Ragged` carries its
transpose.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stepdpo_kernels import _dispatch
from stepdpo_kernels.types import Ragged


def segment_sum(x: Tensor, index: Tensor, lengths: Tensor) -> Tensor:
    """Row r is the sum of the next lengths[r] rows of x[index], 0 for none: x (columns, ...) -> (rows, ...).

    Summed in at least float32, in an order that depends on nothing but the shape, and rounded once to the dtype of x;
    index (N,) and lengths (rows,) are int64. No autograd.
    """
    return _RUN[_choose(x.device, x.dtype)](x, index, lengths)


def _torch(x: Tensor, index: Tensor, lengths: Tensor) -> Tensor:
    data = x.index_select(0, index).to(torch.promote_types(x.dtype, torch.float32))
    flat = data.reshape(data.shape[0], math.prod(x.shape[1:]))  # segment_reduce wants (N, C)
    total = torch.segment_reduce(flat, "sum", lengths=lengths, axis=0, initial=0, unsafe=True)
    return total.reshape(lengths.shape[0], *x.shape[1:]).to(x.dtype)


def _triton(x: Tensor, index: Tensor, lengths: Tensor) -> Tensor:
    from stepdpo_kernels.ops import ragged_triton

    return ragged_triton.segment_sum(x, index, lengths)


_RUN: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"triton": _triton, "torch": _torch}


@_dispatch.asked_once
def _choose(device: torch.device, dtype: torch.dtype) -> str:
    """The implementation's name."""
    return _dispatch.choose("segment_sum", "auto", {"x": _dispatch.Kind(device, dtype)}).name


_dispatch.register(
    "segment_sum",
    "triton",
    _triton,
    _dispatch.triton_why_not("x", "stepdpo_kernels.ops.ragged_triton"),
    _dispatch.triton_why_not_auto("x"),
)
_dispatch.register("segment_sum", "torch", _torch, _dispatch.no_reason)


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ragged: Ragged) -> Tensor:
        ctx.ragged = ragged
        return segment_sum(x, ragged.index, ragged.lengths)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return segment_sum(grad, ctx.ragged.t_index, ctx.ragged.t_lengths), None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ragged: Ragged) -> Tensor:
        ctx.ragged = ragged
        return x.index_select(0, ragged.index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return segment_sum(grad, ctx.ragged.t_index, ctx.ragged.t_lengths), None


def sum_rows(x: Tensor, ragged: Ragged) -> Tensor:
    """`M @ x` for the 0/1 matrix M that `ragged` is: x (columns, ...) -> (rows, ...) in x's dtype."""
    return _SumRows.apply(x, ragged)


def gather_rows(x: Tensor, ragged: Ragged) -> Tensor:
    """`x[ragged.index]` for a `ragged` of one column a row: x (columns, ...) -> (rows, ...)."""
    return _GatherRows.apply(x, ragged)
