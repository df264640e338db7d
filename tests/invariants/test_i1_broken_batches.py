"""The other side of I1: batches that are broken, each in one way, and a comparison that must notice each.

Every mutation is an error that packing could make and that a trained model would hide: a token seen or not seen, a
position, a row, a target, a sum off by one. Each must move the loss or a gradient by a hundred tolerances.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from stepdpo_kernels.packing import build_batch, pack_pairs
from stepdpo_kernels.types import PackedBatch, Ragged, TreePlan
from tests.exactness import (
    MODELS,
    TOLERANCE,
    assert_exact,
    errors,
    family_model,
    packed_step,
    plain_step,
    references_near,
    training_model,
    worst,
)
from tests.families import FAMILIES
from tests.forests import nested_pairs

Make = Callable[..., PreTrainedModel]


def _paths(batch: PackedBatch) -> list[list[int]]:
    cuts = batch.plan.cu_k.tolist()[1:-1]
    return [path.tolist() for path in np.split(batch.plan.keys.index.numpy(), cuts)]


def _with_paths(batch: PackedBatch, paths: list[list[int]], cu_q: Tensor | None = None) -> PackedBatch:
    sizes = np.array([len(path) for path in paths])
    index = np.concatenate(paths)
    plan = TreePlan(
        keys=Ragged.from_rows(index, np.ones_like(index), batch.num_tokens),
        cu_q=batch.plan.cu_q if cu_q is None else cu_q,
        cu_k=torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)),
        max_q=batch.plan.max_q,
        max_k=int(sizes.max()),
    )
    return replace(batch, plan=plan)


def _exchanged(tensor: Tensor, i: int, j: int) -> Tensor:
    tensor = tensor.clone()
    tensor[[i, j]] = tensor[[j, i]]
    assert tensor[i] != tensor[j]
    return tensor


def _changed(tensor: Tensor, i: int | slice, value: Any) -> Tensor:
    tensor = tensor.clone()
    tensor[i] = value
    return tensor


def _own(batch: PackedBatch, leaf: int) -> slice:
    """The packed tokens that a leaf owns."""
    return slice(batch.plan.cu_q[leaf].item(), batch.plan.cu_q[leaf + 1].item())


# a leaf that shares tokens with the one before it, and owns several
LEAF = 2


def _leak_a_sibling(batch: PackedBatch) -> PackedBatch:
    """The leaf sees a token of its sibling instead of its own ancestor at that depth."""
    paths = _paths(batch)
    shared = sum(a == b for a, b in zip(paths[LEAF - 1], paths[LEAF], strict=False))
    paths[LEAF][shared - 1] = paths[LEAF - 1][shared]
    return _with_paths(batch, paths)


def _leak_another_tree(batch: PackedBatch) -> PackedBatch:
    """The leaf sees one token more, at the far end: of another tree."""
    paths = _paths(batch)
    paths[LEAF].insert(0, paths[-1][-1])
    return _with_paths(batch, paths)


def _drop_an_ancestor(batch: PackedBatch) -> PackedBatch:
    paths = _paths(batch)
    del paths[LEAF][1]
    return _with_paths(batch, paths)


def _see_an_ancestor_twice(batch: PackedBatch) -> PackedBatch:
    paths = _paths(batch)
    paths[LEAF][0] = paths[LEAF][1]
    return _with_paths(batch, paths)


def _see_the_future(batch: PackedBatch) -> PackedBatch:
    """Two of a leaf's own tokens change places among its keys, so the first sees the second and not itself."""
    paths = _paths(batch)
    paths[LEAF][-2:] = paths[LEAF][-1:-3:-1]
    return _with_paths(batch, paths)


def _drop_the_root(batch: PackedBatch) -> PackedBatch:
    paths = _paths(batch)
    del paths[LEAF][0]
    return _with_paths(batch, paths)


def _drop_the_parent(batch: PackedBatch) -> PackedBatch:
    """The leaf does not see the last token that it shares."""
    paths, own = _paths(batch), _own(batch, LEAF)
    del paths[LEAF][len(paths[LEAF]) - (own.stop - own.start) - 1]
    return _with_paths(batch, paths)


def _see_no_ancestor(batch: PackedBatch) -> PackedBatch:
    """The leaf stands alone, as if its tokens were a text."""
    paths, own = _paths(batch), _own(batch, LEAF)
    paths[LEAF] = list(range(own.start, own.stop))
    return _with_paths(batch, paths)


