"""A packed batch against what its pairs say: paths, positions, rows, targets, branches."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepdpo_kernels.loss import StepDPOLoss
from stepdpo_kernels.ops.ragged import sum_rows
from stepdpo_kernels.packing import SHARE_MODES, build_batch
from stepdpo_kernels.packing.reference import unpack
from stepdpo_kernels.types import PackedBatch, Ragged, StepPair
from tests.forests import ALPHABET, branches_of, forest_pairs, make_pair, nested_pairs, nodes_by_brute_force, step_pairs

_settings = settings(max_examples=80, deadline=None, derandomize=True)
_share = st.sampled_from(SHARE_MODES)


def _contexts(batch: PackedBatch) -> dict[int, tuple[int, ...]]:
    """The tokens from the root to each packed position, itself included, as the plan's queries see them."""
    contexts = {}
    cu_q, cu_k = batch.plan.cu_q.tolist(), batch.plan.cu_k.tolist()
    for leaf in range(batch.plan.num_leaves):
        path = batch.plan.keys.index[cu_k[leaf] : cu_k[leaf + 1]]
        queries = cu_q[leaf + 1] - cu_q[leaf]
        tokens = batch.input_ids[path].tolist()
        assert batch.position_ids[path].tolist() == list(range(len(path)))
        assert path[-queries:].tolist() == list(range(cu_q[leaf], cu_q[leaf + 1]))
        for position, seen in zip(path[-queries:].tolist(), range(len(path) - queries, len(path)), strict=True):
            contexts[position] = tuple(tokens[: seen + 1])
    assert sorted(contexts) == list(range(batch.num_tokens))
    return contexts


