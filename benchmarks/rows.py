"""A figure is a row: what was measured, of whom, where, and its value in every round. CSV in, CSV out."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Any

SUFFIX = ".csv"  # a folder of results has one file a suite
UNTOLD = ("threads",)  # of a configuration: the same in all of a run


@dataclass(frozen=True)
class Row:
    """One metric of one provider on one case.

    workload, kernel:  what was measured, and what it computes
    provider, role:    whose figure it is: ours, peer or floor
    mode:              which part of the kernel, such as "full" and "frozen"
    metric, unit:      "seconds" in "s", "extra_bytes" in "B", "of_floor" in "x"
    x_name, x:         what varies over the workload, and its value here
    values:            the metric in each round; empty where `status` is not ok
    configuration:     everything else about the case
    status, note:      "ok"; or why there is no figure: absent, refused, wrong, failed, timed out, out of memory,
                       not run
    device, versions, commit
    """

    workload: str
    kernel: str
    provider: str
    role: str
    mode: str
    metric: str
    unit: str
    x_name: str
    x: float
    values: tuple[float, ...]
    configuration: dict[str, Any] = field(default_factory=dict)
    status: str = "ok"
    note: str = ""
    device: str = ""
    versions: str = ""
    commit: str = ""

    @property
    def median(self) -> float:
        return median(self.values)

    @property
    def p20(self) -> float:
        return quantile(self.values, 0.2)

    @property
    def p80(self) -> float:
        return quantile(self.values, 0.8)

    @property
    def panel(self) -> tuple[str, str, str]:
        """What rows of one line in a plot have in common: (workload, mode, configuration)."""
        return self.workload, self.mode, json.dumps(self.configuration, sort_keys=True)

    @property
    def case(self) -> tuple[str, str, str, float]:
        """(workload, mode, configuration, x): rows that were measured in turn."""
        return *self.panel, self.x

    @property
    def told(self) -> str:
        """The configuration, for readers."""
        return ", ".join(f"{key} {value}" for key, value in self.configuration.items() if key not in UNTOLD)

    @property
    def stem(self) -> str:
        """The name of the file that its panel is drawn to."""
        shown = [str(value) for key, value in sorted(self.configuration.items()) if key not in UNTOLD]
        return re.sub(r"[^A-Za-z0-9.]+", "-", "-".join([self.workload, self.mode, *shown])).strip("-")


COLUMNS = [f.name for f in fields(Row)]
COLUMNS[COLUMNS.index("values") : COLUMNS.index("values")] = ["p20", "p50", "p80"]


def quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between the sorted values, q in [0, 1]."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def write(path: Path, rows: Iterable[Row]) -> None:
    """Replaces the file only when all of it is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([_cell(row, column) for column in COLUMNS] for row in rows)
    partial.replace(path)


def _cell(row: Row, column: str) -> str:
    if column in ("p20", "p50", "p80"):
        value = getattr(row, "median" if column == "p50" else column) if row.values else None
        return "" if value is None else f"{value:.6g}"
    value = getattr(row, column)
    if column == "values":
        return " ".join(f"{v:.6g}" for v in value)
    if column == "configuration":
        return json.dumps(value, sort_keys=True)
    return f"{value:g}" if isinstance(value, float) else str(value)


def read(path: Path) -> list[Row]:
    """Of a file, or of all files of a folder of results. Raises SystemExit, naming file, line and column."""
    files = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]
    if not files or not all(file.exists() for file in files):
        raise SystemExit(f"{path}: no results; a folder of results has files such as head{SUFFIX}")
    return [row for file in files for row in _read(file)]


def _read(path: Path) -> list[Row]:
    rows = []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = set(COLUMNS) - set(reader.fieldnames or ())
        if missing:
            raise SystemExit(f"{path}: columns {', '.join(sorted(missing))} are missing")
        for cells in reader:
            taken: dict[str, Any] = {f.name: cells[f.name] for f in fields(Row)}
            for column, convert in (("x", float), ("values", _numbers), ("configuration", json.loads)):
                try:
                    taken[column] = convert(taken[column])
                except (TypeError, ValueError):
                    raise SystemExit(f"{path}, line {reader.line_num}: {column} is {taken[column]!r}") from None
            rows.append(Row(**taken))
    return rows


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(word) for word in text.split())
