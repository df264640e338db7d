"""Best-fit decreasing: items of a size into bins of a capacity."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of item numbers, each bin's sizes adding up to at most `capacity`; the same for the same input.

    Items are placed from the largest down, each into the fullest bin that still takes it. Within a bin items keep
    their order, and bins stand in the order of their first items. An item larger than the capacity gets a bin of its
    own.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free space, bin), sorted
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        at = bisect_left(room, (sizes[item], -1))
        if at == len(room):
            free, number = capacity, len(bins)
            bins.append([])
        else:
            free, number = room.pop(at)
        bins[number].append(item)
        insort(room, (free - sizes[item], number))
    return sorted(sorted(items) for items in bins)
