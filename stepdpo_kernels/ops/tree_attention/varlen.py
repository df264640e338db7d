"""Tree attention on CUDA by the FlashAttention that torch carries: the kernel under torch.nn.attention.varlen.

That module gives no gradient through the logsumexp and keeps the gathered keys; so its two operations are called here.
Whichever FlashAttention torch.nn.attention.activate_flash_attention_impl has put in their place is the one that runs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from stepdpo_kernels.ops.tree_attention import leaf_paths
from stepdpo_kernels.ops.tree_attention.leaf_paths import Call, Kernel
from stepdpo_kernels.types import TreePlan

_setting = threading.Lock()  # autograd has a thread for each device, and the setting is the process's


@contextmanager
def _deterministic() -> Iterator[None]:
    """torch's FlashAttention sums dQ in order where torch is told to be deterministic, and only there."""
    settings: Any = torch.utils.deterministic
    with _setting:
        mode, fill = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
        torch.set_deterministic_debug_mode("error")
        settings.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(mode)
            settings.fill_uninitialized_memory = fill


def _arguments(call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    plan, (left, right) = call.plan, call.window
    sequences = (plan.cu_q, plan.cu_k, plan.max_q, plan.max_k, 0.0, left == -1)  # no dropout; causal
    return sequences, {"scale": call.scale, "window_size_left": left, "window_size_right": right}


def _forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    sequences, options = _arguments(call)
    out, lse, *random, _ = torch.ops.aten._flash_attention_forward(q, k, v, *sequences, False, **options)
    return out, lse, random


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, random: Sequence[Tensor], call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    sequences, options = _arguments(call)
    with _deterministic():
        gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
            grad, q, k, v, out, lse, *sequences, *random, **options
        )
    return gradients


def why_not(inputs: dict[str, Any]) -> list[str]:
    return leaf_paths.why_not(inputs) + (["it has no softcap"] if inputs.get("softcap") is not None else [])


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: TreePlan,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    call = Call(plan, scale, sliding_window, softcap)
    return leaf_paths.attend(query, key, value, sinks, call, Kernel(_forward, _backward))
