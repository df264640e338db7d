"""Token tries: token sequences with every common prefix held once.

Sorted by their token ids, sequences that share a prefix stand side by side, and the depth-first order of their trie
is the sorted order itself: each sequence adds the nodes that follow its longest common prefix with its predecessor.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stepdpo_kernels.types import TokenIds


def sort_key(ids: TokenIds) -> bytes:
    """Bytes that compare as the token sequences do; a prefix of a sequence is a prefix of its key."""
    return ids.astype(">i4").tobytes()


def common_prefix(a: TokenIds, b: TokenIds) -> int:
    """Length of the longest common prefix of two sequences."""
    n = min(a.size, b.size)
    differ = a[:n] != b[:n]
    return int(differ.argmax()) if differ.any() else n


@dataclass(frozen=True)
class Trie:
    """A forest of token sequences in depth-first order; a sequence of its own root makes a further tree.

    leaves:  the maximal sequences, sorted, none a prefix of another
    starts:  leaf l owns the nodes `leaves[l][starts[l]:]`; those before belong to earlier leaves
    homes:   for each input sequence i the (leaf, length) with `sequence i == leaves[leaf][:length]`
    """

    leaves: list[TokenIds]
    starts: list[int]
    homes: list[tuple[int, int]]

    @property
    def num_nodes(self) -> int:
        return sum(leaf.size - start for leaf, start in zip(self.leaves, self.starts, strict=True))


def build_trie(sequences: Sequence[TokenIds]) -> Trie:
    """The trie of non-empty token sequences, in time linear in their tokens plus the sort."""
    keys = [sort_key(s) for s in sequences]
    order = sorted(range(len(sequences)), key=keys.__getitem__)
    leaves: list[TokenIds] = []
    starts: list[int] = []
    homes = [(0, 0)] * len(sequences)
    for rank, i in enumerate(order):
        homes[i] = (len(leaves), sequences[i].size)
        is_inner = rank + 1 < len(order) and keys[order[rank + 1]].startswith(keys[i])
        if not is_inner:
            starts.append(common_prefix(leaves[-1], sequences[i]) if leaves else 0)
            leaves.append(sequences[i])
    return Trie(leaves, starts, homes)


class GrowingTrie:
    """Counts the nodes of a trie while sequences are added one by one."""

    def __init__(self) -> None:
        self.num_nodes = 0
        self._keys: list[bytes] = []
        self._sequences: list[TokenIds] = []

    def add(self, sequence: TokenIds) -> None:
        """Adds a sequence: its longest common prefix with any other is the one with a sorted neighbour."""
        key = sort_key(sequence)
        at = bisect_left(self._keys, key)
        shared = max((common_prefix(sequence, s) for s in self._sequences[max(at - 1, 0) : at + 1]), default=0)
        self.num_nodes += sequence.size - shared
        self._keys.insert(at, key)
        self._sequences.insert(at, sequence)


def path_positions(trie: Trie, offset: int) -> list[np.ndarray]:
    """For each leaf the packed positions of its path's nodes, in order of depth, when node 0 is packed at `offset`."""
    paths: list[np.ndarray] = []
    for leaf, start in zip(trie.leaves, trie.starts, strict=True):
        own = np.arange(offset, offset + leaf.size - start)
        paths.append(np.concatenate([paths[-1][:start], own]) if start else own)
        offset += own.size
    return paths
