"""Log-probs of the targets by vocabulary chunks, in plain torch, on any device.

    forward    for each chunk of C columns: z = X W_c^T (R, C) -> running max m, running sum s, target logit
               logp = (z_target - m) - log s,   lse = m + log s
    backward   for each chunk: recompute z,  Q = onehot - exp(z - lse) (R, C)
               dX += g * (Q W_c)      dW_c = Q^T (g * X)        g (R,) the upstream gradient

Four matrix products in all for a full backward, one of them the recomputation. Extra memory: one chunk of logits
and its Q (CHUNK_BYTES each at most), a float32 dX, and dW. The coefficient g stays off the (R, C) tile, so Q may
be rounded to the input dtype without touching the scale of the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# One chunk of logits, in bytes: fits the last-level cache of a server core's share, and is 1024 rows x 4096 columns.
CHUNK_BYTES = 16 * 1024 * 1024
# Below this many columns a product is too narrow to be fast: a very large R gets chunks of rows as well.
MIN_COLUMNS = 512


def columns_per_chunk(depth: int, element_bytes: int = 4) -> int:
    """How many vocabulary columns a chunk has: as many as CHUNK_BYTES holds of columns this long.

    They are R long in the logits and D long in the part of W that is cast, so `depth` is the larger of the two.
    """
    return max(MIN_COLUMNS, CHUNK_BYTES // (element_bytes * max(depth, 1)) // 64 * 64)


def rows_per_chunk(element_bytes: int = 4) -> int:
    return CHUNK_BYTES // (element_bytes * MIN_COLUMNS)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float | None) -> Tensor:
    """(R, C) logits of a chunk; `hidden` is already in the compute dtype."""
    logits = hidden @ weight.to(hidden.dtype).T
    if bias is not None:
        logits += bias.to(logits.dtype)
    if scale is not None:
        logits *= scale
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def partials(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (R,)
    bias: Tensor | None,  # (V,)
    softcap: float | None,
    logit_scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row: the largest logit, the sum of exp relative to it, the target's logit; (R,) in at least float32.

    A target outside 0..V-1 has logit 0 here: it is somebody else's where the vocabulary is sharded.
    """
    compute = torch.promote_types(hidden.dtype, torch.float32)
    tops = hidden.new_empty(hidden.shape[0], dtype=compute)
    totals = torch.empty_like(tops)
    hits = torch.zeros_like(tops)
    for rows in _row_chunks(hidden.shape[0], compute.itemsize):
        x = hidden[rows].to(compute)
        top = tops.new_full((x.shape[0],), torch.finfo(compute).min)  # finite also where every logit so far is -inf
        total = torch.zeros_like(top)
        for cols in _column_chunks(weight.shape[0], max(x.shape), compute.itemsize):
            z = _logits(x, weight[cols], None if bias is None else bias[cols], softcap, logit_scale)
            inside, local = _target_in(target[rows], cols)
            hit = z.gather(1, local[:, None])[:, 0]
            hits[rows] = torch.where(inside, hit, hits[rows])
            new_top = torch.maximum(top, z.amax(dim=1))
            chunk_sum = z.sub_(new_top[:, None]).exp_().sum(dim=1)
            total = total * torch.exp(top - new_top) + chunk_sum
            top = new_top
        tops[rows], totals[rows] = top, total
    return tops, totals, hits


def gradients(
    grad: Tensor,  # (R,)
    stats: Tensor,  # (2, R) over the whole vocabulary: the largest logit, the log of the sum of exp relative to it
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dX (R, D) and db (V,) in at least float32, dW (V, D) in the dtype of weight; None for what nobody needs."""
    compute, stored = stats.dtype, hidden.dtype
    lse = stats.sum(dim=0)
    d_hidden = torch.zeros(hidden.shape, dtype=compute, device=hidden.device) if need_hidden else None
    row_chunks = list(_row_chunks(hidden.shape[0], compute.itemsize))
    # With one chunk of rows each slice of dW is written once; with more it is a sum and needs float32.
    d_weight = torch.zeros_like(weight, dtype=compute if len(row_chunks) > 1 else stored) if need_weight else None
    d_bias = torch.zeros(weight.shape[0], dtype=compute, device=weight.device) if need_bias else None
    for rows in row_chunks:
        x = hidden[rows].to(compute)
        g = grad[rows].to(compute)[:, None]  # (R, 1)
        gx = (g * x).to(stored) if need_weight else None
        for cols in _column_chunks(weight.shape[0], max(x.shape), compute.itemsize):
            z = _logits(x, weight[cols], None if bias is None else bias[cols], softcap, logit_scale)
            slope = None if softcap is None else 1 - (z / softcap).square_()
            inside, local = _target_in(target[rows], cols)
            q = z.sub_(lse[rows, None]).exp_().neg_()
            q.scatter_add_(1, local[:, None], inside[:, None].to(compute))
            if slope is not None:
                q *= slope
            if logit_scale is not None:
                q *= logit_scale
            if d_bias is not None:
                d_bias[cols] += (g * q).sum(dim=0)
            q = q.to(stored)
            if d_hidden is not None:
                d_hidden[rows] += torch.mm(q, weight[cols])
            if d_weight is not None and gx is not None:
                d_weight[cols] += torch.mm(q.T, gx)
        if d_hidden is not None:
            d_hidden[rows] *= g
    return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), d_bias


class _ChunkedLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (R, D)
        weight: Tensor,  # (V, D)
        target: Tensor,  # (R,)
        bias: Tensor | None,  # (V,)
        softcap: float | None,
        logit_scale: float | None,
    ) -> Tensor:  # (R,)
        top, total, hit = partials(hidden, weight, target, bias, softcap, logit_scale)
        stats = torch.stack([top, total.log_()])
        ctx.save_for_backward(hidden, weight, target, bias, stats)
        ctx.softcap, ctx.logit_scale = softcap, logit_scale
        return (hit - top).sub_(stats[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target, bias, stats = ctx.saved_tensors
        need_hidden, need_weight, _, need_bias = ctx.needs_input_grad[:4]
        problem = (hidden, weight, target, bias, ctx.softcap, ctx.logit_scale)
        with torch.autocast(grad.device.type, enabled=False):
            dx, dw, db = gradients(grad, stats, *problem, need_hidden, need_weight, need_bias)
        return (
            None if dx is None else dx.to(hidden.dtype),
            dw,
            None,
            None if db is None else db.to(bias.dtype),
            None,
            None,
        )


def _row_chunks(rows: int, element_bytes: int) -> list[slice]:
    size = rows_per_chunk(element_bytes)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _column_chunks(columns: int, depth: int, element_bytes: int) -> list[slice]:
    size = columns_per_chunk(depth, element_bytes)
    return [slice(start, min(start + size, columns)) for start in range(0, columns, size)]


def _target_in(target: Tensor, cols: slice) -> tuple[Tensor, Tensor]:
    """Whether each row's target lies in these columns, and its place among them (0 where it does not)."""
    local = target - cols.start
    inside = (local >= 0) & (local < cols.stop - cols.start)
    return inside, torch.where(inside, local, 0)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
) -> Tensor:
    return _ChunkedLogprob.apply(hidden, weight, target, bias, softcap, logit_scale)
