"""Stage 2: solutions -> the same with their first wrong step (Lai et al. 2024, section 3.2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from os import PathLike

from stepdpo_kernels.data.pipeline.locate.protocol import Location, Locator
from stepdpo_kernels.data.pipeline.locate.score import Agreement, agreement
from stepdpo_kernels.data.pipeline.solution import Solution
from stepdpo_kernels.data.pipeline.stage import Chunk, StageReport, check_complete, run_stage, seed_for, stage_input
from stepdpo_kernels.data.sources import open_source
from stepdpo_kernels.types import StepDPOError


def locate(
    solutions: str | PathLike[str],
    output: str | PathLike[str],
    locator: Locator,
    *,
    compare: Locator | None = None,
    seed: int = 0,
    chunk: int = 64,
    limit: int | None = None,
    on_bad: str = "stop",
    overwrite: bool = False,
    partial: bool = False,
    progress: Callable[[StageReport], object] | None = None,
) -> StageReport:
    """Finds the first wrong step of each wrong solution of a file, and writes every solution again with it.

    solutions:  the file that stage 1 wrote; right ones in it are counted and left out
    compare:    a second locator, whose answers are written as `compared_step` beside those of the first, for
                `agreement_of`; it decides nothing
    partial:    take a file that its stage has not finished

    Raises StepDPOError as `run_stage`, and for a locator that can locate nothing at all.
    """
    if not partial:
        check_complete(solutions)

    def work(batch: list[Solution]) -> Chunk:
        counts = Counter[str]()
        asked = [solution for solution in batch if solution.verdict != "right"]
        if len(asked) < len(batch):
            counts["right solutions"] += len(batch) - len(asked)
        locations = locator.locate(asked, seed_for(seed, "locate")) if asked else []
        others = compare.locate(asked, seed_for(seed, "compare")) if asked and compare is not None else []
        records = []
        for i, (solution, location) in enumerate(zip(asked, locations, strict=True)):
            counts[_outcome(location)] += 1
            counts.update(location.counts)
            record = replace(
                solution, locator=locator.name, first_wrong_step=location.step, explanation=location.explanation
            ).to_record()
            if compare is not None:
                counts.update({f"{name} ({compare.name})": count for name, count in others[i].counts.items()})
                record |= {"compared_locator": compare.name, "compared_step": others[i].step}
            records.append(record)
        return Chunk(records, counts)

    def settings(locator: Locator) -> dict[str, object]:
        return {"name": locator.name, **locator.settings}

    return run_stage(
        "locate",
        stage_input(solutions, output, limit=limit),
        output,
        settings={
            "locator": settings(locator),
            "compare": None if compare is None else settings(compare),
            "seed": seed,
            "limit": limit,
        },
        parse=lambda raw: Solution.from_record(raw.value, raw.where),
        work=work,
        chunk=chunk,
        on_bad=on_bad,
        overwrite=overwrite,
        progress=progress,
    )


def _outcome(location: Location) -> str:
    if location.step is None:
        return f"undecided: {location.problem}" if location.problem else "undecided"
    return "located" if location.step else "without a wrong step"


def agreement_of(located: str | PathLike[str]) -> Agreement:
    """How far the two locators agree that `locate` ran with `compare`. Raises StepDPOError where there was but one."""
    a, b = [], []
    for raw in open_source(located, "train", columns=None).records:
        solution = Solution.from_record(raw.value, raw.where)
        if "compared_step" not in raw.value:
            raise StepDPOError(f"{raw.where}: field 'compared_step' is missing: locate with a second locator")
        a.append(solution.first_wrong_step)
        b.append(raw.value["compared_step"])
    return agreement(a, b)
