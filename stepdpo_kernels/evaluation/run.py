"""A run: every problem of a task, what the model said, and whether it is right. One record a line in `items.jsonl`:

    id, prompt, answer   of the problem; answer: the right one
    subject, level       "" where the source names none
    seed                 of the samples
    samples              list of objects:
        text             what the model wrote after the beginning
        finish           "stop", "length" or "failed"
        prediction       the final answer that was found in it, or null
        verdict          "right", "wrong", "no_answer", "unfinished" or "failed"
        reason           the checker's word where there was something to compare, the generator's where it failed
        group            equal answers of an item have the same number, 0, 1, ...; null where there is no vote

A solution that was cut off at the most tokens is unfinished, whatever was found in it. It counts as not right.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

from stepdpo_kernels.data.generation import Completion, Generator, Prompt, Sampling
from stepdpo_kernels.data.pipeline.grading import Checker, Grade, grade
from stepdpo_kernels.data.pipeline.stage import Chunk, StageReport, check_complete, run_file, run_stage
from stepdpo_kernels.data.problems import Problem, parse_problem
from stepdpo_kernels.data.records import shorten
from stepdpo_kernels.evaluation.metrics import ItemScore, majority_score
from stepdpo_kernels.evaluation.tasks import Task
from stepdpo_kernels.types import StepDPOError

ITEMS_FILE = "items.jsonl"
STAGE = "evaluate"
VERDICTS = ("right", "wrong", "no_answer", "unfinished", "failed")


@dataclass(frozen=True)
class Sample:
    """One solution, its fields as in the module's text."""

    text: str
    finish: str
    prediction: str | None
    verdict: str
    reason: str = ""
    group: int | None = None


@dataclass(frozen=True)
class Item:
    """One problem and its samples, as in the module's text."""

    id: str
    prompt: str
    answer: str
    subject: str
    level: str
    seed: int
    samples: tuple[Sample, ...]

    @property
    def score(self) -> ItemScore:
        verdicts = Counter(sample.verdict for sample in self.samples)
        votes = [(sample.group, sample.verdict == "right") for sample in self.samples if sample.group is not None]
        return ItemScore(
            self.id,
            hashlib.sha256(json.dumps([self.prompt, self.answer]).encode()).digest()[:16],
            self.subject,
            self.level,
            len(self.samples),
            verdicts["right"],
            majority_score(votes),
            verdicts["unfinished"],
            verdicts["no_answer"],
            verdicts["failed"],
        )


def evaluate(
    task: Task,
    output_dir: str | PathLike[str],
    generator: Generator,
    checker: Checker,
    sampling: Sampling,
    *,
    settings: Mapping[str, Any] | None = None,
    limit: int | None = None,
    chunk: int = 64,
    on_bad: str = "stop",
    overwrite: bool = False,
    progress: Callable[[StageReport], object] | None = None,
) -> StageReport:
    """Asks, grades and writes `items.jsonl` of a folder, going on from where an earlier run was stopped.

    task:        the problems (`find_task`)
    output_dir:  is made where it is not there
    sampling:    of each problem; temperature 0 and n 1 for greedy
    settings:    what else decides the result, such as the template; a run is only continued with the same
    limit:       only the first so many problems
    chunk:       problems asked together
    on_bad:      "stop" raises for a record that cannot be read and for a sample that could not be had; "skip" leaves
                 the record out and counts the sample as not right
    Raises StepDPOError as `run_stage` does, and for a generator that gives nothing at all.
    """
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StepDPOError(f"output folder {str(folder)!r} cannot be made: {error.strerror}") from error

    def work(batch: list[Problem]) -> Chunk:
        prompts = [Prompt(_asked(problem, task), task.beginning) for problem in batch]
        drawn = generator.generate(prompts, sampling)
        graded = graded_samples([problem.answer for problem in batch], task.beginning, drawn, checker)
        records, counts = [], Counter[str]()
        for problem, samples in zip(batch, graded, strict=True):
            for sample in samples:
                if sample.verdict == "failed" and on_bad == "stop":
                    raise StepDPOError(
                        f"problem {problem.id!r}: the model gave no answer: {sample.reason}; run again to go on, or "
                        "count such samples as not right with --on-bad skip"
                    )
                counts[sample.verdict.replace("_", " ")] += 1
                if sample.reason in ("timeout", "crash", "unreadable_gold"):
                    counts[f"compared in vain ({sample.reason.replace('_', ' ')})"] += 1
            fields = (problem.id, problem.prompt, problem.answer, problem.subject, problem.level, sampling.seed)
            records.append(asdict(Item(*fields, tuple(samples))))
        return Chunk(records, counts)

    decided = {
        "task": task.name,
        "title": task.title,
        "generator": generator.name,
        "sampling": asdict(sampling),
        "beginning": task.beginning,
        "instruction": task.instruction,
        "format": task.format,
        "limit": limit,
        **(settings or {}),
    }
    return run_stage(
        STAGE,
        islice(task.records(), limit),
        folder / ITEMS_FILE,
        settings=decided,
        parse=lambda raw: parse_problem(raw, task.format),
        work=work,
        chunk=chunk,
        on_bad=on_bad,
        overwrite=overwrite,
        progress=progress,
    )


