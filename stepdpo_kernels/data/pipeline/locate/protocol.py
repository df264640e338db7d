"""What the stage asks of whatever finds the first wrong step of a solution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from stepdpo_kernels.data.pipeline.solution import Solution


@dataclass(frozen=True)
class Location:
    """Where a solution goes wrong.

    step:         1, 2, ...: the first step that is wrong; 0: every step is right; None: undecided
    explanation:  for a person to read: the judge's words, the equation that does not hold
    problem:      for None, why in a word or two, for the summary: "no step can be checked", "no decision"
    counts:       what it took, for the summary: tokens, requests
    """

    step: int | None
    explanation: str = ""
    problem: str = ""
    counts: Counter[str] = field(default_factory=Counter)


class Locator(Protocol):
    """Finds the first wrong step.

    name:      "judge", "rollout", "exact" or "human"
    settings:  what decides its results, as JSON can hold it: a stage is not resumed with others
    """

    name: str

    @property
    def settings(self) -> dict[str, object]: ...

    def locate(self, solutions: Sequence[Solution], seed: int) -> list[Location]:
        """One location for each solution, in order, whatever others there are. seed: for locators that sample.

        Raises StepDPOError when nothing can be located at all (no server, refused key); what fails for one solution
        is a Location of step None.
        """
        ...


Verdicts = list[tuple[bool | None, Counter[str]]]


class Verifier(Locator, Protocol):
    """A locator that can also say of one step whether it is right."""

    def verify(self, solutions: Sequence[Solution], ks: Sequence[int], seed: int) -> Verdicts:
        """For each solution whether its step k is right, given that the steps before it are, and what that took.

        None where the verifier cannot tell.
        """
        ...


def verify_by_locating(locator: Locator, solutions: Sequence[Solution], ks: Sequence[int], seed: int) -> Verdicts:
    """`verify` of a locator that looks at whole solutions: a step is right that lies before the first wrong one."""
    return [
        (None if location.step is None else location.step == 0 or location.step > k, location.counts)
        for location, k in zip(locator.locate(solutions, seed), ks, strict=True)
    ]
