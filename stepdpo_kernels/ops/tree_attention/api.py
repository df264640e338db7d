"""`tree_attention`: each packed token attends to its ancestors in the prefix forest and to itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepdpo_kernels import _dispatch
from stepdpo_kernels.ops.tree_attention import cpu, flash, flex, reference, selftest, varlen
from stepdpo_kernels.types import TreePlan


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
    impl: str = "auto",
) -> Tensor:  # (T, H, e)
    """Causal softmax attention along the root-to-leaf paths of a packed forest.

    Equals what each branch computes when it is encoded on its own: token i attends to the tokens on the path from its
    tree's root to itself, with grouped heads (H a multiple of G).

    Args:
        query, key, value: one dtype, one device. Under torch.autocast they are cast to its dtype first.
        plan: where each token's path lies, on the same device.
        scale: factor on the scores, usually d ** -0.5.
        sliding_window: a token sees at most this many tokens of its path, itself included. None: all.
        softcap: scores are softcap * tanh(scale * q k / softcap) (Gemma 2), positive.
        sinks: (H,) a logit of each head that takes part in the softmax and has no value (gpt-oss); differentiable.
        impl: "auto", or the name of an implementation, which then raises rather than falls back.

    Raises:
        ValueError: shapes that do not fit the plan or each other, or an `impl` that cannot take the inputs.
    """
    if query.ndim != 3 or key.ndim != 3 or value.ndim != 3:
        raise ValueError(f"query, key and value must be (T, heads, d), got {query.ndim}, {key.ndim}, {value.ndim} dims")
    if not query.shape[0] == key.shape[0] == value.shape[0] == plan.num_tokens:
        raise ValueError(f"the plan is for {plan.num_tokens} tokens, got {query.shape[0]} queries, {key.shape[0]} keys")
    if query.shape[2] != key.shape[2] or key.shape[1] != value.shape[1] or query.shape[1] % key.shape[1]:
        raise ValueError(f"heads do not fit: {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1, got {sliding_window}")
    if sliding_window is not None:
        sliding_window = min(sliding_window, max(plan.max_k, 1))  # int32 in kernels
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    if sinks is not None and sinks.shape != (query.shape[1],):
        raise ValueError(f"sinks must be ({query.shape[1]},), one for each head of queries, got {tuple(sinks.shape)}")
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    options = {"sliding_window": sliding_window, "softcap": softcap, "sinks": sinks}
    inputs = {"query": query, "key": key, "value": value, "plan": plan, **options}
    implementation = _dispatch.choose("tree_attention", impl, inputs)
    return implementation.run(query, key, value, plan, scale=scale, **options)


def _triton(*args: Any, **options: Any) -> Tensor:
    from stepdpo_kernels.ops.tree_attention import triton_kernel

    return triton_kernel.tree_attention(*args, **options)


_triton_why_not = _dispatch.triton_why_not("query", "stepdpo_kernels.ops.tree_attention.triton_kernel")
for _name, _run, _why_not, _why_not_auto in (
    ("flash", flash.tree_attention, flash.why_not, _dispatch.no_reason),
    ("varlen", varlen.tree_attention, varlen.why_not, _dispatch.no_reason),
    ("triton", _triton, _triton_why_not, _dispatch.triton_why_not_auto("query")),
    ("flex", flex.tree_attention, flex.why_not, flex.why_not_auto),
):
    _dispatch.register("tree_attention", _name, _run, _why_not, _why_not_auto, selftest.of(_name, _run))
_dispatch.register("tree_attention", "cpu", cpu.tree_attention, cpu.why_not)
_dispatch.register("tree_attention", "reference", reference.tree_attention, _dispatch.no_reason)