def _unit_of(share: str, branch: int) -> int:
    return {"tree": 0, "pair": branch // 2, "none": branch}[share]


def _dense(ragged: Ragged, transposed: bool = False) -> np.ndarray:
    index, lengths = (ragged.t_index, ragged.t_lengths) if transposed else (ragged.index, ragged.lengths)
    matrix = np.zeros((ragged.lengths.numel(), ragged.t_lengths.numel()), np.int64)
    outer = np.repeat(np.arange(lengths.numel()), lengths.numpy())
    np.add.at(matrix, (index.numpy(), outer) if transposed else (outer, index.numpy()), 1)
    return matrix


@_settings
@given(step_pairs(), _share)
def test_every_path_spells_a_branch_and_every_row_predicts_its_token(pairs: list[StepPair], share: str) -> None:
    batch = build_batch(pairs, range(len(pairs)), share)
    contexts = _contexts(batch)
    assert batch.num_tokens == len(contexts) == nodes_by_brute_force(pairs, share)
    assert [batch.position_ids[p].item() + 1 for p in contexts] == [len(c) for c in contexts.values()]

    row_position, targets = batch.rows.index.tolist(), batch.targets.tolist()
    assert row_position == sorted(row_position)
    cuts = np.cumsum(batch.branches.lengths.numpy())[:-1]
    branch_rows = [rows.tolist() for rows in np.split(batch.branches.index.numpy(), cuts)]
    sides = np.stack([batch.chosen.numpy(), batch.rejected.numpy()], 1).ravel()
    edges: set[tuple[int, tuple[int, ...], int]] = set()
    units: dict[int, int] = {}
    for number, ((prefix, step), side) in enumerate(zip(branches_of(pairs), sides, strict=True)):
        rows = branch_rows[side]
        assert [targets[r] for r in rows] == list(step)
        for k, row in enumerate(rows):
            assert contexts[row_position[row]] == prefix + step[:k]
            # no row and no position serves two sharing units
            unit = _unit_of(share, number)
            assert units.setdefault(row_position[row], unit) == unit
        edges |= {(_unit_of(share, number), prefix + step[:k], step[k]) for k in range(len(step))}
    assert batch.num_rows == len(edges)


@_settings
@given(step_pairs(), _share)
def test_a_step_of_several_pairs_is_one_branch(pairs: list[StepPair], share: str) -> None:
    batch = build_batch(pairs, range(len(pairs)), share)
    distinct = {
        (_unit_of(share, i), prefix, step) if step else "empty" for i, (prefix, step) in enumerate(branches_of(pairs))
    }
    assert batch.branches.lengths.numel() == len(distinct)
    assert set(batch.chosen.tolist()) | set(batch.rejected.tolist()) == set(range(len(distinct)))


@_settings
@given(step_pairs(), _share)
def test_ragged_matrices_carry_their_transposes(pairs: list[StepPair], share: str) -> None:
    batch = build_batch(pairs, range(len(pairs)), share)
    assert batch.plan.num_tokens == batch.num_tokens
    for ragged in (batch.plan.keys, batch.rows, batch.branches):
        assert (_dense(ragged) == _dense(ragged, transposed=True)).all()
        assert all(getattr(ragged, name).dtype == torch.int64 for name in ("index", "lengths", "t_index", "t_lengths"))
        # ordered, so that the sums run in one order
        starts = np.concatenate([[0], np.cumsum(ragged.t_lengths.numpy())])
        for a, b in pairwise(starts):
            assert (np.diff(ragged.t_index.numpy()[a:b]) > 0).all()
    assert (batch.plan.keys.lengths == 1).all()
    assert (batch.rows.lengths == 1).all()


@_settings
@given(step_pairs(alphabet=ALPHABET), _share)
def test_unpacking_gives_the_pairs_back(pairs: list[StepPair], share: str) -> None:
    readable = [pair for pair in pairs if pair.chosen_ids.size or pair.rejected_ids.size]
    if not readable:
        return
    batch = build_batch(pairs, [i for i, pair in enumerate(pairs) if pair in readable], share)
    assert unpack(batch) == [
        make_pair(p.prefix_ids, p.chosen_ids, p.rejected_ids, id=p.id, weight=p.weight) for p in readable
    ]


@_settings
@given(step_pairs(), _share)
def test_plain_facts_of_a_batch(pairs: list[StepPair], share: str) -> None:
    batch = build_batch(pairs, range(len(pairs)), share)
    plan = batch.plan
    assert batch.num_pairs == len(pairs)
    assert batch.weights.tolist() == [pair.weight for pair in pairs]
    assert batch.pair_ids == tuple(pair.id for pair in pairs)
    assert batch.tokens_unshared == sum(len(prefix) + len(step) for prefix, step in branches_of(pairs))
    assert (plan.max_q, plan.max_k) == (plan.cu_q.diff().max().item(), plan.cu_k.diff().max().item())
    assert plan.cu_q.dtype == plan.cu_k.dtype == torch.int32
    assert plan.cu_q[-1] == batch.num_tokens
    assert plan.cu_k[-1] == plan.keys.index.numel()
    assert (plan.cu_q.diff() > 0).all()
    for tensor in (batch.input_ids, batch.position_ids, batch.targets, batch.chosen, batch.rejected, batch.pair_index):
        assert tensor.dtype == torch.int64
    assert batch.weights.dtype == torch.float32


@pytest.mark.parametrize("share", SHARE_MODES)
def test_pairs_are_taken_by_index_and_stay_in_that_order(share: str) -> None:
    pairs = forest_pairs()
    batch = build_batch(pairs, [5, 0, 11], share)
    assert batch.pair_index.tolist() == [5, 0, 11]
    assert [p.id for p in unpack(batch)] == [pairs[i].id for i in (5, 0, 11)]


def test_identical_branches_are_one() -> None:
    batch = build_batch([make_pair([1, 2], [3, 4, 5], [3, 4, 5])], [0], "pair")
    assert batch.num_tokens == 4
    assert batch.plan.num_leaves == 1
    assert batch.targets.tolist() == [3, 4, 5]
    assert batch.chosen.tolist() == batch.rejected.tolist() == [0]


def test_a_branch_that_is_a_prefix_of_the_other_adds_no_node() -> None:
    batch = build_batch([make_pair([1, 2], [3, 4, 5], [3, 4])], [0], "tree")
    assert batch.input_ids.tolist() == [1, 2, 3, 4]
    assert batch.plan.num_leaves == 1
    assert batch.targets.tolist() == [3, 4, 5]
    assert batch.branches.lengths.tolist() == [3, 2]
    assert batch.branches.index.tolist() == [0, 1, 2, 0, 1]


def test_an_empty_branch_has_no_rows() -> None:
    batch = build_batch([make_pair([1, 2], [], [3, 4])], [0], "tree")
    assert batch.input_ids.tolist() == [1, 2, 3]
    assert batch.branches.lengths.tolist() == [0, 2]
    assert (batch.chosen.item(), batch.rejected.item()) == (0, 1)


@pytest.mark.parametrize("share", SHARE_MODES)
def test_two_empty_branches_are_packed_and_cannot_be_read_back(share: str) -> None:
    batch = build_batch([make_pair([1, 2], [], [], id="void")], [0], share)
    assert batch.num_rows == 0
    assert batch.branches.lengths.tolist() == [0]
    with pytest.raises(ValueError, match="'void' has two empty branches"):
        unpack(batch)


def test_a_rejected_step_of_two_pairs_is_summed_once() -> None:
    pairs = [make_pair([1, 2], [3, 4], [7, 8, 9]), make_pair([1, 2], [5, 6], [7, 8, 9])]
    batch = build_batch(pairs, [0, 1], "tree")
    assert batch.rejected[0] == batch.rejected[1]
    assert batch.branches.lengths.tolist() == [2, 3, 2]
    assert batch.num_rows == 7
    # the same tokens after another prefix are another branch
    other = build_batch([pairs[0], make_pair([1, 3], [5, 6], [7, 8, 9])], [0, 1], "tree")
    assert other.rejected[0] != other.rejected[1]


def test_first_tokens_that_both_steps_have_are_evaluated_once() -> None:
    """Their loss rows are on both branches, so in a margin their log-probs cancel."""
    pair = make_pair([1, 2], [7, 8, 3, 4], [7, 8, 5])
    batch = build_batch([pair], [0], "tree")
    assert batch.input_ids.tolist() == [1, 2, 7, 8, 3]
    assert batch.rows.index.tolist() == [1, 2, 3, 3, 4]
    assert batch.targets.tolist() == [7, 8, 3, 5, 4]
    assert batch.branches.index.tolist() == [0, 1, 2, 4, 0, 1, 3]
    logps = torch.randn(5, dtype=torch.float64)
    changed = logps + torch.tensor([1.0, -2.0, 0, 0, 0])

    def margin(of_rows: torch.Tensor) -> torch.Tensor:
        sums = sum_rows(of_rows, batch.branches)
        return sums[batch.chosen] - sums[batch.rejected]

    torch.testing.assert_close(margin(changed), margin(logps))


@pytest.mark.parametrize("share", SHARE_MODES)
def test_a_batch_of_nothing(share: str) -> None:
    batch = build_batch(forest_pairs(), [], share)
    assert (batch.num_tokens, batch.num_pairs, batch.num_rows, batch.plan.num_leaves) == (0, 0, 0, 0)
    assert (batch.plan.max_q, batch.plan.max_k, batch.tokens_unshared, batch.pair_ids) == (0, 0, 0, ())
    assert batch.plan.cu_q.tolist() == batch.plan.cu_k.tolist() == [0]
    assert all(t.numel() == 0 for t in _tensors(batch) if t.dtype == torch.int64 or t.dtype == torch.float32)
    assert [t.dtype for t in _tensors(batch)] == [t.dtype for t in _tensors(build_batch(forest_pairs(), [0], share))]
    assert unpack(batch) == []
    # its loss is zero, and every parameter's gradient is there
    embedding, weight = torch.randn(9, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    for loss_fn in (StepDPOLoss(), StepDPOLoss(loss_type="simpo"), StepDPOLoss(rpo_alpha=0.5)):
        refs = None if loss_fn.reference_free else torch.empty(0)
        out = loss_fn.packed(embedding[batch.input_ids], weight, batch, refs, num_pairs=3)
        assert out.loss.item() == 0
        assert out.margins.shape == (0,)
        for gradient in torch.autograd.grad(out.loss, [embedding, weight]):
            assert not gradient.any()


def test_the_same_step_in_two_trees_is_two_branches() -> None:
    pairs = [make_pair([1, 2], [3, 4], [7, 8])] * 2
    for share, branches in (("tree", 2), ("pair", 4), ("none", 4)):
        assert build_batch(pairs, [0, 1], share).branches.lengths.numel() == branches


@pytest.mark.parametrize("share", SHARE_MODES)
def test_the_largest_token_ids_survive(share: str) -> None:
    pair = make_pair([2**31 - 1, 0], [2**31 - 1, 0, 2**31 - 1], [0, 0, 2**31 - 1])
    batch = build_batch([pair], [0], share)
    assert unpack(batch) == [pair]
    assert batch.targets.max() == 2**31 - 1


@pytest.mark.parametrize("share", SHARE_MODES)
def test_the_same_pairs_give_the_same_tensors(share: str) -> None:
    first, second = (build_batch(forest_pairs(), range(12), share) for _ in range(2))
    for ours, theirs in zip(_tensors(first), _tensors(second), strict=True):
        assert torch.equal(ours, theirs)


def _tensors(batch: PackedBatch) -> list[torch.Tensor]:
    ragged = [batch.plan.keys, batch.rows, batch.branches]
    own = [batch.input_ids, batch.position_ids, batch.targets, batch.chosen, batch.rejected, batch.weights]
    plan = [batch.plan.cu_q, batch.plan.cu_k]
    return own + plan + [t for r in ragged for t in (r.index, r.lengths, r.t_index, r.t_lengths)]


def test_nested_groups_are_what_the_other_tests_need() -> None:
    batch = build_batch(nested_pairs(), range(8), "tree")
    assert batch.plan.num_leaves == 8
    # the first leaf is a tree of its own, the others branch off at four depths
    assert len(set((batch.plan.cu_k.diff() - batch.plan.cu_q.diff()).tolist())) == 5
    assert batch.tokens_unshared > 4 * batch.num_tokens
    # 16 branches, two of them repeated and one empty
    assert batch.rejected[0] == batch.rejected[1]
    assert (batch.branches.lengths == 0).sum() == 1
    assert batch.branches.lengths.numel() == 14


@_settings
@given(step_pairs(), _share)
def test_groups_of_rows_share_no_pair_and_are_as_small_as_can_be(pairs: list[StepPair], share: str) -> None:
    batch = build_batch(pairs, range(len(pairs)), share)
    cuts = np.append(0, batch.branches.lengths.cumsum(0).numpy())
    index = batch.branches.index.numpy()
    rows = [set(index[cuts[s] : cuts[s + 1]].tolist()) for s in range(len(cuts) - 1)]
    of_pair = [rows[c] | rows[r] for c, r in zip(batch.chosen.tolist(), batch.rejected.tolist(), strict=True)]
    uncut = [end for end in range(1, batch.num_rows + 1) if all(max(p) < end or min(p) >= end for p in of_pair if p)]
    assert list(batch.group_ends) == uncut
    assert all(type(end) is int for end in batch.group_ends)


def test_the_groups_of_a_problem_are_its_pairs() -> None:
    pairs = [make_pair([9, p], [1, 2], [3, 4, 5]) for p in range(3)]
    assert build_batch(pairs, range(3), "tree").group_ends == (5, 10, 15)
    assert build_batch(pairs, range(3), "none").group_ends == (5, 10, 15)
    assert build_batch([], [], "tree").group_ends == ()
