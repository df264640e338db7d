"""`python -m benchmarks compare A B`: do two folders of results agree within their error bars?

Compared is B / A of times, over B / A of those who did not change: the floor, where there are several the one that
counted in A, and peers of the same versions, so that a slower hour of the machine does not count, and the noise of one
floor counts little. Other processes only ever add time, in bursts that hit one turn: of each provider the slowest third
of rounds is left out. Providers are averaged apart: a ratio round by round has the bursts of both, to either side, and
drift within a run costs less than that. Where round k is the same work in both runs it is held against round k, and the
quarter at either end is left out.

Intervals of 99% are Student's, of means whose tails are trimmed (Yuen, Welch), widened by what processes of one commit
differ by systematically (memory layout, clock). The cases of a workload are pooled too, which sees smaller changes.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, variance
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.rows import Row, read

METRIC = "of_floor"  # its note says which floor counted
SAME_ROUNDS = "training_step"  # the kernel whose round k is the same pairs in every run
LEAST_ROUNDS = 2
NO_WORKLOAD = "B has nothing of this workload"
MARGIN = 0.05  # of log B/A: a difference that two runs of one commit may have beyond the noise of rounds
MEMORY_MARGIN = 0.1, 32 * 2**20  # ratio and bytes, both to be exceeded
# Student's t at 99.5% by degrees of freedom
STUDENT = {1: 63.7, 2: 9.92, 3: 5.84, 4: 4.60, 5: 4.03, 6: 3.71, 7: 3.50, 8: 3.36, 10: 3.17, 15: 2.95, 30: 2.75}
STUDENT_LIMIT = 2.58


class Pair(NamedTuple):
    """Times of one provider on one case, (A, B), and of those who did not change."""

    own: tuple[Row, Row]
    others: list[tuple[Row, Row]]


class Mean(NamedTuple):
    """With its variance, and the degrees of freedom that this was estimated from."""

    value: float
    error: float
    degrees: int

    def shared(self, by: int) -> Mean:
        return Mean(self.value / by, self.error / by**2, self.degrees)


@dataclass(frozen=True)
class Ratio:
    """B / A of times, over that of those who did not change, with an interval."""

    of: str
    provider: str
    role: str
    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        if self.low > 1:
            return "slower"
        return "faster" if self.high < 1 else "agree"

    @property
    def sees(self) -> float:
        """The smallest ratio that, when it is found, is outside of the error bars."""
        return self.high / self.ratio


def student(degrees: float) -> float:
    """Linear in 1 / degrees between the entries, which is too large rather than too small."""
    entries = pairwise([*STUDENT.items(), (math.inf, STUDENT_LIMIT)])
    (n, t), (m, u) = next(ends for ends in entries if degrees <= ends[1][0])
    return t + (u - t) * (1 / n - 1 / degrees) / (1 / n - 1 / m)


def trimmed(values: Iterable[float], low: int, high: int) -> Mean:
    """Without so many of the lowest and highest values, which count in the variance as their neighbours (Yuen)."""
    ordered = sorted(values)
    kept = ordered[low : len(ordered) - high]
    winsorised = [kept[0]] * low + kept + [kept[-1]] * high
    return Mean(fmean(kept), (len(ordered) - 1) * variance(winsorised) / (len(kept) * (len(kept) - 1)), len(kept) - 1)


def change(a: Row, b: Row) -> list[Mean]:
    """Means whose sum is log B / A, with errors that are independent."""
    x, y = ([math.log(v) for v in row.values] for row in (a, b))
    if a.kernel == SAME_ROUNDS:
        differences = [w - v for v, w in zip(x, y, strict=False)]
        tail = part(differences, 4)  # a burst in A looks like a gain in B
        return [trimmed(differences, tail, tail)]
    return [trimmed(y, 0, part(y, 3)), trimmed([-v for v in x], part(x, 3), 0)]


def part(values: Sequence[float], of: int) -> int:
    """How many of them one part in `of` is; none where too few are left to tell a spread."""
    return len(values) // of if len(values) > 4 else 0


def ratio_of(of: str, pairs: Sequence[Pair]) -> Ratio:
    """B / A of the geometric mean over cases; at least two rounds of everything."""
    means = []
    for pair in pairs:
        means += change(*pair.own)
        for a, b in pair.others:
            means += [mean.shared(len(pair.others)) for mean in change(b, a)]
    middle = sum(mean.value for mean in means) / len(pairs)
    error = sum(mean.error for mean in means)
    degrees = error**2 / sum(mean.error**2 / mean.degrees for mean in means) if error else math.inf
    half = student(degrees) * math.sqrt(error) / len(pairs) + MARGIN
    own = pairs[0].own[0]
    return Ratio(of, own.provider, own.role, math.exp(middle), math.exp(middle - half), math.exp(middle + half))


def ratios(pairs: Iterable[Pair]) -> tuple[list[Ratio], list[Ratio]]:
    """(of each case, of each workload)."""
    groups = defaultdict(list)
    for pair in pairs:
        groups[pair.own[0].workload, pair.own[0].provider].append(pair)
    cases = [ratio_of(_case(pair.own[0]), [pair]) for group in groups.values() for pair in group]
    pooled = [ratio_of(f"{name}, {len(group)} cases", group) for (name, _), group in groups.items()]
    return cases, pooled


def match(a: Iterable[Row], b: Iterable[Row]) -> tuple[list[Pair], list[tuple[Row, str]]]:
    """(what can be compared, rows of times in A that cannot and why), floors aside."""
    a = list(a)
    of_a, of_b = ({(row.case, row.provider): row for row in rows if row.metric == "seconds"} for rows in (a, b))
    floors = {row.case: row.note.removeprefix("of ") for row in a if row.metric == METRIC}
    workloads = {row.workload for row in of_b.values()}
    measured = defaultdict(list)
    for (case, provider), row in of_a.items():
        other = of_b.get((case, provider))
        if other and min(len(row.values), len(other.values)) >= LEAST_ROUNDS:
            measured[case].append((row, other))
    pairs, skipped = [], []
    for (case, provider), row in of_a.items():
        if row.role == "floor":
            continue
        other, floor = of_b.get((case, provider)), floors.get(case, "")
        others = [
            (x, y)
            for x, y in measured[case]
            if x.provider == floor or (x.role == "peer" and x.provider != provider and x.versions == y.versions)
        ]
        if not row.values:
            skipped.append((row, f"{row.status} in A"))
        elif row.workload not in workloads:
            skipped.append((row, NO_WORKLOAD))
        elif not other:
            skipped.append((row, "not in B"))
        elif not other.values:
            skipped.append((row, f"{other.status} in B: {other.note}"))
        elif (row, other) not in measured[case]:
            skipped.append((row, f"fewer than {LEAST_ROUNDS} rounds"))
        elif not any(x.provider == floor for x, _ in others):
            skipped.append((row, f"floor {floor} has fewer than {LEAST_ROUNDS} rounds" if floor else "no floor in A"))
        else:
            pairs.append(Pair((row, other), others))
    return pairs, skipped


def told_of(skipped: Iterable[tuple[Row, str]]) -> Iterator[str]:
    """A line for each case, but one alone for a workload that B has not, and for what had no times in A already."""
    short: Counter[str] = Counter()
    for row, why in skipped:
        if not row.values:
            short[why] += 1
        elif why == NO_WORKLOAD:
            short[f"{row.workload}: {why}"] += 1
        else:
            yield f"{row.provider}, {_case(row)}: {why}"
    for why, count in short.items():
        yield f"{why}: {count} cases and providers"


def lost(a: Iterable[Row], b: Iterable[Row]) -> list[str]:
    """Cases of ours that have times in A and in B another status than ok; what B has not tried is not lost."""
    had = {(row.case, row.provider) for row in a if row.metric == "seconds" and row.role == "ours" and row.values}
    return [
        f"{row.provider}, {_case(row)}: {row.status} in B: {row.note}"
        for row in b
        if row.metric == "seconds" and row.status not in ("ok", "not run") and (row.case, row.provider) in had
    ]


def _case(row: Row) -> str:
    shown = [str(row.configuration[key]) for key in ("head", "model", "dtype", "inputs") if key in row.configuration]
    return ", ".join([row.workload, row.mode, f"{row.x_name} {row.x:g}", *([" ".join(shown)] if shown else [])])


def memory(a: Iterable[Row], b: Iterable[Row]) -> list[str]:
    """Cases in which B takes plainly more memory."""
    metric = "extra_bytes"
    own = {(row.case, row.provider): row.median for row in a if row.metric == metric and row.values}
    told = []
    for row in b:
        before = own.get((row.case, row.provider)) if row.metric == metric and row.values else None
        share, least = MEMORY_MARGIN
        if before is not None and row.role == "ours" and row.median - before > max(least, share * before):
            told.append(
                f"{row.provider}, {row.workload}, {row.mode}, {row.x_name} {row.x:g}: "
                f"{before / 2**20:,.0f} -> {row.median / 2**20:,.0f} MiB"
            )
    return told


def compare(folder_a: Path, folder_b: Path, show_all: bool = False) -> bool:
    """Prints where they differ; False where ours is slower or larger in B, or has no figure any more.

    Raises SystemExit where nothing was measured in both.
    """
    a, b = read(folder_a), read(folder_b)
    pairs, skipped = match(a, b)
    cases, pooled = ratios(pairs)
    gone = lost(a, b)
    console = Console(width=160)
    for name in ("device", "commit"):
        of_a, of_b = (" and ".join(sorted({getattr(row, name) for row in rows})) for rows in (a, b))
        console.print(f"{name}: {of_a}" if of_a == of_b else f"{name}: A {of_a}, B {of_b}")
    for told in told_of(skipped):
        if told not in gone:
            console.print(f"not compared: {told}", markup=False, soft_wrap=True)
    if skipped:
        console.print(f"not compared: {len(skipped)} of {len(skipped) + len(pairs)} cases and providers")
    if not pairs and not gone:
        raise SystemExit(f"{folder_a} and {folder_b} have no case in common that was measured in two rounds or more")
    for title, found, always in (
        ("B / A by workload", pooled, True),
        ("B / A by case", cases, show_all),
    ):
        table = Table("provider", "of", "B / A", "99% interval", "sees", "verdict", title=title, title_justify="left")
        for r in found:
            if always or r.verdict != "agree":
                style = {"slower": "red", "faster": "green", "agree": None}[r.verdict]
                interval, sees = f"{r.low:.3f} to {r.high:.3f}", f"{r.sees:.2f}x"
                table.add_row(r.provider, r.of, f"{r.ratio:.3f}", interval, sees, r.verdict, style=style)
        if table.row_count:
            console.print(table)
        agree = sum(r.verdict == "agree" for r in found)
        console.print(f"{title}: {agree} of {len(found)} agree within their error bars")
    console.print("sees: the smallest slowdown that is told from none")
    larger = memory(a, b)
    for heading, cases_of in (("more memory", larger), ("no figure in B", gone)):
        for told in cases_of:
            console.print(f"{heading}: {told}", style="red", markup=False, soft_wrap=True)
    slower = [r for r in pooled + cases if r.verdict == "slower" and r.role == "ours"]
    if slower:
        console.print(f"[red]slower: {', '.join(dict.fromkeys(r.provider for r in slower))}[/red]")
    return not slower and not larger and not gone
