"""From pairs to the flat tensors of their prefix forest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from stepdpo_kernels.packing.trie import build_trie, path_positions
from stepdpo_kernels.types import PackedBatch, Ragged, StepPair, TokenIds, TreePlan

SHARE_MODES = ("tree", "pair", "none")


def node_sequence(prefix: TokenIds, branch: TokenIds) -> TokenIds:
    """The tokens that a branch needs encoded: all but its last, which is a target only."""
    return np.concatenate([prefix, branch[:-1]])


def trie_units(num_pairs: int, share: str) -> list[list[int]]:
    """Which branches share a trie: lists of branch numbers, 2p for pair p's chosen and 2p + 1 for its rejected step."""
    if share == "tree":
        return [list(range(2 * num_pairs))]
    if share == "pair":
        return [[2 * p, 2 * p + 1] for p in range(num_pairs)]
    return [[b] for b in range(2 * num_pairs)]


def build_batch(pairs: Sequence[StepPair], indices: Sequence[int], share: str) -> PackedBatch:
    """Packs `pairs[i] for i in indices` into one forest, whatever its size.

    share: "tree" holds every common prefix of the batch once, "pair" those of the two steps of a pair, "none" nothing.
    """
    chosen_pairs = [pairs[i] for i in indices]
    steps = [step for pair in chosen_pairs for step in (pair.chosen_ids, pair.rejected_ids)]  # 2P
    prefixes = [pair.prefix_ids for pair in chosen_pairs for _ in range(2)]

    leaf_tokens: list[TokenIds] = []  # nodes that each leaf owns
    leaf_depths: list[np.ndarray] = []
    leaf_paths: list[np.ndarray] = []
    sources: list[np.ndarray] = [np.empty(0, np.int64)] * len(steps)  # packed positions that predict each step's tokens
    offset = 0
    for unit in trie_units(len(chosen_pairs), share):
        trie = build_trie([node_sequence(prefixes[b], steps[b]) for b in unit])
        paths = path_positions(trie, offset)
        for leaf, start in zip(trie.leaves, trie.starts, strict=True):
            leaf_tokens.append(leaf[start:])
            leaf_depths.append(np.arange(start, leaf.size))
        for b, (leaf_number, _) in zip(unit, trie.homes, strict=True):
            first = prefixes[b].size - 1
            sources[b] = paths[leaf_number][first : first + steps[b].size]
        leaf_paths.extend(paths)
        offset += trie.num_nodes

    # One loss row for each distinct (position, target) edge, sorted by position.
    edges = [source << 32 | step for source, step in zip(sources, steps, strict=True)]
    unique_edges, row_of_edge = np.unique(np.concatenate(edges), return_inverse=True)
    branch_rows = np.split(row_of_edge, np.cumsum([e.size for e in edges])[:-1])
    # One branch for each distinct list of rows: a step that several pairs of a trie share is summed once.
    distinct = {rows.tobytes(): rows for rows in branch_rows}
    branch_number = {key: s for s, key in enumerate(distinct)}
    of_step = [branch_number[rows.tobytes()] for rows in branch_rows]

    return PackedBatch(
        input_ids=_int64(np.concatenate(leaf_tokens)),
        position_ids=_int64(np.concatenate(leaf_depths)),
        plan=_plan(leaf_tokens, leaf_paths, offset),
        rows=Ragged.from_rows(unique_edges >> 32, np.ones_like(unique_edges), offset),
        targets=_int64(unique_edges & 0xFFFFFFFF),
        branches=Ragged.from_rows(
            np.concatenate([*distinct.values()]), np.array([r.size for r in distinct.values()]), unique_edges.size
        ),
        chosen=_int64(np.array(of_step[0::2])),
        rejected=_int64(np.array(of_step[1::2])),
        weights=torch.tensor([pair.weight for pair in chosen_pairs], dtype=torch.float32),
        pair_index=_int64(np.array(indices)),
        pair_ids=tuple(pair.id for pair in chosen_pairs),
        tokens_unshared=sum(prefix.size + step.size for prefix, step in zip(prefixes, steps, strict=True)),
    )


def _plan(leaf_tokens: list[TokenIds], leaf_paths: list[np.ndarray], num_tokens: int) -> TreePlan:
    queries = np.array([tokens.size for tokens in leaf_tokens])
    keys = np.array([path.size for path in leaf_paths])
    index = np.concatenate(leaf_paths)  # (K,)
    return TreePlan(
        keys=Ragged.from_rows(index, np.ones_like(index), num_tokens),
        cu_q=torch.from_numpy(np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)),
        cu_k=torch.from_numpy(np.concatenate([[0], np.cumsum(keys)]).astype(np.int32)),
        max_q=int(queries.max()),
        max_k=int(keys.max()),
    )


def _int64(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int64))
