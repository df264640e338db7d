"""Tree attention on CUDA: keys and values gathered along every leaf's path, then one variable-length call.

`torch.nn.attention.varlen.varlen_attn` (FlashAttention 2) aligns the last query with the last key (bottom-right), which
is what a leaf needs. The gradient of the gather is an ordered float32 sum (`ops.ragged`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen

from stepdpo_kernels.ops.ragged import gather_rows
from stepdpo_kernels.types import TreePlan


def why_not(inputs: dict[str, Any]) -> list[str]:
    query, value = inputs["query"], inputs["value"]
    reasons = []
    if query.device.type != "cuda":
        reasons.append(f"it runs on CUDA, not on {query.device.type}")
    if query.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"it takes float16 and bfloat16, not {query.dtype}")
    if query.shape[2] != value.shape[2]:
        reasons.append(f"heads of queries ({query.shape[2]}) and values ({value.shape[2]}) differ in size")
    if query.shape[2] > 256:
        reasons.append(f"heads of at most 256, not {query.shape[2]}")
    reasons += [f"it has no {name}" for name in ("softcap", "sinks") if inputs.get(name) is not None]
    return reasons


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: TreePlan,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: None = None,
    sinks: None = None,
) -> Tensor:
    output: Tensor = varlen.varlen_attn(  # type: ignore[assignment]  # a tuple only with return_aux
        query.contiguous(),
        gather_rows(key, plan.keys),  # (K, G, d)
        gather_rows(value, plan.keys),
        plan.cu_q,
        plan.cu_k,
        plan.max_q,
        plan.max_k,
        scale=scale,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output
