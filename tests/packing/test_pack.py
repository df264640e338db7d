"""Bins of pairs: every pair once, no batch over its budget, groups kept together."""

from __future__ import annotations

import math
import random
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepdpo_kernels.packing import SHARE_MODES, build_batch, pack_pairs, plan_bins, savings, tokens_of_pair
from stepdpo_kernels.packing.reference import unpack
from stepdpo_kernels.types import StepDPOError, StepPair
from tests.forests import branches_of, forest_pairs, make_pair, nested_pairs, nodes_by_brute_force, step_pairs

_settings = settings(max_examples=80, deadline=None, derandomize=True)
_share = st.sampled_from(SHARE_MODES)


@_settings
@given(step_pairs(max_pairs=10), _share, st.integers(0, 25))
def test_every_pair_once_and_no_batch_over_budget(pairs: list[StepPair], share: str, slack: int) -> None:
    budget = max(tokens_of_pair(pair, share) for pair in pairs) + slack
    bins = plan_bins(pairs, budget, share=share)
    batches = pack_pairs(pairs, budget, share=share)
    assert sorted(i for indices in bins for i in indices) == list(range(len(pairs)))
    assert [batch.pair_index.tolist() for batch in batches] == bins
    for indices, batch in zip(bins, batches, strict=True):
        assert indices
        assert batch.num_tokens == nodes_by_brute_force([pairs[i] for i in indices], share) <= budget
    assert bins == plan_bins(list(pairs), budget, share=share)


@_settings
@given(step_pairs(max_pairs=10), _share, st.integers(0, 25))
def test_unpacking_all_batches_gives_all_pairs(pairs: list[StepPair], share: str, slack: int) -> None:
    pairs = [pair for pair in pairs if pair.chosen_ids.size or pair.rejected_ids.size]
    budget = max((tokens_of_pair(pair, share) for pair in pairs), default=1) + slack
    found = {
        index: pair
        for batch in pack_pairs(pairs, budget, share=share)
        for index, pair in zip(batch.pair_index.tolist(), unpack(batch), strict=True)
    }
    assert len(found) == len(pairs)
    for i, pair in enumerate(pairs):
        assert branches_of([found[i]]) == branches_of([pair])
        assert (found[i].id, found[i].weight) == (pair.id, pair.weight)


@_settings
@given(step_pairs(), _share)
def test_tokens_of_a_pair(pairs: list[StepPair], share: str) -> None:
    for pair in pairs:
        assert tokens_of_pair(pair, share) == nodes_by_brute_force([pair], share)
        assert build_batch([pair], [0], share).num_tokens == tokens_of_pair(pair, share)


@_settings
@given(step_pairs(max_pairs=10), st.integers(0, 25))
def test_sharing_more_never_encodes_more(pairs: list[StepPair], slack: int) -> None:
    for pair in pairs:
        assert tokens_of_pair(pair, "tree") == tokens_of_pair(pair, "pair") <= tokens_of_pair(pair, "none")
    everything = sum(tokens_of_pair(pair, "none") for pair in pairs) + slack
    tokens = {s: sum(b.num_tokens for b in pack_pairs(pairs, everything, share=s)) for s in SHARE_MODES}
    assert tokens["tree"] <= tokens["pair"] <= tokens["none"]


def test_groups_stay_together_where_the_budget_allows() -> None:
    pairs = [
        make_pair(p.prefix_ids, p.chosen_ids, p.rejected_ids, id=p.id, group=p.group)
        for seed in range(4)
        for p in nested_pairs(seed=seed, group=f"problem {seed}")
    ]
    random.Random(0).shuffle(pairs)
    largest = max(nodes_by_brute_force([p for p in pairs if p.group == f"problem {s}"], "tree") for s in range(4))
    bins = plan_bins(pairs, largest)
    assert len(bins) == 4
    for indices in bins:
        assert len({pairs[i].group for i in indices}) == 1
    # one forest for two problems
    assert len(plan_bins(pairs, 2 * largest)) == 2


