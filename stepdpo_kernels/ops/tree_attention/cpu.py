"""Tree attention on the CPU: dense products over blocks of consecutive queries and the keys that they see.

For each chunk of blocks, with G heads of keys and the queries of a group as rows of one matrix:

    S = scale Q K^T + mask,  P = softmax(S),  O = P V
    dV = P^T dO,  dP = dO V^T,  dS = P * (dP - rowsum(P * dP)),  dQ = scale dS K,  dK = scale dS^T Q

With a softcap c, S = c tanh(scale Q K^T / c) + mask, and dS has a factor 1 - tanh^2 more. A sink is one more column of
S, whose value is zero: P has a row sum of 1 - p, and d sink = -sum over the tokens of p rowsum(dO * O).

S and the softmax are at least float32; the other products and what is kept of P are in the dtype of the inputs where
the processor multiplies it, else in float32. The gradients of a key in different blocks are summed in float32, in the
order of the blocks, so they are deterministic.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepdpo_kernels.ops.tree_attention.blocks import Chunk, Segment, blocks_of, is_depth_first
from stepdpo_kernels.types import TreePlan

# P is kept for backward where it takes at most this many times the memory of the queries; else it is computed anew.
KEPT_PROBABILITIES = 4
# Multiplications in a product from which on it pays to use all threads for it: see benchmarks/NOTES.md.
LARGE_PRODUCT = 1 << 22


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype itself where oneDNN multiplies it on this processor, else float32: torch's own loops are far slower."""
    if dtype in (torch.float32, torch.float64):
        return dtype
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    supported = torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, name)()
    return dtype if supported else torch.float32


