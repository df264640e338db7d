"""Tree attention by torch's FlexAttention, compiled: no keys gathered, blocks of the mask from depth-first intervals.

    t sees s   <=>   s <= t < end(s)   and   depth(t) - depth(s) < window

end, depth and window are tensors that the mask reads, so plans and windows share one compiled kernel. A sink s scales
a row of the output by sigmoid(lse - s).

Compilation is fullgraph: past torch's limit of recompilations that raises, where otherwise FlexAttention would go on
without a kernel, with all T x T scores in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from stepdpo_kernels.ops.tree_attention.blocks import is_depth_first
from stepdpo_kernels.ops.tree_attention.triton_tiles import intervals, listed
from stepdpo_kernels.types import TreePlan

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
MIN_SIZE = 16  # of a head, on CUDA


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # what is kept may be saved for a backward
def block_mask(plan: TreePlan, window: int | None) -> BlockMask:
    """The mask of a plan, which all layers share: the last few are kept.

    A block of queries and keys is listed if some query may see some key, as full if every query sees every key.
    """
    from torch.nn.attention.flex_attention import BlockMask

    ends, depths = (x.to(torch.int32) for x in intervals(plan))
    tokens, device = plan.num_tokens, ends.device
    reach = torch.tensor(tokens if window is None else min(window, tokens), dtype=torch.int32, device=device)
    count = -(-tokens // BLOCK)
    padding = (0, count * BLOCK - tokens)
    first = torch.arange(count, device=device) * BLOCK
    last = (first + BLOCK - 1).clamp(max=tokens - 1)
    (latest, deepest), (earliest, shallowest) = (
        ([pad(x, padding, value=fill).view(count, BLOCK) for x in (ends, depths)]) for fill in (0, tokens)
    )
    latest, deepest = latest.amax(dim=1), deepest.amax(dim=1)
    earliest, shallowest = earliest.amin(dim=1), shallowest.amin(dim=1)
    some = (first <= last[:, None]) & (latest > first[:, None]) & (shallowest[:, None] - deepest < reach)
    every = (last <= first[:, None]) & (earliest > last[:, None]) & (deepest[:, None] - shallowest < reach)
    if padding[1]:  # which nothing may see
        every[-1], every[:, -1] = False, False

    def sees(batch: Tensor, head: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (s <= t) & (t < ends[s]) & (depths[t] - depths[s] < reach)

    partial, full = (some & ~every)[None, None], every[None, None]
    return BlockMask.from_kv_blocks(
        *listed(partial), *listed(full), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(tokens, tokens)
    )


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, softcap: Tensor | None, scale: float, lse: bool
) -> tuple[Tensor, Tensor | None]:
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    def capped(score: Tensor, batch: Tensor, head: Tensor, t: Tensor, s: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    score_mod = None if softcap is None else capped
    grouped = query.shape[1] != key.shape[1]
    output, aux = flex_attention(query, key, value, score_mod, mask, scale, grouped, return_aux=AuxRequest(lse=lse))
    return output, aux.lse


@lru_cache(maxsize=1)
def compiled() -> Callable[..., tuple[Tensor, Tensor | None]]:
    return torch.compile(_attend, dynamic=True, fullgraph=True)


def why_not(inputs: dict[str, Any]) -> list[str]:
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    reasons = []
    if query.device.type not in ("cuda", "cpu"):
        reasons.append(f"it runs on CUDA, and forward on the CPU, not on {query.device.type}")
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reasons.append(f"it takes float32, bfloat16 and float16, not {query.dtype}")
    if query.device.type == "cpu":
        if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
            reasons.append("on the CPU it has no backward")
        if inputs.get("sinks") is not None:
            reasons.append("on the CPU it has no sinks")  # its kernel there gives no logsumexp
    if query.device.type == "cuda" and min(query.shape[2], value.shape[2]) < MIN_SIZE:
        reasons.append(f"heads of at least {MIN_SIZE}, not {min(query.shape[2], value.shape[2])}")
    if not reasons and query.device.type == "cpu" and "plan" in inputs and not is_depth_first(inputs["plan"]):
        reasons.append("the paths of the plan are not those of a forest in depth-first order")
    return reasons


def why_not_auto(inputs: dict[str, Any]) -> list[str]:
    return ["on the CPU it is for tests"] if inputs["query"].device.type == "cpu" else []


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: TreePlan,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    if not plan.num_tokens:
        inputs = (query, key, value) if sinks is None else (query, key, value, sinks.to(query.dtype))
        return query.new_empty(0, query.shape[1], value.shape[2]) + sum(x[:0].sum() for x in inputs)
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    cap = None if softcap is None else torch.tensor(softcap, device=query.device)
    output, lse = compiled()(q, k, v, block_mask(plan, sliding_window), cap, scale, sinks is not None)
    if sinks is not None:
        assert lse is not None
        output = (output * torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])[..., None]).to(query.dtype)
    return output[0].transpose(0, 1)
