"""The report of a folder of results: README.md beside the CSV files, and nothing in it that is not in them."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.registry import workloads
from benchmarks.rows import Row, read

INTRODUCTION = """Written by `python -m benchmarks`; `benchmarks/README.md` says how it measures and how to read this.
Times are medians over rounds that went over all providers in turn, 20th and 80th percentile in brackets; ratios are
taken round by round. Below 1 is faster, or smaller, than what it is held against. **Ours** are bold, *floors*, what
nobody who does the work can be expected to beat, in italics. Where a configuration says `alone`, its providers would
not fit into memory together and came one after the other."""
NO_PLOTS = "Without plots: matplotlib is missing. `python -m benchmarks plot FOLDER` draws them where it is installed."
OURS = "ours"  # the provider that is what users get; the other ones of ours are told apart from it


def write_report(folder: Path) -> Path:
    """Writes folder/README.md and folder/plots; returns the former's path."""
    order = [workload.name for workload in workloads()]
    rows = sorted(read(folder), key=lambda row: order.index(row.workload) if row.workload in order else len(order))
    plots = drawn(folder)
    environment = folder / "environment.json"
    told = json.loads(environment.read_text()) if environment.exists() else {}
    parts = [
        f"# {told.get('device') or rows[0].device}",
        INTRODUCTION,
        *([] if plots else [NO_PLOTS]),
        *tests_on_the_device(folder),
        *in_short(rows),
        *beside_each_peer(rows),
        *losses(rows),
        *absent(rows),
        *(part for name, own in by_workload(rows).items() for part in section(name, own, plots)),
        *machine(told, rows),
    ]
    path = folder / "README.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def drawn(folder: Path) -> set[str]:
    """The names of folder/plots, drawn anew; none without matplotlib."""
    try:
        from benchmarks.plots import plot_all
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return set()
    return {path.stem for path in plot_all(folder)}


def by_workload(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.workload].append(row)
    return found


def table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    body = [" | ".join(line) for line in lines]
    rule = "|".join("---" for _ in headings)
    return "\n".join(f"| {line} |" for line in (" | ".join(headings), rule, *body)).replace(f"| {rule} |", f"|{rule}|")


def geometric(values: Sequence[float]) -> float:
    return math.exp(fmean(map(math.log, values)))


def span(values: Sequence[float], cases: int) -> str:
    """Geometric mean and range, and of how many cases where that is not all of them; empty without values."""
    if not values:
        return ""
    told = f"{geometric(values):.2f}"
    told += f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return told if len(values) == cases else f"{told} in {len(values)}"


def in_short(rows: Sequence[Row]) -> list[str]:
    """`ours` beside the floor and the best peer of each case; memory beside that peer's."""
    lines = []
    for name, own in by_workload(rows).items():
        for mode in dict.fromkeys(row.mode for row in own):
            ratios = {
                metric: [r.median for r in own if r.provider == OURS and r.metric == metric and r.mode == mode]
                for metric in ("of_floor", "of_best_peer")
            }
            if ratios["of_floor"] or ratios["of_best_peer"]:
                cases = max(map(len, ratios.values()))
                smaller = memory_ratios([row for row in own if row.mode == mode])
                cells = [span(values, cases) for values in (*ratios.values(), smaller)]
                lines.append((name, mode, str(cases), *cells))
    headings = ("workload", "mode", "cases", "time of the floor's", "time of the best peer's", "memory of that peer's")
    note = "`ours` as it comes, geometric mean over the cases and their range."
    return ["## In short", note, table(headings, lines)] if lines else []


def beside_each_peer(rows: Sequence[Row]) -> list[str]:
    """Of `ours` to every peer: time, round by round, and memory, over the cases that both have."""
    lines = []
    for name, own in by_workload(rows).items():
        figures = {(r.mode, r.case, r.provider, r.metric): r for r in own if r.values}
        for mode in dict.fromkeys(row.mode for row in own):
            cases = dict.fromkeys(case for m, case, *_ in figures if m == mode)
            for peer in dict.fromkeys(row.provider for row in own if row.role == "peer"):
                ratios: dict[str, list[float]] = {"seconds": [], "extra_bytes": []}
                mine = like(peer, own)
                for case in cases:
                    for metric, found in ratios.items():
                        pair = [figures.get((mode, case, provider, metric)) for provider in (mine, peer)]
                        if pair[0] and pair[1] and min(pair[0].median, pair[1].median) > 0:
                            found.append(by_rounds(pair[0], pair[1]))
                if ratios["seconds"]:
                    count = len(ratios["seconds"])
                    cells = [span(values, count) for values in ratios.values()]
                    lines.append((name, mode, mine, peer, str(count), *cells))
    headings = ("workload", "mode", "of ours", "peer", "cases", "time of that peer's", "memory of that peer's")
    return ["## Ours beside each peer", table(headings, lines)] if lines else []


