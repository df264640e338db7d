"""Log-probs of the targets from products of the library and Triton kernels over rows of logits: the speed path.

    forward    for each chunk of rows: logits = X_c W^T in float32 (rows, V); a kernel with a program for each row reads
               them once, relative to the target's logit:  e = exp(z - z[target]), 0 for the target;  s = sum e
               logp = -log(1 + s)         f = 1 / (1 + s)
               and, where there are gradients, writes  Q = (s onehot - e) dz/du  in the dtype of the inputs, without a
               second look at the logits: what a whole row has to be divided by is a factor
               Q W, while Q is at hand
    backward   dX = f g * (Q W)         dW = Q^T (f g * X)         db = sum_r f g Q         g (R,) upstream gradient
               of rows whose Q was not kept, the logits are computed again by chunks of the vocabulary, so that a
               part of dW is complete when it is written

A row with a logit that exceeds the target's by more than HEADROOM is read three times: the sum relative to the maximum,
then Q with f = 1. So is every row in float16, whose range is too small for e.

Moved by the kernel, once for each row: 4 bytes a logit read, 2 (float32: 4) written. Without gradients log-probs come
from the very same code, whose stores are masked then. Three products for a full backward of rows that are kept, four of
others; two for a frozen head; one for log-probs.

Rows of a chunk: 1,024, halved until a chunk's logits fit a sixteenth of the device's memory, at least 128. Rows kept:
2D, whose Q in 16 bits is as large as a float32 dW, or four chunks if that is more; in float32 half of them. With fewer,
adding to a float32 dW, one group of rows after the other (in_forward.py), would cost more than 7% on an H100. The total
memory counts, not what is free at the moment: policy and reference must go through the same products to give the same
bits.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepdpo_kernels.ops.checks import refuse_second_derivative
from stepdpo_kernels.ops.linear_logprob import triton_kernel
from stepdpo_kernels.ops.linear_logprob.in_forward import Needs
from stepdpo_kernels.ops.linear_logprob.triton_kernel import Problem, add_product, around_launches, product, scaled

CHUNK_ROWS = 1024
CHUNK_BYTES = 32 * 1024 * 1024  # of float32 logits that backward computes again: they stay in the L2 cache
MIN_COLUMNS = 512  # below that a product is too narrow to be fast
BLOCK = 2048  # logits of a row at a time
NUM_WARPS = 8
LEAST_WORK = (
    1 << 37
)  # multiplications of a group's product, 0.4 ms on an H100: a slope of the loss is a hundred launches
HEADROOM = tl.constexpr(40.0)  # e^40, its sum over a vocabulary and the inverse are far inside float32 and bfloat16


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Rows whose logits are in memory at a time."""
    total = 1 << 40 if device.type == "cpu" else torch.cuda.get_device_properties(device).total_memory
    rows = CHUNK_ROWS
    while rows > 128 and 4 * rows * vocabulary > total // 16:
        rows //= 2
    return rows


