"""How the tasks in this folder are graded: as `stepdpo evaluate` does it."""

from __future__ import annotations

from typing import Any

from stepdpo_kernels.answers import answers_match, extract_answer

BEGINNING = "Let's think step by step.\nStep 1:"  # gen_prefix of the tasks


def gsm8k_answer(doc: dict[str, Any]) -> str:
    return str(doc["answer"]).rpartition("####")[2].strip()


def math_answer(doc: dict[str, Any]) -> str:
    answer = extract_answer(doc["solution"])
    if answer is None:
        raise ValueError(f"field 'solution' has no answer: {doc['solution'][-60:]!r}")
    return answer


def grade_gsm8k(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return _grade(gsm8k_answer(doc), results[0])


def grade_math(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return _grade(math_answer(doc), results[0])


def _grade(answer: str, text: str) -> dict[str, float]:
    prediction = extract_answer(BEGINNING + text)
    right = prediction is not None and answers_match(answer, prediction)
    return {"acc": float(right), "no_answer": float(prediction is None)}