def like(peer: str, rows: Sequence[Row]) -> str:
    """The provider of ours that computes the same as a peer; `ours`, which then does more, where none does."""
    kernels = {row.provider: row.kernel for row in rows}
    same = [row.provider for row in rows if row.role == "ours" and row.kernel == kernels[peer]]
    return OURS if OURS in same or not same else same[0]


def memory_ratios(rows: Sequence[Row]) -> list[float]:
    """Of `ours` to the fastest peer, for each case where both are known."""
    peers = {r.case: r.note.removeprefix("of ") for r in rows if r.provider == OURS and r.metric == "of_best_peer"}
    memory = {(r.case, r.provider): r.median for r in rows if r.metric == "extra_bytes" and r.values}
    found = [(memory.get((case, OURS)), memory.get((case, peer))) for case, peer in peers.items()]
    return [a / b for a, b in found if a and b and a > 0 and b > 0]


def losses(rows: Sequence[Row]) -> list[str]:
    """Where a peer was faster than ours by the median, or took less memory, or where ours has no figure.

    Peers of one kernel are held against the provider of ours that computes the same; the worst of them is told.
    """
    lines, compared = [], set()
    for name, own in by_workload(rows).items():
        mine = {row.provider: like(row.provider, own) for row in own if row.role == "peer"}
        for row in own:
            if row.provider in {OURS, *mine.values()} and row.metric == "seconds" and row.status != "ok":
                why = plain(f"{row.status}: {row.note}")
                lines.append((name, row.mode, place(row), row.provider, "no figure", "", why))
        figures = {(row.case, row.provider, row.metric): row for row in own if row.values}
        beside: dict[tuple[Any, str, str], list[tuple[Row, Row]]] = defaultdict(list)
        for (case, peer, metric), its in figures.items():
            ours = figures.get((case, mine.get(peer, ""), metric))
            if ours and metric in ("seconds", "extra_bytes"):
                beside[case, its.kernel, metric].append((ours, its))
        for (case, kernel, metric), pairs in beside.items():
            compared.add(case)
            ours, its, factor = worst(pairs)
            if factor > 1:
                what = its.provider if kernel == ours.kernel else f"{its.provider} ({kernel})"
                told = f"{factor:.2f}" if math.isfinite(factor) else f"{ours.median / 2**20:,.1f} MiB beside none"
                where = "time" if metric == "seconds" else "memory"
                lines.append((name, ours.mode, place(ours), ours.provider, where, what, told))
    told = f"Ours stands beside peers in {len(compared)} cases. "
    if not lines:
        none = "In none of them a peer was faster by the median, or took less memory."
        return ["## Where ours loses", told + none] if compared else []
    headings = ("workload", "mode", "case", "of ours", "in", "better peer", "of that peer's")
    told += (
        "Here a peer was faster by the median, or took less memory; one with a kernel in brackets\ncomputes only that:"
    )
    return ["## Where ours loses", told, table(headings, lines)]


def worst(pairs: Iterable[tuple[Row, Row]]) -> tuple[Row, Row, float]:
    """Of (ours, a peer's): the pair in which ours is the largest multiple, and that.

    Memory of none or less, which is the noise of resident sets, counts as none: infinitely less than any.
    """
    found = []
    for ours, peer in pairs:
        if ours.metric == "seconds":
            factor = by_rounds(ours, peer)
        elif peer.median > 0:
            factor = ours.median / peer.median
        else:
            factor = math.inf if ours.median > 0 else 1.0
        found.append((ours, peer, factor))
    return max(found, key=lambda item: item[2])


def by_rounds(ours: Row, peer: Row) -> float:
    return median(a / b for a, b in zip(ours.values, peer.values, strict=False))


def place(row: Row) -> str:
    return f"{row.x_name} {row.x:,.0f}, {row.told}"


