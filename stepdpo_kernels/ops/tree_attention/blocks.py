"""Blocks of consecutive queries and the keys that they see: attention over a packed forest as dense products.

Packed tokens are in depth-first order, so the descendants of token s are the tokens s + 1 .. end(s) - 1, and

    t sees s   <=>   s <= t < end(s)   and   depth(t) - depth(s) < window

A token before a that has a descendant in a..b-1 has a itself among its descendants. The keys of a block of queries
a..b-1 are therefore the ancestors of a and the block itself: depth(a) + b - a columns. A window leaves out the
ancestors too far from the least depth in the block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepdpo_kernels.types import TreePlan

# (query, key) pairs, padding included, of the blocks that are computed together; one query alone may exceed it
CHUNK_PAIRS = 1 << 17
# Keys per token of the chunks whose gradients of keys are summed together
SEGMENT_KEYS = 4
# (query, key) pairs of a plan up to which its masks and indices are kept
KEPT_PAIRS = 1 << 23
# Blocks begin where a leaf does, and within a leaf every so many tokens.
STRIDE = 64
MAX_ROWS = 256
# What one more key of a block and one more chunk cost, in pairs: see benchmarks/NOTES.md.
KEY_COST = 32
CHUNK_COST = 3000

_Ints = NDArray[np.int64]


@lru_cache(maxsize=4)
def is_depth_first(plan: TreePlan) -> bool:
    """Whether each path is a beginning of the one before, followed by the leaf's own tokens."""
    if not plan.num_tokens:
        return True
    cu_q, cu_k = plan.cu_q.numpy().astype(np.int64), plan.cu_k.numpy().astype(np.int64)
    keys, shared = np.diff(cu_k), np.diff(cu_k) - np.diff(cu_q)
    if shared[0] or (shared < 0).any() or (shared[1:] > keys[:-1]).any():
        return False
    paths = plan.keys.index.numpy()
    at = np.arange(paths.size)
    depth = at - np.repeat(cu_k[:-1], keys)
    before = paths[np.maximum(at - np.repeat(np.concatenate([[0], keys[:-1]]), keys), 0)]  # as deep, on the path before
    own = depth + np.repeat(cu_q[:-1] - shared, keys)
    return bool((paths == np.where(depth < np.repeat(shared, keys), before, own)).all())


