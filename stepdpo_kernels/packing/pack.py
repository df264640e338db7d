"""`pack_pairs`: pairs into as few prefix forests of a token budget as we can."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stepdpo_kernels.packing.batch import SHARE_MODES, build_batch, node_sequence
from stepdpo_kernels.packing.bins import best_fit
from stepdpo_kernels.packing.trie import GrowingTrie, common_prefix, sort_key
from stepdpo_kernels.types import PackedBatch, StepDPOError, StepPair


def pack_pairs(pairs: Sequence[StepPair], max_tokens: int, *, share: str = "tree") -> list[PackedBatch]:
    """Packs all pairs into batches of at most `max_tokens` forest nodes each; the same batches for the same input.

    Args:
        pairs: what to pack, in any order. Pairs of one `group` are kept together where the budget allows.
        max_tokens: budget T of a batch, in tokens that are encoded (shared ones count once).
        share: "tree": every common prefix in a batch is encoded once. "pair": the prefix of a pair's two steps is.
            "none": each step is encoded with its own prefix. Loss and gradient are the same for all three.

    Returns:
        Batches that hold every pair exactly once; `PackedBatch.pair_index` says which. Empty for no pairs.

    Raises:
        StepDPOError: a pair that does not fit the budget on its own, by id.
        ValueError: an unknown `share` or a budget below 1.
    """
    return [build_batch(pairs, indices, share) for indices in plan_bins(pairs, max_tokens, share=share)]


def plan_bins(pairs: Sequence[StepPair], max_tokens: int, *, share: str = "tree") -> list[list[int]]:
    """Which pairs go into which batch: lists of indices into `pairs`. Arguments and errors as `pack_pairs`."""
    if share not in SHARE_MODES:
        raise ValueError(f"share must be one of {', '.join(SHARE_MODES)}, got {share!r}")
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    if not pairs:
        return []
    for pair in pairs:
        tokens = tokens_of_pair(pair, share)
        if tokens > max_tokens:
            raise StepDPOError(
                f"pair {pair.id!r} takes {tokens} tokens with share={share!r}, more than max_tokens={max_tokens}: "
                "raise the budget, or leave the pair out (load_step_pairs(..., max_tokens=...) does)"
            )
    if share != "tree":
        return best_fit([tokens_of_pair(pair, share) for pair in pairs], max_tokens)
    # Every forest holds what all pairs have in common (a system prompt, say) once, whatever else is in it.
    common = min(common_prefix(pairs[0].prefix_ids, pair.prefix_ids) for pair in pairs)
    atoms, sizes = _atoms(pairs, max_tokens)
    bins = best_fit([size - common for size in sizes], max_tokens - common)
    return [sorted(i for a in atom_numbers for i in atoms[a]) for atom_numbers in bins]


def tokens_of_pair(pair: StepPair, share: str = "pair") -> int:
    """Tokens that are encoded for one pair on its own: forest nodes, or both branches in full for "none"."""
    chosen, rejected = (node_sequence(pair.prefix_ids, step) for step in (pair.chosen_ids, pair.rejected_ids))
    shared = 0 if share == "none" else common_prefix(chosen, rejected)
    return chosen.size + rejected.size - shared


def _atoms(pairs: Sequence[StepPair], max_tokens: int) -> tuple[list[list[int]], list[int]]:
    """Pairs that stay together, and the nodes of their trie: a group, cut where it outgrows the budget."""
    groups: dict[object, list[int]] = {}
    for i, pair in enumerate(pairs):
        groups.setdefault(pair.group or i, []).append(i)
    atoms: list[list[int]] = []
    sizes: list[int] = []
    for members in groups.values():
        # Neighbours in this order share the longest prefixes.
        members.sort(key=lambda i: (sort_key(pairs[i].prefix_ids), i))
        trie, current = GrowingTrie(), list[int]()
        for i in members:
            before = trie.num_nodes
            _add_pair(trie, pairs[i])
            if trie.num_nodes > max_tokens:
                atoms.append(current)
                sizes.append(before)
                trie, current = GrowingTrie(), []
                _add_pair(trie, pairs[i])
            current.append(i)
        atoms.append(current)
        sizes.append(trie.num_nodes)
    return atoms, sizes


def _add_pair(trie: GrowingTrie, pair: StepPair) -> None:
    trie.add(node_sequence(pair.prefix_ids, pair.chosen_ids))
    trie.add(node_sequence(pair.prefix_ids, pair.rejected_ids))


def savings(batches: Sequence[PackedBatch]) -> dict[str, float]:
    """What packing saved: tokens encoded, tokens of the same pairs unshared, their ratio, and the loss rows."""
    encoded = sum(batch.num_tokens for batch in batches)
    unshared = sum(batch.tokens_unshared for batch in batches)
    return {
        "tokens": encoded,
        "tokens_unshared": unshared,
        "ratio": unshared / encoded if encoded else float(np.nan),
        "rows": sum(batch.num_rows for batch in batches),
    }
