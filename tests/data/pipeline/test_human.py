"""The review file: written, filled in, edited, damaged, read back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stepdpo_kernels.data.pipeline.locate.human import HumanLocator, read_review, write_review
from stepdpo_kernels.data.pipeline.solution import Solution
from stepdpo_kernels.data.steps import Step, StepFormat, Steps
from stepdpo_kernels.types import StepDPOError

TEXT = "Let's think step by step.\nStep 1: 2 + 2 = 4.\nStep 1: 4 + 3 = 8.\nStep 2: The answer is 8."


def solution(name: str = "p/0", steps: Steps | None = None, **fields) -> Solution:
    steps = StepFormat().split(TEXT) if steps is None else steps
    values = {
        "id": name,
        "problem_id": "p",
        "prompt": "What is 2 + 2 + 3?",
        "answer": "7",
        "reference": "2 + 2 = 4\n4 + 3 = 7",
        "sample": 0,
        "seed": 0,
        "generator": "g",
        "steps": steps,
        "logps": (None,) * len(steps.steps),
        "finish": "stop",
        "prediction": "8",
        "verdict": "wrong",
    }
    return Solution(**(values | fields))


def fill(path: Path, *answers: str, note: str = "") -> None:
    """Answers behind the lines that ask, in order."""
    given = iter(answers)
    text = re.sub(r"(?m)^(first wrong step .*): $", lambda m: f"{m[1]}: {next(given)}", path.read_text("utf-8"))
    path.write_text(re.sub(r"(?m)^note: $", lambda _: f"note: {note}", text), "utf-8")
    assert not list(given)


def places(path: Path, *solutions: Solution) -> list[int | None]:
    return [location.step for location in HumanLocator(path).locate(solutions, seed=0)]


def test_what_a_person_sees(tmp_path: Path) -> None:
    assert write_review([solution()], tmp_path / "review.md") == 1
    text = (tmp_path / "review.md").read_text()
    section = text[text.index("---") :]
    assert section.splitlines()[2] == "## p/0"
    assert "\n**Problem**\n\n> What is 2 + 2 + 3?\n" in section
    assert "\n**A right solution**\n\n> 2 + 2 = 4\n> 4 + 3 = 7\n" in section
    # Steps are named by their place, whatever their markers say.
    assert "\n**Step 1**\n\n> 2 + 2 = 4.\n\n**Step 2**\n\n> 4 + 3 = 8.\n\n**Step 3**\n\n> The answer is 8.\n" in section
    assert section.endswith("\nfirst wrong step (1 to 3, 0 for none, ? for undecided): \nnote: \n")
    assert [path.name for path in tmp_path.iterdir()] == ["review.md"]


@pytest.mark.parametrize(
    ("answer", "step"),
    [("2", 2), (" 2 ", 2), ("Step 3", 3), ("**1**", 1), ("3.", 3), ("0", 0), ("?", None), ("\uff12", 2)],
)
def test_answers(tmp_path: Path, answer: str, step: int | None) -> None:
    path = tmp_path / "review.md"
    write_review([solution()], path)
    fill(path, answer, note="4 + 3 is 7")
    (location,) = HumanLocator(path).locate([solution()], seed=0)
    assert (location.step, location.explanation) == (step, "4 + 3 is 7")
    assert location.problem == ("reviewer undecided" if step is None else "")


def test_unfilled_and_absent_solutions_are_undecided_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "review.md"
    stepless = solution("none", Steps("no step", ()))
    assert write_review([solution("a"), solution("b"), stepless], path) == 2
    fill(path, "", "1")
    locator = HumanLocator(path)
    assert locator.unfilled == 1
    found = locator.locate([solution("b"), solution("a"), solution("c"), stepless], seed=0)
    assert [(x.step, x.problem) for x in found] == [
        (1, ""),
        (None, "not filled in"),
        (None, "not in the review file"),
        (None, "no steps"),
    ]
    before = locator.settings
    path.write_text(path.read_text().replace("undecided): \n", "undecided): 2\n"))
    assert HumanLocator(path).settings != before


def test_what_editors_do(tmp_path: Path) -> None:
    path = tmp_path / "review.md"
    write_review([solution("a"), solution("b")], path)
    fill(path, "2", "")
    text = path.read_text()
    stripped = "\n".join(line.rstrip() for line in text.split("\n")).rstrip()
    for changed in (
        text.replace("\n", "\r\n"),
        text.replace("\n", "\r"),
        "\ufeff" + text[text.index("## a") :],
        stripped,
        text.replace("\n", " \t\n"),
        text[text.index("## a") :],
        text.replace("undecided): 2", "undecided):\u00a02").replace("first wrong step (", "First wrong step ("),
    ):
        path.write_bytes(changed.encode())
        assert places(path, solution("a"), solution("b")) == [2, None]


MARKUP = (
    "## other\n<!-- solution 0123456789abcdef -->\n"
    "first wrong step (1 to 9, 0 for none, ? for undecided): 9\nnote: no\n"
    "---\n> quoted\n```\n**Step 7**\n\r\nfirst wrong step (1 to 3, 0 for none, ? for undecided): 1\u2028note: x\x0c## y"
)


def test_markup_in_the_texts_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "review.md"
    steps = Steps(MARKUP, (Step("\nStep 1:", MARKUP), Step("\n3) ", MARKUP)), MARKUP)
    odd = [solution(name, steps, prompt=MARKUP, reference=MARKUP, answer=MARKUP) for name in (MARKUP, '"a"', " a ", "")]
    write_review(odd, path)
    fill(path, "1", "2", "0", "?")
    assert places(path, *odd) == [1, 2, 0, None]


ANY = st.text(st.characters(exclude_categories=()), max_size=40) | st.text("\n\r >#`*-:?1?\u2028\x85", max_size=20)
STEPS = st.builds(Steps, ANY, st.lists(st.builds(Step, ANY, ANY), min_size=1, max_size=4).map(tuple), ANY)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(ANY, st.tuples(ANY, STEPS, ANY, st.integers(0, 4)), min_size=1, max_size=4))
def test_round_trip_of_any_text(tmp_path: Path, cases) -> None:
    path = tmp_path / "review.md"
    path.unlink(missing_ok=True)
    solutions = [
        solution(name, steps, prompt=prompt, reference=other, answer=other)
        for name, (prompt, steps, other, _) in cases.items()
    ]
    answers = [min(answer, len(steps.steps)) for _, steps, _, answer in cases.values()]
    assert write_review(iter(solutions), path) == len(solutions)
    assert [review.filled for review in read_review(path)] == [False] * len(solutions)
    fill(path, *map(str, answers))
    assert places(path, *solutions) == answers


def test_every_unreadable_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "review.md"
    write_review([solution(name) for name in "abcdef"], path)
    fill(path, "2 or 3", "9", "-1", "1", "", "2")
    text = path.read_text()
    text = text.replace("## e", "## f", 1)  # now twice, and e is missing
    text = text + "because of the sum\n" + "first wrong step (1 to 3, 0 for none, ? for undecided): 1\n"
    path.write_text(text)
    lines = text.split("\n")
    with pytest.raises(StepDPOError) as caught:
        HumanLocator(path)
    message = str(caught.value)
    for words in ("2 or 3", "9", "-1"):
        line = 1 + next(i for i, line in enumerate(lines) if line.endswith(f": {words}"))
        assert f"line {line}: '{words}' is no answer; write a number from 1 to 3, 0 for none or ?" in message
    assert f"line {1 + lines.index('because of the sum')}: 'because of the sum' belongs to nothing" in message
    assert f"line {len(lines) - 1}: a second answer for 'f'" in message
    assert "solution 'f' was in line" in message
    assert str(path) in message


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("first wrong", "the line 'first wrong step .* of 'a' is missing"),
        ("<!--", "the line '<!-- .* of 'a' is missing"),
    ],
)
def test_lines_of_the_file_that_are_gone(tmp_path: Path, remove: str, message: str) -> None:
    path = tmp_path / "review.md"
    write_review([solution("a"), solution("b")], path)
    lines = path.read_text().split("\n")
    lines.remove(next(line for line in lines if line.startswith(remove)))
    path.write_text("\n".join(lines))
    with pytest.raises(StepDPOError, match=f"line {1 + lines.index('## a')}: {message}"):
        HumanLocator(path)


def test_files_that_are_no_review(tmp_path: Path) -> None:
    path = tmp_path / "review.md"
    for content, message in ((b"", "no solution in it"), (b"# x\n", "no solution in it"), (b"\xff\xfe#", "not UTF-8")):
        path.write_bytes(content)
        with pytest.raises(StepDPOError, match=message):
            HumanLocator(path)


def test_many_problems_are_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "review.md"
    write_review([solution(str(k)) for k in range(30)], path)
    fill(path, *["x"] * 30)
    with pytest.raises(StepDPOError, match=r"and 10 more$"):
        HumanLocator(path)


def test_another_solution_under_the_same_id_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "review.md"
    write_review([solution("a")], path)
    fill(path, "2")
    for other in (solution("a", prompt="Else?"), solution("a", StepFormat().split(TEXT.replace("8", "9")))):
        with pytest.raises(StepDPOError, match=r"line \d+: another solution than the one that now has the id 'a'"):
            HumanLocator(path).locate([other], seed=0)


def test_a_review_is_never_overwritten_and_a_broken_off_one_leaves_none(tmp_path: Path) -> None:
    path = tmp_path / "review.md"

    def interrupted() -> Iterator[Solution]:
        yield solution("a")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_review(interrupted(), path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(StepDPOError, match="'a' comes twice"):
        write_review([solution("a"), solution("a")], path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(StepDPOError, match="there is no folder"):
        write_review([solution("a")], tmp_path / "no" / "review.md")
    write_review([solution("a")], path)
    fill(path, "2")
    with pytest.raises(StepDPOError, match="may be filled in"):
        write_review([solution("a")], path)
    assert places(path, solution("a")) == [2]
