"""From pairs to the flat tensors of their prefix forest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from stepdpo_kernels.packing.trie import Forest, Ints, Sequences, build_forest, spans
from stepdpo_kernels.types import PackedBatch, Ragged, StepPair, TokenIds, TreePlan

SHARE_MODES = ("tree", "pair", "none")


def node_sequences(pairs: Sequence[StepPair]) -> Sequences:
    """The tokens that each branch needs encoded: all but its last, which is a target only.

    Number 2p is pair p's chosen step after its prefix, 2p + 1 its rejected one.
    """
    return Sequences.of((pair.prefix_ids, step[:-1]) for pair in pairs for step in (pair.chosen_ids, pair.rejected_ids))


def trie_units(num_pairs: int, share: str) -> list[list[int]]:
    """Which branches share a trie: lists of branch numbers, 2p for pair p's chosen and 2p + 1 for its rejected step."""
    if share == "tree":
        return [list(range(2 * num_pairs))]
    if share == "pair":
        return [[2 * p, 2 * p + 1] for p in range(num_pairs)]
    return [[b] for b in range(2 * num_pairs)]


def build_batch(
    pairs: Sequence[StepPair], indices: Sequence[int], share: str, *, sequences: Sequences | None = None
) -> PackedBatch:
    """Packs `pairs[i] for i in indices` into one forest, whatever its size; for no indices a batch of no tokens.

    share: "tree" holds every common prefix of the batch once, "pair" those of the two steps of a pair, "none" nothing.
    sequences: `node_sequences(pairs)`, where they are known already
    """
    mine = [pairs[i] for i in indices]
    if sequences is None:
        sequences = node_sequences(mine)
    else:
        sequences = sequences.take([b for i in indices for b in (2 * i, 2 * i + 1)])
    forest = build_forest(sequences, trie_units(len(mine), share))
    steps = [step for pair in mine for step in (pair.chosen_ids, pair.rejected_ids)]  # 2P
    tokens = np.concatenate([np.empty(0, np.int32), *steps])
    lengths = np.array([step.size for step in steps], np.int64)
    prefixes = np.array([pair.prefix_ids.size for pair in mine for _ in range(2)], np.int64)

    sources = forest.paths[spans(forest.cu_k[forest.homes] + prefixes - 1, lengths)]
    edges, row_of_token = loss_rows(sources, tokens)
    # One branch for each distinct (first row, last row), which a path lies between: a step that several pairs of a trie
    # share is summed once. An empty step is the branch (-1, -1).
    cuts = np.append(0, np.cumsum(lengths))
    rows = np.append(row_of_token, -1)
    first = np.where(lengths > 0, rows[cuts[:-1]], -1)
    last = np.where(lengths > 0, rows[cuts[1:] - 1], -1)
    numbers: dict[tuple[int, int], int] = {}
    of_step = [numbers.setdefault(ends, len(numbers)) for ends in zip(first.tolist(), last.tolist(), strict=True)]
    _, first_step = np.unique(np.array(of_step, np.int64), return_index=True)  # (S,) a step of each branch
    branch_rows = row_of_token[spans(cuts[first_step], lengths[first_step])]

    return PackedBatch(
        input_ids=int64(forest.tokens),
        position_ids=int64(forest.depths),
        plan=tree_plan(forest),
        rows=one_column(edges >> 32, forest.tokens.size),
        targets=int64(edges & 0xFFFFFFFF),
        branches=Ragged.from_rows(branch_rows, lengths[first_step], edges.size),
        chosen=int64(np.array(of_step[0::2])),
        rejected=int64(np.array(of_step[1::2])),
        weights=torch.tensor([pair.weight for pair in mine], dtype=torch.float32),
        pair_index=int64(np.array(indices)),
        pair_ids=tuple(pair.id for pair in mine),
        group_ends=group_ends(first.reshape(-1, 2), last.reshape(-1, 2), edges.size),
        tokens_unshared=int(prefixes.sum() + lengths.sum()),
    )


def loss_rows(sources: Ints, tokens: TokenIds) -> tuple[Ints, Ints]:
    """(edges, row of each token): one loss row for each distinct (position that predicts, token), sorted by position.

    An edge holds its position in the upper 32 bits and its token in the lower.
    """
    return np.unique(sources << 32 | tokens, return_inverse=True)


def group_ends(first: Ints, last: Ints, rows: int) -> tuple[int, ...]:
    """After how many rows a group of them ends, of which every pair has all its rows or none.

    first, last: (P, 2) rows of each branch, between which its other rows lie; -1 for an empty one
    """
    begins = np.where(first < 0, rows, first).min(1, initial=rows)
    ends = last.max(1, initial=-1) + 1
    order = np.argsort(begins, kind="stable")
    furthest = np.maximum.accumulate(ends[order])  # rows that the pairs so far reach
    following = np.append(begins[order][1:], rows)
    return tuple(np.unique(furthest[(furthest <= following) & (furthest > 0)]).tolist())


def one_column(index: Ints, columns: int) -> Ragged:
    """A Ragged of one column a row."""
    return Ragged.from_rows(index, np.ones(index.size, np.int64), columns)


def tree_plan(forest: Forest) -> TreePlan:
    """Who attends to whom in a forest."""
    index, counts = forest.paths_of_nodes()
    return TreePlan(
        keys=Ragged(
            index=int64(forest.paths),
            lengths=torch.ones(forest.paths.size, dtype=torch.int64),
            t_index=int64(index),
            t_lengths=int64(counts),
        ),
        cu_q=torch.from_numpy(forest.cu_q.astype(np.int32)),
        cu_k=torch.from_numpy(forest.cu_k.astype(np.int32)),
        max_q=int(np.diff(forest.cu_q).max(initial=0)),
        max_k=int(np.diff(forest.cu_k).max(initial=0)),
    )


def int64(array: np.ndarray) -> torch.Tensor:
    """An array of integers as a tensor, without a copy where they are int64 already."""
    return torch.from_numpy(array.astype(np.int64, copy=False))
