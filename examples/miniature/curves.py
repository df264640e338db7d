"""The picture: three panels over optimiser steps, the model's own mistakes against out-of-distribution ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

from stepdpo_kernels.trainer.report import Curve

# Okabe and Ito's colours: told apart with every common kind of colour vision, and by lightness in print.
OWN, FOREIGN, INK = "#0072B2", "#D55E00", "#444444"


def draw(path: Path, own: Mapping[str, Curve], foreign: Mapping[str, Curve], curve_problems: int) -> None:
    """Writes the picture. own, foreign: `Training.curves` of the two runs."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}
    with plt.rc_context(style):
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12.5, 4.0), layout="constrained")
        _accuracy(left, own["accuracy"], foreign["accuracy"], curve_problems)
        _margins(middle, own["rewards/margins"], foreign["rewards/margins"])
        _logps(right, own, foreign)
        for axes in (left, middle, right):
            axes.set_xlabel("optimiser steps")
            axes.margins(x=0.02)
            axes.set_xlim(right=axes.get_xlim()[1] * 1.45)  # room for the labels
            axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= own["accuracy"][-1][0]])
        figure.savefig(path, dpi=120)
        plt.close(figure)


def _accuracy(axes: Any, own: Curve, foreign: Curve, problems: int) -> None:
    axes.set_title("Fresh problems solved, %", loc="left")
    for curve, colour in ((own, OWN), (foreign, FOREIGN)):
        steps, values = zip(*curve, strict=True)
        errors = [sqrt(value * (1 - value) / problems) for value in values]
        low = [100 * (value - error) for value, error in zip(values, errors, strict=True)]
        high = [100 * (value + error) for value, error in zip(values, errors, strict=True)]
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(steps, [100 * value for value in values], color=colour)
    _label(axes, [(own[-1][0], 100 * own[-1][1], "own mistakes", OWN),
                  (foreign[-1][0], 100 * foreign[-1][1], "random wrong\nnumbers", FOREIGN)])  # fmt: skip


def _margins(axes: Any, own: Curve, foreign: Curve) -> None:
    axes.set_title("Reward margin of the pairs in training", loc="left")
    axes.axhline(0, color=INK, linewidth=0.6)
    for curve, colour in ((own, OWN), (foreign, FOREIGN)):
        axes.plot(*zip(*curve, strict=True), color=colour)
    _label(axes, [(own[-1][0], own[-1][1], "own mistakes", OWN),
                  (foreign[-1][0], foreign[-1][1], "random wrong\nnumbers", FOREIGN)])  # fmt: skip


def _logps(axes: Any, own: Mapping[str, Curve], foreign: Mapping[str, Curve]) -> None:
    axes.set_title("Log-prob of steps on held-out own mistakes, nats", loc="left")
    labels = []
    for curves, colour, trained in ((own, OWN, "own"), (foreign, FOREIGN, "random")):
        for name, dashes, words in (("eval_logps/chosen", "-", "right"), ("eval_logps/rejected", "--", "wrong")):
            curve = curves[name]
            axes.plot(*zip(*curve, strict=True), dashes, color=colour)
            labels.append((curve[-1][0], curve[-1][1], f"{words} step ({trained})", colour))
    _label(axes, labels)


def _label(axes: Any, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Writes each text beside its point (x, y, text, colour), moved up where it would stand on the one below."""
    low, high = axes.get_ylim()
    line = 0.055 * (high - low)
    free = low
    for x, y, text, colour in sorted(labels, key=lambda label: label[1]):
        height = line * (text.count("\n") + 1)
        at = max(y, free + height / 2)
        free = at + height / 2
        axes.annotate(text, (x, at), xytext=(6, 0), textcoords="offset points", va="center", color=colour)
