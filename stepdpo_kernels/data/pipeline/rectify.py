"""Stage 3: located mistakes -> step pairs (Lai et al. 2024, section 3.2).

The model continues from the right steps and the marker of the first wrong one. A continuation with the right final
answer gives a chosen step: its first. Several different ones may be taken for a prefix. A right answer does not make
every step right, so the chosen step may also be verified by a locator.

The records are in the schema of Math-Step-DPO-10K, and have also

    id             "<id of the solution>/<number of the pair>"
    group          id of the problem
    step_index     the step that is preferred: 1, 2, ...
    chosen_logp    log-prob of the chosen step: the sum over its tokens as the generator saw them, at temperature 1;
                   null where it reports none
    rejected_logp  the same of the rejected step
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from os import PathLike
from typing import Any

from stepdpo_kernels.data.generation import Completion, Generator, Prompt, Sampling
from stepdpo_kernels.data.pipeline.collect import step_logps
from stepdpo_kernels.data.pipeline.grading import Checker, grade
from stepdpo_kernels.data.pipeline.locate.protocol import Verifier
from stepdpo_kernels.data.pipeline.solution import Solution
from stepdpo_kernels.data.pipeline.stage import (
    Chunk,
    SeenKeys,
    StageReport,
    check_complete,
    run_stage,
    seed_for,
    stage_input,
)
from stepdpo_kernels.data.steps import StepFormat
from stepdpo_kernels.types import StepDPOError


class Candidate:
    """A right continuation of a located solution: `solution` holds the steps before and those that it goes on with."""

    def __init__(self, located: Solution, solution: Solution) -> None:
        self.located, self.solution = located, solution

    @property
    def k(self) -> int:
        assert self.located.first_wrong_step
        return self.located.first_wrong_step


def rectify(
    located: str | PathLike[str],
    output: str | PathLike[str],
    generator: Generator,
    checker: Checker,
    sampling: Sampling,
    *,
    steps: StepFormat | None = None,
    verifier: Verifier | None = None,
    max_chosen: int | None = None,
    dataset: str = "stepdpo",
    chunk: int = 32,
    limit: int | None = None,
    on_bad: str = "stop",
    overwrite: bool = False,
    partial: bool = False,
    progress: Callable[[StageReport], object] | None = None,
) -> StageReport:
    """Samples right steps for located mistakes and writes step pairs.

    located:     the file that stage 2 wrote; solutions without a wrong step are counted and left out
    sampling:    n continuations from each prefix
    steps:       how continuations are cut into steps: as the solutions were
    verifier:    a chosen step must also be right by this locator; one that it cannot decide is left out
    max_chosen:  at most so many pairs of a mistake; None for every different step
    dataset:     what the records say in their field of that name
    partial:     take a file that its stage has not finished

    Steps that differ in white space at their ends alone are the same. Pairs are never written twice, also where two
    solutions make the same mistake. Raises StepDPOError as `run_stage`, and for a generator that gives nothing at all.
    """
    if max_chosen is not None and max_chosen < 1:
        raise StepDPOError(f"max_chosen must be at least 1, got {max_chosen!r}")
    if not partial:
        check_complete(located)
    steps = steps or StepFormat()
    seen = SeenKeys()

    def replay(record: dict[str, Any]) -> None:
        seen.add(*(record[name] for name in ("prompt", "initial_reason_steps", "chosen", "rejected")))

    seed = seed_for(sampling.seed, "rectify")

    def work(batch: list[Solution]) -> Chunk:
        counts = Counter[str]()
        mistakes = [solution for solution in batch if solution.first_wrong_step]
        for solution in batch:
            if not solution.first_wrong_step:
                counts["undecided" if solution.first_wrong_step is None else "without a wrong step"] += 1
        if not mistakes:
            return Chunk([], counts)
        candidates = _right_continuations(mistakes, counts)
        if verifier is not None:
            candidates = _verified(candidates, verifier, seed_for(sampling.seed, "verify"), counts)
        records: list[dict[str, Any]] = []
        pairs: Counter[str] = Counter()
        for candidate in candidates:
            record = _record(candidate, dataset, pairs[candidate.located.id])
            if max_chosen is not None and pairs[candidate.located.id] >= max_chosen:
                counts["beyond max_chosen"] += 1
            elif not seen.add(*(record[name] for name in ("prompt", "initial_reason_steps", "chosen", "rejected"))):
                counts["repeated"] += 1
            else:
                pairs[candidate.located.id] += 1
                records.append(record)
        counts["mistakes"] += len(mistakes)
        counts["mistakes with a pair"] += len(pairs)
        return Chunk(records, counts)

    def _right_continuations(mistakes: list[Solution], counts: Counter[str]) -> list[Candidate]:
        begun = [solution.steps.before(solution.first_wrong_step or 1) for solution in mistakes]
        prompts = [Prompt(solution.prompt, text) for solution, text in zip(mistakes, begun, strict=True)]
        drawn = generator.generate(prompts, replace(sampling, seed=seed))
        every: list[tuple[Solution, str, Completion]] = [
            (solution, text, completion)
            for solution, text, completions in zip(mistakes, begun, drawn, strict=True)
            for completion in completions
        ]
        grades = grade([s.answer for s, _, _ in every], [b for _, b, _ in every], [c for _, _, c in every], checker)
        candidates = []
        for (solution, text, completion), graded in zip(every, grades, strict=True):
            k = solution.first_wrong_step or 1
            parts = steps.split(text + completion.text)
            if completion.finish == "failed":
                counts["failed"] += 1
            elif graded.verdict != "right":
                counts["continuations " + graded.verdict.replace("_", " ")] += 1
            elif len(parts.steps) < k or parts.before(k) != text or not parts.steps[k - 1].text.strip():
                counts["continuations without a step"] += 1
            elif parts.steps[k - 1].text.strip() == solution.steps.steps[k - 1].text.strip():
                counts["continuations with the same step"] += 1
            else:
                counts["continuations right"] += 1
                logps = step_logps(parts, text, completion)
                known = (*solution.logps[: k - 1], *logps[k - 1 :])
                new = replace(
                    solution, steps=parts, logps=known, finish="stop", prediction=graded.prediction, verdict="right",
                    seed=seed, generator=generator.name, locator=None, first_wrong_step=None, explanation="",
                )  # fmt: skip
                candidates.append(Candidate(solution, new))
        return candidates

    settings = {
        "generator": generator.name,
        "sampling": asdict(sampling),
        "steps": asdict(steps),
        "verifier": None if verifier is None else {"name": verifier.name, **verifier.settings},
        "max_chosen": max_chosen,
        "dataset": dataset,
        "limit": limit,
    }
    try:
        return run_stage(
            "rectify",
            stage_input(located, output, limit=limit),
            output,
            settings=settings,
            parse=parse_located,
            work=work,
            chunk=chunk,
            on_bad=on_bad,
            overwrite=overwrite,
            replay=replay,
            progress=progress,
        )
    finally:
        seen.close()


def parse_located(raw: Any) -> Solution:
    """A solution that stage 2 has looked at. Raises StepDPOError for another record."""
    solution = Solution.from_record(raw.value, raw.where)
    if solution.locator is None:
        raise StepDPOError(
            f"{raw.where} (id {solution.id!r}): field 'locator' is missing: run stepdpo prepare locate first"
        )
    return solution


def _verified(candidates: Sequence[Candidate], verifier: Verifier, seed: int, counts: Counter[str]) -> list[Candidate]:
    """Those whose step k the locator finds right. Each different step is looked at once."""
    first: dict[tuple[str, int, str], Candidate] = {}
    for candidate in candidates:
        first.setdefault(_key(candidate), candidate)
    asked = list(first.values())
    verdicts = verifier.verify([c.solution for c in asked], [c.k for c in asked], seed) if asked else []
    right: set[tuple[str, int, str]] = set()
    for candidate, (verdict, took) in zip(asked, verdicts, strict=True):
        counts.update(took)
        if verdict:
            right.add(_key(candidate))
        else:
            counts["chosen steps undecided" if verdict is None else "chosen steps wrong"] += 1
    return [candidate for candidate in candidates if _key(candidate) in right]


def _key(candidate: Candidate) -> tuple[str, int, str]:
    return candidate.located.id, candidate.k, candidate.solution.steps.steps[candidate.k - 1].text.strip()


def _record(candidate: Candidate, dataset: str, number: int) -> dict[str, Any]:
    located, solution, k = candidate.located, candidate.solution, candidate.k
    return {
        "dataset": dataset,
        "prompt": located.prompt,
        "initial_reason_steps": located.steps.before(k),
        "chosen": solution.steps.steps[k - 1].text.rstrip(),
        "rejected": located.steps.steps[k - 1].text.rstrip(),
        "full_chosen": solution.steps.after(k),
        "full_rejected": located.steps.after(k),
        "answer": located.answer,
        "id": f"{located.id}/{number}",
        "group": located.problem_id,
        "step_index": k,
        "chosen_logp": solution.logps[k - 1],
        "rejected_logp": located.logps[k - 1],
    }
