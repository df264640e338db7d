"""The definition: a dense mask and a softmax. The twin that every implementation is held against."""

from __future__ import annotations

import torch
from torch import Tensor

from stepdpo_kernels.types import TreePlan


def dense_mask(plan: TreePlan, sliding_window: int | None = None) -> Tensor:
    """(T, T) bool: whether packed token i (row) sees packed token j (column)."""
    mask = torch.zeros(plan.num_tokens, plan.num_tokens, dtype=torch.bool)
    cu_q, cu_k, keys = plan.cu_q.tolist(), plan.cu_k.tolist(), plan.keys.index.cpu()
    for leaf in range(plan.num_leaves):
        path = keys[cu_k[leaf] : cu_k[leaf + 1]]
        queries = cu_q[leaf + 1] - cu_q[leaf]
        depth = torch.arange(path.numel() - queries, path.numel())[:, None]  # of each query, (q, 1)
        distance = depth - torch.arange(path.numel())  # (q, k)
        sees = distance >= 0
        if sliding_window is not None:
            sees &= distance < sliding_window
        mask[cu_q[leaf] : cu_q[leaf + 1], path] = sees
    return mask


def tree_attention(
    query: Tensor,  # (T, H, d)
    key: Tensor,  # (T, G, d)
    value: Tensor,  # (T, G, e)
    plan: TreePlan,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # (H,)
) -> Tensor:  # (T, H, e)
    """Softmax attention over the dense mask, in at least float32; see `api.tree_attention`."""
    compute = torch.promote_types(query.dtype, torch.float32)
    share = query.shape[1] // key.shape[1]
    q = query.to(compute).transpose(0, 1)  # (H, T, d)
    k, v = (x.to(compute).repeat_interleave(share, dim=1).transpose(0, 1) for x in (key, value))
    scores = scale * q @ k.transpose(1, 2)  # (H, T, T)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~dense_mask(plan, sliding_window).to(query.device), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(compute)[:, None, None].expand(-1, scores.shape[1], 1)], dim=2)
    probabilities = scores.softmax(dim=-1)[:, :, : scores.shape[1]]
    return (probabilities @ v).transpose(0, 1).to(query.dtype)
