"""The order in which an epoch draws its pairs."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from stepdpo_kernels.types import StepPair

SAMPLING_MODES = ("shuffle", "grouped")


def epoch_order(
    pairs: Sequence[StepPair], seed: int, sampling: str = "shuffle", *, pairs_per_step: int | None = None
) -> list[int]:
    """Every index into `pairs` once; optimiser steps are consecutive stretches of it. The same for the same seed.

    sampling:
        "shuffle": a uniform permutation. Steps are those of any trainer that shuffles its pairs, so the gradients are,
            too, whatever is shared.
        "grouped": pairs of one `group` (problem) follow one another; the groups, and the pairs within each, come in
            random order. More is shared, but a step has fewer problems, so its gradient is noisier: this changes
            training, unlike everything else in packing. Pairs of group "" are drawn one by one.
    pairs_per_step: length of a step, for "grouped": where the next group does not fit into a step, a later one that
        does comes first, and a group is divided only where none does.

    Raises ValueError for another `sampling` and for fewer than one pair a step.
    """
    if sampling not in SAMPLING_MODES:
        raise ValueError(f"sampling must be one of {', '.join(SAMPLING_MODES)}, got {sampling!r}")
    if pairs_per_step is not None and pairs_per_step < 1:
        raise ValueError(f"pairs_per_step must be at least 1, got {pairs_per_step}")
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = torch.randperm(len(pairs), generator=generator).tolist()
    if sampling == "shuffle":
        return order
    groups: dict[str | int, list[int]] = {}
    for i in order:
        groups.setdefault(pairs[i].group or i, []).append(i)
    members = list(groups.values())
    waiting: dict[int, deque[int]] = {}  # groups of each size, in the order in which they were drawn
    drawn = torch.randperm(len(members), generator=generator).tolist()
    place = {number: n for n, number in enumerate(drawn)}
    for number in drawn:
        waiting.setdefault(len(members[number]), deque()).append(number)
    result: list[int] = []
    while waiting:
        room = len(pairs) if pairs_per_step is None else pairs_per_step - len(result) % pairs_per_step
        size = min((n for n in waiting if n <= room), key=lambda n: place[waiting[n][0]], default=0)
        divided = not size
        if divided:
            size = min(waiting, key=lambda n: place[waiting[n][0]])
        number = waiting[size].popleft()
        if not waiting[size]:
            del waiting[size]
        result += members[number][:room]
        if divided:
            members[number] = members[number][room:]
            place[number] = -1  # the rest comes next
            waiting.setdefault(size - room, deque()).appendleft(number)
    return result
