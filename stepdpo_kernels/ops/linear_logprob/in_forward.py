"""A loss of log-probs whose gradients are taken in forward, one group of rows after the other.

Where more rows are trained than an implementation keeps Q of, its backward computes the logits of the others again, in
four products. A loss over pairs need not wait for backward: the upstream gradient of a row depends on the log-probs of
its pair alone. So in a group, rows that share no pair with others, it is known once they have been projected:

    for each group     logp, Q as in forward       g = d loss / d logp       (group,)
                       dX = g * (Q W)              dW += Q^T (g * X)         db += Q^T g
    backward           all three times the upstream gradient of the loss, one number

Three products whatever the number of rows. Memory beside inputs and gradients: Q of one group, a float32 dW, which each
group but the first reads and writes: 8 bytes of it for the 6 operations of each of the group's rows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

# (R,) log-probs -> (R,) gradient of the loss in them
Slope = Callable[[Tensor], Tensor]
# rising, after how many rows a group of them ends, the last one R; or what gives it, for when it is asked
Ends = Sequence[int] | Callable[[], Sequence[int]]


class Needs(NamedTuple):
    """Whether there must be a gradient."""

    hidden: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    """(R, D), (V, D) and (V,) of a loss, in the dtypes of what they are gradients of; None for what nobody needs."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Run(Protocol):
    """What an implementation offers: log-probs (R,) and gradients of a loss, over groups of rows between `edges`."""

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        logit_scale: float | None,
        edges: Sequence[int],
        slope: Slope,
        needs: Needs,
    ) -> tuple[Tensor, Gradients]: ...


def in_groups(rows: int, kept: int) -> bool:
    """Whether groups are worth it: to compute a few rows again costs less than to add to a float32 dW."""
    return 4 * rows > 5 * kept


def join_groups(ends: Sequence[int], rows: int, limit: int) -> list[int]:
    """Edges [0, ..., rows] of as few groups as hold whole ones of `ends` and at most `limit` rows, or a larger one.

    ends: rising, where groups of rows end
    """
    edges = [0]
    ends = sorted({*(end for end in ends if 0 < end < rows), rows})
    while edges[-1] < rows:
        last = bisect_right(ends, edges[-1] + limit) - 1
        first = bisect_right(ends, edges[-1])
        edges.append(ends[max(first, last)])
    return edges


def slope_of(slope: Slope, logp: Tensor, rows: slice) -> Tensor:
    """(rows,) gradient of the loss in the log-probs of a group, which does not depend on the others."""
    alone = torch.zeros_like(logp)
    alone[rows] = logp[rows]
    return slope(alone)[rows]


class LossInForward(torch.autograd.Function):
    """(loss, log-probs (R,)); only the loss carries a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (R, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        target: Tensor,  # (R,)
        softcap: float | None,
        logit_scale: float | None,
        edges: Sequence[int],
        loss_of: Callable[[Tensor], Tensor],
        run: Run,
        plain: Callable[..., Tensor],
    ) -> tuple[Tensor, Tensor]:
        def slope(logp: Tensor) -> Tensor:
            with torch.enable_grad():
                leaf = logp.detach().requires_grad_()
                return torch.autograd.grad(loss_of(leaf), leaf)[0]

        needs = Needs(*ctx.needs_input_grad[:3])
        logp, ctx.ready = run(hidden, weight, target, bias, softcap, logit_scale, edges, slope, needs)
        ctx.save_for_backward(hidden, weight, bias, target, logp)
        ctx.slope, ctx.plain, ctx.edges = slope, plain, edges
        ctx.options = {"softcap": softcap, "logit_scale": logit_scale}
        ctx.mark_non_differentiable(logp)
        return loss_of(logp).detach(), logp

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        ready: Gradients | None = ctx.ready
        ctx.ready = None  # they are handed on, not copied
        if ready is None:
            ready = _again(ctx)
        return (*(None if x is None else x.mul_(grad) for x in ready), *(None,) * 7)


def _again(ctx: Any) -> Gradients:
    """For a second backward through a retained graph, by the implementation's own forward and backward."""
    hidden, weight, bias, target, logp = ctx.saved_tensors
    x: Any
    w: Any
    b: Any
    with torch.enable_grad():
        x, w, b = (
            None if t is None else t.detach().requires_grad_(needed)
            for t, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        )
        again = by_groups(ctx.plain, x, w, target, ctx.edges, bias=b, **ctx.options)
    needed = [t for t in (x, w, b) if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(again, needed, ctx.slope(logp)))
    return Gradients(*(next(found) if t is not None and t.requires_grad else None for t in (x, w, b)))


def by_groups(
    plain: Callable[..., Tensor], hidden: Tensor, weight: Tensor, target: Tensor, edges: Sequence[int], **options: Any
) -> Tensor:  # (R,)
    """Log-probs by the products that `LossInForward` takes: for a reference, which is to give the same bits."""
    sizes = [stop - start for start, stop in pairwise(edges)]
    parts = zip(hidden.split(sizes), target.split(sizes), strict=True)
    return torch.cat([plain(x, weight, t, **options) for x, t in parts])