def test_a_group_that_outgrows_the_budget_is_cut() -> None:
    pairs = nested_pairs()
    whole = nodes_by_brute_force(pairs, "tree")
    budget = max(tokens_of_pair(pair) for pair in pairs) + 6
    assert budget < whole
    bins = plan_bins(pairs, budget)
    assert len(bins) > 1
    assert sorted(chain(*bins)) == list(range(len(pairs)))
    for indices in bins:
        assert nodes_by_brute_force([pairs[i] for i in indices], "tree") <= budget
    assert len(plan_bins(pairs, whole)) == 1
    assert len(plan_bins(pairs, whole - 1)) == 2


def test_what_all_pairs_begin_with_counts_once_in_a_bin() -> None:
    system = list(range(100, 140))
    pairs = [make_pair([*system, i], [i, 1, 2], [i, 3, 4], id=str(i)) for i in range(3, 9)]
    # 40 shared tokens, then 1 + (1 shared, then 1 and 1) for each pair
    budget = 40 + 6 * 4
    assert [batch.num_tokens for batch in pack_pairs(pairs, budget)] == [budget]
    assert len(pack_pairs(pairs, budget - 1)) == 2


def test_a_budget_that_the_common_prefix_fills() -> None:
    pairs = [make_pair([1, 2, 3], [i], [9], id=str(i)) for i in range(4, 8)]
    (batch,) = pack_pairs(pairs, 3)
    assert batch.num_tokens == 3
    assert batch.num_rows == 5


def test_pairs_without_a_group_still_share_within_their_batch() -> None:
    pairs = [make_pair([1, 2, 3, 4], [5, i], [6, i]) for i in range(3)]
    (batch,) = pack_pairs(pairs, 100)
    assert batch.num_tokens == 6


def test_savings_by_hand() -> None:
    #            1 2 3 [4 5 6 | 7 8]         prefix 3, two nodes and one node after it
    #            1 2 3 4 5 6 [9 9 | 9 3]     three more nodes, then 9 (shared, both go on from it with a target)
    pairs = [
        make_pair([1, 2, 3], [4, 5, 6], [7, 8], group="g"),
        make_pair([1, 2, 3, 4, 5, 6], [9, 9], [9, 3], group="g"),
    ]
    unshared = 3 + 3 + 3 + 2 + 6 + 2 + 6 + 2
    assert savings(pack_pairs(pairs, 100)) == {
        "tokens": 3 + 3 + 1 + 1,
        "tokens_unshared": unshared,
        "ratio": unshared / 8,
        "rows": 3 + 2 + 3,
    }
    # per pair: 3 + 2 + 1 and 6 + 1
    assert savings(pack_pairs(pairs, 100, share="pair"))["tokens"] == 13
    # per branch: 5 + 4 and 7 + 7; a row is no longer shared
    plain = savings(pack_pairs(pairs, 100, share="none"))
    assert (plain["tokens"], plain["rows"], plain["tokens_unshared"]) == (23, 9, unshared)


def test_savings_of_nothing() -> None:
    nothing = savings([])
    assert math.isnan(nothing["ratio"])
    assert nothing["tokens"] == nothing["rows"] == 0


@pytest.mark.parametrize("share", SHARE_MODES)
def test_no_pairs_give_no_batches(share: str) -> None:
    assert pack_pairs([], 10, share=share) == []


@pytest.mark.parametrize(("share", "tokens"), [("tree", 7), ("pair", 7), ("none", 10)])
def test_a_pair_over_the_budget_is_named(share: str, tokens: int) -> None:
    pair = make_pair([1, 2, 3], [4, 5, 6], [7, 8, 9], id="record 17")
    assert len(pack_pairs([pair], tokens, share=share)) == 1
    with pytest.raises(StepDPOError, match=rf"'record 17' takes {tokens} tokens .*'{share}'.*max_tokens={tokens - 1}"):
        pack_pairs([make_pair([1], [2], [3]), pair], tokens - 1, share=share)


def test_unknown_share_and_budget() -> None:
    pairs = forest_pairs()
    with pytest.raises(ValueError, match="tree, pair, none, got 'forest'"):
        pack_pairs(pairs, 100, share="forest")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        pack_pairs(pairs, 0)
