"""The model's own mistakes as step pairs: collect, locate, rectify, and the files they are written to.

The pipeline of the paper (Lai et al. 2024, section 3.2) as `stepdpo prepare` runs it, with an exact checker where the
paper has GPT-4 and people: a first step is accepted because it is right, not because the solution that begins with it
ends well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from examples.miniature.progress import Progress, silent
from examples.miniature.sampling import solution_tokens
from examples.miniature.settings import Settings
from examples.miniature.task import MODULUS, Problem, check_steps, first_wrong_step, marker, problems
from stepdpo_kernels.answers import AnswerChecker
from stepdpo_kernels.data.generation import Sampling
from stepdpo_kernels.data.generation.transformers_generator import TransformersGenerator
from stepdpo_kernels.data.pipeline.collect import collect
from stepdpo_kernels.data.pipeline.locate.exact import ExactLocator
from stepdpo_kernels.data.pipeline.locate.stage import locate
from stepdpo_kernels.data.pipeline.rectify import rectify
from stepdpo_kernels.data.pipeline.stage import StageReport
from stepdpo_kernels.data.steps import StepFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Record = dict[str, Any]


STEPS = StepFormat(closing=r"\s*Answer:")
PROBLEMS, SOLUTIONS, LOCATED, PAIRS = "problems.jsonl", "solutions.jsonl", "located.jsonl", "pairs-all.jsonl"


def write_problems(path: Path, settings: Settings) -> None:
    """The problems that mistakes are collected on."""
    drawn = islice(problems("collect", settings.chain, settings.seed), settings.collect_problems)
    records = ({"id": f"p{i}", "prompt": p.prompt, "answer": p.answer} for i, p in enumerate(drawn))
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def prepare(
    model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path, settings: Settings, progress: Progress = silent
) -> tuple[list[Record], int, int]:
    """The three stages of `stepdpo prepare`, each with its file in `folder`.

    Returns the pairs, how many solutions had a wrong answer, and how many of these were cut at their first wrong step.
    """
    generator = TransformersGenerator(
        model, tokenizer, template="none", batch_size=settings.generation_batch, name="miniature"
    )
    locator = ExactLocator(checker=check_steps)
    sampling = Sampling(
        temperature=settings.temperature,
        top_p=1.0,
        max_new_tokens=solution_tokens(settings),
        seed=settings.seed,
        logps=True,
    )

    def show(report: StageReport) -> None:
        total = settings.collect_problems if report.stage == "collect" else wrong
        progress(report.read, total, report.stage)

    write_problems(folder / PROBLEMS, settings)
    again: dict[str, Any] = {"overwrite": True, "progress": show}
    wrong = 0
    with AnswerChecker() as checker:
        collected = collect(
            folder / PROBLEMS,
            folder / SOLUTIONS,
            generator,
            checker,
            sampling,
            beginning=marker(1),
            steps=STEPS,
            chunk=300,
            **again,
        )
        wrong = int(collected.counts["wrong"])
        located = locate(folder / SOLUTIONS, folder / LOCATED, locator, **again)
        rectify(
            folder / LOCATED,
            folder / PAIRS,
            generator,
            checker,
            replace(sampling, n=settings.continuations),
            steps=STEPS,
            verifier=locator,
            dataset="miniature",
            chunk=100,
            **again,
        )
    return read(folder / PAIRS), wrong, int(located.counts.get("located", 0))


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


def read(path: Path) -> list[Record]:
    with path.open() as file:
        return [json.loads(line) for line in file]


def read_verified(path: Path, chain: int) -> list[Record]:
    """The records of a file, each step of each checked again from its text alone.

    Raises ValueError for a chosen step that is wrong, a rejected one that is right, or earlier steps with an error.
    """
    records = read(path)
    for number, record in enumerate(records, start=1):
        problem = Problem.parse(record["prompt"])
        k = record["initial_reason_steps"].count("Step ")
        rest = "".join(f" {marker(i)}{problem.right_steps(i)[0]}" for i in range(k + 1, chain + 1))
        chosen, rejected = (record["initial_reason_steps"] + record[name] + rest for name in ("chosen", "rejected"))
        if first_wrong_step(problem, chosen) is not None or first_wrong_step(problem, rejected) != k:
            raise ValueError(f"{path.name}, line {number}: the checker does not confirm this pair: {record}")
    return records
