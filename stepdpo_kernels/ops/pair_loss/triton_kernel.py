"""Branch sums, margins, losses and their derivatives of all pairs in one launch; the gradient in two more.

    forward    grid (pairs): a program sums the token log-probs of its two branches in float64, and from there on has
               numbers, not vectors:  margin x = beta ((c - ref_c) - (r - ref_r))
               loss  w ((1 - e) softplus(-x) + e softplus(x))      softplus(-x) = max(-x, 0) + log(1 + exp(-|x|))
               d loss / dc = w beta (e sigmoid(x) - (1 - e) sigmoid(-x)) = - d loss / dr
    backward   grid (branches): sum of the gradients of the pairs that a branch belongs to, over all pairs in order
               grid (blocks of tokens): sum of the gradients of the branches that a token is on, in order

Moved in forward: 12 bytes for each token of a pair's branches (an index and a log-prob) and about 80 for each pair; a
branch in several pairs is summed in each of them, in the same order and so to the same bits. In backward 16 bytes for
each pair and branch, most of them from the cache, and 16 for each token and branch it is on. No atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepdpo_kernels.ops.checks import refuse_second_derivative
from stepdpo_kernels.ops.pair_loss.reference import PairLoss
from stepdpo_kernels.types import Ragged

INTERPRETED = bool(triton.knobs.runtime.interpret)

# A step has tens of tokens and a batch tens to hundreds of pairs: one block of one warp is one or a few rounds.
BLOCK = 128
OPTIONS = {"num_warps": 1, "num_stages": 1}


# ---- helpers --------------------------------------------------------------------------------------------------------


@triton.jit
def _branch_sum(token_logps, index, ends, lengths, branch, BLOCK: tl.constexpr):
    """Sum of the token log-probs of a branch: float64, rounded once."""
    length = tl.load(lengths + branch)
    first = tl.load(ends + branch) - length
    n = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, length, BLOCK):
        inside = start + n < length
        row = tl.load(index + first + start + n, mask=inside, other=0)
        total += tl.load(token_logps + row, mask=inside, other=0.0).to(tl.float64)
    return tl.sum(total, axis=0).to(tl.float32)


@triton.jit
def _log1p(e):
    """log(1 + e) with all digits of a small e."""
    u = 1.0 + e
    rounded_away = u == 1.0
    return tl.where(rounded_away, e, tl.log(u) * (e / tl.where(rounded_away, 1.0, u - 1.0)))


# ---- forward --------------------------------------------------------------------------------------------------------


@triton.jit
def _forward_kernel(
    token_logps,  # (R,) float32
    index,  # (N,) int64: tokens of branch 0, then of branch 1, ...
    ends,  # (S,) int64: where the tokens of a branch end in index
    lengths,  # (S,) int64
    chosen,  # (P,) int64
    rejected,  # (P,) int64
    ref_logps,  # (2P,) float32, or None
    weights,  # (P,) float32, or None
    losses,  # (P,) float32
    logps,  # (2P,) float32
    stats,  # (4, P) float32: rewards chosen and rejected, margin, d loss / d chosen log-prob
    P,
    beta,
    label_smoothing,
    REFERENCE: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    p = tl.program_id(0)
    c = _branch_sum(token_logps, index, ends, lengths, tl.load(chosen + p), BLOCK)
    r = _branch_sum(token_logps, index, ends, lengths, tl.load(rejected + p), BLOCK)
    tl.store(logps + p, c)
    tl.store(logps + P + p, r)
    if REFERENCE:
        c -= tl.load(ref_logps + p)
        r -= tl.load(ref_logps + P + p)
    c *= beta
    r *= beta
    margin = c - r
    x = margin.to(tl.float64)
    decay = tl.exp(-tl.abs(x))
    both = _log1p(decay)
    loss = (1 - label_smoothing) * (tl.maximum(-x, 0.0) + both) + label_smoothing * (tl.maximum(x, 0.0) + both)
    large = 1 / (1 + decay)  # sigmoid(|x|)
    small = decay / (1 + decay)  # sigmoid(-|x|)
    slope = label_smoothing * tl.where(x >= 0, large, small) - (1 - label_smoothing) * tl.where(x >= 0, small, large)
    coefficient = beta * slope
    if WEIGHTS:
        weight = tl.load(weights + p).to(tl.float64)
        loss *= weight
        coefficient *= weight
    tl.store(losses + p, loss.to(tl.float32))
    tl.store(stats + p, c)
    tl.store(stats + P + p, r)
    tl.store(stats + 2 * P + p, margin)
    tl.store(stats + 3 * P + p, coefficient.to(tl.float32))


# ---- backward -------------------------------------------------------------------------------------------------------


@triton.jit
def _branch_gradient_kernel(
    grad,  # (2P,) float32: of the branch log-probs of each pair
    chosen,  # (P,) int64
    rejected,  # (P,) int64
    branch_grad,  # (S,) float64
    P,
    BLOCK: tl.constexpr,
):
    s = tl.program_id(0)
    n = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, P, BLOCK):
        p = start + n
        inside = p < P
        as_chosen = inside & (tl.load(chosen + p, mask=inside, other=-1) == s)
        as_rejected = inside & (tl.load(rejected + p, mask=inside, other=-1) == s)
        total += tl.load(grad + p, mask=as_chosen, other=0.0).to(tl.float64)
        total += tl.load(grad + P + p, mask=as_rejected, other=0.0).to(tl.float64)
    tl.store(branch_grad + s, tl.sum(total, axis=0))


@triton.jit
def _token_gradient_kernel(
    branch_grad,  # (S,) float64
    t_index,  # (N,) int64: branches of token 0, then of token 1, ...
    t_ends,  # (R,) int64: where the branches of a token end in t_index
    t_lengths,  # (R,) int64
    token_grad,  # (R,) float32
    R,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = r < R
    length = tl.load(t_lengths + r, mask=inside, other=0)
    first = tl.load(t_ends + r, mask=inside, other=0) - length
    total = tl.zeros([BLOCK], tl.float64)
    for j in range(tl.max(length, axis=0)):
        on = j < length
        branch = tl.load(t_index + first + j, mask=on, other=0)
        total += tl.load(branch_grad + branch, mask=on, other=0.0)
    tl.store(token_grad + r, total.to(tl.float32), mask=inside)


# ---- why not --------------------------------------------------------------------------------------------------------


def why_not(inputs: dict[str, Any]) -> list[str]:
    token_logps = inputs["token_logps"]
    reasons = []
    if token_logps.device.type != "cuda" and not (INTERPRETED and token_logps.device.type == "cpu"):
        reasons.append(f"it runs on GPUs, and token_logps is on {token_logps.device}")
    if token_logps.dtype != torch.float32:
        reasons.append(f"it takes float32, and token_logps is {token_logps.dtype}")
    return reasons


# ---- launchers ------------------------------------------------------------------------------------------------------


# FP fusion off: a margin is the difference of two rewards as they are stored.
_LAUNCH: dict[str, Any] = {"BLOCK": BLOCK, "enable_fp_fusion": False, **OPTIONS}


@torch.library.custom_op("stepdpo_kernels::pair_loss_triton", mutates_args=())
def _pair_loss(
    token_logps: Tensor,
    index: Tensor,
    lengths: Tensor,
    t_index: Tensor,
    t_lengths: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    ref_logps: Tensor | None,
    weights: Tensor | None,
    beta: float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """losses (P,), logps (2P,), and (4, P): rewards, margins, derivative of a loss by its chosen log-prob."""
    pairs = chosen.shape[0]
    losses, logps, stats = (token_logps.new_empty(shape) for shape in ((pairs,), (2 * pairs,), (4, pairs)))
    with torch.cuda.device_of(token_logps):  # Triton launches on the current device
        if pairs:
            _forward_kernel[(pairs,)](
                token_logps.contiguous(), index, lengths.cumsum(0), lengths, chosen.contiguous(), rejected.contiguous(),
                ref_logps, weights, losses, logps, stats, pairs, beta, label_smoothing,
                REFERENCE=ref_logps is not None, WEIGHTS=weights is not None, **_LAUNCH,
            )  # fmt: skip
    return losses, logps, stats


@_pair_loss.register_fake
def _(token_logps, index, lengths, t_index, t_lengths, chosen, rejected, ref_logps, weights, beta, label_smoothing):  # type: ignore[no-untyped-def]
    pairs = chosen.shape[0]
    return tuple(token_logps.new_empty(shape) for shape in ((pairs,), (2 * pairs,), (4, pairs)))


@torch.library.custom_op("stepdpo_kernels::pair_loss_triton_backward", mutates_args=())
def _token_gradients(
    grad: Tensor, chosen: Tensor, rejected: Tensor, t_index: Tensor, t_lengths: Tensor, branches: int
) -> Tensor:
    """(R,) float32 from the gradients of the pairs' branch log-probs (2P,)."""
    pairs, rows = chosen.shape[0], t_lengths.shape[0]
    branch_grad = torch.empty(branches, dtype=torch.float64, device=grad.device)
    token_grad = torch.empty(rows, dtype=torch.float32, device=grad.device)
    with torch.cuda.device_of(grad):
        if branches:
            _branch_gradient_kernel[(branches,)](
                grad.contiguous(), chosen.contiguous(), rejected.contiguous(), branch_grad, pairs, **_LAUNCH
            )
        if rows:
            _token_gradient_kernel[(triton.cdiv(rows, BLOCK),)](
                branch_grad, t_index, t_lengths.cumsum(0), t_lengths, token_grad, rows, **_LAUNCH
            )
    return token_grad


