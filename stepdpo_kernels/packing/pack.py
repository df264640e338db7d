"""`pack_pairs`: pairs into as few prefix forests of a token budget as we can."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from stepdpo_kernels.packing.batch import SHARE_MODES, build_batch, node_sequences
from stepdpo_kernels.packing.bins import best_fit, spread
from stepdpo_kernels.packing.cut import Cutter
from stepdpo_kernels.packing.trie import common_prefix
from stepdpo_kernels.types import PackedBatch, StepDPOError, StepPair


def pack_pairs(
    pairs: Sequence[StepPair], max_tokens: int, *, share: str = "tree", max_keys: int | None = None
) -> list[PackedBatch]:
    """Packs all pairs into batches of at most `max_tokens` forest nodes each; the same batches for the same input.

    Args:
        pairs: what to pack, in any order. Pairs of one `group` are kept together where the budget allows; a group that
            outgrows it is cut at nodes of its trie, and each part encodes the path down to its nodes.
        max_tokens: budget T of a batch, in tokens that are encoded (shared ones count once).
        share: "tree": every common prefix in a batch is encoded once. "pair": the prefix of a pair's two steps is.
            "none": each step is encoded with its own prefix. Loss and gradient are the same for all three.
        max_keys: a second budget, for K: tokens on all root-to-leaf paths of a batch, a prefix counted once for each
            leaf below it. Only attention that gathers keys and values (`varlen`, on CUDA) pays for it: each layer then
            holds K x key-value heads x head size numbers for keys and as many for values (in bfloat16, 8 heads of 128:
            4 KiB a key; 65,536 keys are 256 MiB), in backward as much again for their gradients, and without gradient
            checkpointing every layer holds them until its backward. None: no such budget.

    Returns:
        Batches that hold every pair exactly once; `PackedBatch.pair_index` says which. Empty for no pairs.

    Raises:
        StepDPOError: a pair that does not fit a budget on its own, by id.
        ValueError: an unknown `share` or a budget below 1.
    """
    planner = _Planner(pairs, max_tokens, share, max_keys)
    return [planner.build(members) for members, _ in planner.bins(max_tokens)]


def plan_bins(
    pairs: Sequence[StepPair], max_tokens: int, *, share: str = "tree", max_keys: int | None = None
) -> list[list[int]]:
    """Which pairs go into which batch: lists of indices into `pairs`. Arguments and errors as `pack_pairs`."""
    planner = _Planner(pairs, max_tokens, share, max_keys)
    return [members for members, _ in planner.bins(max_tokens)]


def plan_ranks(
    pairs: Sequence[StepPair], max_tokens: int, ranks: int, *, share: str = "tree", max_keys: int | None = None
) -> list[list[list[int]]]:
    """Which pairs go into which batch of which process: for each of `ranks` processes a list as `plan_bins` gives.

    The processes have the same number of batches, or one fewer (where all must take part, fill up with a batch of
    any pair with weight 0), and about the same number of tokens: batches stay below `max_tokens` where that takes
    no more rounds of them. Every pair is in exactly one batch. The same for the same input, so that each process
    can plan for all. Other arguments and errors as `pack_pairs`.
    """
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    planner = _Planner(pairs, max_tokens, share, max_keys)
    bins = planner.bins(max_tokens)
    if ranks == 1:
        return [[members for members, _ in bins]]
    rounds = -(-len(bins) // ranks)
    if bins:
        # The least budget, in steps of 5%, with which no more rounds are needed.
        budget = max(planner.largest, sum(tokens for _, tokens in bins) // (rounds * ranks), 1)
        while budget < max_tokens:
            smaller = planner.bins(budget)
            if len(smaller) <= rounds * ranks:
                bins = smaller
                break
            budget += -(-budget // 20)
    shares = spread([tokens for _, tokens in bins], ranks)
    return [[bins[number][0] for number in share_] for share_ in shares]


class Size(NamedTuple):
    """tokens: forest nodes; keys: tokens on its root-to-leaf paths"""

    tokens: int
    keys: int


def size_of_pair(pair: StepPair, share: str = "pair") -> Size:
    """What one pair takes on its own."""
    prefix, chosen, rejected = pair.prefix_ids.size, pair.chosen_ids[:-1], pair.rejected_ids[:-1]
    both = 2 * prefix + chosen.size + rejected.size
    if share == "none":
        return Size(both, both)
    common = common_prefix(chosen, rejected)
    is_one_leaf = common == min(chosen.size, rejected.size)
    return Size(both - prefix - common, prefix + max(chosen.size, rejected.size) if is_one_leaf else both)


def tokens_of_pair(pair: StepPair, share: str = "pair") -> int:
    """Tokens that are encoded for one pair on its own: forest nodes, or both branches in full for "none"."""
    return size_of_pair(pair, share).tokens


class _Planner:
    """Bins of pairs for any budget from `largest`, the tokens of the largest pair, up to `max_tokens`."""

    def __init__(self, pairs: Sequence[StepPair], max_tokens: int, share: str, max_keys: int | None) -> None:
        if share not in SHARE_MODES:
            raise ValueError(f"share must be one of {', '.join(SHARE_MODES)}, got {share!r}")
        for name, value in (("max_tokens", max_tokens), ("max_keys", max_keys)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.pairs, self.share, self.max_keys = pairs, share, max_keys
        self.sizes = [size_of_pair(pair, share) for pair in pairs]
        self.largest = max((size.tokens for size in self.sizes), default=0)
        for pair, size in zip(pairs, self.sizes, strict=True):
            if size.tokens > max_tokens:
                raise StepDPOError(
                    f"pair {pair.id!r} takes {size.tokens} tokens with share={share!r}, more than "
                    f"max_tokens={max_tokens}: raise the budget, or leave the pair out "
                    "(load_step_pairs(..., max_tokens=...) does)"
                )
            if max_keys is not None and size.keys > max_keys:
                raise StepDPOError(
                    f"pair {pair.id!r} takes {size.keys} gathered keys with share={share!r}, more than "
                    f"max_keys={max_keys}: raise that budget, or leave the pair out"
                )
        self.common = 0  # what all pairs begin with, a system prompt, say: every forest holds it once
        self.sequences = node_sequences(pairs)
        if share == "tree" and pairs:
            ends = [pick(range(2 * len(pairs)), key=self.sequences.keys.__getitem__) for pick in (min, max)]
            self.common = common_prefix(*(self.sequences.views[i] for i in ends))
            self.groups: dict[object, list[int]] = {}
            for i, pair in enumerate(pairs):
                self.groups.setdefault(pair.group or i, []).append(i)

    def build(self, indices: Sequence[int]) -> PackedBatch:
        return build_batch(self.pairs, indices, self.share, sequences=self.sequences)

    def bins(self, max_tokens: int) -> list[tuple[list[int], int]]:
        """Indices of the pairs in each bin, and how many tokens it takes at most."""
        if self.share != "tree" or not self.pairs:
            atoms, sizes = [[i] for i in range(len(self.pairs))], self.sizes
        else:
            cutter = Cutter(self.pairs, self.sequences, self.sizes, max_tokens, self.max_keys)
            parts = [part for members in self.groups.values() for part in cutter.cut(members)]
            atoms, sizes = [part.members for part in parts], [Size(part.tokens, part.keys) for part in parts]
        own = [size.tokens - self.common for size in sizes]
        bins = best_fit(own, max_tokens - self.common, [size.keys for size in sizes], self.max_keys)
        return [
            (sorted(i for atom in numbers for i in atoms[atom]), self.common + sum(own[atom] for atom in numbers))
            for numbers in bins
        ]


def savings(
    batches: Sequence[PackedBatch],
    *,
    pairs: Sequence[StepPair] | None = None,
    max_tokens: int | None = None,
    padded_pairs: int = 8,
) -> dict[str, float]:
    """What packing saved; ratios say how many times fewer tokens are encoded.

    Always: "tokens" that are encoded, "tokens_unshared" of the same branches each on its own without padding, their
    "ratio", and the loss "rows". With `max_tokens`: "fill", tokens as a share of what the batches might hold.

    With `pairs`, all that the batches hold: "tokens_padded" of branches in batches of `padded_pairs` pairs, in this
    order, padded to the longest of a batch; "tokens_pair" of forests that share within pairs only; "ratio_padded" and
    "ratio_pair". A ratio of nothing is NaN.
    """
    encoded = sum(batch.num_tokens for batch in batches)
    unshared = sum(batch.tokens_unshared for batch in batches)

    def ratio(tokens: int) -> float:
        return tokens / encoded if encoded else float("nan")

    found = {
        "tokens": encoded,
        "tokens_unshared": unshared,
        "ratio": ratio(unshared),
        "rows": sum(batch.num_rows for batch in batches),
    }
    if max_tokens is not None:
        found["fill"] = encoded / (len(batches) * max_tokens) if batches else float("nan")
    if pairs is not None:
        padded, by_pair = padded_tokens(pairs, padded_pairs), sum(tokens_of_pair(pair, "pair") for pair in pairs)
        found |= {
            "tokens_padded": padded,
            "ratio_padded": ratio(padded),
            "tokens_pair": by_pair,
            "ratio_pair": ratio(by_pair),
        }
    return found


def padded_tokens(pairs: Sequence[StepPair], pairs_per_batch: int) -> int:
    """Tokens of all branches in batches of so many pairs in this order, each padded to the longest branch of its batch:
    what an ordinary trainer encodes.
    """
    longest = [pair.prefix_ids.size + max(pair.chosen_ids.size, pair.rejected_ids.size) for pair in pairs]
    batches = (longest[start : start + pairs_per_batch] for start in range(0, len(longest), pairs_per_batch))
    return sum(2 * len(batch) * max(batch) for batch in batches)
