"""What trainers log of the distributions behind `linear_logprob`, without the logits in memory and without a gradient.

    z = softcap(logit_scale * (hidden @ weight.T + bias)),  p = softmax(z), for each row:

    entropy            -sum p log p = lse - sum z e^(z-m) / s,    m the largest z, s = sum e^(z-m), lse = m + log s
    log_sum_sq_probs   log sum p^2  = log sum e^(2(z-m)) - 2 log s
    mean_logit         the mean of z
    is_top1            whether no z is larger than the target's

One product with the weight, by vocabulary chunks. Products are in the dtype of the inputs, with float32 results on
CUDA; everything after them in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Bytes of a chunk of float32 logits: the passes over it find it in a core's cache.
CHUNK_BYTES = 4 * 1024 * 1024


class Statistics(NamedTuple):
    """Each (R,): entropy, log_sum_sq_probs and mean_logit float32 (float64 for float64 inputs), is_top1 bool."""

    entropy: Tensor
    log_sum_sq_probs: Tensor
    mean_logit: Tensor
    is_top1: Tensor


@torch.no_grad()
def linear_statistics(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (R,) int64
    *,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float | None = None,
) -> Statistics:
    """Statistics of each row's distribution; arguments as `linear_logprob`."""
    device, rows, vocabulary = hidden.device, hidden.shape[0], weight.shape[0]
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    compute = torch.promote_types(hidden.dtype, torch.float32)
    top = torch.full((rows,), torch.finfo(compute).min, dtype=compute, device=device)
    total, moment, squares, sums, wanted = (torch.zeros_like(top) for _ in range(5))
    columns = max(512, CHUNK_BYTES // (4 * max(rows, 1)) // 64 * 64)
    with torch.autocast(device.type, enabled=False):
        for start in range(0, vocabulary if rows else 0, columns):
            cols = slice(start, min(start + columns, vocabulary))
            z = _product(hidden, weight[cols], compute)  # (R, C)
            if bias is not None:
                z += bias[cols]
            if logit_scale is not None:
                z *= logit_scale
            if softcap is not None:
                z.div_(softcap).tanh_().mul_(softcap)
            sums += z.sum(1)
            local = target - start
            inside = (local >= 0) & (local < z.shape[1])
            wanted = torch.where(inside, z.gather(1, torch.where(inside, local, 0)[:, None])[:, 0], wanted)
            new_top = torch.maximum(top, z.amax(1))
            factor = (top - new_top).exp_()
            e = (z - new_top[:, None]).exp_()
            total = total * factor + e.sum(1)
            moment = moment * factor + torch.linalg.vecdot(z, e)
            squares = squares * factor.square() + torch.linalg.vecdot(e, e)
            top = new_top
    log_total = total.log()
    return Statistics(
        entropy=top + log_total - moment / total,
        log_sum_sq_probs=squares.log() - 2 * log_total,
        mean_logit=sums / vocabulary,
        is_top1=wanted >= top,
    )


def _product(hidden: Tensor, weight: Tensor, compute: torch.dtype) -> Tensor:  # (R, C)
    if hidden.is_cuda and hidden.dtype != compute:
        return torch.mm(hidden, weight.T, out_dtype=compute)
    return torch.mm(hidden, weight.T).to(compute)
