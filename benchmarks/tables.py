"""What a run prints: a table for each case, and for each workload's errors.

Notes and configurations are others' text, which may have brackets: as Text, they are not taken for rich's markup.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.registry import Workload
from benchmarks.rows import Row

OURS = "ours"  # what users get who ask for nothing


def print_case(rows: list[Row], console: Console) -> None:
    """The fastest first, who did not run last."""
    first = rows[0]
    by_provider: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_provider.setdefault(row.provider, {})[row.metric] = row
    title = Text(f"{first.x_name} {first.x:,.0f}, {first.mode}, {first.told}", style="table.title")
    table = Table(title=title, title_justify="left")
    table.add_column("provider", no_wrap=True)
    for heading in ("ms", "p20", "p80", "x floor", "x best peer", "first call s", "extra MiB", "beside results"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("error", justify="right")
    table.add_column("note", ratio=1)
    for name, own in sorted(by_provider.items(), key=lambda item: _seconds(item[1])):
        seconds = own["seconds"]
        if seconds.status != "ok":
            table.add_row(name, *[""] * 9, Text(f"{seconds.status}: {seconds.note}"), style="dim")
            continue
        times = (seconds.median, seconds.p20, seconds.p80)
        ratios = (f"{own[m].median:.2f}" if m in own else "" for m in ("of_floor", "of_best_peer"))
        first_call = f"{own['first_call_seconds'].median:.1f}" if "first_call_seconds" in own else ""
        memory = (f"{own[m].median / 2**20:,.0f}" if m in own else "" for m in ("extra_bytes", "beside_results_bytes"))
        errors = " ".join(f"{row.median:.0e}" for row in own.values() if row.metric.startswith("error"))
        style = {"ours": "bold", "floor": "dim"}.get(seconds.role)
        shown = [f"{1e3 * t:,.2f}" for t in times]
        table.add_row(name, *shown, *ratios, first_call, *memory, errors, Text(seconds.note), style=style)
    console.print(table)


def _seconds(own: dict[str, Row]) -> float:
    return own["seconds"].median if own["seconds"].values else float("inf")


def print_errors(
    workload: Workload, verified: dict[tuple[str, tuple[Any, ...]], dict[str, Any]], console: Console
) -> bool:
    """False where `ours` is not right, or another configuration of ours neither right nor absent nor refused.

    A peer's fault is told, and leaves it without figures.
    """
    table = Table("provider", "kind", "status", "errors relative to float64", title=workload.name, title_justify="left")
    right = True
    roles = {provider.name: provider.role for provider in workload.providers}
    for (name, kind), answer in verified.items():
        if roles[name] == "floor":
            continue
        status = answer["status"]
        may_be = ("ok",) if name == OURS else ("ok", "absent", "refused")
        right &= roles[name] != "ours" or status in may_be
        errors = ", ".join(f"{key} {error:.1e}" for key, error in answer.get("errors", {}).items())
        told = Text(errors if status == "ok" else answer.get("note", ""))
        style = None if status == "ok" else "yellow"
        table.add_row(name, Text(" ".join(map(str, kind))), status, told, style=style)
    console.print(table)
    return right
