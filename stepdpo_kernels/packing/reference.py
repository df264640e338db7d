"""Packing undone, and the plain layout: what the packed forest is held against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stepdpo_kernels.types import PackedBatch, StepPair


def unpack(batch: PackedBatch) -> list[StepPair]:
    """The pairs of a batch, read back from nothing but its tensors, in its order.

    Groups are not stored and come back empty. A prefix is read off the branch that is not empty; a pair of two
    empty branches has no loss rows to read and raises ValueError.
    """
    input_ids = batch.input_ids.numpy()
    cu_q, cu_k = batch.plan.cu_q.numpy(), batch.plan.cu_k.numpy()
    keys = batch.plan.keys.index.numpy()
    rows, targets = batch.rows.index.numpy(), batch.targets.numpy()
    branch_rows = np.split(batch.branches.index.numpy(), np.cumsum(batch.branches.lengths.numpy())[:-1])

    def prefix_of(branch: int) -> np.ndarray:
        position = int(rows[branch_rows[branch][0]])  # the packed position that predicts the branch's first token
        leaf = int(np.searchsorted(cu_q, position, side="right")) - 1
        path = keys[cu_k[leaf] : cu_k[leaf + 1]]
        depth = path.size - (cu_q[leaf + 1] - position)
        return input_ids[path[: depth + 1]]

    pairs = []
    for p in range(batch.num_pairs):
        sides = [int(batch.chosen[p]), int(batch.rejected[p])]
        some = next((s for s in sides if branch_rows[s].size), None)
        if some is None:
            raise ValueError(f"pair {batch.pair_ids[p]!r} has two empty branches")
        chosen, rejected = (targets[branch_rows[s]] for s in sides)
        pairs.append(StepPair(prefix_of(some), chosen, rejected, id=batch.pair_ids[p], weight=float(batch.weights[p])))
    return pairs


def padded_batch(pairs: Sequence[StepPair], pad_token_id: int = 0) -> dict[str, Tensor]:
    """Every branch with its own prefix, padded on the right: the layout of an ordinary trainer.

    Returns:
        input_ids, attention_mask and labels, each (2P, L) int64, chosen first, then rejected. Labels are shifted:
        labels[:, t] is what position t predicts, -100 where there is no loss.
    """
    steps = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
    prefixes = [pair.prefix_ids for pair in pairs] * 2
    length = max(prefix.size + step.size for prefix, step in zip(prefixes, steps, strict=True))
    shape = (2 * len(pairs), length)
    input_ids, mask, labels = np.full(shape, pad_token_id), np.zeros(shape, np.int64), np.full(shape, -100)
    for b, (prefix, step) in enumerate(zip(prefixes, steps, strict=True)):
        m, n = prefix.size, step.size
        input_ids[b, : m + n] = np.concatenate([prefix, step])
        mask[b, : m + n] = 1
        labels[b, m - 1 : m - 1 + n] = step
    tensors = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(array.astype(np.int64)) for name, array in tensors.items()}
