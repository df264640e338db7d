"""Best-fit decreasing against its definition, spelt out, and the spreading of bins over processes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepdpo_kernels.packing.bins import best_fit, spread

_settings = settings(max_examples=200, deadline=None, derandomize=True)


def _by_definition(sizes: list[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        room = [capacity - sum(sizes[i] for i in items) for items in bins]
        fits = [b for b in range(len(bins)) if room[b] >= sizes[item]]
        if fits:
            bins[min(fits, key=lambda b: room[b])].append(item)
        else:
            bins.append([item])
    return sorted(sorted(items) for items in bins)


@_settings
@given(st.lists(st.integers(0, 12), max_size=14), st.integers(0, 20))
def test_every_item_once_and_no_bin_over_capacity(sizes: list[int], capacity: int) -> None:
    bins = best_fit(sizes, capacity)
    assert sorted(i for items in bins for i in items) == list(range(len(sizes)))
    for items in bins:
        assert items == sorted(items)
        assert sum(sizes[i] for i in items) <= capacity or len(items) == 1
    assert bins == sorted(bins)
    assert bins == best_fit(sizes, capacity)


@_settings
@given(st.lists(st.integers(1, 12), max_size=14), st.integers(12, 24))
def test_it_is_best_fit_decreasing(sizes: list[int], capacity: int) -> None:
    bins = best_fit(sizes, capacity)
    expected = _by_definition(sizes, capacity)
    # ties between equally full bins may go either way, which leaves the multiset of fillings the same
    assert sorted(sorted(sizes[i] for i in items) for items in bins) == sorted(
        sorted(sizes[i] for i in items) for items in expected
    )


def test_a_perfect_fit_is_found() -> None:
    assert best_fit([4, 6, 3, 7, 5, 5], 10) == [[0, 1], [2, 3], [4, 5]]


def test_nothing_gives_no_bins() -> None:
    assert best_fit([], 10) == []


@_settings
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 9)), max_size=14), st.integers(9, 20))
def test_a_second_capacity_holds_too(items: list[tuple[int, int]], max_keys: int) -> None:
    sizes, keys = [size for size, _ in items], [key for _, key in items]
    bins = best_fit(sizes, 12, keys, max_keys)
    assert sorted(i for numbers in bins for i in numbers) == list(range(len(items)))
    for numbers in bins:
        assert sum(sizes[i] for i in numbers) <= 12
        assert sum(keys[i] for i in numbers) <= max_keys
    # without it, or where it does not bind, nothing changes
    assert best_fit(sizes, 12, keys) == best_fit(sizes, 12) == best_fit(sizes, 12, keys, sum(keys))


def test_keys_send_an_item_to_a_bin_with_more_room() -> None:
    assert best_fit([8, 5, 2], 10, [9, 1, 5], 10) == [[0], [1, 2]]
    assert best_fit([8, 5, 2], 10, [5, 1, 5], 10) == [[0, 2], [1]]


@_settings
@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 5))
def test_bins_are_spread_evenly(sizes: list[int], ranks: int) -> None:
    shares = spread(sizes, ranks)
    assert len(shares) == ranks
    assert sorted(i for share in shares for i in share) == list(range(len(sizes)))
    counts = [len(share) for share in shares]
    assert max(counts) - min(counts) <= 1
    # the largest takes at most one largest bin more than the smallest
    totals = [sum(sizes[i] for i in share) for share in shares]
    assert max(totals) - min(totals) <= max(sizes, default=0)
    assert shares == spread(list(sizes), ranks)
    # bins of one round are neighbours in size
    for earlier, later in zip(range(max(counts)), range(1, max(counts)), strict=False):
        assert min(sizes[s[earlier]] for s in shares) >= max(sizes[s[later]] for s in shares if len(s) > later)


def test_processes_without_a_bin() -> None:
    assert spread([5, 9], 3) == [[1], [0], []]
    assert spread([], 2) == [[], []]
    with pytest.raises(ValueError, match="ranks must be at least 1, got 0"):
        spread([1], 0)
