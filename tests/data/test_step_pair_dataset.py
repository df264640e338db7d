"""The sequence of pairs: reading, fingerprint, split by group, vocabulary."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from stepdpo_kernels.data import LoadReport, StepPairDataset, check_vocabulary
from stepdpo_kernels.types import StepDPOError, StepPair


def pair(*ids: Any, **fields: Any) -> StepPair:
    return StepPair(*(ids or ([1, 2], [3], [4, 5])), **fields)


def test_a_read_only_sequence():
    report = LoadReport("a.jsonl", ("a.jsonl",), 5, 5)
    pairs = [pair(id=str(i)) for i in range(5)]
    dataset = StepPairDataset(pairs, report)
    assert isinstance(dataset, Sequence)
    assert len(dataset) == 5
    assert list(dataset) == pairs
    assert dataset[-1] is pairs[-1]
    assert pairs[2] in dataset
    assert list(dataset[1:3]) == pairs[1:3]
    assert isinstance(dataset[1:3], StepPairDataset)
    assert dataset[1:3].report is report
    with pytest.raises(IndexError):
        dataset[5]
    with pytest.raises(TypeError):
        dataset[0] = pairs[1]  # type: ignore[index]
    pairs.clear()
    assert len(dataset) == 5


def test_a_torch_dataset():
    dataset = StepPairDataset([pair(id=str(i)) for i in range(5)])
    batches = list(DataLoader(dataset, batch_size=2, collate_fn=list))
    assert [[p.id for p in batch] for batch in batches] == [["0", "1"], ["2", "3"], ["4"]]
    again = pickle.loads(pickle.dumps(dataset))  # as DataLoader's worker processes get it
    assert again.fingerprint == dataset.fingerprint


CHANGES = [
    ([1, 3], [3], [4, 5]),
    ([1], [2, 3], [4, 5]),  # the same tokens, cut elsewhere
    ([1, 2], [3, 4], [5]),
    ([1, 2], [4, 5], [3]),
]


def test_fingerprint_is_of_everything_in_the_pairs():
    base = [pair(id="ab", group="c"), pair(id="d")]
    variants = [
        base,
        base[::-1],
        base[:1],
        [*base, pair(id="e")],
        [pair(id="a", group="bc"), base[1]],
        [pair(id="ab", group="c", weight=0.5), base[1]],
        *([pair(*ids, id="ab", group="c"), base[1]] for ids in CHANGES),
    ]
    prints = [StepPairDataset(variant).fingerprint for variant in variants]
    assert len(set(prints)) == len(variants)
    assert StepPairDataset(base, LoadReport("x", ("x",), 2, 2)).fingerprint == prints[0]
    assert all(len(value) == 64 and int(value, 16) >= 0 for value in prints)


@given(
    st.lists(st.sampled_from(["", "a", "b", "c", "d", "e"]), min_size=2, max_size=40),
    st.floats(0.01, 0.99),
    st.integers(0, 5),
)
def test_split_keeps_groups_whole(groups: list[str], fraction: float, seed: int):
    dataset = StepPairDataset([pair(id=str(i), group=group) for i, group in enumerate(groups)])
    try:
        rest, held = dataset.split(fraction, seed)
    except StepDPOError as error:
        assert "cannot be split into two parts" in str(error)  # noqa: PT017
        return
    ids = [int(p.id) for p in held]
    assert ids == sorted(ids)
    assert ids
    assert len(rest)
    assert sorted([*ids, *(int(p.id) for p in rest)]) == list(range(len(groups)))
    assert not {p.group for p in held if p.group} & {p.group for p in rest}
    assert fraction * len(groups) <= len(held)
    assert len(held) < fraction * len(groups) + max(groups.count(p.group) if p.group else 1 for p in held)
    again = dataset.split(fraction, seed)
    assert [part.fingerprint for part in again] == [rest.fingerprint, held.fingerprint]


def test_split_depends_on_the_seed():
    dataset = StepPairDataset([pair(id=str(i), group=str(i // 2)) for i in range(40)], LoadReport("x", ("x",), 40, 40))
    parts = [dataset.split(0.1, seed) for seed in range(4)]
    assert all(len(held) == 4 and len(rest) == 36 for rest, held in parts)
    assert len({held.fingerprint for _, held in parts}) > 1
    assert parts[0][0].report is dataset.report


def test_split_draws_pairs_without_a_group_one_by_one():
    dataset = StepPairDataset([pair(id=str(i)) for i in range(10)])
    for seed in range(5):
        rest, held = dataset.split(0.3, seed)
        assert (len(rest), len(held)) == (7, 3)


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 2, float("nan")])
def test_split_fraction(fraction: float):
    with pytest.raises(StepDPOError, match="fraction must lie between 0 and 1, got"):
        StepPairDataset([pair(), pair()]).split(fraction)


def test_split_of_one_group():
    dataset = StepPairDataset([pair(group="a"), pair(group="a")])
    with pytest.raises(StepDPOError, match="2 pairs in 1 groups cannot be split into two parts"):
        dataset.split(0.5)


def test_check_vocabulary():
    dataset = StepPairDataset([pair(), pair([1, 2], [3], [9, 12, 13], id="far"), pair([99], [1], [2], id="farther")])
    check_vocabulary(dataset, 100)
    with pytest.raises(
        StepDPOError,
        match=r"pair 'far': rejected_ids\[1\] is token 12, but the model's vocabulary has 12 tokens; use the",
    ):
        check_vocabulary(dataset, 12)
    with pytest.raises(StepDPOError, match=r"pair 'farther': prefix_ids\[0\] is token 99"):
        check_vocabulary(dataset, 99)
