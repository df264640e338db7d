"""Greedy accuracy on fresh problems, with its standard error, and the check that nothing leaked into them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import sqrt
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from examples.miniature.progress import Progress, silent
from examples.miniature.sampling import complete, solution_tokens
from examples.miniature.settings import Settings
from examples.miniature.task import Problem, drops_carry, first_wrong_step, is_right, problems

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Accuracy:
    """right: for each problem whether the answer is right; by_habit: wrong answers that first go wrong where the
    habit is to drop a carry.

    The problems stand in one order for every model, so that two models can be compared problem by problem.
    """

    right: tuple[bool, ...]
    by_habit: int

    @property
    def mean(self) -> float:
        return fmean(self.right)

    @property
    def standard_error(self) -> float:
        return sqrt(self.mean * (1 - self.mean) / len(self.right))

    @property
    def wrong(self) -> int:
        return len(self.right) - sum(self.right)

    def minus(self, other: Accuracy) -> tuple[float, float]:
        """Difference of the means, and its standard error from the differences problem by problem."""
        differences = [float(a) - float(b) for a, b in zip(self.right, other.right, strict=True)]
        return fmean(differences), stdev(differences) / sqrt(len(differences))


def draw(split: str, count: int, settings: Settings) -> list[Problem]:
    return list(islice(problems(split, settings.chain, settings.seed), count))


def measure(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    among: Sequence[Problem],
    settings: Settings,
    progress: Progress = silent,
) -> Accuracy:
    """Solves the problems greedily."""
    was_training = model.training
    model.eval()
    solutions = complete(
        model,
        tokenizer,
        [problem.prompt for problem in among],
        max_new_tokens=solution_tokens(settings),
        batch_size=settings.generation_batch,
        progress=progress,
    )
    model.train(was_training)
    right = tuple(is_right(problem, solution) for problem, solution in zip(among, solutions, strict=True))
    by_habit = 0
    for problem, solution, ok in zip(among, solutions, right, strict=True):
        k = None if ok else first_wrong_step(problem, solution)
        by_habit += k is not None and drops_carry(problem.states[k - 1], problem.terms[k - 1])
    return Accuracy(right, by_habit)


def shared_problems(sets: Mapping[str, Collection[str]]) -> dict[str, int]:
    """How many prompts each two sets have in common, by "one and other"."""
    names = list(sets)
    return {
        f"{one} and {other}": len(set(sets[one]) & set(sets[other]))
        for i, one in enumerate(names)
        for other in names[i + 1 :]
    }
