"""Rows, their comparison, plots and reports: from CSV, and from nothing else."""

from __future__ import annotations

import csv
import io
import math
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import __main__ as command
from benchmarks import compare, report, rows, tables
from benchmarks.registry import workloads
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


def run(
    seed: int, slower: float = 1.0, noise: float = 0.03, drift: float = 1.0, bursts: float = 0.0, rounds: int = ROUNDS
) -> list[Row]:
    """A run of three providers on three cases.

    slower: of ours; drift: of the whole machine; bursts: share of turns, floor's too, that others make up to twice as
    long.
    """
    draw, found = random.Random(seed), []
    for x in (128.0, 512.0, 2048.0):
        products = [drift * x * draw.lognormvariate(0, noise) for _ in range(rounds)]
        turns = {
            provider: [factor * p * draw.lognormvariate(0, noise) for p in products]
            for provider, factor in (("products", 1.0), ("ours", 1.1 * slower), ("eager", 2.0))
        }
        found += case_of(burst(turns, bursts, seed + int(x)), x, 1.1 * slower)
    return found


def training(seed: int, slower: float = 1.0, rounds: int = ROUNDS) -> list[Row]:
    """As `run`, of steps whose work differs by up to three times, and in each run in the same way."""
    work, draw, found = random.Random("pairs"), random.Random(seed), []
    for x in (8.0, 16.0, 32.0):
        steps = [x * work.uniform(1, 3) for _ in range(rounds)]
        turns = {
            provider: [factor * step**power * draw.lognormvariate(0, 0.03) for step in steps]
            for provider, factor, power in (("products", 1.0, 1.0), ("ours", 1.3 * slower, 1.2), ("eager", 9.0, 0.8))
        }
        more = {"workload": "step-training", "kernel": "training_step", "x_name": "pairs_per_step"}
        found += case_of(burst(turns, 0.1, seed + int(x)), x, 1.1, **more)
    return found


def burst(turns: dict[str, list[float]], share: float, seed: int) -> dict[str, list[float]]:
    draw = random.Random(f"bursts {seed}")  # whatever else is drawn
    return {
        provider: [t * (draw.uniform(1.2, 2.0) if draw.random() < share else 1.0) for t in times]
        for provider, times in turns.items()
    }


