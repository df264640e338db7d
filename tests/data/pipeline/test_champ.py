"""Parser, locator and score on the 540 human annotations of CHAMP."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("champ_dataset")
pytest.importorskip("openai")

import champ_dataset

from examples.judge_champ import Annotated, locate_all, main, read_champ
from stepdpo_kernels.data.generation.openai_client import OpenAIClient
from stepdpo_kernels.data.pipeline.locate.judge import JudgeLocator
from stepdpo_kernels.data.pipeline.locate.prompt import JudgePrompt
from stepdpo_kernels.data.pipeline.locate.reply import read_reply
from stepdpo_kernels.data.pipeline.locate.score import Score, score
from stepdpo_kernels.data.pipeline.locate.wording import bodies
from tests.openai_server import OpenAIServer, Request


@pytest.fixture(scope="module")
def annotated() -> list[Annotated]:
    return list(read_champ())


@pytest.fixture(scope="module")
def marks() -> list[Any]:
    problems = champ_dataset.load("v0").problems.values()
    return [mark for problem in problems for mark in problem.fws_annotations.values()]


def words(text: str) -> str:
    return " ".join(text.split())


def test_annotated_steps_are_what_the_annotators_marked(annotated: list[Annotated], marks: list[Any]) -> None:
    assert len(annotated) == len(marks) == 540
    prompt = JudgePrompt()
    for (solution, first, last), mark in zip(annotated, marks, strict=True):
        assert solution.text == "\n" + mark.text
        assert not solution.steps.opening
        if mark.start_idx is None:
            assert first == last == 0
            continue
        marked = words(mark.wrong_step())
        begins, ends = solution.steps.steps[first - 1], solution.steps.steps[last - 1]
        # The mark begins with a step, some with what numbers it in a list, and ends with a step.
        assert marked.removeprefix(words(begins.marker)).strip().startswith(words(begins.text))
        assert marked.endswith(words(ends.text)) or words(ends.text).startswith(marked.rpartition(". ")[2])
        # The judge reads it under this number.
        body = words(bodies(solution.steps)[first - 1])
        assert words(begins.text).endswith(body) or body.endswith(words(begins.text))
        shown = prompt.fill(solution, structured=True).split(f"\nStep {first}: ", 1)[1]
        assert words(shown).startswith(body)


def result_of(annotated: list[Annotated], places: list[int | None]) -> Score:
    return score([item.first for item in annotated], places, [len(item.solution.steps.steps) for item in annotated])


def test_a_judge_that_always_says_step_1_scores_what_the_annotations_say(
    annotated: list[Annotated], marks: list[Any]
) -> None:
    def always_first(request: Request) -> str:
        """As the schema has it for one half of the problems, as text for the other."""
        if len(request.body["messages"][0]["content"]) % 2:
            return json.dumps({"steps": [{"step": 1, "explanation": "", "correct": False}], "first_wrong_step": 1})
        return "It is clear at once.\n\n**Final Decision:** Step 1: incorrect"

    with OpenAIServer(always_first) as server:
        locations = locate_all(JudgeLocator(OpenAIClient(server.url, "tiny", concurrency=4)), annotated)
        assert len(server.requests) == 540
    result = result_of(annotated, [location.step for location in locations])
    # Counted from the annotations alone: marks with nothing before them, but for a list's number.
    firsts = sum(
        mark.start_idx is not None and re.fullmatch(r"\s*(?:[-*]|\d+[.)])?\s*", mark.text[: mark.start_idx]) is not None
        for mark in marks
    )
    assert (result.exact, result.undecided, result.count) == (firsts, 0, 540)
    assert result.baselines["always step 1"] == firsts
    assert (result.earlier, result.later, result.exact_right) == (540 - firsts, 0, 0)


def test_other_baselines_and_the_truth_by_what_a_judge_would_write(
    annotated: list[Annotated], marks: list[Any]
) -> None:
    def read(place: int, count: int) -> int | None:
        verdicts = (f"Step {k}: {'incorrect' if k == place else 'correct'}" for k in range(1, count + 1))
        return read_reply("Final Decision: " + "; ".join(verdicts), count).step

    counts = [len(item.solution.steps.steps) for item in annotated]
    none = result_of(annotated, [read(0, count) for count in counts])
    assert none.exact == none.exact_right == sum(mark.start_idx is None for mark in marks)
    truth = result_of(annotated, [read(item.first, count) for item, count in zip(annotated, counts, strict=True)])
    assert (truth.exact, truth.f1) == (540, 1)
    last = result_of(annotated, [read(count, count) for count in counts])
    assert last.exact == last.baselines["always the last step"]


def test_the_command_asks_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replies = itertools.cycle(["Final Decision: Step 1: incorrect", "I cannot tell."])
    with OpenAIServer(lambda _: next(replies)) as server:
        options = ["--limit", "6", "--concurrency", "1", "--price_in", "1", "--output", str(tmp_path / "a.jsonl")]
        main(["--base_url", server.url, "--model", "tiny", *options])
    lines = {line[:42].strip(): line[42:].split() for line in capsys.readouterr().out.splitlines()}
    assert lines["annotated solutions"] == ["6"]
    assert lines["requests"] == ["11"]  # five of them once more
    assert int(lines["cost_micros"][0]) == int(lines["prompt_tokens"][0]) > 0
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [record["located"] for record in records] == [1] * 6
    assert [record["annotated"] for record in records] == [item.first for item in itertools.islice(read_champ(), 6)]
    right = sum(record["annotated"] == 1 for record in records)
    assert int(lines["first wrong step as annotated"][0]) == right