@_token_gradients.register_fake
def _(grad, chosen, rejected, t_index, t_lengths, branches):  # type: ignore[no-untyped-def]
    return grad.new_empty(t_lengths.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, _, lengths, t_index, t_lengths, chosen, rejected, *_ = inputs
    stats = output[2]
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.branches = lengths.shape[0]
    ctx.save_for_backward(stats, chosen, rejected, t_index, t_lengths)


def _backward(ctx: Any, grad_losses: Tensor | None, grad_logps: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("pair_loss in Triton")
    stats, chosen, rejected, t_index, t_lengths = ctx.saved_tensors
    grad = grad_logps
    if grad_losses is not None:
        each = grad_losses * stats[3]
        both = torch.cat([each, -each])
        grad = both if grad is None else both + grad
    if grad is None:
        return (None,) * 11
    return (_token_gradients(grad, chosen, rejected, t_index, t_lengths, ctx.branches), *(None,) * 10)


_pair_loss.register_autograd(_backward, setup_context=_setup_context)


def pair_loss(
    token_logps: Tensor,  # (R,)
    branches: Ragged,
    chosen: Tensor,  # (P,)
    rejected: Tensor,  # (P,)
    ref_logps: Tensor | None = None,  # (2P,)
    weights: Tensor | None = None,  # (P,)
    *,
    beta: float = 1.0,
    label_smoothing: float = 0.0,
) -> PairLoss:
    """As `api.pair_loss`."""
    refs, weights = (None if t is None else t.detach().to(torch.float32).contiguous() for t in (ref_logps, weights))
    losses, logps, stats = _pair_loss(
        token_logps, branches.index, branches.lengths, branches.t_index, branches.t_lengths,
        chosen, rejected, refs, weights, beta, label_smoothing,
    )  # fmt: skip
    return PairLoss(losses, logps, *stats[:3])
