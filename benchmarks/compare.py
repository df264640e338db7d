"""`python -m benchmarks compare A B`: do two folders of results agree within their error bars?

Compared are ratios to the floor, taken round by round within each run, so that a slower hour of the machine does not
count; where there are several floors, to the one that counted in A. For each provider and case, B / A of their medians,
with an interval of 99%: Student's t on the logarithms of the rounds, widened by what processes of one commit differ by
systematically (memory layout, clock). The cases of a workload are pooled too, which sees smaller changes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median, variance

from rich.console import Console
from rich.table import Table

from benchmarks.rows import Row, read

Key = tuple[tuple[str, str, str, float], str]  # case and provider

METRIC = "of_floor"
MEDIAN_ERROR = 1.2533  # of a median's standard error to that of a mean, sqrt(pi / 2) for normal noise
MARGIN = 0.05  # of log B/A: a difference that two runs of one commit may have beyond the noise of rounds
MEMORY_MARGIN = 0.1, 32 * 2**20  # ratio and bytes, both to be exceeded
# Student's t at 99.5% by degrees of freedom; between entries the smaller number of them counts.
STUDENT = {1: 63.7, 2: 9.92, 3: 5.84, 4: 4.60, 5: 4.03, 6: 3.71, 7: 3.50, 8: 3.36, 10: 3.17, 15: 2.95, 30: 2.75}


@dataclass(frozen=True)
class Ratio:
    """B / A of one metric, with an interval."""

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


def student(degrees: int) -> float:
    """Of so many degrees of freedom, at least one."""
    return STUDENT[max(n for n in STUDENT if n <= degrees)]


def ratio_of(of: str, a: Sequence[Row], b: Sequence[Row]) -> Ratio:
    """B / A of the geometric mean over cases; rows of a and b belong together, and have at least two rounds each."""
    logs = [([math.log(v) for v in x.values], [math.log(v) for v in y.values]) for x, y in zip(a, b, strict=True)]
    middle = fmean(median(y) - median(x) for x, y in logs)
    errors = [variance(x) / len(x) + variance(y) / len(y) for x, y in logs]
    fewest = min(len(values) for pair in logs for values in pair)
    degrees = 2 * len(logs) * (fewest - 1)  # errors of runs and cases are independent
    half = student(degrees) * MEDIAN_ERROR * math.sqrt(sum(errors)) / len(logs) + MARGIN
    return Ratio(of, a[0].provider, a[0].role, math.exp(middle), math.exp(middle - half), math.exp(middle + half))


def ratios(a: Iterable[Row], b: Iterable[Row]) -> tuple[list[Ratio], list[Ratio]]:
    """(of each case, of each workload), of what was measured in both."""
    b = list(b)
    seconds = {(row.case, row.provider): row for row in b if row.metric == "seconds"}
    pairs = []
    for row in a:
        if row.metric == METRIC and row.role != "floor" and len(row.values) > 1:
            other = to_floor(row, seconds)
            if other and len(other.values) > 1:
                pairs.append((row, other))
    cases = [ratio_of(f"{x.workload}, {x.mode}, {x.x_name} {x.x:g}{_told(x)}", [x], [y]) for x, y in pairs]
    groups = defaultdict(list)
    for x, y in pairs:
        groups[x.workload, x.provider].append((x, y))
    pooled = [
        ratio_of(f"{name}, {len(group)} cases", [x for x, _ in group], [y for _, y in group])
        for (name, _), group in groups.items()
    ]
    return cases, pooled


def to_floor(row: Row, seconds: dict[Key, Row]) -> Row | None:
    """What `row` is in another run, whose times these are: ratios to the same floor; None where it has no times."""
    own, floor = (seconds.get((row.case, name)) for name in (row.provider, row.note.removeprefix("of ")))
    if not own or not floor:
        return None
    return replace(own, metric=METRIC, values=tuple(x / y for x, y in zip(own.values, floor.values, strict=False)))


def lost(a: Iterable[Row], b: Iterable[Row]) -> list[str]:
    """Cases of ours that have times in A and in B another status than ok; what B has not tried is not lost."""
    had = {(row.case, row.provider) for row in a if row.metric == "seconds" and row.role == "ours" and row.values}
    return [
        f"{row.provider}, {row.workload}, {row.mode}, {row.x_name} {row.x:g}{_told(row)}: {row.status}: {row.note}"
        for row in b
        if row.metric == "seconds" and row.status not in ("ok", "not run") and (row.case, row.provider) in had
    ]


def _told(row: Row) -> str:
    shown = [str(row.configuration[key]) for key in ("head", "model", "dtype", "inputs") if key in row.configuration]
    return f", {' '.join(shown)}" if shown else ""


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
    cases, pooled = ratios(a, b)
    gone = lost(a, b)
    if not cases and not gone:
        raise SystemExit(f"{folder_a} and {folder_b} have no case in common that was measured in two rounds or more")
    console = Console(width=160)
    for name in ("device", "commit"):
        of_a, of_b = (" and ".join(sorted({getattr(row, name) for row in rows})) for rows in (a, b))
        console.print(f"{name}: {of_a}" if of_a == of_b else f"{name}: A {of_a}, B {of_b}")
    for title, found in ((f"B / A by workload, {METRIC}", pooled), (f"B / A by case, {METRIC}", cases)):
        table = Table("provider", "of", "B / A", "99% interval", "verdict", title=title, title_justify="left")
        for r in found:
            if show_all or r.verdict != "agree":
                style = {"slower": "red", "faster": "green", "agree": None}[r.verdict]
                table.add_row(
                    r.provider, r.of, f"{r.ratio:.3f}", f"{r.low:.3f} to {r.high:.3f}", r.verdict, style=style
                )
        if table.row_count:
            console.print(table)
        agree = sum(r.verdict == "agree" for r in found)
        console.print(f"{title}: {agree} of {len(found)} agree within their error bars")
    larger = memory(a, b)
    for heading, cases_of in (("more memory", larger), ("no figure in B", gone)):
        for told in cases_of:
            console.print(f"{heading}: {told}", style="red", markup=False)
    slower = [r for r in pooled + cases if r.verdict == "slower" and r.role == "ours"]
    if slower:
        console.print(f"[red]slower: {', '.join(dict.fromkeys(r.provider for r in slower))}[/red]")
    return not slower and not larger and not gone
