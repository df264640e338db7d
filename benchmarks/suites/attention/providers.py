"""How each provider of the `attention` suite computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.registry import Case
from benchmarks.suites.attention import HEADS
from benchmarks.suites.attention.layouts import Forest, Packed

FLOOR_SIZE = 1024  # of the square operand of the floor's product


@dataclass
class Work:
    """Attention of one layout, from tensors that are there.

    inputs:     queries, keys and values; more than one of each where sequences are apart
    upstream:   gradients of what `forward` returns
    index:      the node of each place of what `forward` returns, flattened, -1 for padding
    heads_at:   the dimension of heads in the tensors' shapes
    """

    forward: Callable[..., list[Tensor]]
    inputs: list[list[Tensor]]  # [queries, keys, values]
    upstream: list[Tensor] = field(default_factory=list)
    index: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    heads_at: int = 1

    def flat(self, tensors: list[Tensor]) -> Tensor:
        """(places, heads, size)"""
        moved = [x if self.heads_at == 1 and x.ndim == 3 else x.transpose(1, 2).flatten(0, 1) for x in tensors]
        return torch.cat(moved)

    def of_nodes(self, tensors: list[Tensor], nodes: Tensor) -> Tensor:
        """(len(nodes), heads, size): summed over the places of each node, in float64; nodes (N,) rise"""
        flat = self.flat(tensors)
        row = torch.searchsorted(nodes, self.index).clamp(max=len(nodes) - 1)
        here = nodes[row] == self.index  # padding is nobody's place
        places, rows = here.nonzero()[:, 0].to(flat.device), row[here].to(flat.device)
        parts = flat[places].double()
        return parts.new_zeros(len(nodes), *parts.shape[1:]).index_add_(0, rows, parts)


def places(forest: Forest, index: Tensor) -> tuple[list[Tensor], Tensor]:
    """([query, key, value] at each place, upstream gradients): a node's gradient is divided among its places."""
    index = index.to(forest.query.device)
    real, at = (index >= 0)[..., None, None], index.clamp(min=0)
    copies = torch.bincount(index[index >= 0].flatten(), minlength=forest.tokens)
    share = 1 / copies[at][..., None, None]
    values = [torch.where(real, x[at], 0) for x in (forest.query, forest.key, forest.value)]
    return values, torch.where(real, (forest.upstream[at] * share).to(forest.upstream.dtype), 0)


def leaf(x: Tensor) -> Tensor:
    return x.detach().contiguous().requires_grad_()


def in_a_line(forest: Forest, layout: Packed, attend: Callable[..., Tensor]) -> Work:
    """attend: query, key, value (T, heads, size) -> (T, H, size)"""
    values, upstream = places(forest, layout.index)
    inputs = [[leaf(x)] for x in values]
    return Work(lambda q, k, v: [attend(q[0], k[0], v[0])], inputs, [upstream], layout.index)


def ours(impl: str, share: str) -> Callable[[Forest], Work]:
    def work(forest: Forest) -> Work:
        from stepdpo_kernels.ops.tree_attention import tree_attention

        layout = forest.layout(share)
        plan = layout.plan.to(forest.query.device)
        return in_a_line(forest, layout, lambda q, k, v: tree_attention(q, k, v, plan, scale=forest.scale, impl=impl))

    return work


def padded_sdpa(forest: Forest) -> Work:
    index = forest.padded()
    values, upstream = places(forest, index)  # (B, L, heads, size)
    inputs = [[leaf(x.transpose(1, 2))] for x in values]
    return Work(
        lambda q, k, v: [causal_sdpa(q[0], k[0], v[0], forest.scale)],
        inputs,
        [upstream.transpose(1, 2)],
        index.flatten(),
        heads_at=2,
    )


def unshared_sdpa(forest: Forest) -> Work:
    layout = forest.layout("none")
    values, upstream = places(forest, layout.index)
    inputs = [[leaf(part.transpose(0, 1)[None]) for part in x.split(layout.lengths)] for x in values]

    def forward(queries: list[Tensor], keys: list[Tensor], values: list[Tensor]) -> list[Tensor]:
        return [causal_sdpa(q, k, v, forest.scale) for q, k, v in zip(queries, keys, values, strict=True)]

    gradients = [part.transpose(0, 1)[None] for part in upstream.split(layout.lengths)]
    return Work(forward, inputs, gradients, layout.index, heads_at=2)


def causal_sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)


def unshared_varlen(forest: Forest) -> Work:
    from torch.nn.attention.varlen import varlen_attn

    layout = forest.layout("none")
    ends, longest = layout.plan.cu_q.to(forest.query.device), max(layout.lengths)
    # Newer versions of torch want to be told of grouped heads, older ones take them as they are.
    options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = varlen_attn(q, k, v, ends, ends, longest, longest, scale=forest.scale, window_size=(-1, 0), **options)
        assert isinstance(output, Tensor)  # without auxiliary results
        return output

    return in_a_line(forest, layout, attend)