def kept_rows(rows: int, weight: Tensor) -> int:
    """Rows whose Q is kept for dW."""
    most = max(2 * weight.shape[1], 4 * chunk_rows(weight.shape[0], weight.device))
    return min(rows, 2 * most // weight.dtype.itemsize)


# ---- helpers and forward --------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["write"])
def _row_kernel(
    logits,  # (rows, V) float32: hidden @ weight.T
    q_out,  # (rows, V)
    bias,  # (V,)
    target,  # (rows,) int64
    logp,  # (rows,) float32
    stats,  # (3, all rows) float32: reference of the logits, log of the sum relative to it, factor f of Q
    V,
    stride_z,
    stride_q,
    stride_stats,
    scale,
    softcap,
    write,  # 0: nothing into q_out; a number, so that the code is the same
    BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    NORMALISED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride_z
    q_out += row * stride_q
    wanted = tl.load(target + row)
    written = V * write
    lane = tl.arange(0, BLOCK)
    hit = tl.load(logits + wanted)
    if BIAS:
        hit += tl.load(bias + wanted).to(tl.float32)
    hit, hit_slope = triton_kernel._transformed(hit, wanted < V, scale, softcap, SOFTCAP)
    ref = tl.where(tl.abs(hit) < float("inf"), hit, 0.0)
    top = tl.full([BLOCK], -3.4028235e38, tl.float32)  # a maximum and a sum for each lane, joined at the end
    totals = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        z, slope = _load_logits(logits, bias, start, V, scale, softcap, BLOCK, BIAS, SOFTCAP)
        d = tl.where(start + lane == wanted, -float("inf"), z - ref)
        e = tl.exp(d)
        top = tl.maximum(top, d)
        totals += e
        if not NORMALISED:
            tl.store(q_out + start + lane, (-e * slope).to(q_out.dtype.element_ty), mask=start + lane < written)
    row_top = tl.max(top, axis=0)
    total = tl.sum(totals, axis=0)
    far = (row_top > HEADROOM) | (hit == -float("inf"))
    if NORMALISED or far:  # the sum relative to the maximum, then Q as it is
        ref += tl.where(far, row_top, 0.0)
        totals = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            z, _ = _load_logits(logits, bias, start, V, scale, softcap, BLOCK, BIAS, SOFTCAP)
            totals += tl.exp(tl.where(start + lane == wanted, -float("inf"), z - ref))
        total = tl.sum(totals, axis=0)
        log_everything = tl.log(tl.exp(hit - ref) + total)
        for start in range(0, written, BLOCK):
            z, slope = _load_logits(logits, bias, start, V, scale, softcap, BLOCK, BIAS, SOFTCAP)
            q = triton_kernel._gradient(z, slope, start + lane == wanted, ref, log_everything)
            tl.store(q_out + start + lane, q.to(q_out.dtype.element_ty), mask=start + lane < written)
    own = tl.exp(hit - ref)  # 1, unless far
    everything = own + total
    # log(1 + s) to the last digit of a small s
    exact = (own == 1) & (everything != 1)
    correction = tl.where(exact, total / tl.where(exact, everything - 1, 1.0), 1.0)
    log_sum = tl.where((own == 1) & (everything == 1), total, tl.log(everything) * correction)
    q_hit = total * hit_slope
    factor = 1 / everything
    if NORMALISED:
        q_hit *= factor
        factor = own * 0 + 1
    else:
        q_hit *= tl.where(far, factor, 1.0)
        # The target's is the largest of Q: what rounding does to it, the factor undoes.
        rounded = q_hit.to(q_out.dtype.element_ty).to(tl.float32)
        undone = tl.where(rounded == 0, 1.0, q_hit / tl.where(rounded == 0, 1.0, rounded))
        factor = tl.where(far, 1.0, factor * undone)
    tl.debug_barrier()  # another thread has written there
    tl.store(q_out + wanted, q_hit.to(q_out.dtype.element_ty), mask=wanted < written)
    tl.store(logp + row, (hit - ref) - log_sum)
    tl.store(stats + row, ref)
    tl.store(stats + stride_stats + row, log_sum)
    tl.store(stats + 2 * stride_stats + row, factor)


@triton.jit
def _gradient_kernel(
    logits,  # (rows, C) float32: hidden @ weight.T of the columns from `first` on
    q_out,  # (rows, C), with a factor of 1; may lie in the memory of the logits
    bias,  # (V,)
    target,  # (rows,) int64
    stats,  # (3, all rows) float32
    C,
    first,
    stride_z,
    stride_q,
    stride_stats,
    scale,
    softcap,
    BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride_z
    q_out += row * stride_q
    if BIAS:
        bias += first
    wanted = tl.load(target + row) - first
    ref = tl.load(stats + row)
    log_sum = tl.load(stats + stride_stats + row)
    lane = tl.arange(0, BLOCK)
    for start in range(0, C, BLOCK):
        z, slope = _load_logits(logits, bias, start, C, scale, softcap, BLOCK, BIAS, SOFTCAP)
        q = triton_kernel._gradient(z, slope, start + lane == wanted, ref, log_sum)
        tl.debug_barrier()  # in place, Q of this block lies over logits that other threads have to read first
        tl.store(q_out + start + lane, q.to(q_out.dtype.element_ty), mask=start + lane < C)


@triton.jit
def _load_logits(
    logits, bias, start, C, scale, softcap, BLOCK: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr
):
    c = start + tl.arange(0, BLOCK)
    z = tl.load(logits + c, mask=c < C, other=0.0)
    if BIAS:
        z += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    return triton_kernel._transformed(z, c < C, scale, softcap, SOFTCAP)


# ---- why not --------------------------------------------------------------------------------------------------------


why_not = triton_kernel.why_not


# ---- launchers ------------------------------------------------------------------------------------------------------


def _options(p: Problem) -> dict[str, Any]:
    flags = {"BIAS": p.bias is not None, "SOFTCAP": p.softcap is not None}
    block = BLOCK // 2 if p.softcap else BLOCK  # its slope takes registers
    return {"BLOCK": block, **flags, "num_warps": NUM_WARPS, "enable_fp_fusion": True}


def _look_at_rows(p: Problem, rows: slice, logits: Tensor, q: Tensor, logp: Tensor, stats: Tensor, write: bool) -> None:
    """Log-probs and stats of some rows from all their logits (rows, V); and Q (rows, V), if it is to be written."""
    _row_kernel[(logits.shape[0],)](
        logits, q, p.bias, p.target[rows], logp[rows], stats[:, rows], p.vocabulary, logits.stride(0),
        logits.stride(0), stats.stride(0), p.scale, p.softcap or 0.0, int(write),
        NORMALISED=q.dtype == torch.float16, **_options(p),
    )  # fmt: skip


def _write_gradient(p: Problem, rows: slice, first: int, logits: Tensor, q: Tensor, stats: Tensor) -> None:
    """Q of some rows and of the columns of `logits` (rows, C), which begin at `first`."""
    _gradient_kernel[(logits.shape[0],)](
        logits, q, p.bias, p.target[rows], stats[:, rows], logits.shape[1], first,
        logits.stride(0), q.stride(0), stats.stride(0), p.scale, p.softcap or 0.0, **_options(p),
    )  # fmt: skip


@torch.library.custom_op("stepdpo_kernels::linear_logprob_triton_chunked", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float | None,
    need_hidden: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs (R,), stats (3, R) and Q W (R or 0, D) in float32; Q of the first rows (kept or 0, V) for dW."""
    p = Problem(hidden, weight, target, bias, softcap, logit_scale)
    kept = kept_rows(p.rows, weight)
    device, dtype = hidden.device, hidden.dtype
    size = min(p.rows, chunk_rows(p.vocabulary, device))
    width = triton.cdiv(p.vocabulary, 8) * 8  # rows of aligned length
    buffer = torch.empty(size, width, dtype=torch.float32, device=device)
    logp = torch.empty(p.rows, dtype=torch.float32, device=device)
    stats = torch.empty(3, p.rows, dtype=torch.float32, device=device)
    d_hidden = torch.empty(p.rows if need_hidden else 0, p.hidden_size, dtype=torch.float32, device=device)
    kept_q = torch.empty(kept if keep else 0, width, dtype=dtype, device=device)
    passes = need_hidden and (not keep or kept < p.rows)
    passing = torch.empty(size if passes else 0, width, dtype=dtype, device=device)  # Q of a chunk that is not kept
    # The rows that may be kept and the others in chunks of their own, so that a chunk is the one or the other; and
    # whether they are kept or not, so that policy and reference go through the same products.
    edges = [*range(0, kept, size), *range(kept, p.rows, size), p.rows]
    with around_launches(hidden):
        for start, stop in pairwise(edges):
            logits = product(p.x[start:stop], p.w.T, out=buffer[: stop - start, : p.vocabulary])
            keep_these = keep and stop <= kept
            q = kept_q[start:stop] if keep_these else passing[: stop - start]
            write = need_hidden or keep_these
            _look_at_rows(p, slice(start, stop), logits, q, logp, stats, write)
            if need_hidden:
                product(q[:, : p.vocabulary], p.w, out=d_hidden[start:stop])
    return logp, stats, d_hidden, kept_q


@_forward.register_fake
def _(hidden, weight, target, bias, softcap, logit_scale, need_hidden, keep):  # type: ignore[no-untyped-def]
    rows, size = hidden.shape
    kept = kept_rows(rows, weight) if keep else 0
    return (
        hidden.new_empty(rows, dtype=torch.float32),
        hidden.new_empty(3, rows, dtype=torch.float32),
        hidden.new_empty(rows if need_hidden else 0, size, dtype=torch.float32),
        hidden.new_empty(kept, (weight.shape[0] + 7) // 8 * 8),
    )


@torch.library.custom_op("stepdpo_kernels::linear_logprob_triton_chunked_backward", mutates_args=())
def _weight_gradients(
    grad: Tensor,
    stats: Tensor,
    kept_q: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float | None,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor]:
    """dW (V or 0, D) in the dtype of the inputs, db (V or 0,) float32."""
    p = Problem(hidden, weight, target, bias, softcap, logit_scale)
    d_weight = hidden.new_empty(p.vocabulary if need_weight else 0, p.hidden_size)
    d_bias = torch.zeros(p.vocabulary if need_bias else 0, dtype=torch.float32, device=hidden.device)
    add_weight_gradients(p, grad, stats, kept_q, d_weight if need_weight else None, d_bias if need_bias else None)
    return d_weight, d_bias


def add_weight_gradients(
    p: Problem,
    grad: Tensor,  # (R,)
    stats: Tensor,  # (3, R)
    kept_q: Tensor,  # (kept, V or more)
    d_weight: Tensor | None,  # (V, D)
    d_bias: Tensor | None,  # (V,) float32, added to
    *,
    add: bool = False,
) -> None:
    """Writes dW into d_weight, of the dtype of the inputs or float32; `add` it to a float32 one."""
    dtype, device, kept = p.x.dtype, p.x.device, kept_q.shape[0]
    grad = grad.to(torch.float32).clone()
    grad[:kept] *= stats[2, :kept]  # of Q as it is kept; what is computed again has a factor of 1
    gx = None if d_weight is None else scaled(p.x, grad)
    with around_launches(p.x):
        rest = slice(kept, p.rows)
        columns = p.vocabulary  # all at once where nothing is computed again
        if kept < p.rows or d_bias is not None:
            columns = min(columns, max(MIN_COLUMNS, CHUNK_BYTES // (4 * p.rows) // 8 * 8))
        buffer = torch.empty(p.rows - kept, triton.cdiv(columns, 8) * 8, dtype=torch.float32, device=device)
        for start in range(0, p.vocabulary, columns):
            part = slice(start, min(start + columns, p.vocabulary))
            pieces = [(kept_q[:, part], slice(0, kept))] if kept else []
            if kept < p.rows:
                size = part.stop - start
                logits = product(p.x[rest], p.w[part].T, out=buffer[:, :size])
                q = buffer.view(dtype)[:, :size]
                _write_gradient(p, rest, start, logits, q, stats)
                pieces.append((q, rest))
            if gx is not None and d_weight is not None:
                of_weight = [(q.T, gx[rows]) for q, rows in pieces]
                if d_weight.dtype != torch.float32 and len(pieces) == 1:
                    torch.mm(*of_weight[0], out=d_weight[part])
                else:
                    total = d_weight[part] if d_weight.dtype == torch.float32 else None
                    if not add or total is None:
                        total = product(*of_weight.pop(0), out=total)
                    for operands in of_weight:
                        add_product(total, *operands)
                    if total.dtype != d_weight.dtype:
                        d_weight[part] = total
            if d_bias is not None:
                for q, rows in pieces:
                    d_bias[part] += (grad[rows, None] * q).sum(dim=0)


@_weight_gradients.register_fake
def _(grad, stats, kept_q, hidden, weight, target, bias, softcap, logit_scale, need_weight, need_bias):  # type: ignore[no-untyped-def]
    vocabulary, size = weight.shape
    return (
        weight.new_empty(vocabulary if need_weight else 0, size),
        weight.new_empty(vocabulary if need_bias else 0, dtype=torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, target, bias, ctx.softcap, ctx.logit_scale, *_ = inputs
    _, stats, d_hidden, kept_q = output
    ctx.mark_non_differentiable(stats, d_hidden, kept_q)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, target, bias, stats, d_hidden, kept_q)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("linear_logprob in Triton")
    if grad is None:
        return (None,) * 8
    hidden, weight, target, bias, stats, d_hidden, kept_q = ctx.saved_tensors
    need_hidden, need_weight, _target, need_bias, *_rest = ctx.needs_input_grad
    dx = ((grad * stats[2])[:, None] * d_hidden).to(hidden.dtype) if need_hidden else None
    dw = db = None
    if need_weight or need_bias:
        problem = (hidden, weight, target, bias, ctx.softcap, ctx.logit_scale)
        dw, db = _weight_gradients(grad, stats, kept_q, *problem, need_weight, need_bias)
    return dx, dw if need_weight else None, None, db.to(bias.dtype) if need_bias else None, *(None,) * 4


_forward.register_autograd(_backward, setup_context=_setup_context)


def linear_logprob(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (R,)
    *,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float | None = None,
) -> Tensor:  # (R,)
    """As `api.linear_logprob`."""
    grads = torch.is_grad_enabled()
    need_hidden = grads and hidden.requires_grad
    keep = grads and (weight.requires_grad or (bias is not None and bias.requires_grad))
    logp, *_ = _forward(hidden, weight, target, bias, softcap, logit_scale, need_hidden, keep)
    return logp


# ---- gradients in forward -------------------------------------------------------------------------------------------


def group_rows(weight: Tensor) -> int:
    """Rows of a group: as many as Q is kept of."""
    return kept_rows(1 << 40, weight)


class Groups:
    """As `in_forward.Groups`. Q of a group is kept until it is added to a float32 dW."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float | None, needs: Needs
    ) -> None:
        self._weight, self._needs, self._rest = weight, needs, (bias, softcap, logit_scale)
        self._d_weight = weight.new_empty(weight.shape, dtype=torch.float32) if needs.weight else None
        self._d_bias = weight.new_zeros(weight.shape[0], dtype=torch.float32) if needs.bias else None

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        self._problem = (hidden, self._weight, target, *self._rest)
        logp, self._stats, self._product, self._q = _forward(*self._problem, self._needs.hidden, True)
        return logp

    def backward(self, grad: Tensor, *, first: bool, last: bool) -> Tensor | None:
        p, sums = Problem(*self._problem), (self._d_weight, self._d_bias)
        add_weight_gradients(p, grad, self._stats, self._q, *sums, add=not first)
        del self._q  # before the next group's
        return (grad * self._stats[2])[:, None] * self._product if self._needs.hidden else None

    def sums(self) -> tuple[Tensor | None, Tensor | None]:
        return None if self._d_weight is None else self._d_weight.to(self._weight.dtype), self._d_bias
