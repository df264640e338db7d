"""Two runs on the same items, item by item."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from stepdpo_kernels.data.records import shorten
from stepdpo_kernels.evaluation.metrics import Z95, Estimate, ItemScore, estimate, standard_error
from stepdpo_kernels.types import StepDPOError

NAMED = 3  # items that a message names


class Comparison(NamedTuple):
    """Run a against run b.

    difference:  accuracy of a less that of b; its standard error is that of the items' differences d_i,
                 sqrt( sum_i (d_i - mean)^2 / (N (N - 1)) ); the 95% interval is mean +- 1.96 of it
    better:      items of which a has more samples right than b
    worse:       items of which b has more
    test:        "McNemar" where both runs have one sample of each item, else "sign"
    p_value:     exact, two-sided: were a and b equally good, how often would `better` and `worse` of as many items be
                 at least as far apart
    """

    items: int
    a: Estimate
    b: Estimate
    difference: Estimate
    better: int
    worse: int
    test: str
    p_value: float


def exact_two_sided(better: int, worse: int) -> float:
    """min(1, 2 P(X <= min(better, worse))), X binomial with n = better + worse and p = 1/2.

    McNemar's test (1947) of discordant items without its approximation by chi squared. The sum is of whole numbers,
    and is divided once: no rounding before that. 1.0 where there are none.
    """
    if better < 0 or worse < 0:
        raise StepDPOError(f"items cannot be counted below 0, got {better!r} and {worse!r}")
    n, few = better + worse, min(better, worse)
    term = total = 1  # C(n, 0), and the sum up to it
    for i in range(few):
        term = term * (n - i) // (i + 1)
        total += term
    return min(1.0, 2 * total / 2**n) if 2 * total < 2**n else 1.0


def compare(a: Sequence[ItemScore], b: Sequence[ItemScore]) -> Comparison:
    """Two runs on the same items, in any order.

    Raises StepDPOError that names what differs where the items are not the same, by id, problem or right answer.
    """
    first, second = _by_id(a, "first"), _by_id(b, "second")
    only_first = [id_ for id_ in first if id_ not in second]
    only_second = [id_ for id_ in second if id_ not in first]
    if only_first or only_second:
        raise StepDPOError(
            "the runs must be on the same items: "
            f"{_named(only_first, 'only in the first run')}; {_named(only_second, 'only in the second run')}; evaluate "
            "both on the same data with the same limit"
        )
    changed = [id_ for id_, score in first.items() if score.digest != second[id_].digest]
    if changed:
        raise StepDPOError(
            f"the runs must be on the same items: {_named(changed, 'with another problem or right answer')}"
        )
    differences = [score.accuracy - second[id_].accuracy for id_, score in first.items()]
    single = all(score.samples == 1 for score in (*a, *b))
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    accuracies = [estimate([score.accuracy for score in run]) for run in (a, b)]
    mean, error = fmean(differences), standard_error(differences)
    low, high = (-1.0, 1.0) if math.isnan(error) else (mean - Z95 * error, mean + Z95 * error)
    return Comparison(
        items=len(first),
        a=accuracies[0],
        b=accuracies[1],
        difference=Estimate(mean, error, max(low, -1.0), min(high, 1.0)),
        better=better,
        worse=worse,
        test="McNemar" if single else "sign",
        p_value=exact_two_sided(better, worse),
    )


def _by_id(scores: Sequence[ItemScore], which: str) -> dict[str, ItemScore]:
    if not scores:
        raise StepDPOError(f"the {which} run has no items")
    found: dict[str, ItemScore] = {}
    for score in scores:
        if score.id in found:
            raise StepDPOError(f"the {which} run has item {shorten(score.id)} twice")
        found[score.id] = score
    return found


def _named(ids: Sequence[str], what: str) -> str:
    if not ids:
        return f"none {what}"
    more = f" and {len(ids) - NAMED:,} more" if len(ids) > NAMED else ""
    return f"{len(ids):,} {what} ({', '.join(shorten(id_) for id_ in ids[:NAMED])}{more})"
