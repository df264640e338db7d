"""The report of a folder of results: README.md beside the CSV files, and nothing in it that is not in them."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.plots import UNTOLD, plot_all, slug
from benchmarks.registry import workloads
from benchmarks.rows import Row, read

INTRODUCTION = """Written by `python -m benchmarks`; `benchmarks/README.md` says how it measures and how to read this.
Times are medians over rounds that went over all providers in turn, 20th and 80th percentile in brackets; ratios are
taken round by round. Below 1 is faster, or smaller, than what it is held against. Where a configuration says `alone`,
its providers would not fit into memory together and came one after the other."""
OURS = "ours"  # the provider that is what users get; the other ones of ours are told apart from it


def write_report(folder: Path) -> Path:
    """Writes folder/README.md and folder/plots; returns the former's path."""
    order = [workload.name for workload in workloads()]
    rows = sorted(read(folder), key=lambda row: order.index(row.workload) if row.workload in order else len(order))
    plots = {path.stem for path in plot_all(folder)}
    environment = folder / "environment.json"
    told = json.loads(environment.read_text()) if environment.exists() else {}
    parts = [
        f"# {told.get('device') or rows[0].device}",
        INTRODUCTION,
        *in_short(rows),
        *beside_each_peer(rows),
        *losses(rows),
        *absent(rows),
        *tests_on_the_device(folder),
        *(part for name, own in by_workload(rows).items() for part in section(name, own, plots)),
        *machine(told, rows),
    ]
    path = folder / "README.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


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


def span(values: Sequence[float]) -> str:
    """Geometric mean and range."""
    mean = f"{geometric(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f} to {max(values):.2f})"


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
                cells = [span(values) if values else "" for values in (*ratios.values(), smaller)]
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
                            rounds = zip(pair[0].values, pair[1].values, strict=False)
                            found.append(median(a / b for a, b in rounds))
                if ratios["seconds"]:
                    cells = [span(values) if values else "" for values in ratios.values()]
                    lines.append((name, mode, mine, peer, str(len(ratios["seconds"])), *cells))
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
    """Where a peer is faster than `ours` by the median, or takes less memory, or where `ours` has no figure."""
    lines, compared = [], 0
    for row in rows:
        if row.provider != OURS:
            continue
        case = f"{row.x_name} {row.x:,.0f}, {configuration(row)}"
        if row.metric == "seconds" and row.status != "ok":
            lines.append((row.workload, row.mode, case, "no figure", "", f"{row.status}: {row.note}"))
        elif row.metric == "of_best_peer":
            compared += 1
            if row.median > 1:
                lines.append((row.workload, row.mode, case, "time", row.note.removeprefix("of "), ratio(row)))
            lean, bytes_of = leanest(row, rows)
            if lean and bytes_of > 1:
                lines.append((row.workload, row.mode, case, "memory", lean, f"{bytes_of:.2f}"))
    told = f"`ours` stands beside peers in {compared} cases. "
    if not lines:
        if not compared:
            return []
        return ["## Where ours loses", told + "In none of them a peer was faster by the median, or took less memory."]
    headings = ("workload", "mode", "case", "in", "better peer", "of that peer's")
    return [
        "## Where ours loses",
        told + "Here a peer was faster by the median, or took less memory:",
        table(headings, lines),
    ]


def leanest(of: Row, rows: Sequence[Row]) -> tuple[str, float]:
    """(the peer of the same kernel and case that takes least memory, memory of `ours` over its own); ("", 0) if none"""
    memory = {
        row.provider: row
        for row in rows
        if row.metric == "extra_bytes" and row.case == of.case and row.values and row.kernel == of.kernel
    }
    peers = [row for row in memory.values() if row.role == "peer" and row.median > 0]
    if OURS not in memory or not peers:
        return "", 0.0
    least = min(peers, key=lambda row: row.median)
    return least.provider, memory[OURS].median / least.median


def absent(rows: Sequence[Row]) -> list[str]:
    """Who has no figures, and why: once for each reason."""
    why: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for row in rows:
        if row.metric == "seconds" and row.status != "ok":
            why[row.provider, row.status, row.note].append(row.workload)
    lines = [
        (provider, status, note.replace("|", "\\|"), f"{len(names)} of {', '.join(dict.fromkeys(names))}")
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
    return ["## Tests marked gpu", f"{told['summary']} ({told['seconds']:.0f} s).", *failed]


def configuration(row: Row) -> str:
    return ", ".join(f"{key} {value}" for key, value in row.configuration.items() if key not in UNTOLD)


def ratio(row: Row) -> str:
    return f"{row.median:.2f}" + (f" ({row.p20:.2f} to {row.p80:.2f})" if len(row.values) > 1 else "")


def section(name: str, rows: Sequence[Row], plots: set[str]) -> list[str]:
    """A workload's plots and tables, a pair for each configuration."""
    workload = next((w for w in workloads() if w.name == name), None)
    parts = [f"## {workload.title if workload else name}", f"`{name}`, kernel `{rows[0].kernel}`."]
    panels: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        panels[row.panel].append(row)
    for panel, own in panels.items():
        parts.append(f"### {own[0].mode}: {configuration(own[0])}")
        if slug(panel) in plots:
            parts.append(f"![{name}](plots/{slug(panel)}.svg)")
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
    headings = (x_name, "provider", "ms", "of the floor", "of the best peer", "first call, s", "extra, MiB", "errors")
    lines = []
    for x, providers in sorted(by_case.items()):
        ran = [(name, own) for name, own in providers.items() if own.get("seconds") and own["seconds"].values]
        for name, own in sorted(ran, key=lambda item: item[1]["seconds"].median):
            seconds = own["seconds"]
            spread = f" ({1e3 * seconds.p20:,.4g} to {1e3 * seconds.p80:,.4g})" if len(seconds.values) > 1 else ""
            lines.append(
                (
                    f"{x:,.0f}",
                    f"**{name}**" if seconds.role == "ours" else name,
                    f"{1e3 * seconds.median:,.4g}{spread}",
                    *(f"{own[m].median:.2f}" if m in own else "" for m in ("of_floor", "of_best_peer")),
                    f"{own['first_call_seconds'].median:.1f}" if "first_call_seconds" in own else "",
                    f"{own['extra_bytes'].median / 2**20:,.0f}" if "extra_bytes" in own else "",
                    " ".join(f"{row.median:.0e}" for row in own.values() if row.metric.startswith("error")),
                    *(f"{own[m].median:,.4g}" if m in own else "" for m in counted),
                )
            )
    return table((*headings, *(m.replace("_", " ") for m in counted)), lines)


def machine(told: dict[str, Any], rows: Sequence[Row]) -> list[str]:
    lines = []
    for key, value in told.items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        lines.append(f"- {key.replace('_', ' ')}: {', '.join(value) if isinstance(value, list) else shown}")
    commits = ", ".join(sorted({row.commit for row in rows}))
    return ["## Machine and versions", "\n".join([*lines, f"- commits of the rows: {commits}"])]
