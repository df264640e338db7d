"""The order of an epoch: plain shuffling, or problem by problem."""

from __future__ import annotations

from itertools import chain, groupby

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepdpo_kernels.packing import SAMPLING_MODES, epoch_order, pack_pairs, savings
from stepdpo_kernels.types import StepPair
from tests.forests import make_pair, nested_pairs

_settings = settings(max_examples=80, deadline=None, derandomize=True)


def _pairs(groups: list[str]) -> list[StepPair]:
    return [make_pair([1], [2], [3], id=str(i), group=group) for i, group in enumerate(groups)]


_groups = st.lists(st.sampled_from(["", "a", "b", "c", "d"]), max_size=24)


@_settings
@given(_groups, st.integers(0, 5), st.sampled_from(SAMPLING_MODES), st.none() | st.integers(1, 7))
def test_every_pair_once(groups: list[str], seed: int, sampling: str, step: int | None) -> None:
    order = epoch_order(_pairs(groups), seed, sampling, pairs_per_step=step)
    assert sorted(order) == list(range(len(groups)))
    assert order == epoch_order(_pairs(groups), seed, sampling, pairs_per_step=step)


@_settings
@given(_groups, st.integers(0, 5))
def test_shuffling_does_not_look_at_groups(groups: list[str], seed: int) -> None:
    """So steps are the ones that any trainer would draw with this permutation."""
    plain = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    assert epoch_order(_pairs(groups), seed) == plain
    assert epoch_order(_pairs(groups), seed, pairs_per_step=3) == plain


@_settings
@given(_groups, st.integers(0, 5))
def test_groups_stay_together(groups: list[str], seed: int) -> None:
    order = epoch_order(_pairs(groups), seed, "grouped")
    runs = [group for group, _ in groupby(groups[i] for i in order) if group]
    assert len(runs) == len(set(runs))


@_settings
@given(_groups, st.integers(0, 5), st.integers(1, 7))
def test_a_group_is_divided_only_where_nothing_else_fits(groups: list[str], seed: int, size: int) -> None:
    order = epoch_order(_pairs(groups), seed, "grouped", pairs_per_step=size)
    steps = [order[start : start + size] for start in range(0, len(order), size)]
    left = {g: groups.count(g) for g in groups if g}
    for number, step in enumerate(steps):
        # what is left of each problem, and of pairs without one, before the last of this step is drawn
        for group in dict.fromkeys(groups[i] for i in step):
            taken = sum(groups[i] == group for i in step)
            at = next(n for n, i in enumerate(step) if groups[i] == group)
            if group and taken < left[group] and number + 1 < len(steps):
                room = size - at
                others = [n for g, n in left.items() if n and g != group and g not in {groups[i] for i in step}]
                assert left[group] > room
                assert all(n > room for n in others)
                assert not any(groups[i] == "" for i in chain(*steps[number + 1 :]))
            if group:
                left[group] -= taken


def test_seeds_differ() -> None:
    pairs = _pairs(["a", "b", "c", "d", ""] * 4)
    for sampling in SAMPLING_MODES:
        orders = {tuple(epoch_order(pairs, seed, sampling)) for seed in range(5)}
        assert len(orders) == 5


def test_grouping_shares_more() -> None:
    pairs = [pair for seed in range(6) for pair in nested_pairs(seed=seed, group=f"problem {seed}")]
    tokens = {}
    for sampling in SAMPLING_MODES:
        order = epoch_order(pairs, 0, sampling, pairs_per_step=8)
        steps = [[pairs[i] for i in order[start : start + 8]] for start in range(0, len(order), 8)]
        tokens[sampling] = sum(savings(pack_pairs(step, 1000))["tokens"] for step in steps)
        if sampling == "grouped":
            assert all(len({pair.group for pair in step}) == 1 for step in steps)
    assert 1.5 * tokens["grouped"] < tokens["shuffle"]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="shuffle, grouped, got 'random'"):
        epoch_order([], 0, "random")
    with pytest.raises(ValueError, match="pairs_per_step must be at least 1, got 0"):
        epoch_order([], 0, "grouped", pairs_per_step=0)
