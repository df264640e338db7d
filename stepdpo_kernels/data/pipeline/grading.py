"""A completion -> a graded solution."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from stepdpo_kernels.data.generation import Completion


class Verdict(Protocol):
    """equal: whether gold and prediction are the same answer; reason: in a word, why not."""

    @property
    def equal(self) -> bool: ...
    @property
    def reason(self) -> str: ...


class Checker(Protocol):
    """`answers.AnswerChecker`, or anything that compares answers: (gold, prediction) in, verdicts out, in order."""

    def check(self, pairs: Iterable[tuple[str, str]]) -> Sequence[Verdict]: ...


class Grade(NamedTuple):
    """prediction: the final answer, if there is one; verdict: as in `solution.py`; reason: the checker's."""

    prediction: str | None
    verdict: str
    reason: str = ""


def grade(
    golds: Sequence[str], begun: Sequence[str], completions: Sequence[Completion], checker: Checker
) -> list[Grade]:
    """One grade for each solution, which is how it begins and its completion. One that was cut off is unfinished."""
    found = [_answer(start, end.text) for start, end in zip(begun, completions, strict=True)]
    asked = {i: text for i, text in enumerate(found) if text is not None and completions[i].finish == "stop"}
    verdicts = dict(zip(asked, checker.check((golds[i], text) for i, text in asked.items()), strict=True))
    grades = []
    for i, (prediction, completion) in enumerate(zip(found, completions, strict=True)):
        if completion.finish != "stop":
            grades.append(Grade(prediction, "unfinished", completion.finish))
        elif prediction is None:
            grades.append(Grade(None, "no_answer"))
        else:
            grades.append(Grade(prediction, "right" if verdicts[i].equal else "wrong", verdicts[i].reason))
    return grades


def _answer(begun: str, text: str) -> str | None:
    """The answer of a solution. None where what was begun has it and its continuation has none of its own."""
    from stepdpo_kernels.answers import extract_answer

    answer = extract_answer(begun + text)
    return None if extract_answer(text) is None and answer == extract_answer(begun) else answer
