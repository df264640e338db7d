"""Final answers: found in a solution, compared with the right one.

    extract_answer("... so it is \\\\boxed{\\\\frac{1}{2}}.")   "\\\\frac{1}{2}"
    answers_match("1/2", "0.5")                             True

What counts as the same answer, and what does not, is in README.md beside this file. No text is ever evaluated.
"""

from __future__ import annotations

from stepdpo_kernels.answers.checker import AnswerChecker, Verdict, answers_match
from stepdpo_kernels.answers.extract import extract_answer

__all__ = ["AnswerChecker", "Verdict", "answers_match", "extract_answer"]
