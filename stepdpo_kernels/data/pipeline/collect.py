"""Stage 1: problems -> solutions that a model wrote, cut into steps and graded (Lai et al. 2024, section 3.2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from os import PathLike

from stepdpo_kernels.data.generation import Completion, Generator, Prompt, Sampling
from stepdpo_kernels.data.pipeline.grading import Checker, grade
from stepdpo_kernels.data.pipeline.solution import Solution
from stepdpo_kernels.data.pipeline.stage import Chunk, StageReport, run_stage, stage_input
from stepdpo_kernels.data.problems import Problem, parse_problem
from stepdpo_kernels.data.steps import StepFormat, Steps
from stepdpo_kernels.types import StepDPOError

BEGINNING = "Let's think step by step.\nStep 1:"  # as released
KEEP = ("wrong", "all")


def collect(
    problems: str | PathLike[str],
    output: str | PathLike[str],
    generator: Generator,
    checker: Checker,
    sampling: Sampling,
    *,
    split: str = "train",
    format: str | None = None,
    beginning: str = BEGINNING,
    steps: StepFormat | None = None,
    keep: str = "wrong",
    chunk: int = 64,
    limit: int | None = None,
    on_bad: str = "stop",
    overwrite: bool = False,
    progress: Callable[[StageReport], object] | None = None,
) -> StageReport:
    """Samples solutions of problems, grades them, and writes one record each (`pipeline/solution.py`).

    problems:   a file, a folder or a hub dataset, as `read_problems` takes it; `format`: as there
    sampling:   n solutions of each problem
    beginning:  how every solution begins; the model goes on from there
    steps:      how a solution is cut into steps
    keep:       "wrong" writes those with a wrong final answer; "all" also right ones and those that were cut off or
                have no answer
    chunk:      problems sampled at a time
    limit:      only the first so many problems

    Right, wrong and unfinished ones are counted, whether kept or not. A wrong solution that cannot be cut into steps is
    counted and left out. Raises StepDPOError as `run_stage`, and for a generator that gives nothing at all.
    """
    if keep not in KEEP:
        raise StepDPOError(f"keep must be one of {', '.join(KEEP)}; got {keep!r}")
    steps = steps or StepFormat()

    def work(batch: list[Problem]) -> Chunk:
        prompts = [Prompt(problem.prompt, beginning) for problem in batch]
        drawn = generator.generate(prompts, sampling)
        pairs = [(p, sample, c) for p, samples in zip(batch, drawn, strict=True) for sample, c in enumerate(samples)]
        grades = grade([p.answer for p, _, _ in pairs], [beginning] * len(pairs), [c for _, _, c in pairs], checker)
        records, counts = [], Counter[str]()
        for (problem, sample, completion), graded in zip(pairs, grades, strict=True):
            if graded.reason == "unreadable_gold":
                if on_bad == "stop":
                    raise StepDPOError(
                        f"problem {problem.id!r}: field 'answer' cannot be read as an answer: {problem.answer!r}; mend "
                        "it, or leave such problems out with --on-bad skip"
                    )
                counts["solutions of unreadable answers"] += 1
                continue
            if completion.finish == "failed":
                counts["failed"] += 1
                continue
            counts[graded.verdict.replace("_", " ")] += 1
            parts = steps.split(beginning + completion.text)
            if not parts.steps:
                counts["without steps"] += 1
            elif keep == "all" or graded.verdict == "wrong":
                records.append(
                    Solution(
                        id=f"{problem.id}/{sample}",
                        problem_id=problem.id,
                        prompt=problem.prompt,
                        answer=problem.answer,
                        reference=problem.reference,
                        sample=sample,
                        seed=sampling.seed,
                        generator=generator.name,
                        steps=parts,
                        logps=step_logps(parts, beginning, completion),
                        finish=completion.finish,
                        prediction=graded.prediction,
                        verdict=graded.verdict,
                    ).to_record()
                )
        return Chunk(records, counts)

    settings = {
        "generator": generator.name,
        "sampling": asdict(sampling),
        "beginning": beginning,
        "steps": asdict(steps),
        "keep": keep,
        "format": format,
        "limit": limit,
    }
    return run_stage(
        "collect",
        stage_input(problems, output, split, limit),
        output,
        settings=settings,
        parse=lambda raw: parse_problem(raw, format),
        work=work,
        chunk=chunk,
        on_bad=on_bad,
        overwrite=overwrite,
        progress=progress,
    )


def step_logps(steps: Steps, begun: str, completion: Completion) -> tuple[float | None, ...]:
    """Log-prob of each step, as the generator saw its tokens; None for one that had begun before the completion."""
    logps, at = [], len(steps.opening) - len(begun)
    for step in steps.steps:
        start = at + len(step.marker)
        at = start + len(step.text)
        logp = completion.logp(start, at) if start >= 0 else None
        logps.append(None if logp is None else round(logp, 4))
    return tuple(logps)