def _follow_a_sibling(batch: PackedBatch) -> PackedBatch:
    """The leaf's tokens come after all of its sibling's, not after what both share."""
    paths, own = _paths(batch), _own(batch, LEAF)
    paths[LEAF] = paths[LEAF - 1] + list(range(own.start, own.stop))
    return _with_paths(batch, paths)


def _see_all_before(batch: PackedBatch) -> PackedBatch:
    """A plain causal mask over the packed tokens."""
    ends = batch.plan.cu_q[1:].tolist()
    return _with_paths(batch, [list(range(end)) for end in ends])


def _exchange_two_ancestors(batch: PackedBatch) -> PackedBatch:
    """Two leaves take each other's last shared token."""
    paths = _paths(batch)
    last = len(paths) - 1
    at = [len(paths[leaf]) - (_own(batch, leaf).stop - _own(batch, leaf).start) - 1 for leaf in (LEAF, last)]
    a, b = paths[LEAF][at[0]], paths[last][at[1]]
    assert a != b
    paths[LEAF][at[0]], paths[last][at[1]] = b, a
    return _with_paths(batch, paths)


def _restart_positions(batch: PackedBatch) -> PackedBatch:
    """A leaf's positions start at 0, as in packing without trees."""
    own = _own(batch, LEAF)
    return replace(batch, position_ids=_changed(batch.position_ids, own, torch.arange(own.stop - own.start)))


def _positions_in_packed_order(batch: PackedBatch) -> PackedBatch:
    return replace(batch, position_ids=torch.arange(batch.num_tokens))


def _move_a_border(batch: PackedBatch) -> PackedBatch:
    """A leaf's last token is asked by the next leaf, along that leaf's path."""
    cu_q = _changed(batch.plan.cu_q, LEAF, batch.plan.cu_q[LEAF] - 1)
    return _with_paths(batch, _paths(batch), cu_q)


def _shift_positions(batch: PackedBatch) -> PackedBatch:
    own = _own(batch, LEAF)
    return replace(batch, position_ids=_changed(batch.position_ids, own, batch.position_ids[own] + 1))


def _shift_one_position(batch: PackedBatch) -> PackedBatch:
    last = batch.num_tokens - 2
    return replace(batch, position_ids=_changed(batch.position_ids, last, batch.position_ids[last] - 1))


def _change_a_token(batch: PackedBatch) -> PackedBatch:
    return replace(batch, input_ids=_changed(batch.input_ids, 5, batch.input_ids[6]))


def _rows(batch: PackedBatch, index: Tensor) -> Ragged:
    return Ragged.from_rows(index.numpy(), np.ones(index.numel(), np.int64), batch.num_tokens)


def _shift_all_rows(batch: PackedBatch) -> PackedBatch:
    """Every token predicts itself: what unshifted labels do."""
    return replace(batch, rows=_rows(batch, (batch.rows.index + 1) % batch.num_tokens))


def _shift_one_row(batch: PackedBatch) -> PackedBatch:
    return replace(batch, rows=_rows(batch, _changed(batch.rows.index, 4, batch.rows.index[4] - 1)))


def _swap_targets(batch: PackedBatch) -> PackedBatch:
    return replace(batch, targets=_exchanged(batch.targets, 3, 4))


def _branches(batch: PackedBatch, rows: list[np.ndarray]) -> PackedBatch:
    lengths = np.array([r.size for r in rows])
    return replace(batch, branches=Ragged.from_rows(np.concatenate(rows), lengths, batch.num_rows))


def _branch_rows(batch: PackedBatch) -> list[np.ndarray]:
    return np.split(batch.branches.index.numpy(), np.cumsum(batch.branches.lengths.numpy())[:-1])


def _forget_the_last_token(batch: PackedBatch) -> PackedBatch:
    rows = _branch_rows(batch)
    rows[1] = rows[1][:-1]
    return _branches(batch, rows)


def _count_a_token_twice(batch: PackedBatch) -> PackedBatch:
    rows = _branch_rows(batch)
    rows[1] = np.append(rows[1], rows[1][-1])
    return _branches(batch, rows)


def _take_a_row_of_another_branch(batch: PackedBatch) -> PackedBatch:
    rows = _branch_rows(batch)
    rows[1] = np.append(rows[1][:-1], rows[2][-1])
    return _branches(batch, rows)


