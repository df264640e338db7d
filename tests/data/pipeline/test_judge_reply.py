"""What judges write, and what is made of it; and the prompt that they get."""

from __future__ import annotations

import json
import time
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import stepdpo_kernels
from stepdpo_kernels.data.pipeline.locate.prompt import JudgePrompt
from stepdpo_kernels.data.pipeline.locate.reply import read_reply
from stepdpo_kernels.data.pipeline.solution import Solution
from stepdpo_kernels.data.steps import Step, StepFormat, Steps
from stepdpo_kernels.types import StepDPOError


def solution(**fields) -> Solution:
    values = {
        "id": "p/0",
        "problem_id": "p",
        "prompt": "What is 2 + 2 + 3?",
        "answer": "7",
        "reference": "2 + 2 + 3 = 7",
        "sample": 0,
        "seed": 0,
        "generator": "g",
        "steps": StepFormat().split("Step 1: 2 + 2 = 4.\nStep 1: 4 + 3 = 8.\nStep 2: The answer is 8."),
        "logps": (None, None, None),
        "finish": "stop",
        "prediction": "8",
        "verdict": "wrong",
    }
    return Solution(**(values | fields))


def as_json(told: object, *correct: object, **extra: object) -> str:
    steps = [{"step": k, "explanation": f"because {k}", "correct": c} for k, c in enumerate(correct, start=1)]
    return json.dumps({"steps": steps, "first_wrong_step": told, **extra})


YES, NO = "correct", "incorrect"


def decision(*verdicts: str) -> str:
    return "Final Decision: " + "; ".join(f"Step {k}: {verdict}" for k, verdict in enumerate(verdicts, start=1))


