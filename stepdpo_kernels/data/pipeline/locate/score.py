"""How good a locator is, and how far two of them agree.

A location is the number of the first wrong step, 0 where every step is right, None where it is undecided.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from stepdpo_kernels.types import StepDPOError

Place = int | None


@dataclass(frozen=True)
class Score:
    """A locator against annotations. Shares are of the `count` annotated solutions; an undecided one counts as missed.

    count:         solutions with an annotation
    unannotated:   solutions whose annotation is undecided; they are in no other number
    undecided:     solutions that the locator left undecided
    exact:         it names the annotated step, or finds every step right where that is so
    off_by_one:    it names the step before or after the annotated one
    earlier:       it names an earlier step than the annotated one, or one where every step is right
    later:         it names a later step than the annotated one, or none where one is wrong
    wrong, right:  solutions with a wrong step, and without; `exact_wrong`, `exact_right`: those of `exact` among them
    baselines:     how many are exact when the same answer is given for every solution
    """

    count: int
    unannotated: int
    undecided: int
    exact: int
    off_by_one: int
    earlier: int
    later: int
    wrong: int
    right: int
    exact_wrong: int
    exact_right: int
    baselines: dict[str, int]

    @property
    def accuracy(self) -> float:
        return self.exact / self.count

    @property
    def standard_error(self) -> float:
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.count)

    @property
    def f1(self) -> float | None:
        """Harmonic mean of the accuracies on solutions with and without a wrong step, as ProcessBench reports it
        (Zheng et al. 2024, arXiv 2412.06559); None where there are only solutions of one kind."""
        if not self.wrong or not self.right:
            return None
        a, b = self.exact_wrong / self.wrong, self.exact_right / self.right
        return 2 * a * b / (a + b) if a + b else 0.0

    def __str__(self) -> str:
        def row(name: str, number: int, of: int) -> str:
            return f"{name:<42}{_share(number, of)}"

        rows = [
            f"{'annotated solutions':<42}{self.count:>6}",
            row("first wrong step as annotated", self.exact, self.count) + f" ± {100 * self.standard_error:.1f}",
            row("  of solutions with a wrong step", self.exact_wrong, self.wrong),
            row("  of solutions without", self.exact_right, self.right),
            f"{'  F1 of the two':<42}{'' if self.f1 is None else format(100 * self.f1, '.1f'):>14}",
            row("one step before or after it", self.off_by_one, self.count),
            row("earlier", self.earlier, self.count),
            row("later", self.later, self.count),
            row("undecided", self.undecided, self.count),
            *(row(f"baseline: {name}", exact, self.count) for name, exact in self.baselines.items()),
        ]
        if self.unannotated:
            rows.append(f"{'left out: annotation undecided':<42}{self.unannotated:>6}")
        return "\n".join(rows)


def score(annotated: Sequence[Place], located: Sequence[Place], lengths: Sequence[int]) -> Score:
    """The score of `located` against `annotated`.

    lengths: how many steps each solution has, for the baseline that names the last one

    Raises StepDPOError where the three differ in length, where a location is not one of the solution's steps, and
    where nothing is annotated.
    """
    _check(annotated, located, "annotations", "locations")
    _check(annotated, lengths, "annotations", "lengths")
    for k, (truth, place, length) in enumerate(zip(annotated, located, lengths, strict=True)):
        for name, value in (("annotation", truth), ("location", place)):
            if value is not None and not 0 <= value <= length:
                raise StepDPOError(f"{name} {k} is step {value} of a solution of {length} steps")
    rows = [(a, b, n) for a, b, n in zip(annotated, located, lengths, strict=True) if a is not None]
    if not rows:
        raise StepDPOError(f"none of {len(annotated)} solutions is annotated: there is nothing to score against")
    order = Counter(_order(a, b) for a, b, _ in rows)
    truths = Counter(a for a, _, _ in rows)
    usual, most = max(truths.items(), key=lambda item: (item[1], -item[0]))
    return Score(
        count=len(rows),
        unannotated=len(annotated) - len(rows),
        undecided=order["undecided"],
        exact=order["same"],
        off_by_one=sum(bool(a and b) and abs(a - (b or 0)) == 1 for a, b, _ in rows),
        earlier=order["earlier"],
        later=order["later"],
        wrong=len(rows) - truths[0],
        right=truths[0],
        exact_wrong=sum(a == b != 0 for a, b, _ in rows),
        exact_right=sum(a == b == 0 for a, b, _ in rows),
        baselines={
            "always step 1": truths[1],
            "always the last step": sum(a == n > 0 for a, _, n in rows),
            "always no wrong step": truths[0],
            f"always the most frequent, {usual}": most,
        },
    )


ROWS = ("a step", "none", "undecided")
COLUMNS = ("earlier", "same", "later", *ROWS)
CELLS = [(row, column) for row in ROWS for column in COLUMNS if (column in COLUMNS[:3]) <= (row == "a step")]
CELLS.remove(("a step", "a step"))


@dataclass(frozen=True)
class Agreement:
    """Two locators, a and b, on the same solutions.

    count:   solutions
    both:    those that both decide
    equal:   those of `both` with the same answer
    kappa:   Cohen's kappa over the answers 0, 1, 2, ... of `both` (Cohen 1960, Educational and Psychological
             Measurement 20(1)): 1 for full agreement, 0 for as much as chance would give; None where it is
             undefined, because both give one and the same answer throughout or decide nothing
    table:   (what a says, what b says) -> solutions; each names "a step", "none" (no step is wrong) or is
             "undecided"; where both name a step, b's is "earlier", the "same" or "later"
    """

    count: int
    both: int
    equal: int
    kappa: float | None
    table: dict[tuple[str, str], int]

    def __str__(self) -> str:
        kappa = "undefined" if self.kappa is None else f"{self.kappa:.3f}"
        lines = [
            f"{'solutions':<24}{self.count:>6}",
            f"{'decided by both':<24}{_share(self.both, self.count)}",
            f"{'equal, of these':<24}{_share(self.equal, self.both)}",
            f"{'Cohen kappa':<24}{kappa:>14}",
            "",
            f"{'a, down; b, across':<20}" + "".join(f"{name:>11}" for name in COLUMNS),
            *(f"{row:<20}" + "".join(f"{self.table.get((row, name), ''):>11}" for name in COLUMNS) for row in ROWS),
        ]
        return "\n".join(lines)


def agreement(a: Sequence[Place], b: Sequence[Place]) -> Agreement:
    """How far two locators agree. Raises StepDPOError where they differ in length."""
    _check(a, b, "locations of a", "locations of b")
    table = dict.fromkeys(CELLS, 0)
    for x, y in zip(a, b, strict=True):
        table[_kind(x), _order(x, y) if x and y else _kind(y)] += 1
    both = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    equal = sum(x == y for x, y in both)
    of_a, of_b = Counter(x for x, _ in both), Counter(y for _, y in both)
    by_chance = sum(of_a[place] * of_b[place] for place in of_a)  # times len(both)^2
    square = len(both) ** 2
    kappa = None if by_chance == square else (equal * len(both) - by_chance) / (square - by_chance)
    return Agreement(len(a), len(both), equal, kappa, table)


def _kind(place: Place) -> str:
    return "undecided" if place is None else "a step" if place else "none"


def _order(a: int, b: Place) -> str:
    """Where b lies, seen from a. That no step is wrong comes after every step."""
    if b is None:
        return "undecided"
    if a == b:
        return "same"
    return "earlier" if b and (not a or b < a) else "later"


def _check(a: Sequence[object], b: Sequence[object], *names: str) -> None:
    if len(a) != len(b):
        raise StepDPOError(f"there are {len(a)} {names[0]} and {len(b)} {names[1]}; each solution has one of both")


def _share(number: int, of: int) -> str:
    return f"{number:>6}" + (f"{100 * number / of:>7.1f}%" if of else f"{'':>8}")
