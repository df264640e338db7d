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

from stepdpo_kernels.ops.checks import refuse_second_derivative

# (log-probs (R,), of which those of a group are there; its rows) -> (rows,) gradient of the loss in them
Slope = Callable[[Tensor, slice], Tensor]
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


class Groups(Protocol):
    """What an implementation does with groups of rows, one after the other, in memory that they share.

    Made of weight (V, D), bias (V,), softcap, logit_scale and needs.
    """

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        """(rows,) log-probs of a group; what its gradients need is kept."""

    def backward(self, grad: Tensor, *, first: bool, last: bool) -> Tensor | None:
        """dX (rows, D) of that group in float32, for its upstream gradient (rows,); dW and db are added up."""

    def sums(self) -> tuple[Tensor | None, Tensor | None]:
        """dW (V, D) in the dtype of the weight and db (V,) in float32, after the last group."""


# (hidden, weight, bias, slope, needs) -> log-probs (R,) and gradients, the rest of `loss_gradients` being known
RunGroups = Callable[[Tensor, Tensor, Tensor | None, Slope, Needs], tuple[Tensor, Gradients]]


def loss_gradients(
    groups_of: Callable[..., Groups],
    target: Tensor,  # (R,)
    options: dict[str, float | None],
    edges: Sequence[int],
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    slope: Slope,
    needs: Needs,
) -> tuple[Tensor, Gradients]:
    """Log-probs (R,) and the gradients of a loss, over the groups of rows between `edges`."""
    logp = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    d_hidden = torch.empty_like(hidden) if needs.hidden else None
    with torch.autocast(hidden.device.type, enabled=False):  # backward may be called inside
        groups = groups_of(weight, bias, **options, needs=needs)
        for start, stop in pairwise(edges):
            rows = slice(start, stop)
            logp[rows] = groups.forward(hidden[rows], target[rows])
            dx = groups.backward(slope(logp, rows), first=start == 0, last=stop == edges[-1])
            if d_hidden is not None and dx is not None:
                d_hidden[rows] = dx
        d_weight, d_bias = groups.sums()
    return logp, Gradients(d_hidden, d_weight, None if d_bias is None or bias is None else d_bias.to(bias.dtype))


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


def slope_of(loss_of: Callable[[Tensor], Tensor]) -> Slope:
    """The gradient of a loss in the log-probs of a group, which does not depend on those of others."""

    def slope(logp: Tensor, rows: slice) -> Tensor:
        alone = torch.zeros_like(logp)
        alone[rows] = logp[rows]
        # The hooks of a checkpoint around all this would compute it again for each of these small graphs.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            (gradient,) = torch.autograd.grad(loss_of(alone.requires_grad_()), alone)
        return gradient[rows]

    return slope


class Ready(torch.autograd.Function):
    """A loss () whose gradients are there already; `run` and `slope` are what they came from."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        loss: Tensor,
        gradients: Gradients,
        run: RunGroups,
        slope: Slope,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.gradients, ctx.run, ctx.slope = gradients, run, slope
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("linear_logprob by groups of rows")
        gradients: Gradients | None = ctx.gradients
        ctx.gradients = None  # handed on, not copied: a second backward through a retained graph has to compute them
        if gradients is None:
            _, gradients = ctx.run(*ctx.saved_tensors, ctx.slope, Needs(*ctx.needs_input_grad[:3]))
        return (*(None if x is None else x.mul_(grad) for x in gradients), *(None,) * 4)


class GroupedLogprob(torch.autograd.Function):
    """Log-probs (R,) for any gradient by the products that `Ready`'s come from: a reference's, should it be trained.

    Keeps nothing but its inputs; backward goes through the groups once more, with four products in all.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        logprob: Callable[..., Tensor],
        run: RunGroups,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.run = run
        return logprob(hidden, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("linear_logprob by groups of rows")
        needs = Needs(*ctx.needs_input_grad[:3])
        _, gradients = ctx.run(*ctx.saved_tensors, lambda logp, rows: grad[rows], needs)
        return (*gradients, None, None)


def logprob_by_groups(
    plain: Callable[..., Tensor],
    target: Tensor,
    options: dict[str, float | None],
    edges: Sequence[int],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:  # (R,)
    """Log-probs by an implementation's own `linear_logprob`, one group after the other."""
    sizes = [stop - start for start, stop in pairwise(edges)]
    parts = zip(hidden.split(sizes), target.split(sizes), strict=True)
    return torch.cat([plain(x, weight, t, bias=bias, **options) for x, t in parts])
