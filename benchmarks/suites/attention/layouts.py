"""The tokens of some pairs in every layout that attention is computed in, and how they correspond.

A node is a token of the forest in which every common prefix is held once. Each layout holds every node at least once;
`index` says which node lies where. A copy of a node has its share of the node's upstream gradient, so that gradients,
summed over copies, are the same for all layouts.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from benchmarks.lengths import branching, draw_lengths, pairs_of
from benchmarks.registry import Case
from benchmarks.suites.attention import HEADS
from stepdpo_kernels.packing import build_batch
from stepdpo_kernels.types import PackedBatch, StepPair, TreePlan

VOCABULARY = 30_000


def pairs(case: Case) -> list[StepPair]:
    if case["lengths"] == "real":
        lengths = draw_lengths(case["pairs"])
    else:
        lengths = branching(case["prefixes"], case["prefix"], case["branch"], case["pairs_per_prefix"])
    return pairs_of(lengths, VOCABULARY)


@dataclass(frozen=True)
class Packed:
    """Tokens in one line.

    plan:   who attends to whom
    index:  (T,) the node at each place
    """

    plan: TreePlan
    index: Tensor

    @property
    def lengths(self) -> list[int]:
        """Of the sequences, where nothing is shared."""
        return self.plan.cu_q.diff().tolist()


class Forest:
    """Nodes with random queries, keys, values and upstream gradients; and their layouts."""

    def __init__(self, case: Case) -> None:
        self._pairs, self._trie = pairs(case), {}  # type: tuple[list[StepPair], dict[tuple[int, int], int]]
        tree = self.batch("tree")
        self._node = {int(n): place for place, n in enumerate(self._nodes(tree))}
        self.plan, self.tokens = tree.plan, tree.num_tokens
        heads, kv_heads, size = HEADS[case["heads"]]
        generator = torch.Generator().manual_seed(0)
        of, device = getattr(torch, case["dtype"]), case["device"]

        def random(count: int) -> Tensor:
            return torch.randn(self.tokens, count, size, generator=generator).to(device, of)

        self.query, self.key, self.value = random(heads), random(kv_heads), random(kv_heads)
        self.upstream = random(heads)
        self.scale = size**-0.5

    def batch(self, share: str) -> PackedBatch:
        return build_batch(self._pairs, range(len(self._pairs)), share)

    def _nodes(self, batch: PackedBatch) -> list[int]:
        """The node of each packed token: tokens are one where all tokens on the way to them are."""
        found = [0] * batch.num_tokens
        tokens, keys, ends = batch.input_ids.tolist(), batch.plan.keys.index.tolist(), batch.plan.cu_k.tolist()
        for begin, end in pairwise(ends):
            node = -1
            for place in keys[begin:end]:
                node = found[place] = self._trie.setdefault((node, tokens[place]), len(self._trie))
        return found

    def layout(self, share: str) -> Packed:
        batch = self.batch(share)
        return Packed(batch.plan, torch.tensor([self._node[n] for n in self._nodes(batch)]))

    def padded(self) -> Tensor:
        """(B, L) the node at each place of a right-padded batch of unshared sequences, -1 where there is none"""
        flat = self.layout("none")
        index = torch.full((len(flat.lengths), max(flat.lengths)), -1)
        for row, part in enumerate(flat.index.split(flat.lengths)):
            index[row, : len(part)] = part
        return index

    @property
    def visible(self) -> int:
        """(query, key) pairs that are seen, over all nodes"""
        queries, keys = (ends.diff().numpy().astype(np.int64) for ends in (self.plan.cu_q, self.plan.cu_k))
        return int((queries * (keys - queries) + queries * (queries + 1) // 2).sum())
