"""Plots, from rows alone: SVG and PNG, axes logarithmic where costs grow, every line named at its end.

Colours are those of Okabe and Ito, which the colour-blind can tell apart; ours are blue and wide, floors grey and
dotted. A floor is one of time: what it takes of memory says nothing, and is not drawn.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt

from benchmarks.registry import workloads
from benchmarks.report import like
from benchmarks.rows import Row, read

OURS, FLOOR, INK = "#0072B2", "#808080", "#333333"
PEERS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C5109", "#5E3C99", "#000000", "#B2ABD2")
MARKERS = "osD^vPX*<>"
STYLE = {
    "svg.hashsalt": "stepdpo_kernels",  # the same rows, the same file
    "svg.fonttype": "path",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
}
SCALES = {
    "seconds": (1e3, "time, ms"),
    "of_floor": (1.0, "time, multiples of the floor's"),  # tells lines apart that grow alike
    "extra_bytes": (2**-20, "peak memory beside inputs and weights, MiB"),
}


def plot_all(folder: Path) -> list[Path]:
    """Writes folder/plots/*.{svg,png}, a pair for each workload, mode and configuration; returns the SVG files."""
    panels: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in read(folder):
        if row.values and row.metric in SCALES:
            panels[row.panel].append(row)
    target = folder / "plots"
    target.mkdir(exist_ok=True)
    for old in (*target.glob("*.svg"), *target.glob("*.png")):
        old.unlink()
    written = []
    with mpl.rc_context(STYLE):
        for rows in map(drawable, panels.values()):
            several = len({row.x for row in rows}) > 1
            written.append(save(lines(rows) if several else bars(rows), target / rows[0].stem))
    return written


def drawable(rows: Iterable[Row]) -> list[Row]:
    """Those of time and memory; of floors, those of time that are the floor of some case."""
    rows = list(rows)
    floors = floors_of(rows)
    return [r for r in rows if r.role != "floor" or (r.metric != "extra_bytes" and r.provider in floors)]


def floors_of(rows: Iterable[Row]) -> set[str]:
    return {row.note.removeprefix("of ") for row in rows if row.metric == "of_floor"}


def title(row: Row, *more: str) -> str:
    """What a panel is: in words, then as the command line and the CSV files call it."""
    known = {workload.name: workload.title for workload in workloads()}
    words = f"{known[row.workload]}: {row.workload}" if row.workload in known else row.workload
    return f"{words}, {row.mode}\n{', '.join((row.told, *more))}"


def x_label(row: Row) -> str:
    return {workload.name: workload.x_label for workload in workloads()}.get(row.workload, row.x_name)


def shown_name(row: Row) -> str:
    return f"{row.provider}, the floor" if row.role == "floor" else row.provider


def save(figure: Any, stem: Path) -> Path:
    """stem.svg and stem.png; the same bytes for the same rows, as far as matplotlib and its fonts are the same."""
    svg, png = stem.with_name(stem.name + ".svg"), stem.with_name(stem.name + ".png")
    figure.savefig(svg, bbox_inches="tight", metadata={"Date": None, "Creator": None})
    figure.savefig(png, bbox_inches="tight", dpi=130, metadata={"Software": None})
    plt.close(figure)
    return svg


def looks(providers: Iterable[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """Colour, line and marker of each (provider, role), in the order of their first rows."""
    found: dict[str, dict[str, Any]] = {}
    ours, peers = 0, 0
    for name, role in providers:
        if name in found:
            continue
        if role == "floor":
            found[name] = {"color": FLOOR, "linestyle": ":", "marker": "", "linewidth": 1.5}
        elif role == "ours":
            style = ("-", "--", "-.", (0, (1, 1)), (0, (3, 1, 1, 1)), (0, (5, 1)))[ours % 6]
            found[name] = {"color": OURS, "linestyle": style, "marker": "o", "linewidth": 2.6 if not ours else 1.6}
            ours += 1
        else:
            colour, marker = PEERS[peers % len(PEERS)], MARKERS[peers % len(MARKERS)]
            found[name] = {"color": colour, "linestyle": "-", "marker": marker, "linewidth": 1.2}
            peers += 1
    return found


def lines(rows: Sequence[Row]) -> Any:
    """Time and memory against x."""
    look = looks((row.provider, row.role) for row in rows)
    metrics = [metric for metric in SCALES if any(row.metric == metric for row in rows)]
    figure, axes = plt.subplots(1, len(metrics), figsize=(4.9 * len(metrics), 4.2), squeeze=False)
    every = sorted({row.x for row in rows})
    for metric, axis in zip(metrics, axes[0], strict=True):
        factor, unit = SCALES[metric]
        ends, colours, nothing = [], {}, []
        for name in look:
            own = sorted((row for row in rows if row.provider == name and row.metric == metric), key=lambda r: r.x)
            points = [(row.x, factor * row.median, factor * row.p20, factor * row.p80) for row in own]
            points = [point for point in points if point[1] > 0]
            if len(points) < len(own):
                nothing.append(name)
            if not points:
                continue
            xs, ys, low, high = zip(*points, strict=True)
            axis.plot(xs, ys, markersize=3.5, **look[name])
            if metric != "extra_bytes":
                axis.fill_between(xs, low, high, color=look[name]["color"], alpha=0.12, linewidth=0)
            ends.append((xs[-1], ys[-1], shown_name(own[0])))
            colours[shown_name(own[0])] = look[name]["color"]
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(every, [f"{x:,.0f}" for x in every], rotation=30 if len(every) > 5 else 0)
        axis.minorticks_off()
        axis.yaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda y, _: f"{y:,.10g}"))
        bottom, top = axis.get_ylim()
        axis.yaxis.set_minor_locator(mpl.ticker.LogLocator(subs=(2, 5) if top > 8 * bottom else (1.5, 2, 3, 4, 6)))
        axis.yaxis.set_minor_formatter(mpl.ticker.FuncFormatter(lambda y, _: f"{y:,.10g}"))
        axis.tick_params(which="minor", labelsize=7)
        axis.set_xlabel(x_label(rows[0]))
        axis.set_ylabel(unit)
        if nothing:
            axis.set_title(f"none that could be measured, and no point: {', '.join(nothing)}", fontsize=7, loc="left")
        name_ends(axis, ends, colours)
    figure.suptitle(title(rows[0]), fontsize=9, x=0.01, ha="left")
    figure.tight_layout(w_pad=3)
    return figure


def name_ends(axis: Any, ends: list[tuple[float, float, str]], colours: dict[str, str]) -> None:
    """Names at the right of the axes, at the height of their lines' ends, spread so that none covers another."""
    if not ends:
        return
    axis.figure.canvas.draw()  # limits and the scale are known only now
    to_axes = axis.transAxes.inverted()
    heights = [(to_axes.transform(axis.transData.transform((x, y)))[1], name) for x, y, name in ends]
    heights.sort()
    gap = 0.047
    placed: list[float] = []
    for height, _ in heights:
        placed.append(max(height, placed[-1] + gap) if placed else height)
    if placed[-1] > 1.04:  # down again from the top
        placed[-1] = 1.04
        for i in range(len(placed) - 2, -1, -1):
            placed[i] = min(placed[i], placed[i + 1] - gap)
    for (height, name), at in zip(heights, placed, strict=True):
        axis.annotate(
            name,
            xy=(1.0, height),
            xytext=(1.045, at),
            xycoords="axes fraction",
            color=colours[name],
            fontsize=7.5,
            va="center",
            fontweight="bold" if colours[name] == OURS else "normal",
            arrowprops={"arrowstyle": "-", "relpos": (0, 0.5), "color": colours[name], "linewidth": 0.5, "alpha": 0.6},
            annotation_clip=False,
        )


def bars(rows: Sequence[Row]) -> Any:
    """Time and memory of one case, the fastest first."""
    look = looks((row.provider, row.role) for row in rows)
    metrics = [metric for metric in ("seconds", "extra_bytes") if any(row.metric == metric for row in rows)]
    order = sorted((row for row in rows if row.metric == "seconds"), key=lambda row: row.median, reverse=True)
    size = (4.8 * len(metrics), 0.7 + 0.27 * max(len(order), 3))
    figure, axes = plt.subplots(1, len(metrics), figsize=size, sharey=True, squeeze=False)
    for metric, axis in zip(metrics, axes[0], strict=True):
        factor, unit = SCALES[metric]
        own = {row.provider: row for row in rows if row.metric == metric}
        for at, name in enumerate(row.provider for row in order):
            if name in own:
                draw_bar(axis, at, own[name], factor, look[name]["color"])
            if name in own and own[name].role == "floor":
                draw_floor(axis, factor * own[name].median)
        axis.set_xlabel(unit)
        finish_bars(axis, order, [shown_name(row) for row in order])
    figure.suptitle(title(rows[0], f"{x_label(rows[0])} {rows[0].x:,.0f}"), fontsize=9, x=0.01, ha="left")
    figure.tight_layout()
    return figure


def finish_bars(axis: Any, order: Sequence[Row], names: Sequence[str]) -> None:
    """Names, those of ours in their colour, and an axis for people."""
    axis.set_yticks(range(len(order)), names)
    for label, row in zip(axis.get_yticklabels(), order, strict=False):  # none where the left axes have them
        if row.role == "ours":
            label.set(color=OURS, fontweight="bold")
    axis.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda x, _: f"{x:,.10g}"))
    axis.xaxis.set_major_locator(mpl.ticker.MaxNLocator(6))
    axis.grid(axis="y", visible=False)
    axis.margins(x=0.16)


def draw_floor(axis: Any, value: float) -> None:
    axis.axvline(value, color=FLOOR, linestyle=":", linewidth=1.5, zorder=0.5)


def draw_bar(axis: Any, at: float, row: Row, factor: float, colour: str) -> None:
    """A bar with its 20th and 80th percentile, and its figure at its end."""
    middle, low, high = factor * row.median, factor * row.p20, factor * row.p80
    axis.barh(at, middle, color=colour, alpha=0.85, height=0.7)
    if len(row.values) > 1:
        axis.plot([low, high], [at, at], color=INK, linewidth=1.2)
    axis.text(max(high, 0), at, f" {figure_of(middle)}", va="center", fontsize=7.5, color=INK)


def figure_of(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def picture(folder: Path, file: Path) -> None:
    """The README's picture, from results in `folder`: of whole training and of the head, time and peak memory.

    For those who have never seen a report: names in words, peers all of one colour, and of ours only what users get
    and what computes the same as some peer.
    """
    found = [row for row in read(folder) if row.values]
    training = [row for row in found if row.workload == PICTURE_TRAINING]
    head = [row for row in found if row.workload == PICTURE_HEAD and row.mode == "full"]
    if not training or not head:
        raise SystemExit(f"{folder} has no rows of {PICTURE_TRAINING} and {PICTURE_HEAD}: run the suites step and head")
    training = [row for row in training if row.case == training[0].case]
    training += [
        replace(row, metric="speed", values=tuple(row.x / value for value in row.values))
        for row in training
        if row.metric == "seconds"
    ]
    largest = max(head, key=lambda row: row.x)
    head = [row for row in head if row.case == largest.case]
    step, of = training[0].configuration, largest.configuration
    with mpl.rc_context(STYLE):
        orders = [slowest_first(rows) for rows in (training, head)]
        counts = [len(order) for order in orders]
        size = (9.6, 1.9 + 0.25 * sum(counts))
        figure, axes = plt.subplots(2, 2, figsize=size, height_ratios=counts, sharey="row", layout="constrained")
        speed = ("speed", 1.0, "pairs a second: more is better")
        process = ("peak_bytes", 2**-30, "peak memory of the process, GiB: less is better")
        side_by_side(axes[0], training, orders[0], (speed, process))
        shown = [(metric, *SCALES[metric]) for metric in ("seconds", "extra_bytes")]
        columns = [(metric, factor, f"{unit}: less is better") for metric, factor, unit in shown]
        side_by_side(axes[1], head, orders[1], columns)
        whole = f"Step-DPO training of {step.get('model')}, {training[0].x:,.0f} pairs an optimiser step"
        alone = f"Log-probs of {largest.x:,.0f} tokens and their gradients: "
        alone += f"hidden size {of['hidden']:,}, vocabulary {of['vocab']:,}"
        for axis, what in zip(axes[:, 0], (whole, alone), strict=True):
            axis.set_title(what, loc="left", fontsize=10, fontweight="bold")
        keys = [
            mpl.patches.Patch(color=OURS, label="stepdpo-kernels"),
            mpl.patches.Patch(color=PEERS[0], label="others"),
            mpl.lines.Line2D([], [], color=FLOOR, linestyle=":", label="the matrix products alone: the floor"),
        ]
        figure.legend(handles=keys, loc="outside upper left", ncols=3, frameon=False, fontsize=10)
        commits = " and ".join(dict.fromkeys((training[0].commit, head[0].commit)))
        figure.supxlabel(
            f"{training[0].device}; {training[0].versions}; commit {commits}. "
            "Bars: medians; lines: 20th to 80th percentile of the rounds.",
            fontsize=7.5, color=INK, x=0.005, ha="left",
        )  # fmt: skip
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, bbox_inches="tight", metadata={"Date": None, "Creator": None})
        plt.close(figure)


PICTURE_TRAINING, PICTURE_HEAD = "step-training", "head-rows"
WORDS = {  # of providers in the picture; others go by their names
    (PICTURE_TRAINING, "ours"): "StepDPOTrainer",
    (PICTURE_TRAINING, "trl"): "TRL, up to 8 at a time",
    (PICTURE_TRAINING, "trl-sorted"): "TRL, up to 8 at a time, sorted",
    (PICTURE_TRAINING, "trl-32"): "TRL, up to 32 at a time, sorted",
    (PICTURE_TRAINING, "trl-1"): "TRL, 1 at a time",
    (PICTURE_HEAD, "ours"): "linear_logprob",
    (PICTURE_HEAD, "ours-loss"): "StepDPOLoss (DPO loss)",
    (PICTURE_HEAD, "eager"): "PyTorch, full logits",
    (PICTURE_HEAD, "eager-compiled"): "PyTorch, full logits, compiled",
    (PICTURE_HEAD, "torch-linear-ce"): "PyTorch, linear_cross_entropy",
    (PICTURE_HEAD, "torch-linear-ce-chunked"): "PyTorch, the same, own backward",
    (PICTURE_HEAD, "trl-selective"): "TRL, full logits",
    (PICTURE_HEAD, "trl-chunked"): "TRL, chunked",
    (PICTURE_HEAD, "quack"): "quack (sum of losses)",
    (PICTURE_HEAD, "liger-dpo"): "Liger (DPO loss)",
}


def slowest_first(rows: Sequence[Row]) -> list[Row]:
    """Seconds of who is in the picture: peers, `ours`, and what of ours computes the same as a peer."""
    peers = {row.provider for row in rows if row.role == "peer"}
    names = {"ours", *peers, *(like(peer, rows) for peer in peers)}
    found = [row for row in rows if row.metric == "seconds" and row.provider in names]
    return sorted(found, key=lambda row: row.median, reverse=True)


def side_by_side(
    axes: Iterable[Any], rows: Sequence[Row], order: Sequence[Row], columns: Iterable[tuple[str, float, str]]
) -> None:
    """Bars of (metric, factor, label of the axis), and the floor of what is not memory."""
    floors = floors_of(rows)
    for axis, (metric, factor, label) in zip(axes, columns, strict=True):
        own = {row.provider: row for row in rows if row.metric == metric}
        for at, row in enumerate(order):
            if row.provider in own:
                draw_bar(axis, at, own[row.provider], factor, OURS if row.role == "ours" else PEERS[0])
        for name in floors & set(own) if "bytes" not in metric else ():
            draw_floor(axis, factor * own[name].median)
        axis.set_xlabel(label)
        finish_bars(axis, order, [WORDS.get((row.workload, row.provider), row.provider) for row in order])
