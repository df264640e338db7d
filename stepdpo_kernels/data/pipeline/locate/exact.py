"""The first wrong step by checking what each step states, for tasks where that decides it."""

from __future__ import annotations

import importlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence

from stepdpo_kernels.data.pipeline.locate.arithmetic import check
from stepdpo_kernels.data.pipeline.locate.protocol import Location, Verdicts
from stepdpo_kernels.data.pipeline.solution import Solution
from stepdpo_kernels.types import StepDPOError

# Prompt and steps, without their markers -> the first wrong step 1, 2, ..., 0 where there is none, None for undecided.
StepChecker = Callable[[str, Sequence[str]], int | None]


class ExactLocator:
    """Checks the arithmetic of each step (`arithmetic.py`), or asks a function that knows the task.

    The first step with an equation that does not hold is the first wrong step. Steps without an equation are passed
    over; with `strict` one of them before the wrong step leaves it undecided. Where every step has equations and all
    hold, there is no wrong step; where some have none, it is undecided.

    This decides tasks of plain computation. A step may compute rightly what nobody asked for: of a wrong solution to a
    word problem it finds slips of arithmetic, and none of the others.

    modulus:  equations hold modulo this number
    strict:   see above
    checker:  "module:function", or the function: decides instead, from the prompt and the texts of the steps

    Raises StepDPOError for a checker that cannot be imported.
    """

    name = "exact"

    def __init__(
        self, *, modulus: int | None = None, strict: bool = False, checker: str | StepChecker | None = None
    ) -> None:
        if modulus is not None and modulus < 2:
            raise StepDPOError(f"modulus must be at least 2, got {modulus!r}")
        self.modulus, self.strict = modulus, strict
        self.checker = import_checker(checker) if isinstance(checker, str) else checker
        self._named = checker if isinstance(checker, str) else getattr(checker, "__qualname__", None)

    @property
    def settings(self) -> dict[str, object]:
        return {"modulus": self.modulus, "strict": self.strict, "checker": self._named}

    def locate(self, solutions: Sequence[Solution], seed: int) -> list[Location]:
        return [self._locate(solution.prompt, [step.text for step in solution.steps.steps]) for solution in solutions]

    def verify(self, solutions: Sequence[Solution], ks: Sequence[int], seed: int) -> Verdicts:
        return [
            (self.verify_step(solution.prompt, [step.text for step in solution.steps.steps[:k]]), Counter())
            for solution, k in zip(solutions, ks, strict=True)
        ]

    def verify_step(self, prompt: str, steps: Sequence[str]) -> bool | None:
        """Whether the last of the steps is right, given that those before it are; None where it states nothing."""
        if self.checker is not None:
            found = self._asked(prompt, steps)
            return None if found is None else found == 0
        equations = check(steps[-1], self.modulus)
        return all(equation.holds for equation in equations) if equations else None

    def _locate(self, prompt: str, steps: Sequence[str]) -> Location:
        if not steps:
            return Location(None, problem="no steps")
        if self.checker is not None:
            found = self._asked(prompt, steps)
            return Location(found, problem="" if found is not None else "the checker does not decide")
        unchecked = 0
        for k, text in enumerate(steps, start=1):
            equations = check(text, self.modulus)
            wrong = next((equation for equation in equations if not equation.holds), None)
            if wrong is not None:
                if unchecked and self.strict:
                    return Location(None, f"{wrong.text} does not hold", "an unchecked step before the wrong one")
                return Location(k, f"{wrong.text} does not hold")
            unchecked += not equations
        if unchecked == len(steps):
            return Location(None, problem="no step can be checked")
        if unchecked:
            return Location(None, problem="no wrong equation, but not every step can be checked")
        return Location(0, "every equation holds")

    def _asked(self, prompt: str, steps: Sequence[str]) -> int | None:
        assert self.checker is not None
        found = self.checker(prompt, list(steps))
        if found is not None and (not isinstance(found, int) or not 0 <= found <= len(steps)):
            raise StepDPOError(
                f"the checker {self._named!r} returned {found!r} for {len(steps)} steps; it must return the first "
                "wrong step 1, 2, ..., 0 for none, or None"
            )
        return found


def import_checker(name: str) -> StepChecker:
    """The function that "module:function" names, of a module on the path or in the working directory.

    Raises StepDPOError where there is none.
    """
    module, _, function = name.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # which a command that is installed does not look in
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, ValueError, AttributeError) as error:
        raise StepDPOError(f"checker {name!r} cannot be imported: {error}; write it as module:function") from error
    if not callable(found):
        raise StepDPOError(f"checker {name!r} is not a function")
    checker: StepChecker = found
    return checker
