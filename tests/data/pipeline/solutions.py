"""Solutions for tests of the pipeline."""

from __future__ import annotations

from typing import Any

from stepdpo_kernels.data.pipeline.solution import Solution
from stepdpo_kernels.data.steps import StepFormat


def solution(text: str, *, prompt: str = "What is it?", answer: str = "7", number: int = 0, **fields: Any) -> Solution:
    """A wrong solution, cut at its markers; `closing` is given to StepFormat."""
    steps = StepFormat(closing=fields.pop("closing", "")).split(text)
    values: dict[str, Any] = {
        "id": f"p{number}/0",
        "problem_id": f"p{number}",
        "prompt": prompt,
        "answer": answer,
        "reference": None,
        "sample": 0,
        "seed": 0,
        "generator": "test",
        "steps": steps,
        "logps": (None,) * len(steps.steps),
        "finish": "stop",
        "prediction": None,
        "verdict": "wrong",
    }
    return Solution(**(values | fields))
