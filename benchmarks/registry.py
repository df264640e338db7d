"""What is measured: workloads, who computes them, and what must hold before a figure of theirs is shown.

A suite is a package `benchmarks.suites.NAME` with `WORKLOADS` and a module `task` that the worker processes use:

    prepare(case, folder)           writes the inputs of a case, once, for all processes
    errors(provider, case)          {name: relative error to float64} on a small problem of the same kind
    tolerance(case)                 the most that an error may be
    needs(provider, case)           bytes that it takes beside what is there, a lower bound; 0 where nobody knows
    load(provider, case, folder)    a Task

A case that says "alone" is measured one provider after the other: they would not fit into a GPU's memory together. One
that has "rounds" gets no more of them by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, Protocol

SUITES = {
    "head": "log-probs of the loss tokens and the preference loss from hidden states",
    "attention": "attention along shared prefixes, forward and backward",
    "step": "a model's forward and backward, and whole training steps",
    "data": "records to token ids, and pairs to batches",
}
SIZES = ("tiny", "quick", "full")  # tiny: every path in seconds, no figure worth keeping

Case = dict[str, Any]  # a problem, as JSON: its mode, what varies, its configuration
Role = Literal["ours", "peer", "floor"]


class Task(Protocol):
    """A provider's work on a case, in a process that has nothing else to do."""

    facts: dict[str, float]  # what is counted and not timed: tokens, result_bytes; asked for after `value`

    @property
    def note(self) -> str:
        """What a reader should know beside the figures; asked after the first call."""

    def run(self) -> Any:
        """One call, to its end: on a GPU too."""

    def value(self, outputs: Any) -> float | None:
        """A number of what `run` returned that readers can compare, such as the loss."""

    def errors(self, outputs: Any) -> dict[str, float]:
        """Relative errors of what `run` returned, as far as they can be told at the size that is measured."""


@dataclass(frozen=True)
class Provider:
    """One way to compute a workload.

    name:      as in tables and plots
    role:      ours, a peer, or the floor: what nobody who does the work can be expected to beat
    what:      one line for readers: which function with which options
    package:   the distribution whose version goes into its rows, where it is not ours or torch itself
    devices:   where it runs
    kernel:    what it computes, where that is not the workload's kernel; best peers are of the same kernel
    bound:     of a floor: what it stands for. Floors of one bound are ways to come near it, and the fastest counts; of
               several bounds the slowest is the floor
    """

    name: str
    role: Role
    what: str
    package: str = ""
    devices: tuple[str, ...] = ("cpu", "cuda")
    kernel: str = ""
    bound: str = "products"


@dataclass(frozen=True)
class Workload:
    """Cases along one axis, and who computes them.

    name:       unique
    suite:      a key of SUITES
    kernel:     what is computed
    title:      of its section and its plots
    x:          the key of a case that varies
    x_label:    of the axis
    cases:      (device, size) -> its cases
    providers:  a floor is among them
    kinds:      keys of a case on which being right may depend: errors are measured once for each combination
    tests:      pytest's names of tests that must be green; where they are not, ours has no figures
    runner:     the module whose `measure` and `verify` take the workload
    dry:        providers of a dry run, which walks through what a GPU would run: the floor, ours, a peer; empty where
                another workload of the suite goes the same way
    with_x:     keys of a case that follow from x, and are not its configuration
    """

    name: str
    suite: str
    kernel: str
    title: str
    x: str
    x_label: str
    cases: Callable[[str, str], list[Case]] = field(repr=False)
    providers: tuple[Provider, ...] = field(repr=False)
    kinds: tuple[str, ...] = ("dtype", "mode")
    tests: tuple[str, ...] = ()
    runner: str = "benchmarks.runner"
    dry: tuple[str, ...] = ()
    with_x: tuple[str, ...] = ()


def task_module(suite: str) -> Any:
    return import_module(f"benchmarks.suites.{suite}.task")


def workloads(suite: str = "all") -> list[Workload]:
    """Those of a suite, or of all of them, in their order."""
    names = SUITES if suite == "all" else (suite,)
    return [workload for name in names for workload in import_module(f"benchmarks.suites.{name}").WORKLOADS]
