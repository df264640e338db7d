"""Rollouts find the step that closes the way to the answer, as far as samples can."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import islice

import pytest

pytest.importorskip("math_verify")

from examples.miniature.task import Problem, check_steps, habitual_solution, marker, problems
from stepdpo_kernels.answers import AnswerChecker
from stepdpo_kernels.data.generation import Completion, Prompt, Sampling
from stepdpo_kernels.data.pipeline.locate.exact import ExactLocator
from stepdpo_kernels.data.pipeline.locate.rollout import RolloutLocator
from stepdpo_kernels.data.pipeline.locate.score import agreement
from stepdpo_kernels.data.pipeline.solution import Solution
from stepdpo_kernels.types import StepDPOError
from tests.data.pipeline.solutions import solution

CLOSING = r"\s*Answer:"


class Solver:
    """Goes on from any prefix of a miniature solution; each step is right with a probability of its own.

    From a wrong number on it computes rightly, and so never reaches the answer.
    """

    name = "solver"

    def __init__(self, skill: float) -> None:
        self.skill, self.asked = skill, 0

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        draw = random.Random(sampling.seed)
        self.asked += len(prompts) * sampling.n
        return [[Completion(self._go_on(prompt, draw), "stop") for _ in range(sampling.n)] for prompt in prompts]

    def _go_on(self, prompt: Prompt, draw: random.Random) -> str:
        problem = Problem.parse(prompt.problem)
        done = prompt.begun.count("Step ")
        begun = prompt.begun.endswith(":")  # with the marker of a step that is to be written
        written = [text for text in prompt.begun.replace(".", " ").split() if text[-2:].isdigit()]
        state = int(written[-1][-2:]) if written else problem.start
        parts = []
        for k in range(done if begun else done + 1, len(problem.terms) + 1):
            state = (state + problem.terms[k - 1]) % 100
            if draw.random() > self.skill:
                state = (state + 1) % 100  # no slip of the habit makes up for it
            head = "" if begun and k == done else (" " if k > 1 else "") + marker(k)
            parts.append(f"{head} gives {state:02}.")
        return "".join(parts) + f" Answer: {state:02}"


def wrong_solutions(count: int):
    draw = random.Random(0)
    found: list[Solution] = []
    for problem in islice(problems("collect", 5, 0), 20 * count):
        text = habitual_solution(problem, draw)
        if check_steps(problem.prompt, [s.text for s in solution(text, closing=CLOSING).steps.steps]):
            answer = problem.answer
            if not text.endswith(answer):
                found.append(solution(text, prompt=problem.prompt, answer=answer, number=len(found), closing=CLOSING))
    return found[:count]


@pytest.mark.parametrize("search", ["binary", "linear"])
def test_agrees_with_the_exact_locator(search):
    """With a solver that is right on nine steps of ten, a right prefix is nearly always continued well."""
    solutions = wrong_solutions(60)
    exact = [location.step for location in ExactLocator(checker=check_steps).locate(solutions, 0)]
    with AnswerChecker() as checker:
        locator = RolloutLocator(Solver(0.9), checker, Sampling(n=16, temperature=1.0), search=search)
        found = locator.locate(solutions, 1)
        assert locator.locate(solutions, 1) == found  # the same seed
    steps = [location.step for location in found]
    assert sum(a == b for a, b in zip(exact, steps, strict=True)) >= 57
    assert "60" in str(agreement(exact, steps))
    assert all(location.counts["continuations"] > 0 for location in found)


def test_a_weak_solver_blames_too_early_or_cannot_decide():
    solutions = wrong_solutions(40)
    exact = [location.step or 0 for location in ExactLocator(checker=check_steps).locate(solutions, 0)]
    with AnswerChecker() as checker:
        found = RolloutLocator(Solver(0.3), checker, Sampling(n=4, temperature=1.0)).locate(solutions, 0)
    assert any(location.step is None for location in found)
    assert all(location.problem == "no continuation of the prompt is right" for location in found if not location.step)
    early = [location.step - k for location, k in zip(found, exact, strict=True) if location.step is not None]
    assert max(early) <= 0


def test_binary_search_asks_less():
    """Of solutions that go wrong in their last step, where the first step after the other takes longest."""
    late = [s for s in wrong_solutions(150) if check_steps(s.prompt, [step.text for step in s.steps.steps]) == 5]
    asked = {}
    with AnswerChecker() as checker:
        for search in ("binary", "linear"):
            solver = Solver(1.0)
            RolloutLocator(solver, checker, Sampling(n=8, temperature=1.0), search=search).locate(late, 0)
            asked[search] = solver.asked
    assert len(late) > 10
    assert asked["binary"] < asked["linear"]


def test_a_continuation_that_failed_blames_no_step():
    class Short(Solver):
        """Has no room for more than two steps."""

        def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
            drawn = super().generate(prompts, sampling)
            for i, prompt in enumerate(prompts):
                if prompt.begun.count("Step ") > 2:
                    drawn[i] = [Completion("", "failed", "no room")] * sampling.n
            return drawn

    solutions = wrong_solutions(40)
    exact = [location.step or 0 for location in ExactLocator(checker=check_steps).locate(solutions, 0)]
    with AnswerChecker() as checker:
        locator = RolloutLocator(Short(1.0), checker, Sampling(n=2, temperature=1.0), search="linear")
        found = locator.locate(solutions, 0)
        verdicts = locator.verify(solutions, [3] * len(solutions), 0)
    assert [location.step for location in found] == [k if k == 1 else None for k in exact]
    assert {location.problem for location in found if location.step is None} == {"continuations failed"}
    assert {verdict for verdict, _ in verdicts} == {None}


def test_verifying_a_step():
    solutions = wrong_solutions(10)
    exact = [location.step or 0 for location in ExactLocator(checker=check_steps).locate(solutions, 0)]
    with AnswerChecker() as checker:
        locator = RolloutLocator(Solver(1.0), checker, Sampling(n=2, temperature=1.0))
        assert [verdict for verdict, _ in locator.verify(solutions, exact, 0)] == [False] * 10
        later = [(s, k - 1) for s, k in zip(solutions, exact, strict=True) if k > 1]
        assert all(verdict for verdict, _ in locator.verify([s for s, _ in later], [k for _, k in later], 0))


def test_options_are_checked():
    with pytest.raises(StepDPOError, match="search must be one of binary, linear; got 'random'"):
        RolloutLocator(Solver(1), None, Sampling(n=2), search="random")
    with pytest.raises(StepDPOError, match="temperature must be above 0"):
        RolloutLocator(Solver(1), None, Sampling(temperature=0.0))