class _Forest:
    """Per token: its depth, where its subtree ends, and where the path of its leaf begins in `paths`."""

    def __init__(self, plan: TreePlan, window: int | None) -> None:
        cu_q, cu_k = plan.cu_q.numpy().astype(np.int64), plan.cu_k.numpy().astype(np.int64)
        queries, keys = np.diff(cu_q), np.diff(cu_k)
        self.window = window
        self.paths: _Ints = plan.keys.index.numpy()  # (K,)
        self.path_starts = np.repeat(cu_k[:-1], queries)
        self.depths = np.arange(plan.num_tokens) + np.repeat(keys - queries - cu_q[:-1], queries)
        last = np.empty(plan.num_tokens, np.int64)
        last[self.paths] = np.arange(self.paths.size)  # where each token stands on the last path that has it
        self.ends = cu_q[np.searchsorted(cu_k, last, side="right")]
        strides = np.clip(CHUNK_PAIRS // np.maximum(keys, 1), 1, STRIDE)
        self.cuts = np.array(
            [c for leaf in range(queries.size) for c in range(cu_q[leaf], cu_q[leaf + 1], strides[leaf])]
            + [plan.num_tokens]
        )

    def blocks(self) -> tuple[_Ints, _Ints, _Ints]:
        """First query, number of queries and of ancestors of each block: the cuts of least cost."""
        cuts = self.cuts
        depths = self.depths[cuts[:-1]]
        first = np.minimum(np.searchsorted(cuts, cuts - MAX_ROWS), np.arange(cuts.size) - 1)
        cost = np.zeros(cuts.size)
        before = np.zeros(cuts.size, np.int64)
        ancestors = np.zeros(cuts.size, np.int64)  # of the best block that stops at each cut
        for stop in range(1, cuts.size):
            i = slice(first[stop], stop)
            rows = cuts[stop] - cuts[i]
            reach = depths[i]
            if self.window is not None:
                least = np.minimum.accumulate(reach[::-1])[::-1]  # of the blocks i..stop-1: lowest where a leaf begins
                reach = reach - np.maximum(least - self.window + 1, 0)
            columns = reach + rows
            pairs = rows * columns
            pairs[:-1][pairs[:-1] > CHUNK_PAIRS] = 1 << 60  # not possible
            total = cost[i] + pairs + KEY_COST * columns
            best = int(total.argmin())
            cost[stop], before[stop], ancestors[stop] = total[best], first[stop] + best, reach[best]
        chosen = [cuts.size - 1]
        while chosen[-1]:
            chosen.append(int(before[chosen[-1]]))
        at = np.array(chosen[::-1])
        return cuts[at[:-1]], np.diff(cuts[at]), ancestors[at[1:]]


def _chunks(rows: _Ints, columns: _Ints) -> Iterator[_Ints]:
    """Numbers of the blocks that are computed together: neighbours in order of size, the cheapest way."""
    order = np.lexsort((rows, columns))
    n, m = rows[order], columns[order]
    cost = np.zeros(n.size + 1)
    before = np.zeros(n.size + 1, np.int64)
    for stop in range(1, n.size + 1):
        widest = np.maximum.accumulate(n[:stop][::-1])[::-1]  # of the chunks i..stop-1, which have m[stop - 1] columns
        pairs = np.arange(stop, 0, -1) * widest * m[stop - 1]
        pairs[:-1][pairs[:-1] > CHUNK_PAIRS] = 1 << 60
        total = cost[:stop] + pairs + CHUNK_COST
        before[stop] = total.argmin()
        cost[stop] = total[before[stop]]
    stop = n.size
    while stop:
        yield order[before[stop] : stop]
        stop = int(before[stop])


@dataclass(eq=False)
class Chunk:
    """Blocks that are computed together, padded to n queries and m keys, for G heads of keys.

    shape:       blocks, n, m
    query_rows:  (blocks * G * n,) int64: rows of the queries seen as (T * G, query heads a head of keys * d)
    padding:     those of query_rows that repeat a block's last query
    """

    forest: _Forest
    groups: int
    first: _Ints  # (blocks, 1), as are the next two
    rows: _Ints
    ancestors: _Ints

    def __post_init__(self) -> None:
        self.shape = self.first.size, int(self.rows.max()), int((self.rows + self.ancestors).max())
        i = np.arange(self.shape[1])
        self.queries = self.first + np.minimum(i, self.rows - 1)  # (blocks, n)
        rows = self.queries[:, None] * self.groups + np.arange(self.groups)[:, None]  # (blocks, G, n)
        self.query_rows = torch.from_numpy(rows.reshape(-1))
        self.padding = torch.from_numpy(np.flatnonzero(np.broadcast_to((i >= self.rows)[:, None], rows.shape)))
        self.kept: tuple[Tensor, Tensor] | None = None

    @property
    def columns(self) -> int:
        return self.shape[0] * self.shape[2]

    @property
    def pairs(self) -> int:
        return self.shape[0] * self.shape[1] * self.shape[2]

    def keys(self) -> tuple[Tensor, Tensor]:
        """(blocks * G * m,) rows of the keys seen as (T * G, d); (blocks, n, m) bfloat16: 0 where seen, else -inf."""
        if self.kept is not None:
            return self.kept
        forest, j = self.forest, np.arange(self.shape[2])
        on_path = forest.path_starts[self.first] + forest.depths[self.first] - self.ancestors + j
        own = self.first + np.minimum(j - self.ancestors, self.rows - 1)
        keys = np.where(j < self.ancestors, forest.paths[np.minimum(on_path, forest.paths.size - 1)], own)
        ends = np.where(j < self.ancestors + self.rows, forest.ends[keys], 0)  # no query sees padding
        query, key, end = (torch.from_numpy(x.astype(np.int32)) for x in (self.queries, keys, ends))
        sees = (key[:, None] <= query[:, :, None]).logical_and_(query[:, :, None] < end[:, None])
        if forest.window is not None:
            depth, at = (torch.from_numpy(forest.depths[x].astype(np.int32)) for x in (self.queries, keys))
            sees.logical_and_(depth[:, :, None] - at[:, None] < forest.window)
        mask = torch.zeros(self.shape, dtype=torch.bfloat16).masked_fill_(sees.logical_not_(), -torch.inf)
        rows = keys[:, None] * self.groups + np.arange(self.groups)[:, None]  # (blocks, G, m)
        return torch.from_numpy(rows.reshape(-1)), mask


@dataclass(eq=False)
class Segment:
    """Consecutive chunks whose gradients of keys are laid end to end and summed at once."""

    chunks: list[Chunk]
    kept: tuple[Tensor, Tensor] | None = None

    @property
    def key_rows(self) -> int:
        return sum(chunk.columns for chunk in self.chunks) * self.chunks[0].groups

    def bags(self, rows: int) -> tuple[Tensor, Tensor]:
        """Of `rows` rows of keys: where each stands among the chunks' key rows, in order, and where its list begins."""
        if self.kept is not None:
            return self.kept
        row = torch.cat([chunk.keys()[0] for chunk in self.chunks]).numpy().astype(np.int32)
        counts = np.bincount(row, minlength=rows)
        return torch.from_numpy(row.argsort(kind="stable")), torch.from_numpy(counts.cumsum() - counts)


@dataclass(eq=False)
class Blocks:
    """All queries of a plan in blocks, for one window and G heads of keys.

    query_slots:  (T * G,) int64: of each row of queries, its place among the query rows of all chunks laid end to end
    """

    segments: list[Segment]
    query_slots: Tensor

    @property
    def chunks(self) -> list[Chunk]:
        return [chunk for segment in self.segments for chunk in segment.chunks]

    @property
    def pairs(self) -> int:
        return sum(chunk.pairs for chunk in self.chunks)


@lru_cache(maxsize=4)
def blocks_of(plan: TreePlan, window: int | None, groups: int) -> Blocks:
    """The blocks of a plan, which all layers of a forward and a backward share: the last few are kept."""
    slots = np.empty(plan.num_tokens * groups, np.int64)
    if not plan.num_tokens:
        return Blocks([], torch.from_numpy(slots))
    forest = _Forest(plan, window)
    first, rows, ancestors = forest.blocks()
    segments: list[Segment] = []
    room = used = 0
    for members in _chunks(rows, rows + ancestors):
        chunk = Chunk(forest, groups, *(x[members][:, None] for x in (first, rows, ancestors)))
        if room < chunk.columns:
            segments.append(Segment([]))
            room = SEGMENT_KEYS * plan.num_tokens
        segments[-1].chunks.append(chunk)
        room -= chunk.columns
        # from the last on, so that a query comes after the padding that repeats it
        query_rows = chunk.query_rows.numpy()
        slots[query_rows[::-1]] = np.arange(used, used + query_rows.size)[::-1]
        used += query_rows.size
    blocks = Blocks(segments, torch.from_numpy(slots))
    if blocks.pairs <= KEPT_PAIRS:
        for chunk in blocks.chunks:
            chunk.kept = chunk.keys()
        for segment in segments:
            segment.kept = segment.bags(plan.num_tokens * groups)
    return blocks
