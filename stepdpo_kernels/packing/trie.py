"""Token tries: token sequences with every common prefix held once.

Sorted by their token ids, sequences that share a prefix stand side by side, and the depth-first order of their trie
is the sorted order itself: each sequence adds the nodes that follow its longest common prefix with its predecessor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from stepdpo_kernels.types import TokenIds

Ints = NDArray[np.int64]


def common_prefix(a: TokenIds, b: TokenIds) -> int:
    """Length of the longest common prefix of two sequences."""
    n = min(a.size, b.size)
    if not n:
        return 0
    differ = a[:n] != b[:n]
    first = int(differ.argmax())
    return first if differ[first] else n


def spans(starts: Ints, lengths: Ints) -> Ints:
    """start, start + 1, ... of each span, laid end to end: (sum of lengths,) int64."""
    ends = np.cumsum(lengths)
    numbers = np.repeat(starts - ends + lengths, lengths)
    numbers += np.arange(numbers.size)
    return numbers


@dataclass(frozen=True)
class Sequences:
    """n token sequences.

    tokens:   (N,) int32, laid end to end
    begins:   (n,) int64, where each sequence begins there
    lengths:  (n,) int64, none of them 0
    views:    the sequences one by one
    keys:     bytes that compare as the sequences do; a prefix of a sequence has a prefix of its key
    """

    tokens: TokenIds
    begins: Ints
    lengths: Ints
    views: list[TokenIds]
    keys: list[bytes]

    @classmethod
    def of(cls, sequences: Iterable[Sequence[TokenIds]]) -> Sequences:
        """Of sequences that are given in parts."""
        parts, sizes = [np.empty(0, np.int32)], []
        for sequence in sequences:
            parts += sequence
            sizes.append(sum(part.size for part in sequence))
        tokens, lengths = np.concatenate(parts), np.array(sizes, np.int64)
        ends = np.cumsum(lengths)
        big_endian = tokens.astype(">i4").tobytes()
        views, keys, begin = [], [], 0
        for end in ends.tolist():
            views.append(tokens[begin:end])
            keys.append(big_endian[4 * begin : 4 * end])
            begin = end
        return cls(tokens, ends - lengths, lengths, views, keys)

    def take(self, numbers: Sequence[int]) -> Sequences:
        """Some of them, without a copy of their tokens."""
        views, keys = [self.views[i] for i in numbers], [self.keys[i] for i in numbers]
        return Sequences(self.tokens, self.begins[numbers], self.lengths[numbers], views, keys)

    def sort(self, members: Iterable[int]) -> tuple[list[int], list[int]]:
        """(order, shared): members in sorted order, and how much each has in common with the one before; first 0."""
        order = sorted(members, key=self.keys.__getitem__)
        shared = [common_prefix(self.views[a], self.views[b]) for a, b in pairwise(order)]
        return order, [0, *shared][: len(order)]

    def trie_size(self, members: Iterable[int]) -> tuple[int, int]:
        """(nodes, keys) of the members' trie: tokens that are encoded, and those on its root-to-leaf paths, K."""
        order, shared = self.sort(members)
        lengths = self.lengths[order]
        after = np.array([*shared, 0], np.int64)[1:]
        return int(lengths.sum()) - sum(shared), int(lengths[after < lengths].sum())


@dataclass(frozen=True)
class Forest:
    """Tries of token sequences, one after the other, each in depth-first order.

    A leaf is a sequence that is no prefix of another one of its trie; it owns the nodes of its path that belong to no
    earlier leaf.

    tokens:  (T,) int32, one per node
    depths:  (T,) int64
    cu_q:    (L+1,) int64: leaf l owns the nodes cu_q[l]:cu_q[l+1]
    cu_k:    (L+1,) int64: its path is paths[cu_k[l]:cu_k[l+1]]
    paths:   (K,) int64: nodes from the root down
    homes:   (n,) int64: a leaf whose path begins with each sequence
    """

    tokens: TokenIds
    depths: Ints
    cu_q: Ints
    cu_k: Ints
    paths: Ints
    homes: Ints

    def paths_of_nodes(self) -> tuple[Ints, Ints]:
        """(index, counts): where each node stands in `paths`, node by node, (K,); and how often, (T,).

        The leaves below a node follow one another, and their paths hold it at its depth.
        """
        counts = np.bincount(self.paths, minlength=self.tokens.size)
        own = np.repeat(np.arange(self.cu_q.size - 1), np.diff(self.cu_q))  # (T,) the first leaf below each node
        index = self.cu_k[spans(own, counts)]
        index += np.repeat(self.depths, counts)
        return index, counts


def build_forest(sequences: Sequences, units: Sequence[Sequence[int]]) -> Forest:
    """A trie for each unit, a list of sequence numbers; every sequence is in one unit."""
    order: list[int] = []
    shared_: list[int] = []
    firsts = []  # where each unit begins in `order`
    for unit in units:
        firsts.append(len(order))
        unit_order, unit_shared = sequences.sort(unit) if len(unit) > 1 else (unit, [0] * len(unit))
        order += unit_order
        shared_ += unit_shared
    shared, lengths = np.array(shared_, np.int64), sequences.lengths[order]

    after = np.append(shared, 0)[1:]
    after[np.array(firsts[1:], np.int64) - 1] = 0  # the next unit shares nothing
    is_leaf = after < lengths
    leaves = is_leaf.nonzero()[0]
    homes = np.empty(len(order), np.int64)
    homes[order] = np.cumsum(is_leaf) - is_leaf
    # A leaf shares with the leaf before it the least that neighbours between the two have in common.
    starts = np.minimum.reduceat(shared, np.append(0, leaves[:-1] + 1)) if leaves.size else shared
    keys = lengths[leaves]
    queries = keys - starts
    cu_q, cu_k = (np.append(0, np.cumsum(counts)) for counts in (queries, keys))

    depths = spans(starts, queries)
    begins = sequences.begins[order][leaves]
    paths = np.empty(cu_k[-1], np.int64)
    paths[spans(cu_k[:-1] + starts, queries)] = np.arange(cu_q[-1])
    before = 0
    for begin, start in zip(cu_k[:-1].tolist(), starts.tolist(), strict=True):
        if start:
            paths[begin : begin + start] = paths[before : before + start]
        before = begin
    return Forest(sequences.tokens[spans(begins + starts, queries)], depths, cu_q, cu_k, paths, homes)
