"""Plots, from rows alone: SVG and PNG, axes logarithmic where costs grow, every line named at its end.

Colours are those of Okabe and Ito, which the colour-blind can tell apart; ours are blue and wide, floors grey and
dotted.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt

from benchmarks.rows import Row, read

OURS, FLOOR, INK = "#0072B2", "#999999", "#333333"
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
SCALES = {"seconds": (1e3, "ms"), "extra_bytes": (2**-20, "MiB beside inputs and weights"), "tokens": (1, "tokens")}
PANEL_METRICS = ("seconds", "extra_bytes")
UNTOLD = ("threads",)  # of a configuration: told once, in the report


def plot_all(folder: Path) -> list[Path]:
    """Writes folder/plots/*.{svg,png}, a pair for each workload, mode and configuration; returns the SVG files."""
    panels: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in read(folder):
        if row.values and row.metric in (*PANEL_METRICS, "of_floor"):
            panels[row.panel].append(row)
    target = folder / "plots"
    target.mkdir(exist_ok=True)
    for old in (*target.glob("*.svg"), *target.glob("*.png")):
        old.unlink()
    written = []
    with mpl.rc_context(STYLE):
        for panel, rows in panels.items():
            several = len({row.x for row in rows}) > 1
            figure = lines(panel, rows) if several else bars(panel, rows)
            written.append(save(figure, target / slug(panel)))
    return written


def slug(panel: tuple[str, str, str]) -> str:
    """A file's name for what is in a plot."""
    workload, mode, configuration = panel
    shown = [str(value) for key, value in json.loads(configuration).items() if key not in UNTOLD]
    return re.sub(r"[^A-Za-z0-9.]+", "-", "-".join([workload, mode, *shown])).strip("-")


def title(panel: tuple[str, str, str]) -> str:
    workload, mode, configuration = panel
    told = ", ".join(f"{key} {value}" for key, value in json.loads(configuration).items() if key not in UNTOLD)
    return f"{workload}, {mode}\n{told}"


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


def lines(panel: tuple[str, str, str], rows: Sequence[Row]) -> Any:
    """Time and memory against x."""
    look = looks((row.provider, row.role) for row in rows)
    metrics = [metric for metric in PANEL_METRICS if any(row.metric == metric for row in rows)]
    figure, axes = plt.subplots(1, len(metrics), figsize=(5.6 * len(metrics), 4.2), squeeze=False)
    for metric, axis in zip(metrics, axes[0], strict=True):
        factor, unit = SCALES[metric]
        ends = []
        for name in look:
            own = sorted((row for row in rows if row.provider == name and row.metric == metric), key=lambda r: r.x)
            points = [(row.x, factor * row.median, factor * row.p20, factor * row.p80) for row in own]
            points = [point for point in points if point[1] > 0]
            if not points:
                continue
            xs, ys, low, high = zip(*points, strict=True)
            axis.plot(xs, ys, markersize=3.5, **look[name])
            if metric == "seconds":
                axis.fill_between(xs, low, high, color=look[name]["color"], alpha=0.12, linewidth=0)
            ends.append((xs[-1], ys[-1], name))
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        every = sorted({row.x for row in rows})
        axis.set_xticks(every, [f"{x:,.0f}" for x in every], rotation=30 if len(every) > 5 else 0)
        axis.minorticks_off()
        axis.yaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda y, _: f"{y:,.4g}"))
        axis.yaxis.set_minor_locator(mpl.ticker.LogLocator(subs=(2, 5)))
        axis.yaxis.set_minor_formatter(mpl.ticker.FuncFormatter(lambda y, _: f"{y:,.4g}"))
        axis.tick_params(which="minor", labelsize=7)
        axis.set_xlabel(rows[0].x_name.replace("_", " "))
        axis.set_ylabel(f"{'time, ' if metric == 'seconds' else 'peak memory, '}{unit}")
        name_ends(axis, ends, {name: look[name]["color"] for name in look})
    figure.suptitle(title(panel), fontsize=9, x=0.01, ha="left")
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
            arrowprops={"arrowstyle": "-", "color": colours[name], "linewidth": 0.5, "alpha": 0.6},
            annotation_clip=False,
        )


def bars(panel: tuple[str, str, str], rows: Sequence[Row]) -> Any:
    """Time and memory of one case, the fastest first."""
    look = looks((row.provider, row.role) for row in rows)
    metrics = [metric for metric in PANEL_METRICS if any(row.metric == metric for row in rows)]
    order = sorted((row for row in rows if row.metric == "seconds"), key=lambda row: row.median, reverse=True)
    names = [row.provider for row in order]
    figure, axes = plt.subplots(
        1, len(metrics), figsize=(4.8 * len(metrics), 0.7 + 0.27 * len(names)), sharey=True, squeeze=False
    )
    for metric, axis in zip(metrics, axes[0], strict=True):
        factor, unit = SCALES[metric]
        own = {row.provider: row for row in rows if row.metric == metric}
        for at, name in enumerate(names):
            if name in own:
                draw_bar(axis, at, own[name], factor, look[name]["color"])
        axis.set_yticks(range(len(names)), names)
        axis.set_xlabel(f"{'time' if metric == 'seconds' else 'peak memory'}, {unit}")
        axis.grid(axis="y", visible=False)
        axis.margins(x=0.16)
    figure.suptitle(f"{title(panel)}, {rows[0].x_name} {rows[0].x:,.0f}", fontsize=9, x=0.01, ha="left")
    figure.tight_layout()
    return figure


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
    """The README's picture: pairs a second and memory of whole training, and the head, from results in `folder`."""
    found = read(folder)
    training = [row for row in found if row.workload == PICTURE_TRAINING and row.values and row.role != "floor"]
    head = [row for row in found if row.workload == PICTURE_HEAD and row.values and row.mode == "full"]
    if not training or not head:
        raise SystemExit(f"{folder} has no rows of {PICTURE_TRAINING} and {PICTURE_HEAD}: run the suites step and head")
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.6), width_ratios=(1, 1, 1.15))
        first = training[0]
        speeds = {
            row.provider: tuple(row.x / value for value in row.values) for row in training if row.metric == "seconds"
        }
        names = sorted(speeds, key=lambda name: sorted(speeds[name])[len(speeds[name]) // 2])
        colours = {row.provider: OURS if row.role == "ours" else PEERS[0] for row in training}
        for at, name in enumerate(names):
            row = next(r for r in training if r.provider == name and r.metric == "seconds")
            draw_bar(axes[0], at, _with(row, speeds[name]), 1, colours[name])
            memory = next((r for r in training if r.provider == name and r.metric == "peak_bytes"), None)
            if memory:
                draw_bar(axes[1], at, memory, 2**-30, colours[name])
        model = first.configuration.get("model", "")
        axes[0].set_title(f"training, {model}: pairs a second", loc="left", fontsize=9)
        axes[1].set_title("the same: peak memory of the process, GiB", loc="left", fontsize=9)
        for axis in axes[:2]:
            axis.set_yticks(range(len(names)), names)
        axes[1].set_yticklabels([])
        last = max((row for row in head if row.metric == "of_floor"), key=lambda row: row.x)
        shown = [row for row in head if row.metric == "of_floor" and row.case == last.case]
        shown.sort(key=lambda row: row.median, reverse=True)
        for at, row in enumerate(shown):
            draw_bar(axes[2], at, row, 1, {"ours": OURS, "floor": FLOOR, "peer": PEERS[0]}[row.role])
        axes[2].set_yticks(range(len(shown)), [row.provider for row in shown])
        of = shown[0].configuration
        axes[2].set_title(
            f"head, {last.x:,.0f} rows, D {of['hidden']}, V {of['vocab']:,}: x the matrix products",
            loc="left",
            fontsize=9,
        )
        for axis in axes:
            axis.grid(axis="y", visible=False)
            axis.margins(x=0.16)
        figure.text(
            0.005, -0.02, f"{first.device}; {first.versions}; commit {first.commit}. Bars are medians, lines the 20th "
            "to 80th percentile of interleaved rounds.", fontsize=7.5, color=INK,
        )  # fmt: skip
        figure.tight_layout()
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, bbox_inches="tight", metadata={"Date": None, "Creator": None})
        plt.close(figure)


PICTURE_TRAINING, PICTURE_HEAD = "step-training", "head-rows"


def _with(row: Row, values: tuple[float, ...]) -> Row:
    from dataclasses import replace

    return replace(row, values=values)
