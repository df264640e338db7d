"""How good a judge is at finding the first wrong step: its score on the human annotations of CHAMP.

    pip install 'stepdpo-kernels[openai]' champ-dataset
    python -m examples.judge_champ --base_url http://localhost:8000/v1 --model Qwen/Qwen2.5-72B-Instruct --limit 100

CHAMP (Mao, Kim and Zhou 2024, arXiv 2406.03235; MIT) has 270 competition problems and 540 solutions by four models, in
each of which a person marked the first wrong step, or that there is none. The endpoint is any server of the OpenAI
protocol; its key is read from OPENAI_API_KEY. `--prompt_file` takes another prompt, `--output` a file for each
solution's annotation and location.

The annotators marked sentences and lines of free text, often several at once. So a step is a sentence here, or a line
where that is shorter; the annotated step is the one that the mark begins with.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import champ_dataset

from stepdpo_kernels.data.generation.openai_client import OpenAIClient
from stepdpo_kernels.data.pipeline.locate.judge import JudgeLocator
from stepdpo_kernels.data.pipeline.locate.protocol import Location, Locator
from stepdpo_kernels.data.pipeline.locate.score import score
from stepdpo_kernels.data.pipeline.solution import Solution
from stepdpo_kernels.data.steps import StepFormat

# A step ends with a sentence (or a bold one) and with a line, but not within the brackets of a displayed formula. What
# numbers a list is part of the marker.
SENTENCES = StepFormat(
    "pattern",
    r"(?:(?<=[.?!])|(?<=[.?!]\*\*))[ \t]+(?=[^\s\d])"
    r"|(?<!\\\[)[ \t]*\n\s*+(?!\\\])(?:[-*] +|\d+[.)] +)?",
)


class Annotated(NamedTuple):
    """A solution of CHAMP; first, last: the steps in which the mark begins and ends, 0 where no step is wrong."""

    solution: Solution
    first: int
    last: int


def read_champ() -> Iterator[Annotated]:
    """All annotated solutions, in the order of the dataset."""
    for name, problem in champ_dataset.load("v0").problems.items():
        reference = "\n".join(step.text for step in problem.solution.steps)
        for sample, (key, mark) in enumerate(problem.fws_annotations.items()):
            steps = SENTENCES.split("\n" + mark.text)  # so that the first line is a step, too
            first, last = 0, 0
            if mark.start_idx is not None:
                ends, end = [], 0
                for step in steps.steps:
                    end += len(step.marker + step.text)
                    ends.append(end - 1)  # in mark.text
                first = 1 + sum(end <= mark.start_idx for end in ends)
                last = 1 + sum(end < mark.start_idx + len(mark.wrong_step().rstrip()) for end in ends)
            solution = Solution(
                id=f"{name}/{key}",
                problem_id=name,
                prompt=problem.text,
                answer=problem.answer,
                reference=reference,
                sample=sample,
                seed=0,
                generator=mark.author,
                steps=steps,
                logps=(None,) * len(steps.steps),
                finish="stop",
                prediction=None,
                verdict="wrong" if first else "right",
            )
            yield Annotated(solution, first, last)


def locate_all(locator: Locator, annotated: Sequence[Annotated], batch: int = 64) -> list[Location]:
    """Locations of all solutions; shows how far it is."""
    locations: list[Location] = []
    for start in range(0, len(annotated), batch):
        solutions = [item.solution for item in annotated[start : start + batch]]
        locations += locator.locate(solutions, seed=start)
        print(f"{len(locations)} of {len(annotated)}", flush=True)
    return locations


def report(annotated: Sequence[Annotated], locations: Sequence[Location]) -> str:
    """The score, how often the located step lies within the mark, why others are undecided, and what it took."""
    places = [location.step for location in locations]
    lines = [str(score([item.first for item in annotated], places, [len(a.solution.steps.steps) for a in annotated]))]
    within = sum(
        place is not None and item.first <= place <= item.last for item, place in zip(annotated, places, strict=True)
    )
    lines.append(f"{'any step of the mark':<42}{within:>6}{100 * within / len(annotated):>7.1f}%")
    problems = Counter(location.problem for location in locations if location.step is None)
    lines += [f"{f'undecided: {problem}':<42}{count:>6}" for problem, count in problems.most_common()]
    counts = sum((location.counts for location in locations), Counter[str]())
    lines += [f"{name:<42}{count:>6}" for name, count in counts.items()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Asks a judge about CHAMP and prints its score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_url", required=True, help="such as http://localhost:8000/v1")
    parser.add_argument("--model", required=True, help="its name at the server")
    parser.add_argument("--prompt_file", type=Path)
    parser.add_argument("--limit", type=int, help="only the first so many of the 540 solutions")
    parser.add_argument("--concurrency", type=int, default=16, help="requests at a time")
    parser.add_argument("--max_tokens", type=int, default=4096, help="of a reply")
    parser.add_argument("--price_in", type=float, default=0.0, help="of a million prompt tokens")
    parser.add_argument("--price_out", type=float, default=0.0, help="of a million completion tokens")
    parser.add_argument("--output", type=Path, help="JSONL of every solution's annotation and location")
    args = parser.parse_args(argv)
    locator = JudgeLocator(
        OpenAIClient(args.base_url, args.model, concurrency=args.concurrency),
        prompt_file=args.prompt_file,
        max_tokens=args.max_tokens,
        price_in=args.price_in,
        price_out=args.price_out,
    )
    annotated = list(islice(read_champ(), args.limit))
    locations = locate_all(locator, annotated)
    if args.output:
        with args.output.open("w", encoding="utf-8") as file:
            for item, location in zip(annotated, locations, strict=True):
                record = {
                    "id": item.solution.id,
                    "annotated": item.first,
                    "located": location.step,
                    "problem": location.problem,
                    "explanation": location.explanation,
                }
                file.write(json.dumps(record) + "\n")
    print(report(annotated, locations))


if __name__ == "__main__":
    main()