def plain(text: str) -> str:
    """Others' text, such as errors, as Markdown that shows it as it is, on one line."""
    return re.sub(r"([\\`*\[<|]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", " ".join(text.split()))


def absent(rows: Sequence[Row]) -> list[str]:
    """Who has no figures, and why: once for each reason."""
    why: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for row in rows:
        if row.metric == "seconds" and row.status != "ok":
            why[row.provider, row.status, row.note].append(row.workload)
    lines = [
        (provider, status, plain(note), f"{len(names)} of {', '.join(dict.fromkeys(names))}")
        for (provider, status, note), names in why.items()
    ]
    return ["## Who has no figures", table(("provider", "status", "why", "cases"), lines)] if lines else []


def tests_on_the_device(folder: Path) -> list[str]:
    """What the tests marked gpu said, where `gpu` ran them."""
    path = folder / "gpu-tests.json"
    if not path.exists():
        return []
    told = json.loads(path.read_text())
    failed = [f"- failed: `{name}`" for name in told["failed"]]
    return ["## Tests marked gpu", f"{plain(told['summary'])} ({told['seconds']:.0f} s).", *failed]


def section(name: str, rows: Sequence[Row], plots: set[str]) -> list[str]:
    """A workload's plots and tables, a pair for each configuration."""
    workload = next((w for w in workloads() if w.name == name), None)
    parts = [f"## {workload.title if workload else name}", f"`{name}`, kernel `{rows[0].kernel}`."]
    panels: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        panels[row.panel].append(row)
    for own in panels.values():
        parts.append(f"### {own[0].mode}: {own[0].told}")
        if own[0].stem in plots:
            parts.append(f"![{name}](plots/{own[0].stem}.svg)")
        parts.append(figures(own))
    if workload:
        shown = {row.provider for row in rows}
        parts.append("\n".join(f"- `{p.name}`: {p.what}" for p in workload.providers if p.name in shown))
    return parts


def figures(rows: Sequence[Row]) -> str:
    by_case: dict[float, dict[str, dict[str, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        by_case[row.x][row.provider][row.metric] = row
    counted = [m for m in ("tokens", "of_unique") if any(row.metric == m for row in rows)]
    x_name = rows[0].x_name.replace("_", " ")
    headings = (
        x_name,
        "provider",
        "ms",
        "of the floor",
        "of the best peer",
        "first call, s",
        "extra, MiB",
        "largest error",
    )
    lines = []
    for x, providers in sorted(by_case.items()):
        ran = [(name, own) for name, own in providers.items() if own.get("seconds") and own["seconds"].values]
        for name, own in sorted(ran, key=lambda item: item[1]["seconds"].median):
            seconds = own["seconds"]
            spread = f" ({number(1e3 * seconds.p20)} to {number(1e3 * seconds.p80)})" if len(seconds.values) > 1 else ""
            errors = [row for row in own.values() if row.metric.startswith("error")]
            lines.append(
                (
                    f"{x:,.0f}",
                    {"ours": f"**{name}**", "floor": f"*{name}*", "peer": name}[seconds.role],
                    f"{number(1e3 * seconds.median)}{spread}",
                    *(f"{own[m].median:.2f}" if m in own else "" for m in ("of_floor", "of_best_peer")),
                    f"{own['first_call_seconds'].median:.1f}" if "first_call_seconds" in own else "",
                    f"{own['extra_bytes'].median / 2**20:,.0f}" if "extra_bytes" in own else "",
                    largest(errors),
                    *(number(own[m].median) if m in own else "" for m in counted),
                )
            )
    return table((*headings, *(m.replace("_", " ") for m in counted)), lines)


def largest(errors: Sequence[Row]) -> str:
    """The largest of a provider's errors, and what it is of."""
    if not errors:
        return ""
    worst = max(errors, key=lambda row: row.median)
    return f"{worst.median:.0e} {worst.metric.removeprefix('error').strip('_').replace('_', ' ')}".strip()


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def machine(told: dict[str, Any], rows: Sequence[Row]) -> list[str]:
    lines = []
    for key, value in told.items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        lines.append(f"- {key.replace('_', ' ')}: {', '.join(value) if isinstance(value, list) else shown}")
    commits = ", ".join(sorted({row.commit for row in rows}))
    return ["## Machine and versions", "\n".join([*lines, f"- commits of the rows: {commits}"])]
