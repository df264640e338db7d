r"""Accuracy and what it is worth.

An item has n samples, c of them right. Its score is

    mean        c / n
    pass@k      1 - C(n - c, k) / C(n, k): the chance that one of k samples, drawn without putting back, is right;
                unbiased (Chen et al. 2021, arXiv 2107.03374, equation 1)
    maj@n       samples vote with their final answers, equal answers together; those that were cut off or have no answer
                do not vote. 1 where the right answer has most votes, 1/t where t answers share most votes and the right
                one is among them (the mean over ties broken at random), else 0

A result is the mean of N items' scores x_i, and its standard error is that of the items:

    SE = sqrt( sum_i (x_i - mean)^2 / (N (N - 1)) )

The samples of an item are not independent, so they are one cluster each; with the same n for every item this is the
clustered standard error of the N n samples (Miller 2024, arXiv 2411.00640) times sqrt(N / (N - 1)). For n = 1 it is
sqrt(p (1 - p) / (N - 1)). Items count as a sample of those that could have been asked.

The 95% interval is Wilson's (1927) where every score is 0 or 1, else mean +- 1.96 SE cut to 0..1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import NamedTuple

from stepdpo_kernels.types import StepDPOError

Z95 = 1.959963984540054  # 97.5% quantile of the normal distribution


class Estimate(NamedTuple):
    """A mean over items: its value, its standard error (nan for a single item), and the ends of its 95% interval."""

    value: float
    standard_error: float
    low: float
    high: float


class ItemScore(NamedTuple):
    """What is kept of an item: a fixed amount, whatever its texts were.

    digest:      of its problem and right answer
    samples:     n
    right:       c
    majority:    score of the vote
    unfinished:  samples cut off at the most tokens
    no_answer:   samples that came to an end without a final answer
    failed:      samples that could not be had
    """

    id: str
    digest: bytes
    subject: str
    level: str
    samples: int
    right: int
    majority: float
    unfinished: int
    no_answer: int
    failed: int

    @property
    def accuracy(self) -> float:
        return self.right / self.samples


class Row(NamedTuple):
    """Of some of the items: how many, their accuracy, and the share of samples without end and without an answer."""

    name: str
    items: int
    accuracy: Estimate
    unfinished: float
    no_answer: float


class Summary(NamedTuple):
    """Results of a run.

    samples:    of each item
    pass_at:    by k, empty where every item has one sample
    majority:   None where every item has one sample
    failed:     share of samples
    subjects, levels:  empty where no item names one
    """

    items: int
    samples: int
    accuracy: Estimate
    pass_at: dict[int, Estimate]
    majority: Estimate | None
    unfinished: float
    no_answer: float
    failed: float
    subjects: list[Row]
    levels: list[Row]


def wilson(right: int, items: int, z: float = Z95) -> tuple[float, float]:
    """Interval of a share, `right` of `items` (Wilson 1927, "Probable inference", equation for the two limits)."""
    if not 0 <= right <= items or items < 1:
        raise StepDPOError(f"right must be in 0..items and items at least 1, got {right!r} of {items!r}")
    share, width = right / items, z * z / items
    middle = (share + width / 2) / (1 + width)
    half = z / (1 + width) * math.sqrt(share * (1 - share) / items + width / (4 * items))
    # The limits are exactly 0 and 1 where none and where all are right.
    return (0.0 if right == 0 else middle - half), (1.0 if right == items else middle + half)


def standard_error(scores: Sequence[float]) -> float:
    """Of the mean of N independent scores, with N - 1 in the variance; nan for one."""
    if len(scores) < 2:
        return math.nan
    mean = fmean(scores)
    return math.sqrt(math.fsum((x - mean) ** 2 for x in scores) / (len(scores) * (len(scores) - 1)))


def estimate(scores: Sequence[float]) -> Estimate:
    """The mean of items' scores in 0..1. Raises StepDPOError for none."""
    if not scores:
        raise StepDPOError("there are no items: nothing can be said of their accuracy")
    mean, error = fmean(scores), standard_error(scores)
    if all(score in (0, 1) for score in scores):
        low, high = wilson(int(sum(scores)), len(scores))
    elif math.isnan(error):
        low, high = 0.0, 1.0
    else:
        low, high = max(mean - Z95 * error, 0.0), min(mean + Z95 * error, 1.0)
    return Estimate(mean, error, low, high)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k), from whole numbers. Raises StepDPOError for k outside 1..n."""
    if not 0 <= right <= samples or not 1 <= k <= samples:
        raise StepDPOError(f"pass@k needs 1 <= k <= n and 0 <= c <= n, got k {k!r}, n {samples!r}, c {right!r}")
    every = math.comb(samples, k)
    return (every - math.comb(samples - right, k)) / every


def majority_score(votes: Iterable[tuple[int, bool]]) -> float:
    """Score of a vote.

    votes: for each sample that votes, a number that equal answers have in common, and whether the answer is right
    """
    counts: dict[int, int] = {}
    right: set[int] = set()
    for group, is_right in votes:
        counts[group] = counts.get(group, 0) + 1
        if is_right:
            right.add(group)
    most = max(counts.values(), default=0)
    leaders = [group for group, count in counts.items() if count == most]
    return sum(group in right for group in leaders) / len(leaders) if leaders else 0.0


def summarise(scores: Sequence[ItemScore]) -> Summary:
    """Results of a run. Raises StepDPOError for no items, and for items with different numbers of samples."""
    numbers = sorted({score.samples for score in scores})
    if len(numbers) > 1:
        raise StepDPOError(f"items must have the same number of samples, got {numbers[0]} to {numbers[-1]}")
    accuracy = estimate([score.accuracy for score in scores])
    n = numbers[0]
    ks = [2**i for i in range(n.bit_length()) if 2**i < n] + [n] if n > 1 else []
    total = n * len(scores)
    return Summary(
        items=len(scores),
        samples=n,
        accuracy=accuracy,
        pass_at={k: estimate([pass_at_k(n, score.right, k) for score in scores]) for k in ks},
        majority=estimate([score.majority for score in scores]) if n > 1 else None,
        unfinished=sum(score.unfinished for score in scores) / total,
        no_answer=sum(score.no_answer for score in scores) / total,
        failed=sum(score.failed for score in scores) / total,
        subjects=_table(scores, lambda score: score.subject),
        levels=_table(scores, lambda score: score.level),
    )


def _table(scores: Sequence[ItemScore], name_of: Callable[[ItemScore], str]) -> list[Row]:
    groups: dict[str, list[ItemScore]] = {}
    for score in scores:
        groups.setdefault(name_of(score), []).append(score)
    if set(groups) == {""}:
        return []
    rows = []
    for name in sorted(groups, key=lambda name: (not name, *_natural(name))):
        group = groups[name]
        samples = sum(score.samples for score in group)
        rows.append(
            Row(
                name or "not named",
                len(group),
                estimate([score.accuracy for score in group]),
                sum(score.unfinished for score in group) / samples,
                sum(score.no_answer for score in group) / samples,
            )
        )
    return rows


def _natural(name: str) -> tuple[str, int, str]:
    """Level 2 before Level 10."""
    words = name.rstrip("0123456789")
    return words, int(name[len(words) :] or 0), name
