"""What came out, as it is: a table for the terminal and `report.md`."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers

import stepdpo_kernels
from examples.miniature.evaluate import Accuracy
from examples.miniature.settings import Settings
from examples.miniature.sharing import Packing
from examples.miniature.task import HABIT_PROBABILITY
from stepdpo_kernels.trainer.report import markdown_table

HEADER = ("model", "solved", "change, points", "wrong by a dropped carry")
CAVEAT = (
    "No claim about Step-DPO against other methods: in a pilot of this setting, DPO on whole solutions and "
    "fine-tuning on the model's own right solutions did as well as Step-DPO, within one point at every learning rate. "
    "Chains of five steps leave little for a step-level loss to gain. What the setting can show is the difference "
    "between rejected steps of the model's own and ones that it would not have written."
)


@dataclass(frozen=True)
class Stage:
    """A stage's name, its wall-clock time and the processor time of all threads, in seconds."""

    name: str
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Results:
    """Everything that a run of the demonstration measured.

    cached: the fine-tuned model was there from an earlier run;
    wrong, located: wrong solutions, and those cut at a first wrong step; pairs, held_out: records for training and
    held out; logps: mean log-prob under the SFT model of the chosen, the own rejected and the random rejected steps;
    shared_problems: prompts in common of each two sets of problems
    """

    settings: Settings
    cached: bool
    wrong: int
    located: int
    pairs: int
    held_out: int
    logps: tuple[float, float, float]
    first_loss: float
    before: Accuracy
    own: Accuracy
    foreign: Accuracy
    training_seconds: tuple[float, float]
    shared_problems: Mapping[str, int]
    packing: Mapping[str, Packing]
    stages: tuple[Stage, ...]

    @property
    def verdict(self) -> str:
        """The three accuracies in a sentence that says no more than the standard errors allow."""
        sentences = [
            _compare("Step-DPO on the model's own mistakes", "the model before it", self.own, self.before),
            _compare("It", "the same training on random wrong numbers", self.own, self.foreign),
        ]
        return " ".join(sentences)


def _compare(one: str, other: str, a: Accuracy, b: Accuracy) -> str:
    difference, error = a.minus(b)
    points = f"{100 * abs(difference):.1f} ± {100 * error:.1f} points"
    if abs(difference) <= 2 * error:
        return f"{one} and {other} cannot be told apart by {len(a.right):,} problems: {points} apart."
    return f"{one} solved {points} {'more' if difference > 0 else 'fewer'} of the problems than {other}."


def accuracy_rows(results: Results) -> list[tuple[str, str, str, str]]:
    """(model, solved, change, wrong answers that drop a carry): the table of the terminal and of the report."""
    rows = []
    for name, accuracy in (
        ("before, with its bad habit", results.before),
        ("after, on its own mistakes", results.own),
        ("after, on random numbers", results.foreign),
    ):
        solved = f"{100 * accuracy.mean:.1f}% ± {100 * accuracy.standard_error:.1f}"
        difference, error = accuracy.minus(results.before)
        change = "" if accuracy is results.before else f"{100 * difference:+.1f} ± {100 * error:.1f}"
        rows.append((name, solved, change, f"{accuracy.by_habit} of {accuracy.wrong}"))
    return rows


def sharing_rows(results: Results) -> list[tuple[str, str, str]]:
    """(packing, tokens encoded, median time of an optimiser step)"""
    words = {"none": 'every step with its own prefix (share="none")', "tree": 'shared prefixes once (share="tree")'}
    return [
        (words[mode], f"{packing.tokens:,}", f"{1000 * packing.median_seconds:.0f} ms")
        for mode, packing in results.packing.items()
    ]


def sharing_sentence(results: Results) -> str:
    none, tree = results.packing["none"], results.packing["tree"]
    return (
        f"With shared prefixes encoded once, an optimiser step took {tree.tokens / none.tokens:.0%} of the tokens and "
        f"{tree.median_seconds / none.median_seconds:.0%} of the time. In a model this small, the fixed cost of each "
        "operation weighs more than it would in a real one."
    )


def write(path: Path, results: Results) -> None:
    """Writes report.md."""
    path.write_text(_text(results))


def _text(r: Results) -> str:
    right, own_wrong, random_wrong = r.logps
    losses = max(abs(a - b) for a, b in zip(r.packing["none"].losses, r.packing["tree"].losses, strict=True))
    leaks = sum(r.shared_problems.values())
    parts = [
        "# Step-DPO in miniature: what came out",
        r.verdict,
        markdown_table(HEADER, accuracy_rows(r)),
        f"{len(r.before.right):,} fresh problems, the same for every model. ± is one standard error; that of a change "
        "is taken over the differences problem by problem. One seed.",
        CAVEAT,
        "![curves](curves.png)",
        "Left: greedy accuracy on other fresh problems during training, with one standard error. Middle: the margin "
        "that the loss works on, for the pairs that each run was trained on. Right: what both runs did to mistakes of "
        "the model that neither was trained on; the right step should rise and the wrong one fall.",
        "## Where the pairs came from",
        f"The model solved {r.settings.collect_problems:,} problems at temperature {r.settings.temperature}; "
        f"{r.wrong:,} answers were wrong, and {r.located:,} of these solutions could be cut at their first wrong step. "
        f"{r.settings.continuations} continuations from each cut gave {r.pairs + r.held_out:,} different right steps: "
        f"{r.pairs:,} pairs for training and {r.held_out:,} held out, every step of each confirmed by the checker.",
        f"Mean log-prob under the model before training: right steps {right:.1f}, its own wrong steps "
        f"{own_wrong:.1f}, the same steps with a random wrong number {random_wrong:.1f} nats. The last kind needs no "
        "unlearning, so pushing it down teaches little: this is what out-of-distribution means here. (In the paper "
        "it is the chosen step that comes from elsewhere.)",
        f"First training loss: {r.first_loss:.6f} (log 2 is 0.693147: policy and reference are the same then).",
        f"Problems in common between fine-tuning, pairs, curves and evaluation: {leaks}.",
        "## What sharing saved",
        markdown_table(("packing", "tokens encoded", "median optimiser step"), sharing_rows(r)),
        f"{sharing_sentence(r)} {r.settings.timing_steps} optimiser steps of {r.settings.pairs_per_step} pairs each "
        f"way, taken in turns; their losses differ by at most {losses:.1e}.",
        "## Times",
        markdown_table(
            ("stage", "seconds", "processor seconds"),
            [(s.name, f"{s.seconds:.1f}", f"{s.cpu_seconds:.1f}") for s in r.stages],
        ),
        ("The fine-tuned model was kept from an earlier run. " if r.cached else "")
        + f"Step-DPO itself took {r.training_seconds[0]:.1f} s on own mistakes and "
        f"{r.training_seconds[1]:.1f} s on random wrong numbers; the rest of these stages measured accuracy.",
        "## Settings",
        f"The bad habit has probability {HABIT_PROBABILITY}. "
        + ", ".join(f"{name} {value}" for name, value in asdict(r.settings).items())
        + ".",
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"stepdpo_kernels {stepdpo_kernels.__version__}, {torch.get_num_threads()} threads.",
    ]
    return "\n\n".join(parts) + "\n"
