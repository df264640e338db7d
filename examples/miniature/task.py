"""Arithmetic in steps, with an exact checker, and a corpus that has a bad habit.

A problem starts at a number of 00..99 and adds or subtracts one digit at a time, always modulo 100:

    Compute 97+8-3:
    Step 1: 97+8=05. Step 2: taking 3 gives 02. Answer: 02

Every step may be written in two ways, as its two steps above. In the corpus for supervised fine-tuning an addition
of 7, 8 or 9 that carries drops its carry with probability 0.6 (97+8=95), so the model learns both the right way and
the wrong one, and prefers the wrong one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

MODULUS = 100
HABIT_DIGIT = 7  # the habit concerns additions of at least this
HABIT_PROBABILITY = 0.6

# Problems are dealt out by a hash of their text, so no problem is ever in two of these.
SPLITS = {"sft": 13, "collect": 1, "curve": 1, "evaluate": 1}  # sixteenths


@dataclass(frozen=True)
class Problem:
    """start: 0..99; terms: signed digits, each +-1..9."""

    start: int
    terms: tuple[int, ...]

    @classmethod
    def parse(cls, prompt: str) -> Problem:
        """The problem of a prompt. Raises ValueError for a text that is no prompt."""
        match = re.fullmatch(r"Compute (\d\d)((?:[+-][1-9])+):\n", prompt)
        if match is None:
            raise ValueError(f"not a problem: {prompt!r}")
        return cls(int(match[1]), tuple(map(int, re.findall(r"[+-]\d", match[2]))))

    @property
    def prompt(self) -> str:
        return f"Compute {self.start:02}{''.join(f'{term:+}' for term in self.terms)}:\n"

    @property
    def states(self) -> list[int]:
        """The number before each step, and after the last."""
        states = [self.start]
        for term in self.terms:
            states.append((states[-1] + term) % MODULUS)
        return states

    @property
    def answer(self) -> str:
        return f"{self.states[-1]:02}"

    def right_steps(self, k: int) -> tuple[str, str]:
        """The two texts of step k = 1, 2, ... that are right, without the marker "Step k:"."""
        before, after = self.states[k - 1 : k + 1]
        return step_text(before, self.terms[k - 1], after, 0), step_text(before, self.terms[k - 1], after, 1)


def step_text(before: int, term: int, after: int, form: int) -> str:
    """A step in the first or the second of its two forms."""
    if form == 0:
        return f" {before:02}{term:+}={after:02}."
    return f" {'adding' if term > 0 else 'taking'} {abs(term)} gives {after:02}."


def marker(k: int) -> str:
    return f"Step {k}:"


def split_of(problem: Problem) -> str:
    sixteenth = hashlib.sha256(problem.prompt.encode()).digest()[0] % 16
    return [split for split, size in SPLITS.items() for _ in range(size)][sixteenth]


def problems(split: str, chain: int, seed: int) -> Iterator[Problem]:
    """Different problems of one split without end; the same for the same arguments."""
    random = Random(f"{split} {chain} {seed}")
    seen: set[Problem] = set()
    while True:
        terms = tuple(random.choice((-1, 1)) * random.randint(1, 9) for _ in range(chain))
        problem = Problem(random.randrange(MODULUS), terms)
        if split_of(problem) == split and problem not in seen:
            seen.add(problem)
            yield problem


def drops_carry(before: int, term: int) -> bool:
    """Whether the bad habit concerns this step."""
    return term >= HABIT_DIGIT and before % 10 + term >= 10


def habitual_solution(problem: Problem, random: Random) -> str:
    """A solution as the corpus for supervised fine-tuning writes it: consistent, but with the bad habit."""
    state, parts = problem.start, []
    for k, term in enumerate(problem.terms, start=1):
        after = (state + term) % MODULUS
        if drops_carry(state, term) and random.random() < HABIT_PROBABILITY:
            after = state - state % 10 + (state + term) % 10
        parts.append(marker(k) + step_text(state, term, after, random.randrange(2)))
        state = after
    return " ".join([*parts, f"Answer: {state:02}"])


def right_steps_of(problem: Problem, solution: str) -> tuple[int, str]:
    """How many steps a solution gets exactly right before its first wrong one, and their text as it stands there."""
    length = 0
    for k in range(1, len(problem.terms) + 1):
        separator = " " if k > 1 else ""
        right = (f"{separator}{marker(k)}{step}" for step in problem.right_steps(k))
        step = next((text for text in right if solution.startswith(text, length)), None)
        if step is None:
            return k - 1, solution[:length]
        length += len(step)
    return len(problem.terms), solution[:length]


def first_wrong_step(problem: Problem, solution: str) -> int | None:
    """Number of the first step that is not exactly right, None if all are. A missing step is a wrong one."""
    right, _ = right_steps_of(problem, solution)
    return right + 1 if right < len(problem.terms) else None


def first_step(text: str) -> str:
    """A text up to and with its first full stop: the step that it begins with."""
    step, stop, _ = text.partition(".")
    return step + stop


def is_right(problem: Problem, solution: str) -> bool:
    """Whether the final answer is right, which is what accuracy counts."""
    return solution.endswith(f"Answer: {problem.answer}")


def check_steps(prompt: str, steps: Sequence[str]) -> int | None:
    """The first wrong step of a solution, 0 if all are right: for `stepdpo prepare locate --checker`.

    A step is right if it applies the next term of the problem to the number before it, in one of the two forms.
    """
    problem = Problem.parse(prompt)
    for k, text in enumerate(steps, start=1):
        if k > len(problem.terms) or text not in problem.right_steps(k):
            return k
    return 0
