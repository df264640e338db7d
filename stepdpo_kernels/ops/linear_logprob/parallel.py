"""Log-probs of the targets where the vocabulary is sharded over processes (tensor parallel).

Each process has the rows V_i of W, in the order of ranks, and the same hidden states and targets.

    forward    m_i = max z_i      s_i = sum exp(z_i - m_i)      h_i = z[target] where it is one of V_i, else 0
               m = max_i m_i      s = sum_i s_i exp(m_i - m)    logp = sum_i h_i - m - log s        4 R numbers move
    backward   dW_i, db_i from the rows V_i alone with p = exp(z_i - lse);  dX = sum_i Q_i W_i      R D numbers move

The partial sums come from the fused Triton kernel or from torch by chunks: both recompute, four products in all.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Implementations that can be had for a part of the vocabulary: module with `partials` and `gradients`.
_HOMES = {"triton_fused": "triton_kernel", "chunked": "chunked"}


class _ShardedLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (R, D)
        weight: Tensor,  # (V_i, D)
        target: Tensor,  # (R,) relative to this process's first row
        bias: Tensor | None,  # (V_i,)
        softcap: float | None,
        logit_scale: float | None,
        home: Any,
        group: dist.ProcessGroup,
    ) -> Tensor:  # (R,)
        top, total, hit = home.partials(hidden, weight, target, bias, softcap, logit_scale)
        global_top = top.clone()
        dist.all_reduce(global_top, dist.ReduceOp.MAX, group)
        inside = (target >= 0) & (target < weight.shape[0])
        sums = torch.stack([total * torch.exp(top - global_top), hit, inside.to(hit.dtype)])
        dist.all_reduce(sums, dist.ReduceOp.SUM, group)
        _check_owners(sums[2])
        log_total = sums[0].log()
        ctx.save_for_backward(hidden, weight, target, bias, torch.stack([global_top, log_total]))
        ctx.softcap, ctx.logit_scale, ctx.home, ctx.group = softcap, logit_scale, home, group
        return (sums[1] - global_top) - log_total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target, bias, stats = ctx.saved_tensors
        need_hidden, need_weight, _, need_bias = ctx.needs_input_grad[:4]
        problem = (hidden, weight, target, bias, ctx.softcap, ctx.logit_scale)
        with torch.autocast(grad.device.type, enabled=False):
            dx, dw, db = ctx.home.gradients(grad, stats, *problem, need_hidden, need_weight, need_bias)
        if dx is not None:
            dist.all_reduce(dx, dist.ReduceOp.SUM, ctx.group)
            dx = dx.to(hidden.dtype)
        return dx, dw, None, None if db is None else db.to(bias.dtype), *(None,) * 4


def _check_owners(owners: Tensor) -> None:
    """Each target (R,) must lie in one process's part of the vocabulary."""
    if owners.device.type != "cpu":
        torch._assert_async((owners == 1).all(), "a target lies in no process's part of the vocabulary, or in several")
    elif (owners != 1).any():
        row = int((owners != 1).nonzero()[0, 0])
        raise ValueError(
            f"the target of row {row} lies in the vocabulary of {int(owners[row])} processes; vocab_start and the "
            "weights' rows must cover the vocabulary once"
        )


def is_distributed(weight: Tensor) -> bool:
    """Whether it is a DTensor; without importing what defines that."""
    return type(weight).__name__ == "DTensor"


def localize(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, dist.ProcessGroup | None, int | None]:
    """This process's part of DTensors: hidden, weight, bias, group and first row; no group for a replicated weight.

    Raises ValueError for a sharded weight with a hidden that is not a replicated DTensor: with plain tensors nothing
    says whether all processes have the same rows (tensor parallel) or each its own (data parallel, FSDP).
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    assert isinstance(weight, DTensor)
    mesh, placements = weight.device_mesh, weight.placements
    if mesh.ndim != 1 or placements[0] not in (Replicate(), Shard(0)):
        raise ValueError(
            f"weight is a DTensor with placements {tuple(placements)}; on a mesh of one dimension Shard(0) or "
            "Replicate() can be taken: redistribute it, or pass weight.full_tensor()"
        )
    if not isinstance(hidden, DTensor) or hidden.device_mesh != mesh or hidden.placements != (Replicate(),):
        raise ValueError(
            "weight is a DTensor, so hidden must be a DTensor replicated on the same mesh (tensor parallel). Under "
            "FSDP run the head inside the wrapped module's forward, where weights are whole"
        )
    if bias is not None:
        if not isinstance(bias, DTensor):
            raise ValueError("weight is a DTensor, so bias must be one with the same placement")
        bias = bias.redistribute(mesh, placements).to_local()
    hidden, local = hidden.to_local(), weight.to_local()
    if placements[0] == Replicate():
        return hidden, local, bias, None, None
    rows_each = -(-weight.shape[0] // mesh.size())  # as torch.chunk cuts
    first = min(mesh.get_local_rank() * rows_each, weight.shape[0])
    return hidden, local, bias, mesh.get_group(), first


def linear_logprob(
    name: str,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float | None,
    group: dist.ProcessGroup,
    first: int,
) -> Tensor:
    """As `api.linear_logprob` with the rows from `first` on of the weight; `name` of the implementation."""
    home = import_module(f"stepdpo_kernels.ops.linear_logprob.{_HOMES[name]}")
    return _ShardedLogprob.apply(hidden, weight, target - first, bias, softcap, logit_scale, home, group)