def case_of(turns: dict[str, list[float]], x: float, memory: float, **more: Any) -> list[Row]:
    """memory: of ours, to that of the products."""
    found = []
    for provider, times in turns.items():
        ratios = [a / b for a, b in zip(times, turns["products"], strict=True)]
        found.append(row(provider, values=times, x=x, **more))
        found.append(row(provider, "of_floor", ratios, unit="x", x=x, note="of products", **more))
        extra = x * {"products": 1.0, "ours": memory, "eager": 2.0}[provider] * 2**20
        found.append(row(provider, "extra_bytes", [extra], unit="B", x=x, **more))
        if provider != "products":
            best = [r / 2 for r in ratios]
            found.append(row(provider, "of_best_peer", best, unit="x", x=x, note="of eager", **more))
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
    """Even where the machine was twice as slow all the time, and other processes burst in."""
    rounds = 5 + seed % 3
    rows.write(tmp_path / "a" / "head.csv", run(seed, bursts=0.12, rounds=rounds))
    rows.write(tmp_path / "b" / "head.csv", run(1000 + seed, drift=2.0, bursts=0.12, rounds=rounds))
    rows.write(tmp_path / "a" / "step.csv", training(seed, rounds=rounds))
    rows.write(tmp_path / "b" / "step.csv", training(1000 + seed, rounds=rounds))
    assert compare.compare(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", ["kernels", "training"])
def test_a_planted_slowdown_is_flagged(
    tmp_path: Path, kind: str, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training in as many rounds as full runs have: with seven, one run of 45 does not see it."""
    for folder, drawn, slower in (("a", seed, 1.0), ("b", 1000 + seed, 1.3)):
        found = training(drawn, slower, rounds=9) if kind == "training" else run(drawn, slower, bursts=0.12)
        rows.write(tmp_path / folder / "head.csv", found)
    with pytest.raises(SystemExit) as stopped:
        command.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert stopped.value.code == 1
    told = capsys.readouterr().out
    assert "slower: ours" in told
    assert not [line for line in told.splitlines() if "eager" in line and "slower" in line]


def test_false_alarms_are_rare() -> None:
    """In 300 pairs of runs of one commit, of 8 verdicts on ours each."""
    alarms = 0
    for seed in range(300):
        a, b = ([*run(s, noise=0.08, bursts=0.12), *training(s)] for s in (seed, 1000 + seed))
        found = compare.ratios(compare.match(a, b)[0])
        alarms += any(r.verdict != "agree" and r.role == "ours" for part in found for r in part)
    assert alarms <= 3


@pytest.mark.parametrize("kernel", ["linear_logprob", "training_step"])
@pytest.mark.parametrize("rounds", [2, 5, 7, 9])
def test_intervals_hold_what_they_promise(kernel: str, rounds: int) -> None:
    """Without the margin for systematic differences, 99 of 100 intervals hold the true ratio; 400 are drawn."""
    held = 0
    for seed in range(400):
        draw = random.Random(seed)

        def turns(draw: random.Random = draw) -> Row:
            times = [draw.lognormvariate(0, 0.08) for _ in range(rounds)]
            return row(kernel=kernel, values=burst({"": times}, 0.12, draw.randrange(10**9))[""])

        found = compare.ratio_of("", [compare.Pair((turns(), turns()), [(turns(), turns())])])
        held += found.low * math.exp(compare.MARGIN) <= 1 <= found.high / math.exp(compare.MARGIN)
    assert held >= 390


def test_a_burst_that_hits_the_floor_changes_little() -> None:
    own, floor = row(values=[1.0, 1.02, 0.99, 1.01, 1.0]), row(values=[0.5, 0.51, 0.5, 0.49, 0.5])
    hit = compare.Pair((own, own), [(floor, row(values=[0.5, 0.51, 0.9, 0.49, 0.5]))])
    found = compare.ratio_of("", [hit])
    assert found.ratio == pytest.approx(1, abs=0.01)
    assert found.sees < 1.1


def test_another_version_of_a_peer_does_not_count() -> None:
    before = run(1)
    for versions, ratio in (("torch 2.13", 0.5**0.5), ("torch 2.14", 1.0)):  # twice the time of one of two others
        after = [
            replace(r, values=tuple(2 * v for v in r.values), versions=versions) if r.provider == "eager" else r
            for r in before
        ]
        _, pooled = compare.ratios(compare.match(before, after)[0])
        assert {r.provider: r.ratio for r in pooled} == pytest.approx({"ours": ratio, "eager": 2.0})


def test_what_cannot_be_compared_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def is_case(r: Row, provider: str, x: float) -> bool:
        return (r.provider, r.x) == (provider, x)

    before = [*run(1), *training(1), row("quack", values=(), status="absent")]
    after = []
    for r in run(2):
        if is_case(r, "ours", 128.0) or is_case(r, "products", 2048.0):
            if r.metric == "seconds":
                after.append(replace(r, values=(), status="not run", note="the run ended before its turn"))
        elif is_case(r, "eager", 512.0):
            after.append(replace(r, values=r.values[:1]))
        elif not is_case(r, "eager", 128.0):
            after.append(r)
    rows.write(tmp_path / "a" / "head.csv", before)
    rows.write(tmp_path / "b" / "head.csv", after)
    assert compare.compare(tmp_path / "a", tmp_path / "b")  # nothing that was tried is lost
    told = capsys.readouterr().out
    for line in (
        "ours, head-rows, full, rows 128, float32: not run in B: the run ended before its turn",
        "eager, head-rows, full, rows 128, float32: not in B",
        "eager, head-rows, full, rows 512, float32: fewer than 2 rounds",
        "ours, head-rows, full, rows 2048, float32: floor products has fewer than 2 rounds",
        "eager, head-rows, full, rows 2048, float32: floor products has fewer than 2 rounds",
        "step-training: B has nothing of this workload: 6 cases and providers",
        "absent in A: 1 cases and providers",
        "12 of 13 cases and providers",
    ):
        assert f"not compared: {line}\n" in told


def test_ours_without_a_figure_any_more_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    after = [
        replace(r, values=(), status="wrong", note="tests failed") if (r.provider, r.x) == ("ours", 128.0) else r
        for r in run(2)
        if r.metric == "seconds" or r.x > 128.0
    ]
    rows.write(tmp_path / "a" / "head.csv", run(1))
    rows.write(tmp_path / "b" / "head.csv", after)
    assert not compare.compare(tmp_path / "a", tmp_path / "b")
    told = capsys.readouterr().out
    assert told.count("ours, head-rows, full, rows 128, float32: wrong in B: tests failed") == 1
    assert "not compared: 1 of 6 cases and providers" in told


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
    assert "Ours stands beside peers in 4 cases. In none of them a peer was faster" in told
    seconds = next(r for r in found if r.provider == "ours" and r.metric == "seconds" and r.x == 2048.0)
    assert f"{1e3 * float(f'{seconds.median:.6g}'):,.0f}" in told

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


def lost(folder: Path, *found: Row) -> str:
    rows.write(folder / "head.csv", found)
    return report.write_report(folder).read_text().split("## Where ours loses")[1].split("##")[0]


def test_peers_of_another_kernel_are_among_those_that_ours_loses_to(tmp_path: Path) -> None:
    """liger-dpo beside ours-loss, which computes the same; quack, which nothing of ours does, beside ours."""
    pair, total = {"kernel": "preference_loss"}, {"kernel": "cross_entropy_sum"}
    told = lost(
        tmp_path,
        row("ours", values=(1.0, 1.2, 1.1)),
        row("ours-loss", values=(3.0, 3.3, 3.6), **pair),
        row("eager", values=(2.0, 2.0, 2.0)),
        row("liger-dpo", values=(2.0, 2.2, 2.4), **pair),
        row("quack", values=(0.5, 0.6, 0.55), **total),
    )
    assert "in 1 cases" in told
    assert "| ours-loss | time | liger-dpo | 1.50 |" in told
    assert "| ours | time | quack (cross_entropy_sum) | 2.00 |" in told
    assert "eager" not in told


def test_ours_of_another_kernel_without_a_figure_is_a_loss(tmp_path: Path) -> None:
    pair = {"kernel": "preference_loss"}
    failed = row("ours-loss", values=(), status="failed", note="ValueError: a | b\nc", **pair)
    told = lost(tmp_path, row("ours"), failed, row("liger-dpo", **pair))
    assert r"| ours-loss | no figure |  | failed: ValueError: a \| b c |" in told


@pytest.mark.parametrize(("ours", "peer", "told"), [(3, 0, "3.0 MiB beside none"), (3, -1, "3.0 MiB beside none")])
def test_a_peer_without_memory_takes_less(tmp_path: Path, ours: int, peer: int, told: str) -> None:
    found = [row(), row("eager", values=(9.0,)), row("lean", values=(9.0,))]
    memory = {"ours": ours, "eager": 1, "lean": peer}
    found += [row(name, "extra_bytes", [taken * 2**20], unit="B") for name, taken in memory.items()]
    assert f"| ours | memory | lean | {told} |" in lost(tmp_path, *found)


@pytest.mark.parametrize("ours", [0, -2])
def test_where_ours_takes_no_memory_none_takes_less(tmp_path: Path, ours: int) -> None:
    found = [row(), row("eager", values=(9.0,))]
    found += [row(name, "extra_bytes", [taken], unit="B") for name, taken in (("ours", ours), ("eager", -3))]
    assert "In none of them" in lost(tmp_path, *found)


def test_notes_do_not_break_the_tables_of_a_report(tmp_path: Path) -> None:
    note = "KeyError: 'a|b' in <class 'x'>\n\n| __init__ | *args |"
    rows.write(tmp_path / "head.csv", [row(), row("eager", values=(), status="failed", note=note)])
    table = report.write_report(tmp_path).read_text().split("## Who has no figures\n\n")[1].split("\n\n")[0]
    heading, _, *lines = table.splitlines()
    assert len(lines) == 1
    cells = [len(re.split(r"(?<!\\)\|", line)) for line in (heading, *lines)]
    assert cells[0] == cells[1]
    assert r"KeyError: 'a\|b' in \<class 'x'> \| \_\_init\_\_ \| \*args \|" in lines[0]


def test_without_matplotlib_there_is_a_report_without_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows.write(tmp_path / "head.csv", run(3))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "benchmarks.plots")
    told = report.write_report(tmp_path).read_text()
    assert "matplotlib is missing" in told
    assert "![" not in told
    assert "| 2,048 | **ours** |" in told
    assert not (tmp_path / "plots").exists()


@pytest.mark.parametrize("note", ["[/foo] [batch, heads]", "[red]:x: [/]"])
def test_notes_are_printed_as_they_are(note: str) -> None:
    """Not taken for rich's markup."""
    console = Console(file=io.StringIO(), width=240)
    of = {"configuration": {"model": note}}
    tables.print_case([row(note=note, **of), row("eager", values=(), status="failed", note=note, **of)], console)
    workload = next(w for w in workloads() if w.name == "head-rows")
    verified = {("eager", ("full", note)): {"status": "failed", "note": note}}
    assert tables.print_errors(workload, verified, console)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().count(note) == 5


def test_lines_name_the_floor_that_counts_and_draw_no_memory_of_it() -> None:
    found = [*run(3), *(row("bytes", values=(0.1,), role="floor", x=x) for x in (128.0, 512.0, 2048.0))]
    kept = {(r.provider, r.metric) for r in plots.drawable(found) if r.role == "floor"}
    assert kept == {("products", "seconds"), ("products", "of_floor")}


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
