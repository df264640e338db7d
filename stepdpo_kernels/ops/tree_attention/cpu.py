"""Tree attention on the CPU: one flash-attention call for each leaf, keys and values gathered along its path.

The gradient of a key that several leaves share is summed in float32, leaf after leaf, whatever the dtype of the
inputs, so it is deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepdpo_kernels.types import TreePlan

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Leaf(NamedTuple):
    queries: slice
    path: Tensor | slice  # packed positions of its keys
    is_causal: bool
    mask: Tensor | None  # (q, k) additive


def _leaves(plan: TreePlan, sliding_window: int | None, dtype: torch.dtype) -> Iterator[_Leaf]:
    cu_q, cu_k = plan.cu_q.tolist(), plan.cu_k.tolist()
    for leaf in range(plan.num_leaves):
        queries = slice(cu_q[leaf], cu_q[leaf + 1])
        q, k = queries.stop - queries.start, cu_k[leaf + 1] - cu_k[leaf]
        fits_window = sliding_window is None or k <= sliding_window
        if q == k and fits_window:  # the first leaf of a tree: its path is its own tokens
            yield _Leaf(queries, queries, True, None)
            continue
        mask = torch.full((q, k), -torch.inf, dtype=dtype).triu_(k - q + 1)
        if sliding_window is not None and not fits_window:
            mask += torch.full((q, k), -torch.inf, dtype=dtype).tril_(k - q - sliding_window)
        yield _Leaf(queries, plan.keys.index[cu_k[leaf] : cu_k[leaf + 1]], False, mask)


def _along(x: Tensor, path: Tensor | slice) -> Tensor:
    """(1, G, k, d) keys or values of a path from (T, G, d)."""
    rows = x[path] if isinstance(path, slice) else x.index_select(0, path)
    return rows.transpose(0, 1)[None]


class _LeafPathAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: TreePlan,
        scale: float,
        sliding_window: int | None,
    ) -> Tensor:
        output = query.new_empty(*query.shape[:2], value.shape[2])  # (T, H, e)
        lse = query.new_empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))  # (T, H)
        for leaf in _leaves(plan, sliding_window, query.dtype):
            q = _along(query, leaf.queries)
            k, v = _along(key, leaf.path), _along(value, leaf.path)
            out, leaf_lse = _forward(q, k, v, 0.0, leaf.is_causal, attn_mask=leaf.mask, scale=scale)
            output[leaf.queries] = out[0].transpose(0, 1)
            lse[leaf.queries] = leaf_lse[0].T
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.plan, ctx.scale, ctx.sliding_window = plan, scale, sliding_window
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        d_query = torch.empty_like(query)
        accumulate = torch.promote_types(query.dtype, torch.float32)
        d_key, d_value = (torch.zeros(x.shape, dtype=accumulate) for x in (key, value))
        for leaf in _leaves(ctx.plan, ctx.sliding_window, query.dtype):
            q, out, g = (_along(x, leaf.queries) for x in (query, output, grad))
            k, v = _along(key, leaf.path), _along(value, leaf.path)
            leaf_lse = lse[leaf.queries].T[None]
            dq, dk, dv = _backward(g, q, k, v, out, leaf_lse, 0.0, leaf.is_causal, attn_mask=leaf.mask, scale=ctx.scale)
            d_query[leaf.queries] = dq[0].transpose(0, 1)
            for total, part in ((d_key, dk), (d_value, dv)):
                rows = part[0].transpose(0, 1).to(accumulate)
                if isinstance(leaf.path, slice):
                    total[leaf.path] += rows
                else:
                    total.index_add_(0, leaf.path, rows)
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), None, None, None


def why_not(inputs: dict[str, Any]) -> list[str]:
    query, value = inputs["query"], inputs["value"]
    reasons = []
    if query.device.type != "cpu":
        reasons.append(f"it runs on the CPU, not on {query.device.type}")
    if query.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        reasons.append(f"it takes no {query.dtype}")
    if query.shape[2] != value.shape[2]:
        reasons.append(f"heads of queries ({query.shape[2]}) and values ({value.shape[2]}) differ in size")
    return reasons


def tree_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: TreePlan, *, scale: float, sliding_window: int | None = None
) -> Tensor:
    # the kernel reads a head's d elements as neighbours, whatever the strides say
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    return _LeafPathAttention.apply(query, key, value, plan, scale, sliding_window)
