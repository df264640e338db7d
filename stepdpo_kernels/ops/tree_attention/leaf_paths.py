"""Attention along leaf paths by a kernel for sequences of different lengths: gather, one call, ordered sums.

    K~, V~ = K, V along every leaf's path          O, lse = kernel(Q, K~, V~)
    dQ, dK~, dV~ = kernel's backward               dK, dV = float32 sums of dK~, dV~ over the leaves, in order

The last query of a leaf is aligned with its last key (bottom-right). K~ and V~ are not kept from forward to backward
but gathered again.

A sink s scales a row of O by sigmoid(lse - s). The kernel's own backward, which begins with P = exp(S - lse) and
rowsum(dO * O), is then given O' = O sigmoid(lse - s) and lse' = log(exp(lse) + exp(s)) and is exact, with
ds = -sum over the tokens of exp(s - lse') rowsum(dO * O').

Heads are padded with zeros to the larger of the sizes of keys and values and to a multiple of 8, which changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from stepdpo_kernels.ops.ragged import segment_sum
from stepdpo_kernels.types import TreePlan

MAX_SIZE = 256


class Call(NamedTuple):
    """What a kernel needs beside its tensors."""

    plan: TreePlan
    scale: float
    sliding_window: int | None
    softcap: float | None

    @property
    def window(self) -> tuple[int, int]:
        """Keys to the left and right of the diagonal that a query sees, -1 for all."""
        return (-1 if self.sliding_window is None else self.sliding_window - 1, 0)


class Kernel(NamedTuple):
    """Heads of one size for queries (T, H, d), gathered keys and values (K, G, d).

    forward:   (q, k, v, call) -> output (T, H, d), lse (H, T) float32, and what else its backward wants
    backward:  (grad, q, k, v, output, lse, the rest, call) -> dq, dk, dv, the same bits every time
    """

    forward: Callable[[Tensor, Tensor, Tensor, Call], tuple[Tensor, Tensor, Sequence[Tensor]]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _padded(x: Tensor, size: int) -> Tensor:
    x = pad(x, (0, size - x.shape[2])) if x.shape[2] < size else x
    return x if x.stride(2) == 1 else x.contiguous()


def _sequences(query: Tensor, key: Tensor, value: Tensor, plan: TreePlan) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel takes: the queries, and the keys and values of all leaves."""
    size = -(-max(query.shape[2], value.shape[2]) // 8) * 8
    k, v = (_padded(x, size).index_select(0, plan.keys.index) for x in (key, value))
    return _padded(query, size), k, v


class _LeafPaths(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, call: Call, kernel: Kernel
    ) -> Tensor:
        ctx.call, ctx.kernel = call, kernel
        if not call.plan.num_tokens:
            ctx.save_for_backward(query, key, value, sinks)
            return query.new_empty(0, query.shape[1], value.shape[2])
        out, lse, state = kernel.forward(*_sequences(query, key, value, call.plan), call)
        if lse.shape != (query.shape[1], query.shape[0]):
            expected = query.shape[1], query.shape[0]
            raise RuntimeError(f"expected a logsumexp of {expected} (heads, tokens), got {tuple(lse.shape)}")
        out = out[:, :, : value.shape[2]]
        if sinks is not None:
            sink = sinks.to(lse.dtype)[:, None]
            out = (out * torch.sigmoid(lse - sink).T[:, :, None]).to(query.dtype)
            lse = torch.logaddexp(lse, sink)
        ctx.save_for_backward(query, key, value, sinks, out, lse, *state)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, *kept = ctx.saved_tensors
        plan, needed = ctx.call.plan, ctx.needs_input_grad
        if not kept:  # no tokens
            return *(None if x is None else torch.zeros_like(x) for x in (query, key, value, sinks)), None, None
        out, lse, *state = kept
        q, k, v = _sequences(query, key, value, plan)
        up, result = (_padded(x, q.shape[2]) for x in (grad, out))
        d_q, d_k, d_v = ctx.kernel.backward(up, q, k, v, result, lse, state, ctx.call)
        gradients: list[Tensor | None] = [d_q[:, :, : query.shape[2]]]
        for parts, x, need in ((d_k, key, needed[1]), (d_v, value, needed[2])):
            total = segment_sum(parts, plan.keys.t_index, plan.keys.t_lengths) if need else None
            gradients.append(None if total is None else total[:, :, : x.shape[2]])
        d_sinks = None
        if needed[3]:
            weights = torch.exp(sinks.to(lse.dtype)[:, None] - lse)  # (H, T)
            deltas = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(dim=2)  # (T, H)
            d_sinks = -(weights * deltas.T).sum(dim=1).to(sinks.dtype)
        return *gradients, d_sinks, None, None


def attend(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, call: Call, kernel: Kernel) -> Tensor:
    """(T, H, e) from query (T, H, d), key (T, G, d), value (T, G, e), sinks (H,)."""
    output: Tensor = _LeafPaths.apply(query, key, value, sinks, call, kernel)
    return output


def why_not(inputs: dict[str, Any]) -> list[str]:
    """What no kernel of FlashAttention takes."""
    query, size = inputs["query"], max(inputs["query"].shape[2], inputs["value"].shape[2])
    reasons = []
    if query.device.type != "cuda":
        reasons.append(f"it runs on CUDA, not on {query.device.type}")
    if query.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"it takes float16 and bfloat16, not {query.dtype}")
    if size > MAX_SIZE:
        reasons.append(f"heads of at most {MAX_SIZE}, not {size}")
    return reasons