@pytest.mark.parametrize(
    ("reply", "step"),
    [
        (decision(YES, YES, NO, NO, YES), 3),
        (decision(NO, YES, YES, YES, YES), 1),
        (decision(YES, YES, YES, YES, YES), 0),
        (decision(YES, NO), 2),  # what comes after the first wrong step is no matter
        ("I checked all.\n\n" + decision(YES, YES, YES, YES, NO) + "\n", 5),
        ("final decision\nstep 1 is correct\nstep 2 is not correct", 2),
        ("### Final Decision:\n\n- **Step 1**: Correct\n- **Step 2:** *Incorrect*\n- **Step 3**: Incorrect", 2),
        ("**Final Decision:** **Step 1: correct; Step 2: correct; Step 3: incorrect**", 3),
        ("Final Decision\n| Step | Verdict |\n|---|---|\n| Step 1 | correct |\n| Step 2 | incorrect |", 2),
        ("Final Decision: Step 3: incorrect; Step 1: correct; Step 2: correct", 3),
        ("Final Decision: Steps 1-3: correct; Step 4: incorrect; Step 5: incorrect", 4),
        ("Final Decision: Steps 1, 2 and 3 are correct, step 4 is wrong.", 4),
        ("Final Decision: Step 1 to 5: correct", 0),
        ("Final Decision: all steps are correct.", 0),
        ("Final Decision: \\boxed{\\text{Step 1: correct; Step 2: incorrect}}", 2),
        ("Final Decision: Step 1: ✓ Step 2: ✗", 2),
        (f"I will end with a Final Decision.\nStep 1: fine.\n{decision(YES, NO)}", 2),
        (f"{decision(YES, NO)}\nTo repeat it:\n{decision(YES, NO, NO)}", 2),
        (f"<think>{decision(NO)} no...</think>{decision(YES, NO)}", 2),
        (f"maybe {decision(NO)}</think>{decision(YES, NO)}", 2),
        ("FINAL DECISION: Step 1 – correct, Step 2 — incorrect", 2),
        (as_json(2, True, False, True, True, True), 2),
        (as_json(0, True, True, True, True, True), 0),
        (as_json(3, True, True, False), 3),
        (as_json(1, False, comment="x"), 1),
        (as_json("2", True, False), 2),
        ('{"first_wrong_step": 4}', 4),
        (f"Here it is:\n```json\n{as_json(2, True, False)}\n```\nI hope that $\\frac{{1}}{{2}}$ helps.", 2),
        (f'{{"verdict": {as_json(2, True, False)}}}', 2),
        (f'First {{"first_wrong_step": 1}}, no: {as_json(2, True, False)}', 2),
    ],
)
def test_replies_that_decide(reply: str, step: int) -> None:
    reading = read_reply(reply, 5)
    assert (reading.step, reading.problem) == (step, "")


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ("", "empty reply"),
        (" \n", "empty reply"),
        ("<think>" + decision(YES, NO), "empty reply"),
        ("Step 2 is wrong, I think.", "no decision"),
        ("Step 1: correct. Step 2: incorrect.", "no decision"),
        ("Final Decision:", "no decision"),
        ("Final Decision: hard to say", "no decision"),
        ("Final Decision: not all steps are correct", "no decision"),
        ("Final Decision: all steps are correct except step 3", "no decision"),
        ("Final Decision: Step 2", "no decision"),
        ("Final Decision: Step 1: correct; Step 3: incorrect", "a step is left out"),
        ("Final Decision: Step 1: correct; Step 2: correctness unclear; Step 3: incorrect", "a step is left out"),
        ("Final Decision: Step 1: correct; Step 2: partially correct; Step 3: incorrect", "a step is left out"),
        (decision(YES, YES, YES), "a step is left out"),
        ("Final Decision: Step 2: incorrect", "a step is left out"),
        (decision(YES, NO) + "; Step 2: correct", "contradiction"),
        ("Final Decision: Steps 1-3: correct; Step 2: incorrect", "contradiction"),
        (f"{decision(YES, NO)}\nWait.\n{decision(YES, YES, NO)}", "contradiction"),
        ("Final Decision: Step 9: incorrect", "no such step"),
        (decision(*[YES] * 8) + "; Step 9: incorrect", "no such step"),
        ("Final Decision: Step 0: correct; Step 1: incorrect", "no such step"),
        (as_json(9, True, False), "no such step"),
        (as_json(-1, True, False), "no such step"),
        (as_json(6, True, True, True, True, True, False), "no such step"),
        (as_json(2, False, False), "contradiction"),
        (as_json(0, True, True, False, True, True), "contradiction"),
        (as_json(3, True, False, False), "contradiction"),
        (as_json(3, True, True, True, True, True), "contradiction"),
        (as_json(3, True, "maybe", False), "a step is left out"),
        (as_json(0, True, True), "a step is left out"),
        (as_json(None, True, False), "no decision"),
        (as_json(True, False), "no decision"),
        (as_json(2.0, True, False), "no decision"),
        (as_json(2, True, False)[:-5], "no decision"),
        ("[" * 100_000, "no decision"),
        ('{"first_wrong_step":' * 3_000, "no decision"),
    ],
)
def test_replies_that_do_not(reply: str, problem: str) -> None:
    reading = read_reply(reply, 5)
    assert (reading.step, reading.problem) == (None, problem)


def test_the_explanation_is_what_the_judge_says_of_the_step() -> None:
    assert read_reply(as_json(2, True, False, False), 3).explanation == "because 2"
    assert read_reply(as_json(0, True, True), 2).explanation == ""
    assert read_reply("4 + 3 is 7.\n\n**" + decision(YES, NO), 3).explanation == "4 + 3 is 7."
    assert "because 1" in read_reply(as_json(1, True, False), 3).explanation  # for a person to look into
    assert read_reply("Who knows?", 3).explanation == "Who knows?"


WORDS = st.sampled_from(
    ["Final Decision", "Step", "steps", "1", "2", "3", "99", ":", ";", "-", ",", "to", "is", "are", "correct", "not ",
     "incorrect", "all steps are correct", "\n", " ", "**", "|", "{", "}", '"', "first_wrong_step", '": ',
     '{"first_wrong_step": 2}', "<think>", "✗"]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(WORDS, max_size=30).map("".join) | st.text(), st.integers(1, 4))
def test_no_reply_breaks_it_or_names_a_step_that_is_not_there(reply: str, count: int) -> None:
    reading = read_reply(reply, count)
    assert reading.step is None or 0 <= reading.step <= count
    assert (reading.step is None) == bool(reading.problem)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=12), st.randoms())