def _rows(x: Tensor, groups: int) -> Tensor:
    """(T * G, heads of a group * d) of (T, heads, d)."""
    return x.reshape(x.shape[0] * groups, x.shape[1] // groups * x.shape[2])


def _queries(x: Tensor, chunk: Chunk, size: int, dtype: torch.dtype) -> Tensor:
    """(blocks * G, n * heads of a group, d) of (T * G, heads of a group * d)."""
    return x.index_select(0, chunk.query_rows).to(dtype).view(chunk.shape[0] * chunk.groups, -1, size)


def _keys(x: Tensor, rows: Tensor, chunk: Chunk, dtype: torch.dtype) -> Tensor:
    """(blocks * G, m, d) of (T * G, d)."""
    return x.index_select(0, rows).to(dtype).view(chunk.shape[0] * chunk.groups, chunk.shape[2], x.shape[1])


def _multiply(out: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """out = beta out + alpha a b, over a batch of matrices."""
    batch, threads = a.shape[0], torch.get_num_threads()
    busy = batch / (-(-batch // threads) * threads)  # MKL gives each matrix of a batch to one thread, oneDNN does not
    if a.dtype in (torch.float32, torch.float64) and busy < 0.8 and a[0].numel() * b.shape[2] >= LARGE_PRODUCT:
        for of_out, of_a, of_b in zip(out, a, b, strict=True):
            of_out.addmm_(of_a, of_b, beta=beta, alpha=alpha)
        return out
    return out.baddbmm_(a, b, beta=beta, alpha=alpha)


class _Probabilities(NamedTuple):
    """p, slope: (blocks * G, n * heads of a group, m); sunk: (blocks * G * n, heads of a group).

    slope:  1 - tanh^2 of the scores, with a softcap, where asked for
    sunk:   at least float32, the probabilities of the sinks
    """

    p: Tensor
    slope: Tensor | None
    sunk: Tensor | None


def _probabilities(
    query: Tensor,
    key: Tensor,
    mask: Tensor,
    chunk: Chunk,
    scale: float,
    dtype: torch.dtype,
    softcap: float | None,
    sinks: Tensor | None,
    slope: bool,
) -> _Probabilities:
    """Of one chunk; p and slope in `dtype`."""
    blocks, n, m = chunk.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    heads = query.shape[1] // n
    every = torch.empty(blocks, chunk.groups, n, heads, m + (sinks is not None), dtype=wide)
    if sinks is not None:
        every[..., m] = sinks.view(chunk.groups, 1, heads)
    rows = every.view(blocks * chunk.groups, n * heads, every.shape[-1])
    scores, mask = rows[..., :m], mask[:, None, :, None]
    slopes = None
    if softcap is None:
        every[..., :m] = mask
        _multiply(scores, query.to(wide), key.to(wide).mT, alpha=scale, beta=1)
    else:
        _multiply(scores, query.to(wide), key.to(wide).mT, alpha=scale / softcap).tanh_()
        slopes = scores.square().neg_().add_(1).to(dtype) if slope else None
        scores.mul_(softcap)
        every[..., :m].add_(mask)
    torch.softmax(rows, dim=-1, out=rows)
    sunk = None if sinks is None else every[..., m].reshape(-1, heads)
    return _Probabilities(scores.to(dtype).contiguous(), slopes, sunk)


def _sums(parts: Tensor, segment: Segment, total: Tensor | None, rows: int) -> Tensor:
    """Adds to `total` (T * G, d) the parts of each key, (key rows of the segment, d); the sums are float32."""
    order, starts = segment.bags(rows)
    sums, *_ = torch.embedding_bag(parts, order, starts, mode=0)
    return sums if total is None else total.to(torch.promote_types(total.dtype, torch.float32)).add_(sums)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: TreePlan,
        scale: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        groups, size = key.shape[1:]
        blocks = blocks_of(plan, sliding_window, groups)
        dtype = _product_dtype(query.dtype)
        heads = query.shape[1] // groups
        q, k, v = (_rows(x, groups) for x in (query, key, value))
        size_of_p = blocks.pairs * query.shape[1] * dtype.itemsize * (1 if softcap is None else 2)
        kept = any(ctx.needs_input_grad) and size_of_p <= KEPT_PROBABILITIES * query.nbytes
        output = torch.empty(sum(c.query_rows.numel() for c in blocks.chunks), heads * value.shape[2], dtype=dtype)
        probabilities: list[Tensor] = []
        sunk = [torch.empty(0, heads)]
        at = 0
        for chunk in blocks.chunks:
            rows, mask = chunk.keys()
            queries, keys = _queries(q, chunk, size, q.dtype), _keys(k, rows, chunk, k.dtype)
            p, slope, of_sinks = _probabilities(queries, keys, mask, chunk, scale, dtype, softcap, sinks, kept)
            if kept:
                probabilities += [p] if slope is None else [p, slope]
            if of_sinks is not None:
                sunk.append(of_sinks)
            end = at + chunk.query_rows.numel()
            out = output[at:end].view(*p.shape[:2], value.shape[2])
            _multiply(out, p, _keys(v, rows, chunk, dtype))
            at = end
        output = output.index_select(0, blocks.query_slots).view(*query.shape[:2], value.shape[2]).to(query.dtype)
        of_sinks = None if sinks is None else torch.cat(sunk).index_select(0, blocks.query_slots)
        ctx.save_for_backward(query, key, value, sinks, of_sinks, None if sinks is None else output, *probabilities)
        ctx.blocks, ctx.scale, ctx.softcap = blocks, scale, softcap
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, of_sinks, output, *probabilities = ctx.saved_tensors
        blocks, scale, softcap, groups = ctx.blocks, ctx.scale, ctx.softcap, key.shape[1]
        dtype = _product_dtype(query.dtype)
        q, k, v, g = (_rows(x, groups) for x in (query, key, value, grad))
        d_query = torch.empty(sum(c.query_rows.numel() for c in blocks.chunks), q.shape[1], dtype=dtype)
        d_key = d_value = None
        kept = iter(probabilities)
        q_at = 0
        for segment in blocks.segments:
            key_parts = torch.empty(segment.key_rows, k.shape[1], dtype=dtype)
            value_parts = torch.empty(segment.key_rows, v.shape[1], dtype=dtype)
            k_at = 0
            for chunk in segment.chunks:
                rows, mask = chunk.keys()
                queries, up = (_queries(x, chunk, y.shape[2], dtype) for x, y in ((q, key), (g, value)))
                up.view(chunk.query_rows.numel(), -1).index_fill_(0, chunk.padding, 0)
                keys, values = (_keys(x, rows, chunk, dtype) for x in (k, v))
                if probabilities:
                    p, slope = next(kept), None if softcap is None else next(kept)
                else:
                    p, slope, _ = _probabilities(queries, keys, mask, chunk, scale, dtype, softcap, sinks, True)
                q_end, k_end = q_at + chunk.query_rows.numel(), k_at + rows.numel()
                _multiply(value_parts[k_at:k_end].view_as(values), p.mT, up)
                d_p = _multiply(torch.empty_like(p), up, values.mT)
                d_scores = torch.ops.aten._softmax_backward_data(d_p, p, -1, dtype)
                if slope is not None:
                    d_scores.mul_(slope)
                _multiply(d_query[q_at:q_end].view_as(queries), d_scores, keys, alpha=scale)
                _multiply(key_parts[k_at:k_end].view_as(keys), d_scores.mT, queries, alpha=scale)
                q_at, k_at = q_end, k_end
            d_key = _sums(key_parts, segment, d_key, k.shape[0])
            d_value = _sums(value_parts, segment, d_value, v.shape[0])
        d_sinks = None
        if sinks is not None:
            wide = of_sinks.dtype
            delta = (grad.to(wide) * output.to(wide)).sum(dim=2)  # (T, H)
            d_sinks = -(of_sinks.view_as(delta) * delta).sum(dim=0).to(sinks.dtype)
        if d_key is None or d_value is None:  # no tokens
            d_key, d_value = torch.zeros_like(key), torch.zeros_like(value)
        d_query = d_query.index_select(0, blocks.query_slots).view(query.shape).to(query.dtype)
        d_key, d_value = d_key.view(key.shape).to(key.dtype), d_value.view(value.shape).to(value.dtype)
        return d_query, d_key, d_value, None, None, None, None, d_sinks


def why_not(inputs: dict[str, Any]) -> list[str]:
    query = inputs["query"]
    reasons = []
    if query.device.type != "cpu":
        reasons.append(f"it runs on the CPU, not on {query.device.type}")
    if query.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        reasons.append(f"it takes no {query.dtype}")
    if not reasons and "plan" in inputs and not is_depth_first(inputs["plan"]):
        reasons.append("the paths of the plan are not those of a forest in depth-first order")
    return reasons


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
    return _BlockAttention.apply(query, key, value, plan, scale, sliding_window, softcap, sinks)
