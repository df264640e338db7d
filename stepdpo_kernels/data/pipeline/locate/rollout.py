"""The first wrong step by Monte-Carlo continuation: the first step after which no continuation is right any more.

As Math-Shepherd judges steps (Wang et al. 2024, arXiv 2312.08935, "hard estimation"), with continuations of the model
itself. A step after which some continuation reaches the right answer still left the way open; that does not make it a
good step, and with few continuations a step may be blamed that only made the way hard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

from stepdpo_kernels.data.generation import Completion, Generator, Prompt, Sampling
from stepdpo_kernels.data.pipeline.grading import Checker, grade
from stepdpo_kernels.data.pipeline.locate.protocol import Location, Verdicts
from stepdpo_kernels.data.pipeline.solution import Solution
from stepdpo_kernels.data.pipeline.stage import seed_for
from stepdpo_kernels.types import StepDPOError

SEARCHES = ("binary", "linear")
FAILED = "continuations failed"


@dataclass
class _Search:
    """What is known of one solution: a continuation was right after step `good`, and none after step `bad`."""

    solution: Solution
    good: int = 0
    bad: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def open(self) -> bool:
        return self.good + 1 < self.bad


class RolloutLocator:
    """Samples continuations after the steps of a wrong solution until it is known where the way to the answer closes.

    generator:  continues the text; checker compares final answers
    sampling:   n continuations of a step at most; a right one ends it early, so they are drawn in rounds of doubling
                size
    search:     "binary" halves the steps that are left, which supposes that no continuation is right after a step
                once none was after an earlier one (OmegaPRM, Luo et al. 2024, arXiv 2406.06592); "linear" tries one
                after the other

    The last step of a wrong solution needs no continuation. A solution is undecided where no continuation of its
    prompt alone is right: the model cannot solve the problem at all; and where none is right after a step, but some
    failed. All solutions of a call are continued together.
    """

    name = "rollout"

    def __init__(self, generator: Generator, checker: Checker, sampling: Sampling, *, search: str = "binary") -> None:
        if search not in SEARCHES:
            raise StepDPOError(f"search must be one of {', '.join(SEARCHES)}; got {search!r}")
        if sampling.temperature == 0:
            raise StepDPOError("continuations are sampled: their temperature must be above 0, got 0")
        self.generator, self.checker, self.sampling, self.search = generator, checker, sampling, search

    @property
    def settings(self) -> dict[str, object]:
        return {"generator": self.generator.name, "sampling": asdict(self.sampling), "search": self.search}

    def locate(self, solutions: Sequence[Solution], seed: int) -> list[Location]:
        searches = [_Search(solution, bad=len(solution.steps.steps)) for solution in solutions]
        located: dict[int, Location] = {
            i: Location(None, problem="no steps") for i, search in enumerate(searches) if not search.bad
        }
        asked = [search for i, search in enumerate(searches) if i not in located]
        solvable = dict(zip(map(id, asked), self._reach([(search, 0) for search in asked], seed), strict=True))
        for i, search in enumerate(searches):
            if i not in located and not solvable[id(search)]:
                problem = FAILED if solvable[id(search)] is None else "no continuation of the prompt is right"
                located[i] = Location(None, problem=problem, counts=search.counts)
        rest = {i: search for i, search in enumerate(searches) if i not in located}
        number = 0
        while opened := {i: search for i, search in rest.items() if search.open}:
            number += 1
            steps = [self._next(search) for search in opened.values()]
            reached = self._reach(list(zip(opened.values(), steps, strict=True)), seed_for(seed, number))
            for (i, search), k, right in zip(opened.items(), steps, reached, strict=True):
                if right is None:
                    located[i] = Location(None, f"after step {k}", FAILED, rest.pop(i).counts)
                elif right:
                    search.good = k
                else:
                    search.bad = k
        for i, search in rest.items():
            words = f"no continuation is right after step {search.bad}"
            located[i] = Location(search.bad, words, counts=search.counts)
        return [located[i] for i in range(len(searches))]

    def verify(self, solutions: Sequence[Solution], ks: Sequence[int], seed: int) -> Verdicts:
        searches = [_Search(solution) for solution in solutions]
        reached = self._reach(list(zip(searches, ks, strict=True)), seed)
        return [(right, search.counts) for search, right in zip(searches, reached, strict=True)]

    def _next(self, search: _Search) -> int:
        return search.good + 1 if self.search == "linear" else (search.good + search.bad) // 2

    def _reach(self, asked: list[tuple[_Search, int]], seed: int) -> list[bool | None]:
        """For each search and step k whether one of n continuations after it has the right answer.

        None where none has it and some failed.
        """
        right, failed = [False] * len(asked), [False] * len(asked)
        done, size, number = 0, max(1, self.sampling.n // 4), 0
        while done < self.sampling.n and not all(right):
            size = min(size, self.sampling.n - done)
            rest = [i for i, ok in enumerate(right) if not ok]
            prompts = [_prompt(search.solution, k) for search, k in (asked[i] for i in rest)]
            sampling = replace(self.sampling, n=size, seed=seed_for(seed, number), logps=False)
            drawn = self.generator.generate(prompts, sampling)
            every: list[tuple[int, Prompt, Completion]] = [
                (i, prompt, completion)
                for i, prompt, completions in zip(rest, prompts, drawn, strict=True)
                for completion in completions
            ]
            golds = [asked[i][0].solution.answer for i, _, _ in every]
            grades = grade(golds, [p.begun for _, p, _ in every], [c for _, _, c in every], self.checker)
            for (i, _, completion), graded in zip(every, grades, strict=True):
                right[i] |= graded.verdict == "right"
                failed[i] |= completion.finish == "failed"
                asked[i][0].counts["continuations"] += 1
            done, size, number = done + size, size * 2, number + 1
        return [None if bad and not ok else ok for ok, bad in zip(right, failed, strict=True)]


def _prompt(solution: Solution, k: int) -> Prompt:
    """The solution through step k and, where it goes on, the marker of the next one, so that its format is kept."""
    if k < len(solution.steps.steps):
        return Prompt(solution.prompt, solution.steps.before(k + 1))
    return Prompt(solution.prompt, solution.steps.before(k) + solution.steps.steps[k - 1].text)
