"""Bins of pairs: every pair once, no batch over its budget, groups kept together."""

from __future__ import annotations

import math
import random
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepdpo_kernels.packing import (
    SHARE_MODES,
    build_batch,
    pack_pairs,
    padded_tokens,
    plan_bins,
    plan_ranks,
    savings,
    tokens_of_pair,
)
from stepdpo_kernels.packing.pack import size_of_pair
from stepdpo_kernels.packing.reference import padded_batch, unpack
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
        batch = build_batch([pair], [0], share)
        assert size_of_pair(pair, share) == (batch.num_tokens, batch.plan.keys.index.numel())
        assert batch.num_tokens == tokens_of_pair(pair, share)


@_settings
@given(step_pairs(max_pairs=10), _share, st.integers(0, 15), st.integers(0, 25))
def test_no_batch_over_its_budget_of_keys(pairs: list[StepPair], share: str, more: int, slack: int) -> None:
    sizes = [size_of_pair(pair, share) for pair in pairs]
    max_keys = max(size.keys for size in sizes) + more
    budget = max(size.tokens for size in sizes) + slack
    batches = pack_pairs(pairs, budget, share=share, max_keys=max_keys)
    assert sorted(i for batch in batches for i in batch.pair_index.tolist()) == list(range(len(pairs)))
    for batch in batches:
        assert batch.plan.keys.index.numel() <= max_keys
        assert batch.num_tokens <= budget
    # one that does not bind changes nothing
    everything = sum(size_of_pair(pair, "none").keys for pair in pairs)
    assert plan_bins(pairs, budget, share=share, max_keys=everything) == plan_bins(pairs, budget, share=share)


@_settings
@given(step_pairs(max_pairs=10), _share, st.integers(0, 25), st.integers(1, 4))
def test_every_pair_in_one_batch_of_one_process(pairs: list[StepPair], share: str, slack: int, ranks: int) -> None:
    budget = max(tokens_of_pair(pair, share) for pair in pairs) + slack
    plan = plan_ranks(pairs, budget, ranks, share=share)
    assert len(plan) == ranks
    assert sorted(chain(*chain(*plan))) == list(range(len(pairs)))
    for indices in chain(*plan):
        assert 0 < nodes_by_brute_force([pairs[i] for i in indices], share) <= budget
    # as many rounds as one process after the other would need at least, and nobody waits for more than one batch
    counts = [len(bins) for bins in plan]
    assert max(counts) - min(counts) <= 1
    assert max(counts) == math.ceil(len(plan_bins(pairs, budget, share=share)) / ranks)
    assert plan == plan_ranks(list(pairs), budget, ranks, share=share)
    if ranks == 1:
        assert plan == [plan_bins(pairs, budget, share=share)]


def test_processes_encode_about_the_same() -> None:
    """One full batch and a bit are two equal batches for two processes, and groups stay whole."""
    pairs = [pair for seed in range(12) for pair in nested_pairs(seed=seed, group=f"problem {seed}")]
    one = nodes_by_brute_force(pairs[:8], "tree")
    assert [len(b) for b in plan_bins(pairs, 10 * one)] == [80, 16]
    for ranks in (2, 3, 4):
        plan = plan_ranks(pairs, 10 * one, ranks)
        tokens = [sum(nodes_by_brute_force([pairs[i] for i in b], "tree") for b in bins) for bins in plan]
        assert [len(bins) for bins in plan] == [1] * ranks
        assert max(tokens) < 1.1 * min(tokens)
        assert 12 * one - 12 < sum(tokens) <= 12 * one  # some problems begin with the same token


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


@_settings
@given(step_pairs(max_pairs=10), _share, st.integers(1, 4))
def test_savings_against_other_layouts(pairs: list[StepPair], share: str, per_batch: int) -> None:
    budget = max(tokens_of_pair(pair, share) for pair in pairs) + 10
    batches = pack_pairs(pairs, budget, share=share)
    found = savings(batches, pairs=pairs, max_tokens=budget, padded_pairs=per_batch)
    padded = [padded_batch(pairs[i : i + per_batch])["input_ids"].numel() for i in range(0, len(pairs), per_batch)]
    by_pair = sum(batch.num_tokens for batch in pack_pairs(pairs, budget, share="pair")) if share != "none" else None
    tokens = sum(batch.num_tokens for batch in batches)
    assert found == savings(batches) | {
        "fill": tokens / (budget * len(batches)),
        "tokens_padded": sum(padded),
        "ratio_padded": sum(padded) / tokens,
        "tokens_pair": by_pair or sum(tokens_of_pair(pair) for pair in pairs),
        "ratio_pair": (by_pair or sum(tokens_of_pair(pair) for pair in pairs)) / tokens,
    }
    assert padded_tokens(pairs, per_batch) == sum(padded)


def test_savings_of_nothing() -> None:
    nothing = savings([])
    assert math.isnan(nothing["ratio"])
    assert nothing["tokens"] == nothing["rows"] == 0
    more = savings([], pairs=[], max_tokens=10)
    assert all(math.isnan(more[name]) for name in ("ratio", "ratio_padded", "ratio_pair", "fill"))
    assert more["tokens_padded"] == more["tokens_pair"] == 0


@pytest.mark.parametrize("share", SHARE_MODES)
def test_no_pairs_give_no_batches(share: str) -> None:
    assert pack_pairs([], 10, share=share) == []


@pytest.mark.parametrize(("share", "tokens"), [("tree", 7), ("pair", 7), ("none", 10)])
def test_a_pair_over_the_budget_is_named(share: str, tokens: int) -> None:
    pair = make_pair([1, 2, 3], [4, 5, 6], [7, 8, 9], id="record 17")
    assert len(pack_pairs([pair], tokens, share=share)) == 1
    with pytest.raises(StepDPOError, match=rf"'record 17' takes {tokens} tokens .*'{share}'.*max_tokens={tokens - 1}"):
        pack_pairs([make_pair([1], [2], [3]), pair], tokens - 1, share=share)


@pytest.mark.parametrize(("share", "keys"), [("tree", 10), ("pair", 10), ("none", 10)])
def test_a_pair_over_the_budget_of_keys_is_named(share: str, keys: int) -> None:
    pair = make_pair([1, 2, 3], [4, 5, 6], [7, 8, 9], id="record 17")
    assert len(pack_pairs([pair], 100, share=share, max_keys=keys)) == 1
    with pytest.raises(StepDPOError, match=rf"'record 17' takes {keys} gathered keys .*max_keys={keys - 1}"):
        pack_pairs([make_pair([1], [2], [3]), pair], 100, share=share, max_keys=keys - 1)


def test_keys_are_counted_once_for_a_step_that_is_a_prefix_of_the_other() -> None:
    pair = make_pair([1, 2, 3], [4, 5, 6, 7], [4, 5, 9])
    assert [size_of_pair(pair, share) for share in SHARE_MODES] == [(6, 6), (6, 6), (11, 11)]
    assert size_of_pair(make_pair([1, 2], [], [])) == (2, 2)


def test_unknown_share_and_budget() -> None:
    pairs = forest_pairs()
    with pytest.raises(ValueError, match="tree, pair, none, got 'forest'"):
        pack_pairs(pairs, 100, share="forest")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        pack_pairs(pairs, 0)
    with pytest.raises(ValueError, match="max_keys must be at least 1, got 0"):
        pack_pairs(pairs, 100, max_keys=0)
    with pytest.raises(ValueError, match="ranks must be at least 1, got 0"):
        plan_ranks(pairs, 1000, 0)
