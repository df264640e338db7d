"""A prefix trie that is too large for one batch, cut at nodes: every part takes the path above its nodes along.

A cut at depth d encodes d tokens once more. So parts are made from the leaves up: at each node, best fit puts what
hangs below it into as few parts as it can, and these go on towards the root.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from stepdpo_kernels.packing.bins import best_fit
from stepdpo_kernels.packing.trie import Sequences, common_prefix
from stepdpo_kernels.types import StepPair, TokenIds


class Part(NamedTuple):
    """Pairs that stay together.

    tokens, keys:  of their trie, or more: its nodes, and the tokens on its root-to-leaf paths
    prefix:        of the pair among them whose prefix is longest
    """

    members: list[int]
    tokens: int
    keys: int
    prefix: TokenIds


class Cutter:
    """Cuts tries of pairs into parts of at most `max_tokens` nodes and `max_keys` keys. Each pair fits on its own.

    sequences:  `node_sequences(pairs)`
    sizes:      (tokens, keys) of each pair on its own
    """

    def __init__(
        self,
        pairs: Sequence[StepPair],
        sequences: Sequences,
        sizes: Sequence[tuple[int, int]],
        max_tokens: int,
        max_keys: int | None = None,
    ) -> None:
        self.pairs, self.sequences, self.sizes = pairs, sequences, sizes
        self.max_tokens, self.max_keys = max_tokens, max_keys

    def part(self, members: list[int]) -> Part:
        """These pairs in one part, counted exactly."""
        if len(members) == 1:
            size = self.sizes[members[0]]
        else:
            size = self.sequences.trie_size(b for i in members for b in (2 * i, 2 * i + 1))
        return Part(members, *size, max((self.pairs[i].prefix_ids for i in members), key=len))

    def fits(self, tokens: int, keys: int) -> bool:
        return tokens <= self.max_tokens and (self.max_keys is None or keys <= self.max_keys)

    def cut(self, members: Sequence[int]) -> list[Part]:
        """The pairs in as few parts as we find, with few tokens encoded more than once; sizes are exact."""
        whole = self.part(list(members))
        if self.fits(whole.tokens, whole.keys):
            return [whole]
        blocks: dict[bytes, list[int]] = {}  # pairs of one prefix
        for i in members:
            blocks.setdefault(self.sequences.keys[2 * i][: 4 * self.pairs[i].prefix_ids.size], []).append(i)
        # Nodes on the path to the prefix in hand at which prefixes end or part: depth, and the parts below so far.
        nodes: list[tuple[int, list[Part]]] = [(0, [])]
        before: TokenIds | None = None
        for key in sorted(blocks):
            prefix = self.pairs[blocks[key][0]].prefix_ids
            if before is not None:
                self._close(nodes, common_prefix(before, prefix))
            nodes.append((prefix.size, self._same_prefix(blocks[key])))
            before = prefix
        self._close(nodes, 0)
        return [self.part(part.members) for part in nodes[0][1]]

    def _close(self, nodes: list[tuple[int, list[Part]]], depth: int) -> None:
        """Ends the nodes deeper than `depth`: their parts go to the node above, which is at `depth` at the least."""
        while nodes[-1][0] > depth:
            parts = self._merge(*nodes.pop())
            if nodes[-1][0] < depth:
                nodes.append((depth, []))
            nodes[-1][1].extend(parts)

    def _same_prefix(self, block: list[int]) -> list[Part]:
        """Pairs of one prefix: one part if they fit, else parts of one step that several pairs have."""
        whole = self.part(block)
        if self.fits(whole.tokens, whole.keys):
            return [whole]
        shared: list[dict[bytes, list[int]]] = [{}, {}]
        for i in block:
            for side in range(2):
                shared[side].setdefault(self.sequences.keys[2 * i + side], []).append(i)
        parts = []
        for key, members in min(shared, key=len).items():
            part = self.part(members)
            single = self.fits(part.tokens, part.keys)
            parts += [part] if single else self._merge(len(key) // 4, [self.part([i]) for i in members])
        return parts

    def _merge(self, depth: int, parts: list[Part]) -> list[Part]:
        """Fewer parts of these, all of which go through one node and share no more than the `depth` tokens down to it,
        but for the steps of pairs whose prefix ends there: these go on along the prefixes of other parts.
        """
        below = [part for part in parts if part.prefix.size != depth]
        for part in parts:
            if part.prefix.size == depth:
                self._attach(part, below, depth)
        if len(below) == 1:
            return below
        bins = best_fit(
            [part.tokens - depth for part in below],
            self.max_tokens - depth,
            [part.keys for part in below],
            self.max_keys,
        )
        return [self._together([below[i] for i in numbers], depth) for numbers in bins]

    def _attach(self, part: Part, below: list[Part], depth: int) -> None:
        """Joins a part whose prefix ends at `depth` to the one below that shares most with its steps, or adds it."""
        views = self.sequences.views
        steps: dict[int, list[TokenIds]] = {}  # by the first token
        for i in part.members:
            for step in (views[2 * i][depth:], views[2 * i + 1][depth:]):
                if step.size:
                    steps.setdefault(int(step[0]), []).append(step)
        best, shared, at = part, 0, len(below)
        for number, other in enumerate(below):
            onwards = other.prefix[depth:]
            like = steps.get(int(onwards[0]), []) if onwards.size else []
            more = max((common_prefix(step, onwards) for step in like), default=0)
            if more > shared:
                joined = self._together([part, other], depth + more)
                if self.fits(joined.tokens, joined.keys):
                    best, shared, at = joined, more, number
        below[at : at + 1] = [best]

    def _together(self, parts: list[Part], shared: int) -> Part:
        """One part of several that have their first `shared` tokens in common."""
        if len(parts) == 1:
            return parts[0]
        return Part(
            members=[i for part in parts for i in part.members],
            tokens=shared + sum(part.tokens - shared for part in parts),
            keys=sum(part.keys for part in parts),
            prefix=max((part.prefix for part in parts), key=len),
        )
