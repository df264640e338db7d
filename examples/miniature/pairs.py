"""The model's own mistakes as step pairs: collect, locate, rectify, and the files they are written to.

The pipeline of the paper (Lai et al. 2024, section 3.2), with an exact checker where the paper has GPT-4 and
people: a first step is accepted because it is right, not because the solution that begins with it ends well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from examples.miniature.progress import Progress, silent
from examples.miniature.sampling import complete, solution_tokens
from examples.miniature.settings import Settings
from examples.miniature.task import (
    MODULUS,
    Problem,
    first_step,
    first_wrong_step,
    is_right,
    marker,
    problems,
    right_steps_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Record = dict[str, str]


@dataclass(frozen=True)
class Mistake:
    """A wrong solution of the model, cut at its first wrong step k.

    before:    the right steps and the marker of step k: "Step 1: ... Step k:"
    rejected:  the text of step k
    rest:      step k and everything after it
    """

    problem: Problem
    k: int
    before: str
    rejected: str
    rest: str


def collect(
    model: Any, tokenizer: PreTrainedTokenizerFast, settings: Settings, progress: Progress = silent
) -> tuple[list[Mistake], int]:
    """The located mistakes in the model's solutions of fresh problems, and how many solutions had a wrong answer.

    A wrong solution gives no mistake where all steps are right (only its answer line is wrong) and where its first
    wrong line does not begin like a step.
    """
    fresh = list(islice(problems("collect", settings.chain, settings.seed), settings.collect_problems))
    solutions = complete(
        model,
        tokenizer,
        [problem.prompt for problem in fresh],
        max_new_tokens=solution_tokens(settings),
        temperature=settings.temperature,
        batch_size=settings.generation_batch,
        progress=progress,
    )
    wrong = [(p, s) for p, s in zip(fresh, solutions, strict=True) if not is_right(p, s)]
    mistakes = [locate(problem, solution) for problem, solution in wrong]
    return [mistake for mistake in mistakes if mistake is not None], len(wrong)


def locate(problem: Problem, solution: str) -> Mistake | None:
    """Cuts a solution at its first wrong step; None where there is no such step to cut at."""
    right, text = right_steps_of(problem, solution)
    k = right + 1
    before = f"{text} {marker(k)}".lstrip()
    if right == len(problem.terms) or not solution.startswith(before):
        return None
    rest = solution.removeprefix(before)
    return Mistake(problem, k, before, first_step(rest), rest)


def rectify(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    mistakes: Sequence[Mistake],
    settings: Settings,
    progress: Progress = silent,
) -> list[Record]:
    """Step pairs: the model continues from just before each mistake; every different right step makes one pair."""
    starts = [mistake for mistake in mistakes for _ in range(settings.continuations)]
    continuations = complete(
        model,
        tokenizer,
        [mistake.problem.prompt + mistake.before for mistake in starts],
        max_new_tokens=solution_tokens(settings),
        temperature=settings.temperature,
        batch_size=settings.generation_batch,
        progress=progress,
    )
    records: dict[tuple[str, str, str], Record] = {}
    for mistake, continuation in zip(starts, continuations, strict=True):
        chosen = first_step(continuation)
        if chosen not in mistake.problem.right_steps(mistake.k):
            continue
        key = (mistake.problem.prompt, mistake.before, chosen)
        records.setdefault(
            key,
            {
                "dataset": "miniature",
                "prompt": mistake.problem.prompt,
                "initial_reason_steps": mistake.before,
                "chosen": chosen,
                "rejected": mistake.rejected,
                "full_chosen": continuation,
                "full_rejected": mistake.rest,
                "answer": mistake.problem.answer,
            },
        )
    return list(records.values())


def hold_out(records: Sequence[Record], fraction: float = 0.1) -> tuple[list[Record], list[Record]]:
    """(for training, held out): all pairs of the last tenth of the problems are held out."""
    prompts = list(dict.fromkeys(record["prompt"] for record in records))
    held = set(prompts[len(prompts) - max(1, round(fraction * len(prompts))) :])
    return [r for r in records if r["prompt"] not in held], [r for r in records if r["prompt"] in held]


def out_of_distribution(records: Sequence[Record], seed: int) -> list[Record]:
    """The same pairs with a rejected step that the model would not write: its result is a random wrong number."""
    random = Random(f"out of distribution {seed}")
    return [{**record, "rejected": _random_result(record, random), "full_rejected": ""} for record in records]


def _random_result(record: Record, random: Random) -> str:
    """The rejected step with another result; a step that ends in no number is replaced by the chosen one."""
    pattern = re.compile(r"\d\d\.$")
    taken = {found[0] for step in (record["chosen"], record["rejected"]) for found in pattern.finditer(step)}
    number = random.choice([text for n in range(MODULUS) if (text := f"{n:02}.") not in taken])
    step = record["rejected"] if pattern.search(record["rejected"]) else record["chosen"]
    return pattern.sub(number, step)


def write(path: Path, records: Sequence[Record]) -> None:
    """One record a line, in the fields of Math-Step-DPO-10K."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def read_verified(path: Path, chain: int) -> list[Record]:
    """The records of a file, each step of each checked again from its text alone.

    Raises ValueError for a chosen step that is wrong, a rejected one that is right, or earlier steps with an error.
    """
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for number, record in enumerate(records, start=1):
        problem = Problem.parse(record["prompt"])
        k = record["initial_reason_steps"].count("Step ")
        rest = "".join(f" {marker(i)}{problem.right_steps(i)[0]}" for i in range(k + 1, chain + 1))
        chosen, rejected = (record["initial_reason_steps"] + record[name] + rest for name in ("chosen", "rejected"))
        if first_wrong_step(problem, chosen) is not None or first_wrong_step(problem, rejected) != k:
            raise ValueError(f"{path.name}, line {number}: the checker does not confirm this pair: {record}")
    return records
