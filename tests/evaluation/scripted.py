"""A generator that says what it is told to, and problems to ask it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stepdpo_kernels.data.generation import Completion, Prompt, Sampling


class Scripted:
    """say: a problem's text and a sample's number -> what is written, or a whole Completion"""

    def __init__(self, say: Callable[[str, int], str | Completion], name: str = "scripted") -> None:
        self.say, self.name = say, name
        self.asked: list[tuple[Prompt, Sampling]] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        self.asked += [(prompt, sampling) for prompt in prompts]
        drawn = [[self.say(prompt.problem, i) for i in range(sampling.n)] for prompt in prompts]
        return [[Completion(x, "stop") if isinstance(x, str) else x for x in samples] for samples in drawn]


def write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def sums(count: int) -> list[dict[str, Any]]:
    """Plain problems "i + i = ?" of two subjects and three levels."""
    return [
        {
            "id": f"q{i}",
            "prompt": f"{i} + {i} = ?",
            "answer": str(2 * i),
            "subject": ("even", "odd")[i % 2],
            "level": f"Level {i % 3 + 1}",
        }
        for i in range(count)
    ]


def answer_of(problem: str) -> int:
    return 2 * int(problem.split()[0])
