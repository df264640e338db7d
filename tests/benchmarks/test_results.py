"""Rows, their comparison, plots and reports: from CSV, and from nothing else."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks import compare, report, rows
from benchmarks.rows import Row

pytest.importorskip("matplotlib")
from benchmarks import plots

ROUNDS = 7


def row(provider: str = "ours", metric: str = "seconds", values: Sequence[float] = (1.0, 1.2, 1.1), **more: Any) -> Row:
    role = "floor" if provider == "products" else "ours" if provider.startswith("ours") else "peer"
    usual: dict[str, Any] = {
        "workload": "head-rows",
        "kernel": "linear_logprob",
        "provider": provider,
        "role": role,
        "mode": "full",
        "metric": metric,
        "unit": "s",
        "x_name": "rows",
        "x": 128.0,
        "values": tuple(values),
        "configuration": {"dtype": "float32", "hidden": 32, "vocab": 1500, "threads": 2},
        "device": "a processor",
        "versions": "torch 2.13",
        "commit": "abc",
    }
    return Row(**usual | more)


def run(seed: int, slower: float = 1.0, noise: float = 0.03, drift: float = 1.0) -> list[Row]:
    """A run of three providers on three cases; `slower` is of ours, `drift` of the whole machine."""
    draw, found = random.Random(seed), []
    for x in (128.0, 512.0, 2048.0):
        products = [drift * x * draw.lognormvariate(0, noise) for _ in range(ROUNDS)]
        for provider, factor in (("products", 1.0), ("ours", 1.1 * slower), ("eager", 2.0)):
            times = [factor * p * draw.lognormvariate(0, noise) for p in products]
            ratios = [a / b for a, b in zip(times, products, strict=True)]
            found.append(row(provider, values=times, x=x))
            found.append(row(provider, "of_floor", ratios, unit="x", x=x, note="of products"))
            found.append(row(provider, "extra_bytes", [x * factor * 2**20], unit="B", x=x))
            if provider != "products":
                found.append(row(provider, "of_best_peer", [r / 2 for r in ratios], unit="x", x=x, note="of eager"))
    return found


def test_rows_survive_being_written(tmp_path: Path) -> None:
    written = [row(), row("absent-peer", values=(), status="absent", note='no module "x", said\npython')]
    rows.write(tmp_path / "head.csv", written)
    assert rows.read(tmp_path) == written
    header = (tmp_path / "head.csv").read_text().splitlines()[0]
    assert header == ",".join(rows.COLUMNS)
    assert {"kernel", "provider", "mode", "metric", "x", "values", "device", "versions", "commit"} <= set(rows.COLUMNS)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("column", ["x", "values", "configuration"])
def test_a_broken_cell_is_named(tmp_path: Path, column: str) -> None:
    rows.write(tmp_path / "head.csv", [row()])
    cells = (tmp_path / "head.csv").read_text().splitlines()
    values = next(csv.reader(cells[1:]))
    values[rows.COLUMNS.index(column)] = "many{"
    with (tmp_path / "head.csv").open("w", newline="") as file:
        file.write(cells[0] + "\n")
        csv.writer(file).writerow(values)
    with pytest.raises(SystemExit, match=rf"head\.csv, line 2: {column} is 'many"):
        rows.read(tmp_path)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "head.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match=r"columns commit, configuration, .* are missing"):
        rows.read(tmp_path)
    with pytest.raises(SystemExit, match="no results"):
        rows.read(tmp_path / "nowhere")


@pytest.mark.parametrize("seed", range(20))
def test_runs_of_one_commit_agree(tmp_path: Path, seed: int) -> None:
    """Even where the machine was twice as slow all the time."""
    rows.write(tmp_path / "a" / "head.csv", run(seed))
    rows.write(tmp_path / "b" / "head.csv", run(1000 + seed, drift=2.0))
    assert compare.compare(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("seed", range(20))
def test_a_planted_slowdown_is_flagged(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    rows.write(tmp_path / "a" / "head.csv", run(seed))
    rows.write(tmp_path / "b" / "head.csv", run(1000 + seed, slower=1.3))
    with pytest.raises(SystemExit) as stopped:
        command.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert stopped.value.code == 1
    told = capsys.readouterr().out
    assert "slower: ours" in told
    assert "eager" not in told.split("99% interval")[1]


def test_intervals_hold_what_they_promise() -> None:
    """Without the margin for systematic differences, 99 of 100 intervals hold the true ratio; 400 are drawn."""
    held = 0
    for seed in range(400):
        draw = random.Random(seed)
        a, b = (row(metric="of_floor", values=[draw.lognormvariate(0, 0.1) for _ in range(5)]) for _ in range(2))
        found = compare.ratio_of("", [a], [b])
        held += found.low * 2.718281828**compare.MARGIN <= 1 <= found.high / 2.718281828**compare.MARGIN
    assert held >= 390


def test_more_memory_is_flagged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = run(1)
    after = [
        replace(r, values=tuple(2 * v for v in r.values)) if r.metric == "extra_bytes" and r.provider == "ours" else r
        for r in before
    ]
    rows.write(tmp_path / "a" / "head.csv", before)
    rows.write(tmp_path / "b" / "head.csv", after)
    assert not compare.compare(tmp_path / "a", tmp_path / "b")
    assert "more memory: ours, head-rows, full, rows 2048: 2,253 -> 4,506 MiB" in capsys.readouterr().out


def test_nothing_in_common_is_said(tmp_path: Path) -> None:
    rows.write(tmp_path / "a" / "head.csv", run(1))
    rows.write(tmp_path / "b" / "head.csv", [replace(r, mode="frozen") for r in run(2)])
    with pytest.raises(SystemExit, match="no case in common"):
        compare.compare(tmp_path / "a", tmp_path / "b")


def test_plots_and_report_are_of_the_rows_alone(tmp_path: Path) -> None:
    found = [*run(3), row("quack", values=(), status="absent", note="No module named 'quack'")]
    found += [replace(r, mode="frozen") for r in run(4) if r.x == 128.0]  # one case: bars
    rows.write(tmp_path / "head.csv", found)
    command.main(["plot", str(tmp_path)])
    names = sorted(path.name for path in (tmp_path / "plots").iterdir())
    stems = ("head-rows-frozen-float32-32-1500", "head-rows-full-float32-32-1500")
    assert names == [f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")]
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "plots").iterdir()}
    told = (tmp_path / "README.md").read_text()
    for name in (*stems, "quack", "absent", "No module named 'quack'", "a processor", "commits of the rows: abc"):
        assert name in told
    assert "`ours` stands beside peers in 4 cases. In none of them a peer was faster" in told
    seconds = next(r for r in found if r.provider == "ours" and r.metric == "seconds" and r.x == 2048.0)
    assert f"{1e3 * seconds.median:,.4g}" in told

    command.main(["plot", str(tmp_path)])  # the same rows, the same files
    assert {path.name: path.read_bytes() for path in (tmp_path / "plots").iterdir()} == drawn


def test_the_report_says_where_ours_loses(tmp_path: Path) -> None:
    rows.write(tmp_path / "head.csv", run(5, slower=2.5))
    told = report.write_report(tmp_path).read_text()
    lost = told.split("## Where ours loses")[1].split("##")[0]
    for what in ("time", "memory"):
        assert lost.count(f"| {what} | eager |") == 3
    in_short = told.split("## In short")[1].split("##")[0]
    assert "| head-rows | full | 3 | 2.7" in in_short


def test_names_at_the_ends_of_lines_do_not_cover_each_other() -> None:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots()
    ends = [(1.0, 1.0 + i / 100, f"provider {i}") for i in range(9)]
    for _, y, _name in ends:
        axis.plot([0, 1], [0, y])
    plots.name_ends(axis, ends, dict.fromkeys((name for *_, name in ends), "#000000"))
    heights = sorted(text.xyann[1] for text in axis.texts)
    assert min(b - a for a, b in pairwise(heights)) > 0.04
    assert heights[-1] <= 1.04 + 1e-9
    plt.close(figure)


def test_ours_and_floors_can_be_told_from_peers() -> None:
    names = [("products", "floor"), ("ours", "ours"), ("ours-pair", "ours"), *((f"p{i}", "peer") for i in range(9))]
    looks = plots.looks(names)
    assert looks["ours"]["color"] == looks["ours-pair"]["color"] == plots.OURS
    assert looks["ours"]["linestyle"] != looks["ours-pair"]["linestyle"]
    colours = [looks[name]["color"] for name, _ in names if name != "ours-pair"]
    assert len(set(colours)) == len(colours)


def test_the_picture_is_drawn_from_results(tmp_path: Path) -> None:
    training = []
    for provider, seconds in (("ours", 2.0), ("trl", 16.0)):
        for metric, value in (("seconds", seconds), ("peak_bytes", seconds * 2**30)):
            more = {"workload": "step-training", "x_name": "pairs_per_step", "x": 16.0}
            training.append(row(provider, metric, (value, value * 1.1, value * 0.9), **more))
    rows.write(tmp_path / "head.csv", run(6))
    with pytest.raises(SystemExit, match="no rows of step-training"):
        command.main(["plot", str(tmp_path), "--picture", str(tmp_path / "picture.svg")])
    rows.write(tmp_path / "step.csv", training)
    command.main(["plot", str(tmp_path), "--picture", str(tmp_path / "picture.svg")])
    assert (tmp_path / "picture.svg").read_text().startswith("<?xml")
    assert not (tmp_path / "plots").exists()