def _swap_the_sides_of_a_pair(batch: PackedBatch) -> PackedBatch:
    return replace(
        batch,
        chosen=_changed(batch.chosen, 2, batch.rejected[2]),
        rejected=_changed(batch.rejected, 2, batch.chosen[2]),
    )


def _swap_rejected_steps(batch: PackedBatch) -> PackedBatch:
    return replace(batch, rejected=_exchanged(batch.rejected, 2, 3))


def _forget_a_pair(batch: PackedBatch) -> PackedBatch:
    names = ("chosen", "rejected", "weights", "pair_index")
    return replace(batch, **{name: getattr(batch, name)[1:] for name in names})


def _forget_the_weights(batch: PackedBatch) -> PackedBatch:
    return replace(batch, weights=torch.ones_like(batch.weights))


def _mix_up_pairs(batch: PackedBatch) -> PackedBatch:
    """Two pairs take each other's reference log-probs."""
    return replace(batch, pair_index=_exchanged(batch.pair_index, 0, 1))


def _wrong_transpose_of_rows(batch: PackedBatch) -> PackedBatch:
    """Only the gradient is wrong."""
    return replace(batch, rows=replace(batch.rows, t_index=_exchanged(batch.rows.t_index, 2, 3)))


def _wrong_transpose_of_branches(batch: PackedBatch) -> PackedBatch:
    t_index = batch.branches.t_index
    return replace(batch, branches=replace(batch.branches, t_index=_exchanged(t_index, 0, t_index.numel() - 1)))


MUTATIONS = [
    _leak_a_sibling,
    _leak_another_tree,
    _drop_an_ancestor,
    _see_an_ancestor_twice,
    _see_the_future,
    _drop_the_root,
    _drop_the_parent,
    _see_no_ancestor,
    _follow_a_sibling,
    _see_all_before,
    _exchange_two_ancestors,
    _move_a_border,
    _shift_positions,
    _shift_one_position,
    _restart_positions,
    _positions_in_packed_order,
    _change_a_token,
    _shift_all_rows,
    _shift_one_row,
    _swap_targets,
    _forget_the_last_token,
    _count_a_token_twice,
    _take_a_row_of_another_branch,
    _swap_the_sides_of_a_pair,
    _swap_rejected_steps,
    _forget_a_pair,
    _forget_the_weights,
    _mix_up_pairs,
    _wrong_transpose_of_rows,
    _wrong_transpose_of_branches,
]


@pytest.mark.parametrize(
    "which",
    ["llama", "qwen2", *(pytest.param(kind, marks=pytest.mark.slow) for kind in sorted({*FAMILIES} - {*MODELS}))],
)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda f: f.__name__[1:])
def test_every_broken_batch_is_noticed(
    tiny_model: Make, mutation: Callable[[PackedBatch], PackedBatch], which: str
) -> None:
    pairs = nested_pairs()
    make = partial(training_model if which in MODELS else family_model, tiny_model, which)
    if which in ("mistral", "phi3", "starcoder2"):  # in whose narrow windows no layer would see the roots
        make = partial(make, sliding_window=60)
    model = make()
    refs = references_near(model, pairs)
    batch = build_batch(pairs, range(len(pairs)), "tree")
    plain = plain_step(make(), pairs, refs)
    assert_exact(packed_step(model, [batch], refs, num_pairs=len(pairs)), plain)
    broken = packed_step(model, [mutation(batch)], refs, num_pairs=len(pairs))
    error, _ = worst(broken, plain)
    # far beyond the tolerance, not just beyond it
    assert error > 100 * TOLERANCE
    if mutation in (_wrong_transpose_of_rows, _wrong_transpose_of_branches):
        assert errors(broken, plain)["loss"] <= TOLERANCE


def test_a_window_of_another_size_is_noticed(tiny_model: Make) -> None:
    pairs = nested_pairs()
    model, other = (
        training_model(tiny_model, "qwen2 sliding"),
        training_model(tiny_model, "qwen2 sliding", sliding_window=8),
    )
    refs = references_near(model, pairs)
    (batch,) = pack_pairs(pairs, 10_000)
    plain = plain_step(training_model(tiny_model, "qwen2 sliding"), pairs, refs)
    assert_exact(packed_step(model, [batch], refs, num_pairs=len(pairs)), plain)
    assert worst(packed_step(other, [batch], refs, num_pairs=len(pairs)), plain)[0] > 100 * TOLERANCE