def _asked(problem: Problem, task: Task) -> str:
    return f"{problem.prompt}\n{task.instruction}" if task.instruction else problem.prompt


def graded_samples(
    answers: Sequence[str], beginning: str, drawn: Sequence[Sequence[Completion]], checker: Checker
) -> list[list[Sample]]:
    """The samples of each problem, graded, and their answers put into groups of equal ones.

    answers: the right one of each problem
    All right answers of a problem are one group, and no wrong one joins it.
    """
    flat = [(i, completion) for i, samples in enumerate(drawn) for completion in samples]
    grades = grade([answers[i] for i, _ in flat], [beginning] * len(flat), [c for _, c in flat], checker)
    by_item: list[list[tuple[Completion, Grade]]] = [[] for _ in drawn]
    for (i, completion), graded in zip(flat, grades, strict=True):
        by_item[i].append((completion, graded))
    groups = _groups([[graded for _, graded in item] for item in by_item], checker)
    return [
        [
            Sample(completion.text, completion.finish, graded.prediction, "failed", completion.error)
            if completion.finish == "failed"
            else Sample(completion.text, completion.finish, *graded, group=group)
            for (completion, graded), group in zip(item, numbers, strict=True)
        ]
        for item, numbers in zip(by_item, groups, strict=True)
    ]


def _groups(items: Sequence[Sequence[Grade]], checker: Checker) -> list[list[int | None]]:
    """A number for each sample that votes. Wrong answers join the first earlier group whose first answer is equal."""
    groups: list[list[int | None]] = [[None] * len(item) for item in items]
    used = [0] * len(items)
    left: list[dict[str, list[int]]] = []  # of each item, samples without a group by their text
    for number, item in enumerate(items):
        texts: dict[str, list[int]] = {}
        for sample, graded in enumerate(item):
            if graded.verdict == "right":
                groups[number][sample], used[number] = 0, 1
            elif graded.verdict == "wrong":
                texts.setdefault(graded.prediction or "", []).append(sample)
        left.append(texts)
    while any(left):
        asked = []  # (item, text): equal to the item's first text?
        for number, texts in enumerate(left):
            if texts:
                first, *others = texts
                asked += [(number, first, text) for text in others]
        same = {(number, first) for number, texts in enumerate(left) for first in list(texts)[:1]}
        verdicts = checker.check((first, text) for _, first, text in asked)
        same |= {(n, text) for (n, _, text), verdict in zip(asked, verdicts, strict=True) if verdict.equal}
        for number, text in same:
            for sample in left[number].pop(text):
                groups[number][sample] = used[number]
        for number in {number for number, _ in same}:
            used[number] += 1
    return groups


def read_items(folder: str | PathLike[str]) -> Iterator[Item]:
    """The items of a run that came to its end, one at a time.

    Raises StepDPOError for a folder without a run, for one that was stopped, and for a line that is not of a run.
    """
    path = Path(folder) / ITEMS_FILE
    if not path.is_file():
        raise StepDPOError(f"{folder}: no run of stepdpo evaluate: there is no {ITEMS_FILE} in it")
    try:
        check_complete(path)
    except StepDPOError as error:
        raise StepDPOError(f"{folder}: the run has not come to its end: run the same command again to go on") from error
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                value = json.loads(line)
                item = Item(**(value | {"samples": tuple(Sample(**sample) for sample in value["samples"])}))
                known = bool(item.samples) and all(sample.verdict in VERDICTS for sample in item.samples)
            except (ValueError, KeyError, TypeError) as error:
                raise StepDPOError(f"{path}, line {number}: not an item of a run: {shorten(line)}") from error
            if not known:
                raise StepDPOError(f"{path}, line {number}: an item without samples, or with an unknown verdict")
            yield item


def read_settings(folder: str | PathLike[str]) -> dict[str, Any]:
    """What a run was made with."""
    path = run_file(Path(folder) / ITEMS_FILE)
    try:
        value = json.loads(path.read_text())
        settings = value["settings"] | {"counts": value["report"]["counts"], "skipped": value["report"]["skipped"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StepDPOError(f"{path}: not the run file of a run: {error}") from error
    return dict(settings)
