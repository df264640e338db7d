"""Best-fit decreasing against its definition, spelt out."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from stepdpo_kernels.packing.bins import best_fit

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