def test_any_consistent_verdicts_are_read_in_any_order(correct: list[bool], draw) -> None:
    first = correct.index(False) + 1 if False in correct else 0
    parts = [f"Step {k}: {YES if c else NO}" for k, c in enumerate(correct, start=1)]
    draw.shuffle(parts)
    assert read_reply("Final Decision: " + "; ".join(parts), len(correct)).step == first
    assert read_reply(as_json(first, *correct), len(correct)).step == first


@pytest.mark.parametrize(
    "reply",
    [
        "Final Decision: step 1" + "-" * 30_000,
        "Final Decision: " + "step 1, " * 5_000,
        "Final Decision: step " + "1" * 30_000,
        "Final Decision: step 1" + " " * 30_000 + "x",
        "first_wrong_step" + "{ " * 30_000,
        "first_wrong_step" + '{"a": 1}' * 5_000,
    ],
)
def test_a_judge_that_never_stops_takes_no_time_to_read(reply: str) -> None:
    start = time.perf_counter()
    assert read_reply(reply, 5).step is None
    assert time.perf_counter() - start < 5  # milliseconds, where nothing is tried over and over


# ---- the prompt -----------------------------------------------------------------------------------------------------


def test_the_prompt_shows_problem_solution_and_numbered_steps() -> None:
    text = JudgePrompt().fill(solution(), structured=False)
    for words in (
        "### Problem\nWhat is 2 + 2 + 3?\n",
        "### Correct solution\n2 + 2 + 3 = 7\n",
        "### Correct final answer\n7\n",
        "### Solution to check\nStep 1: 2 + 2 = 4.\nStep 2: 4 + 3 = 8.\nStep 3: The answer is 8.\n",
        "the 3 steps",
        "up to Step 3",
        "Final Decision: Step 1:",
    ):
        assert words in text
    structured = JudgePrompt().fill(solution(), structured=True)
    assert "Final Decision" not in structured
    assert "first_wrong_step" in structured
    assert "not at hand" in JudgePrompt().fill(solution(reference=None), structured=True)


def test_braces_of_the_values_are_never_read(tmp_path: Path) -> None:
    odd = r"\frac{1}{2} {problem} {{steps}} {x} {} {0} \1 \g<0> $S = \{1\}$ {answer"
    steps = Steps("", (Step("Step 1:", odd),))
    text = JudgePrompt().fill(
        solution(prompt=odd, answer=odd, reference=odd, steps=steps, logps=(None,)), structured=True
    )
    assert text.count(odd) == 4
    file = tmp_path / "prompt.txt"
    file.write_text(r'{problem}{steps} {{answer}} \boxed{1} {"a": {}} {{ }} {0}', "utf-8")
    text = JudgePrompt(file).fill(solution(prompt="P", steps=steps), structured=True)
    assert text == "PStep 1: " + odd + r' {answer} \boxed{1} {"a": {}} {{ }} {0}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{problem} {step}", r"prompt\.txt: \{step\} is unknown; there are \{problem\}, .*write \{\{step\}\}"),
        (b"{problem} {Steps}", r"\{Steps\} is unknown"),
        (b"{problem}", r"prompt\.txt: \{steps\} is missing"),
        (b"{steps} {{problem}}", r"prompt\.txt: \{problem\} is missing"),
        (b"", "is missing"),
        (b"{problem} {steps} \xff", r"prompt\.txt: not UTF-8 at byte 18"),
    ],
)
def test_prompt_files_that_cannot_be_used(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "prompt.txt").write_bytes(content)
    with pytest.raises(StepDPOError, match=message):
        JudgePrompt(tmp_path / "prompt.txt")


def test_a_prompt_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StepDPOError, match=r"none\.txt cannot be read: No such file"):
        JudgePrompt(tmp_path / "none.txt")


def test_the_prompt_is_packaged() -> None:
    root = Path(stepdpo_kernels.__file__).parent.parent
    data = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    (folder,) = [name for name, files in data.items() if "prompt.txt" in files]
    assert root.joinpath(*folder.split("."), "prompt.txt").read_text("utf-8") == JudgePrompt().text