def unshared_flash_attn(forest: Forest) -> Work:
    flash = import_module("flash_attn").flash_attn_varlen_func
    layout = forest.layout("none")
    ends, longest = layout.plan.cu_q.to(forest.query.device), max(layout.lengths)
    return in_a_line(
        forest,
        layout,
        lambda q, k, v: flash(q, k, v, ends, ends, longest, longest, softmax_scale=forest.scale, causal=True),
    )


def dense_sdpa(forest: Forest) -> Work:
    from stepdpo_kernels.ops.tree_attention.reference import dense_mask

    layout = forest.layout("tree")
    mask = dense_mask(layout.plan).to(forest.query.device)
    # On CUDA the kernel that takes a mask and needs no scores of all by all takes no grouped heads.
    group = forest.query.shape[1] // forest.key.shape[1] if forest.query.is_cuda else 1

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=forest.scale, enable_gqa=group == 1)
        return output[0].transpose(0, 1)

    return in_a_line(forest, layout, attend)


def flex_shared_prefix(forest: Forest) -> Work:
    from torch.nn.attention.flex_attention import create_block_mask

    layout = forest.layout("pair")
    pair, second, first = (x.to(forest.query.device) for x in pair_places(layout))

    def sees(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (pair[q] == pair[k]) & (q >= k) & ~(second[q] & first[k])

    size = layout.index.numel()
    # Compiled, or it holds tensors of all by all places.
    device = forest.query.device.type
    mask = create_block_mask(sees, None, None, size, size, device=device, _compile=device == "cuda")
    flex = _compiled_flex()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        turned = [x.transpose(0, 1)[None] for x in (q, k, v)]
        return flex(*turned, block_mask=mask, scale=forest.scale, enable_gqa=True)[0].transpose(0, 1)

    return in_a_line(forest, layout, attend)


def pair_places(layout: Packed) -> tuple[Tensor, Tensor, Tensor]:
    """(pair of each place, whether it is of the pair's second branch, whether of the first one's own tokens)"""
    queries, keys = layout.plan.cu_q.diff().tolist(), layout.plan.cu_k.diff().tolist()
    number, pair, second, first = -1, [], [], []
    for leaf_number, (own, path) in enumerate(zip(queries, keys, strict=True)):
        begins = own == path  # prefix and first branch; the next leaf, of the same pair, says how long the prefix is
        number += begins
        shared = keys[leaf_number + 1] - queries[leaf_number + 1] if begins and leaf_number + 1 < len(keys) else 0
        pair += [number] * own
        second += [not begins] * own
        first += [begins and place >= shared for place in range(own)]
    return torch.tensor(pair), torch.tensor(second), torch.tensor(first)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def operations(forest: Forest, case: Case) -> int:
    """2 products forward and 4 backward of every visible pair, an addition and a multiplication a step"""
    heads, _, size = HEADS[case["heads"]]
    return 2 * heads * size * forest.visible * (2 if case["mode"] == "forward" else 6)


def products(forest: Forest, case: Case) -> Work:
    """One product of as many operations, of operands that a library is at its best with."""
    rows = max(1, round(operations(forest, case) / (2 * FLOOR_SIZE**2)))
    of: dict[str, Any] = {"dtype": forest.query.dtype, "device": forest.query.device}
    a, b = torch.randn(min(rows, 8 * FLOOR_SIZE), FLOOR_SIZE, **of), torch.randn(FLOOR_SIZE, FLOOR_SIZE, **of)
    whole, rest = divmod(rows, len(a))

    def forward(*_: Any) -> list[Tensor]:
        for _part in range(whole):
            torch.mm(a, b)
        return [torch.mm(a[:rest], b)]

    return Work(forward, [[], [], []])


def moved(forest: Forest, case: Case) -> Work:
    """Forward reads Q, K, V and writes O; backward reads Q, K, V, dO and writes dQ, dK, dV. A copy reads and writes."""
    copies = [forest.query, forest.key] * (1 if case["mode"] == "forward" else 2)  # K is as large as V, Q as O

    def forward(*_: Any) -> list[Tensor]:
        return [x.clone() for x in copies]

    return Work(forward, [[], [], []])


FLOORS: dict[str, Callable[[Forest, Case], Work]] = {"products": products, "bytes": moved}
WORKS: dict[str, Callable[[Forest], Work]] = {
    "ours": ours("auto", "tree"),
    "ours-pair": ours("auto", "pair"),
    "ours-none": ours("auto", "none"),
    "ours-flash": ours("flash", "tree"),
    "ours-varlen": ours("varlen", "tree"),
    "ours-triton": ours("triton", "tree"),
    "ours-flex": ours("flex", "tree"),
    "padded-sdpa": padded_sdpa,
    "unshared-sdpa": unshared_sdpa,
    "unshared-varlen": unshared_varlen,
    "unshared-flash-attn": unshared_flash_attn,
    "flex-shared-prefix": flex_shared_prefix,
    "dense-sdpa": dense_sdpa,
}
