"""Which tiles of keys a block of queries sees, from the depth-first intervals of a plan: torch on the plan's device.

Packed tokens are in depth-first order, so the descendants of token s are the tokens s + 1 .. end(s) - 1, and

    t sees s   <=>   s <= t < end(s)   and   depth(t) - depth(s) < window

The queries i0..i1-1 see nothing of a tile of keys that begins at i1 or later, whose ends are all at i0 or before, or
whose greatest depth is a window or more above the least depth of the queries. Nothing here waits for the device.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from stepdpo_kernels.types import TreePlan


class Shape(NamedTuple):
    """Rows of queries, which are heads of a token, one token after another, and tokens of keys."""

    rows: int
    keys: int


class Tiles(NamedTuple):
    """What the kernels read of a plan, int32.

    ends, depths:      (T,): the first token after the subtree of each token, and the token's position on its path
    forward, d_query:  (blocks of rows, 1 + tiles of keys): how many tiles each block visits, then their numbers,
                       ascending; each in the shape of its kernel
    d_key:             (tiles of keys, 1 + blocks of rows): the same from the side of the tiles

    What follows the numbers of a block or tile is not read.
    """

    ends: Tensor
    depths: Tensor
    forward: Tensor
    d_query: Tensor
    d_key: Tensor


def intervals(plan: TreePlan) -> tuple[Tensor, Tensor]:
    """ends and depths (T,) int64; a plan whose paths are not those of a depth-first forest fails on the device."""
    tokens = torch.arange(plan.num_tokens, device=plan.cu_q.device)
    cu_q, cu_k, paths = plan.cu_q.long(), plan.cu_k.long(), plan.keys.index
    leaf = torch.searchsorted(cu_q, tokens, right=True) - 1
    own = cu_k[1:] - cu_q[1:]  # from a leaf's own token to its place in `paths`
    places = tokens + own[leaf]
    depths = places - cu_k[leaf]
    # where each token stands on the last path that has it
    last = plan.keys.t_index[plan.keys.t_lengths.cumsum(0) - 1]
    ends = cu_q[torch.searchsorted(cu_k, last, right=True)]
    # a path is a beginning of the one before, followed by the leaf's own tokens
    at = torch.arange(paths.numel(), device=paths.device)
    leaf = torch.searchsorted(cu_k, at, right=True) - 1
    depth, shared = at - cu_k[leaf], (cu_k.diff() - cu_q.diff())[leaf]
    before = cu_k[(leaf - 1).clamp(min=0)] + depth  # as deep, on the path before
    on_path_before = (leaf > 0) & (before < cu_k[leaf]) & (paths == paths[before.clamp(max=max(paths.numel() - 1, 0))])
    depth_first = torch.where(depth < shared, on_path_before, paths == at - own[leaf])
    torch._assert_async(depth_first.all(), "the paths of the plan are not those of a forest in depth-first order")
    return ends, depths


def listed(visible: Tensor) -> tuple[Tensor, Tensor]:
    """(..., n) how many of each row of (..., n, m) bool are true, (..., n, m) which, ascending, then others; int32."""
    order = visible.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return visible.sum(dim=-1).to(torch.int32), order.to(torch.int32)


def _lists(visible: Tensor) -> Tensor:
    """(n, 1 + m): what `listed` gives, side by side."""
    many, which = listed(visible)
    return torch.cat([many[:, None], which], dim=1)


def _visible(ends: Tensor, depths: Tensor, window: int | None, group: int, shape: Shape) -> Tensor:
    """(blocks of rows, tiles of keys) bool; with `group` heads of queries for each of keys."""
    tokens = ends.numel()
    blocks, tiles = -(-tokens * group // shape.rows), -(-tokens // shape.keys)
    block = torch.arange(blocks, device=ends.device)
    first = block * shape.rows // group
    last = (((block + 1) * shape.rows - 1) // group).clamp(max=tokens - 1)
    key = torch.arange(tiles, device=ends.device) * shape.keys
    padding = (0, tiles * shape.keys - tokens)
    end = pad(ends, padding).view(tiles, shape.keys).amax(dim=1)
    visible = (key <= last[:, None]) & (end > first[:, None])
    if window is not None:
        rows = torch.arange(blocks * shape.rows, device=ends.device) // group
        least = depths[rows.clamp(max=tokens - 1)].view(blocks, shape.rows).amin(dim=1)
        greatest = pad(depths, padding).view(tiles, shape.keys).amax(dim=1)
        visible &= least[:, None] - greatest < window
    return visible


def make_tiles(plan: TreePlan, window: int | None, group: int, forward: Shape, d_query: Shape, d_key: Shape) -> Tiles:
    """For `group` heads of queries for each of keys, and the shape of each kernel's tiles."""
    ends, depths = intervals(plan)
    seen, seen_again, seen_by = (_visible(ends, depths, window, group, shape) for shape in (forward, d_query, d_key))
    return Tiles(ends.to(torch.int32), depths.to(torch.int32), _lists(seen), _lists(seen_again), _lists(seen_by.T))


_kept = lru_cache(maxsize=4)(torch.inference_mode(False)(make_tiles))  # what is kept may be saved for a backward


def tiles_of(plan: TreePlan, window: int | None, group: int, forward: Shape, d_query: Shape, d_key: Shape) -> Tiles:
    """As `make_tiles`; all layers of a forward and a backward share them, so the last few are kept."""
    make = make_tiles if torch.compiler.is_compiling() else _kept
    return make(plan, window, group, forward, d_query, d_key)
