"""Bins of a capacity, and their spreading over processes."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit(
    sizes: Sequence[int], capacity: int, keys: Sequence[int] | None = None, max_keys: int | None = None
) -> list[list[int]]:
    """Best-fit decreasing: bins of item numbers, whose sizes add up to at most `capacity`; the same for the same input.

    Items are placed from the largest down, each into the fullest bin that still takes it. Within a bin items keep
    their order, and bins stand in the order of their first items. An item larger than the capacity gets a bin of its
    own. With `max_keys`, the items' `keys` in a bin add up to no more than that, likewise.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free space, bin), sorted
    held: list[int] = []  # keys in each bin
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        need = 0 if keys is None else keys[item]
        at = bisect_left(room, (sizes[item], -1))
        while max_keys is not None and at < len(room) and held[room[at][1]] + need > max_keys:
            at += 1
        if at == len(room):
            free, number = capacity, len(bins)
            bins.append([])
            held.append(0)
        else:
            free, number = room.pop(at)
        bins[number].append(item)
        held[number] += need
        insort(room, (free - sizes[item], number))
    return sorted(sorted(items) for items in bins)


def spread(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Which bins each of `ranks` processes takes: lists of bin numbers that differ in length by at most one.

    From the largest bin down, every process takes one before any takes another, the one with the least so far first
    (so processes in step with each other work on bins of similar sizes). A process whose list is short, or empty, has
    a batch of weight 0 to run where all must take part. The same for the same input.
    """
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    shares: list[list[int]] = [[] for _ in range(ranks)]
    totals = [0] * ranks
    for start in range(0, len(order), ranks):
        turn = sorted(range(ranks), key=lambda rank: (totals[rank], rank))
        for rank, number in zip(turn, order[start : start + ranks], strict=False):
            shares[rank].append(number)
            totals[rank] += sizes[number]
    return shares
