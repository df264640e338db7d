"""The three stages on a generator that says what it is told: nothing is lost, doubled or taken for what it is not."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from examples.miniature.task import Problem, check_steps, habitual_solution, marker, problems
from stepdpo_kernels.answers import AnswerChecker
from stepdpo_kernels.data import load_step_pairs
from stepdpo_kernels.data.generation import Completion, Prompt, Sampling
from stepdpo_kernels.data.pipeline.collect import collect
from stepdpo_kernels.data.pipeline.grading import grade
from stepdpo_kernels.data.pipeline.locate.exact import ExactLocator
from stepdpo_kernels.data.pipeline.locate.stage import agreement_of, locate
from stepdpo_kernels.data.pipeline.rectify import rectify
from stepdpo_kernels.data.pipeline.solution import Solution, read_solutions
from stepdpo_kernels.data.steps import StepFormat
from stepdpo_kernels.types import StepDPOError

CLOSING = StepFormat(closing=r"\s*Answer:")
LETTER = 0.25  # nats of each letter


class Script:
    """Says what `answer(prompt, number, seed)` returns; every letter is a token."""

    name = "script"

    def __init__(self, answer: Callable[[Prompt, int, int], str | Completion]) -> None:
        self.answer = answer

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        return [[self._one(prompt, i, sampling) for i in range(sampling.n)] for prompt in prompts]

    def _one(self, prompt: Prompt, number: int, sampling: Sampling) -> Completion:
        said = self.answer(prompt, number, sampling.seed)
        if isinstance(said, Completion):
            return said
        logps = (-LETTER,) * len(said) if sampling.logps else None
        return Completion(said, "stop", logps=logps, ends=tuple(range(1, len(said) + 1)) if sampling.logps else None)


class Habit:
    """Solves problems of the miniature with its bad habit, and goes on from a prefix rightly four times of five."""

    name = "habit"

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        return [[self._solve(prompt, f"{sampling.seed}/{i}") for i in range(sampling.n)] for prompt in prompts]

    def _solve(self, prompt: Prompt, seed: str) -> Completion:
        problem, draw = Problem.parse(prompt.problem), random.Random(f"{prompt.problem}{seed}")
        if prompt.begun == "Step 1:" and draw.random() < 0.5:
            text = habitual_solution(problem, draw)
            return Completion(text.removeprefix(prompt.begun), "stop")
        k = prompt.begun.count("Step ")
        steps = [draw.choice(problem.right_steps(i)) for i in range(k, len(problem.terms) + 1)]
        answer = problem.answer if draw.random() < 0.8 else "xx"
        rest = "".join(f" {marker(k + i)}{step}" for i, step in enumerate(steps))
        return Completion(rest.removeprefix(f" {marker(k)}") + f" Answer: {answer}", "stop")


@pytest.fixture
def checker():
    with AnswerChecker() as checker:
        yield checker


def write(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open()]


SUM = {"id": "sum", "prompt": "What is 1 + 2 + 4?", "answer": "7", "reference": "1 + 2 = 3, 3 + 4 = 7"}


def collected(tmp_path, checker, answer, problems=(SUM,), n=1, **options):
    source = write(tmp_path / "problems.jsonl", problems)
    return collect(source, tmp_path / "solutions.jsonl", Script(answer), checker, Sampling(n=n, logps=True), **options)


# ---- collect ------------------------------------------------------------------------------------------------------


def test_a_wrong_solution_is_kept_whole(tmp_path, checker):
    said = " 1 + 2 = 4.\nStep 2: 4 + 4 = 8.\nThe answer is 8."
    report = collected(tmp_path, checker, lambda *_: said)
    (record,) = lines(tmp_path / "solutions.jsonl")
    assert report.counts == {"wrong": 1}
    assert record == record | {
        "id": "sum/0",
        "problem_id": "sum",
        "prompt": SUM["prompt"],
        "answer": "7",
        "reference": SUM["reference"],
        "sample": 0,
        "generator": "script",
        "opening": "Let's think step by step.",
        "closing": "",
        "finish": "stop",
        "prediction": "8",
        "verdict": "wrong",
    }
    first, second = " 1 + 2 = 4.", " 4 + 4 = 8.\nThe answer is 8."
    assert record["steps"] == [
        {"marker": "\nStep 1:", "text": first, "logp": -LETTER * len(first)},
        {"marker": "\nStep 2:", "text": second, "logp": -LETTER * len(second)},
    ]
    (solution,) = read_solutions(tmp_path / "solutions.jsonl")
    assert solution.text == "Let's think step by step.\nStep 1:" + said
    assert solution.to_record() == record


def test_what_is_kept_and_counted(tmp_path, checker):
    said = {
        0: " it is 7.",
        1: " it is 8.",
        2: Completion(" and so on, and so", "length"),
        3: " I do not know",
        4: Completion("", "failed", error="too long"),
    }
    report = collected(tmp_path, checker, lambda prompt, number, seed: said[number], n=5)
    assert report.counts == {"right": 1, "wrong": 1, "unfinished": 1, "no answer": 1, "failed": 1}
    assert [record["id"] for record in lines(tmp_path / "solutions.jsonl")] == ["sum/1"]
    report = collected(tmp_path, checker, lambda prompt, number, seed: said[number], n=5, keep="all", overwrite=True)
    kept = lines(tmp_path / "solutions.jsonl")
    assert [record["verdict"] for record in kept] == ["right", "wrong", "unfinished", "no_answer"]
    assert report.written == 4


def test_a_model_that_never_ends_a_step(tmp_path, checker):
    endless = Completion(" again and" * 5000, "length")
    report = collected(tmp_path, checker, lambda *_: endless, n=2, keep="all")
    assert report.counts == {"unfinished": 2}
    located = locate(tmp_path / "solutions.jsonl", tmp_path / "located.jsonl", ExactLocator())
    assert located.counts == {"undecided: no step can be checked": 2}


def test_a_solution_without_steps_is_counted(tmp_path, checker):
    report = collected(tmp_path, checker, lambda *_: "It is 8.", beginning="")
    assert report.counts == {"wrong": 1, "without steps": 1}
    assert lines(tmp_path / "solutions.jsonl") == []


def test_an_answer_that_cannot_be_read(tmp_path, checker):
    bad = {"id": "bad", "prompt": "?", "answer": r"\frac{"}
    with pytest.raises(StepDPOError, match="problem 'bad': field 'answer' cannot be read"):
        collected(tmp_path, checker, lambda *_: " x+1. The answer is x+1.", problems=[SUM, bad])
    report = collected(
        tmp_path, checker, lambda *_: " The answer is x+1.", problems=[SUM, bad], on_bad="skip", overwrite=True
    )
    assert report.counts == {"wrong": 1, "solutions of unreadable answers": 1}


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ('{"id": "b"', "malformed JSON"),
        ({"id": "b", "prompt": "", "answer": "7"}, "field 'prompt' is empty"),
        ({"id": "b", "prompt": "P"}, "field 'answer' is missing"),
        (SUM, "'sum' came before"),
        ('"' + "x" * (9 << 20) + '"', "bytes in one line"),
        ("\udcff", "not UTF-8"),
    ],
)
def test_bad_problems(tmp_path, checker, bad, said):
    text = "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in (SUM, bad, SUM | {"id": "last"}))
    source = tmp_path / "problems.jsonl"
    source.write_bytes(text.encode(errors="surrogateescape"))
    script, output = Script(lambda *_: " it is 8."), tmp_path / "solutions.jsonl"
    with pytest.raises(StepDPOError, match=r"line 2.*") as error:
        collect(source, output, script, checker, Sampling())
    assert said in str(error.value)
    report = collect(source, output, script, checker, Sampling(), on_bad="skip", overwrite=True)
    assert sum(report.skipped.values()) == 1
    assert [record["problem_id"] for record in lines(output)] == ["sum", "last"]


def test_a_right_number_in_what_was_begun_is_no_answer(checker):
    begun = "Step 1: 3 + 4 = 7 eggs.\nStep 2:"
    for said, verdict in ((" I am not sure.", "no_answer"), ("", "no_answer"), (" So it is 7.", "right")):
        assert grade(["7"], [begun], [Completion(said, "stop")], checker)[0].verdict == verdict
    assert grade(["east"], ["The answer is"], [Completion(" east.", "stop")], checker)[0].verdict == "right"


# ---- rectify ------------------------------------------------------------------------------------------------------

WRONG = " 1 + 2 = 4.\nStep 2: 4 + 4 = 8. The answer is 8."


def rectified(tmp_path, checker, answer, n=1, **options):
    collected(tmp_path, checker, lambda *_: WRONG, n=options.pop("solutions", 1), overwrite=True)
    locate(tmp_path / "solutions.jsonl", tmp_path / "located.jsonl", ExactLocator(), overwrite=True)
    report = rectify(
        tmp_path / "located.jsonl",
        tmp_path / "pairs.jsonl",
        Script(answer),
        checker,
        Sampling(n=n, logps=True),
        overwrite=True,
        **options,
    )
    return report, lines(tmp_path / "pairs.jsonl")


def test_a_pair_in_the_released_schema(tmp_path, checker):
    said = " 1 + 2 = 3. \nStep 2: 3 + 4 = 7. The answer is 7."
    report, (record,) = rectified(tmp_path, checker, lambda *_: said)
    assert record == {
        "dataset": "stepdpo",
        "prompt": SUM["prompt"],
        "initial_reason_steps": "Let's think step by step.\nStep 1:",
        "chosen": " 1 + 2 = 3.",
        "rejected": " 1 + 2 = 4.",
        "full_chosen": said,
        "full_rejected": WRONG,
        "answer": "7",
        "id": "sum/0/0",
        "group": "sum",
        "step_index": 1,
        "chosen_logp": -LETTER * len(" 1 + 2 = 3."),
        "rejected_logp": -LETTER * len(" 1 + 2 = 4."),
    }
    assert report.counts == {"continuations right": 1, "mistakes": 1, "mistakes with a pair": 1}


RIGHT = " The answer is 7."
CONTINUATIONS = [
    " 1 + 2 = 3." + RIGHT,  # the one step is all of it
    " 1 + 2 = 3.\nStep 2: 3 + 4 = 7." + RIGHT,
    " 1 + 2 = 3.\nStep 2: so 7." + RIGHT,  # the same first step
    " 2 + 1 = 3.\nStep 2: 3 + 4 = 7." + RIGHT,
    " 2 + 1 = 9.\nStep 2: all in all it is 7." + RIGHT,  # right answer, wrong step
    " we add.\nStep 2: 3 + 4 = 7." + RIGHT,  # cannot be checked
    " 1 + 2 = 4.\nStep 2: no, 3, and 3 + 4 = 7." + RIGHT,  # the rejected step itself
    " \nStep 2: 3 + 4 = 7." + RIGHT,  # empty
    " 1 + 2 = 3.\nStep 2: 3 + 4 = 8. The answer is 8.",
    " nobody knows",
]


def test_which_continuations_become_pairs(tmp_path, checker):
    report, records = rectified(tmp_path, checker, lambda prompt, number, seed: CONTINUATIONS[number], n=10)
    assert [record["chosen"] for record in records] == [
        CONTINUATIONS[0],
        " 1 + 2 = 3.",
        " 2 + 1 = 3.",
        " 2 + 1 = 9.",
        " we add.",
    ]
    assert report.counts == {
        "continuations right": 6,
        "repeated": 1,
        "continuations with the same step": 1,
        "continuations without a step": 1,
        "continuations wrong": 1,
        "continuations no answer": 1,
        "mistakes": 1,
        "mistakes with a pair": 1,
    }
    report, records = rectified(
        tmp_path, checker, lambda prompt, number, seed: CONTINUATIONS[number], n=10, verifier=ExactLocator()
    )
    assert [record["chosen"] for record in records] == [CONTINUATIONS[0], " 1 + 2 = 3.", " 2 + 1 = 3."]
    assert (report.counts["chosen steps wrong"], report.counts["chosen steps undecided"]) == (1, 1)
    report, records = rectified(
        tmp_path, checker, lambda prompt, number, seed: CONTINUATIONS[number], n=10, max_chosen=2
    )
    assert [record["id"] for record in records] == ["sum/0/0", "sum/0/1"]
    assert report.counts["beyond max_chosen"] == 4


def test_two_solutions_with_the_same_mistake_give_each_pair_once(tmp_path, checker):
    said = " 1 + 2 = 3.\nStep 2: 3 + 4 = 7." + RIGHT
    report, records = rectified(tmp_path, checker, lambda *_: said, solutions=3)
    assert [record["id"] for record in records] == ["sum/0/0"]
    assert (report.counts["mistakes"], report.counts["repeated"]) == (3, 2)


def test_the_model_goes_on_from_the_marker_of_the_wrong_step(tmp_path, checker):
    wrong = " 1 + 2 = 3.\nStep 2: 3 + 4 = 8.\nStep 3: The answer is 8."
    collected(tmp_path, checker, lambda *_: wrong)
    locate(tmp_path / "solutions.jsonl", tmp_path / "located.jsonl", ExactLocator())
    asked: list[Prompt] = []

    def answer(prompt: Prompt, number: int, seed: int) -> str:
        asked.append(prompt)
        return " 3 + 4 = 7." + RIGHT

    rectify(tmp_path / "located.jsonl", tmp_path / "pairs.jsonl", Script(answer), checker, Sampling())
    assert asked == [Prompt(SUM["prompt"], "Let's think step by step.\nStep 1: 1 + 2 = 3.\nStep 2:")]
    (record,) = lines(tmp_path / "pairs.jsonl")
    assert (record["step_index"], record["rejected"]) == (2, " 3 + 4 = 8.")


def test_stages_are_run_in_order(tmp_path, checker):
    collected(tmp_path, checker, lambda *_: WRONG)
    with pytest.raises(StepDPOError, match="field 'locator' is missing: run stepdpo prepare locate first"):
        rectify(tmp_path / "solutions.jsonl", tmp_path / "pairs.jsonl", Script(lambda *_: ""), checker, Sampling())
    locate(tmp_path / "solutions.jsonl", tmp_path / "located.jsonl", ExactLocator())
    with pytest.raises(StepDPOError, match="locate with a second locator"):
        agreement_of(tmp_path / "located.jsonl")


# ---- all of it ----------------------------------------------------------------------------------------------------


def stages(
    folder: Path, checker: AnswerChecker, generator: Any, chunks: Sequence[int] = (7, 5, 3)
) -> list[Callable[[], Any]]:
    locator = ExactLocator(checker=check_steps)
    source = folder.parent / "problems.jsonl"
    sampling = Sampling(n=2)
    return [
        lambda: collect(
            source, folder / "1.jsonl", generator, checker, sampling, beginning="Step 1:", steps=CLOSING,
            chunk=chunks[0],
        ),
        lambda: locate(
            folder / "1.jsonl", folder / "2.jsonl", locator, compare=ExactLocator(modulus=100), chunk=chunks[1]
        ),
        lambda: rectify(
            folder / "2.jsonl", folder / "3.jsonl", generator, checker, Sampling(n=8), steps=CLOSING,
            verifier=locator, chunk=chunks[2],
        ),
    ]  # fmt: skip


class DiesAt:
    """A generator that is interrupted at its calls of these numbers."""

    name = "habit"

    def __init__(self, generator: Any, calls: set[int]) -> None:
        self.generator, self.calls, self.call = generator, calls, 0

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        self.call += 1
        if self.call in self.calls:
            raise KeyboardInterrupt
        drawn: list[list[Completion]] = self.generator.generate(prompts, sampling)
        return drawn


@pytest.mark.parametrize("chunks", [(7, 5, 3), (5, 8, 2)])
def test_stopped_at_random_calls_and_run_again_it_writes_the_same(tmp_path, checker, chunks):
    """Also in chunks of another size."""
    drawn = islice(problems("collect", 5, 0), 40)
    write(
        tmp_path / "problems.jsonl",
        [{"id": f"p{i}", "prompt": p.prompt, "answer": p.answer} for i, p in enumerate(drawn)],
    )
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    for stage in stages(tmp_path / "whole", checker, Habit()):
        stage()
    dying = DiesAt(Habit(), {2, 5, 9, 10, 13})
    stops = 0
    for stage in stages(tmp_path / "stopped", checker, dying, chunks):
        while True:
            try:
                stage()
                break
            except KeyboardInterrupt:
                stops += 1
    assert stops == 5
    for name in ("1.jsonl", "2.jsonl", "3.jsonl"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    pairs = lines(tmp_path / "whole" / "3.jsonl")
    assert len(pairs) > 10
    assert len({record["id"] for record in pairs}) == len(pairs)
    for record in pairs:
        before = [step.text for step in CLOSING.split(record["initial_reason_steps"]).steps][:-1]
        assert check_steps(record["prompt"], [*before, record["chosen"]]) == 0
        assert check_steps(record["prompt"], [*before, record["rejected"]]) == record["step_index"]
    assert "decided by both" in str(agreement_of(tmp_path / "whole" / "2.jsonl"))


def test_the_trainer_reads_what_comes_out(tmp_path, checker, tiny_tokenizer):
    said = " 1 + 2 = 3.\nStep 2: 3 + 4 = 7." + RIGHT
    rectified(tmp_path, checker, lambda *_: said)
    (pair,) = load_step_pairs(tmp_path / "pairs.jsonl", tiny_tokenizer("qwen2"))
    assert (pair.id, pair.group) == ("sum/0/0", "sum")


def test_solutions_survive_any_record(tmp_path):
    record = Solution.from_record(
        {
            "id": "a", "problem_id": "p", "prompt": "P", "answer": "7", "sample": 0, "seed": 1, "generator": "g",
            "opening": "", "steps": [{"marker": "Step 1:", "text": " x"}], "finish": "stop", "verdict": "wrong",
        },
        "here",
    )  # fmt: skip
    assert record.logps == (None,)
    for change, said in (
        ({"steps": 5}, "field 'steps' must be list, got 5"),
        ({"steps": [5]}, "step 1: field 'marker' is missing"),
        ({"verdict": "maybe"}, "field 'verdict' must be one of"),
        ({"first_wrong_step": 3}, "field 'first_wrong_step' is 3, but there are 1 steps"),
        ({"sample": True}, "field 'sample' must be int, got True"),
        ({"prompt": None}, "field 'prompt' must be str, got None"),
    ):
        with pytest.raises(StepDPOError, match=said):
            Solution.from_record(record.to_record() | change, "here")
