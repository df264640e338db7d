"""The exact locator knows what whoever made a solution knows."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from itertools import islice
from pathlib import Path
from random import Random

import pytest

from examples.miniature.task import check_steps, first_wrong_step, habitual_solution, problems
from stepdpo_kernels.data.pipeline.locate.exact import ExactLocator
from stepdpo_kernels.data.pipeline.locate.protocol import Location
from stepdpo_kernels.types import StepDPOError
from tests.data.pipeline.solutions import solution

ROOT = Path(__file__).resolve().parents[3]
FORMS = [
    "{who} has {a} {op} {b} = {c} {things}.",
    "That makes {a} {things} {op} {b} {things} = {c} {things}",
    "Then we get {a}{op}{b}={c}.",
    "So ${a} {op} ${b} = ${c} in all",
    "This gives $\\displaystyle {a} {latex} {b} = {c}$.",
    "In step {k}, {a} {op} {b} = <<{a}{op}{b}={c}>>{c} {things}",
    "Now ({a}) {op} ({b}) = {c}, which we need later.",
]
LATEX = {"+": "+", "-": "-", "*": r"\times", "/": r"\div"}


def number(value: Fraction, draw: Random) -> str:
    """Integers, some with separators; other fractions as decimals of two places."""
    if value.denominator == 1:
        return f"{int(value):,}" if draw.random() < 0.5 else str(int(value))
    return f"{float(value):.2f}"


def generated(draw: Random, index: int) -> tuple[str, int]:
    """(a solution of three to seven steps, its first wrong step or 0): the error may be carried on or not."""
    state, wrong = Fraction(draw.randint(2, 60)), draw.choice([0, *range(1, 8)])
    steps = draw.randint(max(3, wrong), 7)
    who, things = draw.choice(["Ann", "Bo", "The class"]), draw.choice(["eggs", "books", "red apples", "hours"])
    parts = []
    for k in range(1, steps + 1):
        op = draw.choice("+-*/") if state.denominator == 1 else draw.choice("+-")
        term = Fraction(draw.choice([4, 5, 8, 10]) if op == "/" else draw.randint(2, 12))
        result = {"+": state + term, "-": state - term, "*": state * term, "/": state / term if op == "/" else state}[
            op
        ]
        if abs(result) > 10**7 or (result * 1000).denominator != 1:
            op, result = "-", state - term
        shown = result
        if k == wrong:
            shown = result + draw.choice([-10, -1, 1, 2, 10, 100])
        percent = op == "*" and draw.random() < 0.3 and k != wrong
        a, b, c = (number(value, draw) for value in (state, term, shown))
        if (Fraction(a.replace(",", "")), Fraction(c.replace(",", ""))) != (state, shown):  # rounded when written
            a, c = str(float(state)), str(float(shown))
        form = draw.choice(FORMS) if shown >= 0 and state >= 0 else FORMS[2]
        text = form.format(a=a, b=b, c=c, op=op, latex=LATEX[op], who=who, things=things, k=k)
        if percent and state.denominator == 1:
            text = f"And {int(term) * 100}% of {a} = {c}"
        parts.append(f"Step {k}: {text}")
        state = shown if k != wrong or draw.random() < 0.5 else result
    return "Let's think step by step.\n" + "\n".join(parts), wrong


def test_all_of_2000_generated_solutions():
    draw = Random(0)
    made = [generated(draw, i) for i in range(2000)]
    located = ExactLocator().locate([solution(text, number=i) for i, (text, _) in enumerate(made)], 0)
    differ = [(text, wrong, at) for (text, wrong), at in zip(made, located, strict=True) if at.step != wrong]
    assert differ == []
    assert len({wrong for _, wrong in made}) == 8
    assert len({text for text, _ in made}) == 2000


@pytest.mark.parametrize("checker", [check_steps, "examples.miniature.task:check_steps"])
def test_all_of_2000_solutions_of_the_miniature(checker):
    draw = Random(0)
    made = list(islice(problems("collect", 5, 0), 2000))
    texts = [habitual_solution(problem, draw) for problem in made]
    solutions = [
        solution(text, prompt=problem.prompt, closing=r"\s*Answer:") for problem, text in zip(made, texts, strict=True)
    ]
    truth = [first_wrong_step(problem, text) or 0 for problem, text in zip(made, texts, strict=True)]
    assert [location.step for location in ExactLocator(checker=checker).locate(solutions, 0)] == truth
    assert 0.2 < sum(step > 0 for step in truth) / 2000 < 0.9


def test_unchecked_steps():
    text = "Step 1: She has some.\nStep 2: 3 + 4 = 8\nStep 3: 8 + 1 = 9"
    assert ExactLocator().locate([solution(text)], 0) == [Location(2, "3 + 4 = 8 does not hold")]
    (strict,) = ExactLocator(strict=True).locate([solution(text)], 0)
    assert (strict.step, strict.problem) == (None, "an unchecked step before the wrong one")
    for text, step, problem in (
        ("Step 1: She has some.\nStep 2: 3 + 4 = 7", None, "no wrong equation, but not every step can be checked"),
        ("Step 1: She has some.", None, "no step can be checked"),
        ("nothing", None, "no steps"),
        ("Step 1: 1 + 1 = 2\nStep 2: 3 + 4 = 7", 0, ""),
    ):
        (found,) = ExactLocator().locate([solution(text)], 0)
        assert (found.step, found.problem) == (step, problem)


def test_verifying_a_step():
    locator = ExactLocator()
    right = solution("Step 1: some.\nStep 2: 3 + 4 = 7\nStep 3: 7 + 1 = 9")
    assert [locator.verify([right], [k], 0)[0][0] for k in (1, 2, 3)] == [None, True, False]
    with_checker = ExactLocator(checker=lambda prompt, steps: 2 if len(steps) > 1 else 0)
    assert [with_checker.verify([right], [k], 0)[0][0] for k in (1, 2)] == [True, False]


def test_modulus_and_settings():
    text = "Step 1: 97+8=05"
    assert ExactLocator(modulus=100).locate([solution(text)], 0)[0].step == 0
    assert ExactLocator().locate([solution(text)], 0)[0].step == 1
    assert ExactLocator(modulus=100, checker="examples.miniature.task:check_steps").settings == {
        "modulus": 100,
        "strict": False,
        "checker": "examples.miniature.task:check_steps",
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"modulus": 1}, "modulus must be at least 2, got 1"),
        ({"checker": "nowhere.at.all:f"}, "checker 'nowhere.at.all:f' cannot be imported"),
        ({"checker": "examples.miniature.task"}, "cannot be imported"),
        ({"checker": "examples.miniature.task:nothing"}, "cannot be imported"),
        ({"checker": "examples.miniature.task:MODULUS"}, "is not a function"),
    ],
)
def test_what_is_wrong_is_named(options, said):
    with pytest.raises(StepDPOError, match=said):
        ExactLocator(**options)


def test_a_checker_that_returns_nonsense():
    with pytest.raises(StepDPOError, match="returned 9 for 1 steps"):
        ExactLocator(checker=lambda prompt, steps: 9).locate([solution("Step 1: x")], 0)


def test_a_checker_in_the_working_directory(tmp_path):
    """The command that is installed has its own folder on the path, and not the one that it is called in."""
    (tmp_path / "my_checker_of_steps.py").write_text("def check(prompt, steps):\n    return len(steps)\n")
    code = (
        "import sys; sys.path[:] = [path for path in sys.path if path];"
        "from stepdpo_kernels.data.pipeline.locate.exact import import_checker;"
        "print(import_checker('my_checker_of_steps:check')('', ['a', 'b']))"
    )
    paths = {"PYTHONPATH": str(ROOT)}
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, **paths}, capture_output=True, text=True
    )
    assert said.stdout.strip() == "2", said.stderr
