"""Locator `human`: a file that a person fills in.

`write_review` writes it, `HumanLocator` reads it back. What stands in it of problems and solutions is indented by `> `,
so that no text of theirs can be taken for a line of the file itself.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from stepdpo_kernels.data.pipeline.locate.protocol import Location
from stepdpo_kernels.data.pipeline.locate.wording import bodies
from stepdpo_kernels.data.pipeline.solution import Solution
from stepdpo_kernels.data.records import shorten
from stepdpo_kernels.types import StepDPOError

INTRODUCTION = """\
# Where does each solution go wrong?

Below each solution, behind "first wrong step:", write the number of the first step that is wrong, 0 if no step is
wrong, or ? if it cannot be decided. Behind "note:" you may say why. A line that you leave empty is asked again.
Leave everything else as it is. Lines that begin with ">" belong to problems and solutions.
"""
KEY = "<!-- solution {} -->"
QUESTION = "first wrong step (1 to {}, 0 for none, ? for undecided):"
NOTE = "note:"

_KEY = re.compile(r"<!-- solution ([0-9a-f]{16}) -->")
_QUESTION = re.compile(r"first wrong step \(1 to (\d+), 0 for none, \? for undecided\):(.*)", re.IGNORECASE)
_ANSWER = re.compile(r"(?:step )?(\d{1,6}|\?)\.?", re.IGNORECASE)
_NOTE = re.compile(r"note:(.*)", re.IGNORECASE)
_OWN = re.compile(
    r">|\*\*(?:Problem|A right solution|The right answer|Solution|Step \d+|After the last step)\*\*$|---$|$"
)
_MOST = 20  # problems named in one message


def write_review(solutions: Iterable[Solution], path: str | PathLike[str]) -> int:
    """Write the review file of `solutions`, one after the other; those without steps are left out.

    Returns how many it holds. Raises StepDPOError where the path exists, since it may be filled in, where its folder
    does not, and for an id that comes twice.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise StepDPOError(f"{path}: there is no folder {str(path.parent)!r}")
    if path.exists():
        raise StepDPOError(f"{path} exists, and may be filled in: read it, or move it away to have a new one written")
    part = path.with_name(path.name + ".part")
    seen: set[str] = set()
    try:
        with part.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(INTRODUCTION)
            for solution in solutions:
                if not solution.steps.steps:
                    continue
                if solution.id in seen:
                    raise StepDPOError(f"solution {solution.id!r} comes twice: an answer could belong to either")
                seen.add(solution.id)
                file.writelines(f"{line}\n" for line in _section(solution))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return len(seen)


def _section(solution: Solution) -> Iterator[str]:
    steps = solution.steps
    yield from ("", "---", "", f"## {_written(solution.id)}", "", KEY.format(_digest(solution)))
    yield from _part("Problem", solution.prompt)
    yield from _part("A right solution", solution.reference or "")
    yield from _part("The right answer", solution.answer)
    yield from _part("Solution", steps.opening)
    for k, body in enumerate(bodies(steps), start=1):
        yield from _part(f"Step {k}", body or " ")
    yield from _part("After the last step", steps.closing)
    yield from ("", QUESTION.format(len(steps.steps)) + " ", NOTE + " ")


def _part(title: str, text: str) -> Iterator[str]:
    if text:
        yield from ("", f"**{title}**", "")
        # splitlines cuts at everything that an editor may take for the end of a line
        yield from (f"> {line}".rstrip() for line in text.splitlines() or [""])


def _written(name: str) -> str:
    """An id in one line: as JSON where it would not survive as it is."""
    plain = name.isprintable() and name == name.strip() and name and not name.startswith('"')
    return name if plain else json.dumps(name)


def _digest(solution: Solution) -> str:
    text = json.dumps([solution.prompt, [list(step) for step in solution.steps.steps]])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Review(NamedTuple):
    """One section of a review file. line: number of the line to fill in; step: as in Location."""

    id: str
    digest: str
    line: int
    filled: bool
    step: int | None
    note: str


def read_review(path: str | PathLike[str]) -> list[Review]:
    """The sections of a review file, those not filled in among them.

    Raises StepDPOError that names every line that cannot be read (the first 20 of them).
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # universal newlines
    except UnicodeDecodeError as error:
        raise StepDPOError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    reader = _Reader()
    for number, line in enumerate(text.split("\n"), start=1):
        reader.read(number, line.rstrip().replace("\xa0", " "))
    reader.end()
    if not reader.reviews and not reader.problems:
        reader.problems.append("no solution in it; is it a review file?")
    if reader.problems:
        more = len(reader.problems) - _MOST
        lines = reader.problems[:_MOST] + ([f"and {more} more"] if more > 0 else [])
        raise StepDPOError(f"{path} cannot be read:\n  " + "\n  ".join(lines))
    return reader.reviews


class _Reader:
    """Reads a review file line by line; what it cannot read goes to `problems`."""

    def __init__(self) -> None:
        self.reviews: list[Review] = []
        self.problems: list[str] = []
        self.lines: dict[str, int] = {}  # of each id
        self.name: str | None = None  # of the section that is open
        self.digest, self.note = "", ""
        self.answer: tuple[int, bool, int | None] | None = None

    def read(self, number: int, line: str) -> None:
        if line.startswith("## "):
            self.end()
            self._begin(number, line[3:].strip())
        elif self.name is None and not self.lines:
            pass  # the introduction
        elif match := _KEY.fullmatch(line):
            self.digest = match[1]
        elif match := _QUESTION.fullmatch(line):
            if self.answer is not None:
                self.problems.append(f"line {number}: a second answer for {self.name!r}")
            self.answer = (number, *self._answer(number, match[2].strip(), int(match[1])))
        elif match := _NOTE.fullmatch(line):
            self.note = match[1].strip()
        elif not _OWN.match(line):
            self.problems.append(
                f"line {number}: {shorten(line)} belongs to nothing; a note is one line after {NOTE!r}"
            )

    def _begin(self, number: int, written: str) -> None:
        try:
            name = json.loads(written) if written.startswith('"') else written
        except ValueError:
            name = written
        if name in self.lines:
            self.problems.append(f"line {number}: solution {name!r} was in line {self.lines[name]} already")
        self.lines[name] = number
        self.name, self.digest, self.note, self.answer = name, "", "", None

    def _answer(self, number: int, text: str, steps: int) -> tuple[bool, int | None]:
        """Whether it is filled in, and the step."""
        if not text:
            return False, None
        match = _ANSWER.fullmatch(text.strip("*_`"))
        if match is None or (match[1] != "?" and int(match[1]) > steps):
            self.problems.append(
                f"line {number}: {shorten(text)} is no answer; write a number from 1 to {steps}, 0 for none or ?"
            )
            return True, None
        return True, None if match[1] == "?" else int(match[1])

    def end(self) -> None:
        """The section that is open ends."""
        if self.name is None:
            return
        line = self.lines[self.name]
        if self.answer is None:
            self.problems.append(f"line {line}: the line {QUESTION.format('...')!r} of {self.name!r} is missing")
        elif not self.digest:
            self.problems.append(f"line {line}: the line {KEY.format('...')!r} of {self.name!r} is missing")
        else:
            self.reviews.append(Review(self.name, self.digest, *self.answer, self.note))
        self.name = None


class HumanLocator:
    """Locations that a person wrote into a review file.

    unfilled: how many of its solutions are not filled in; they are undecided

    Raises StepDPOError as read_review does.
    """

    name = "human"

    def __init__(self, path: str | PathLike[str]) -> None:
        self._path = path
        self._reviews = {review.id: review for review in read_review(path)}
        self.unfilled = sum(not review.filled for review in self._reviews.values())

    @property
    def settings(self) -> dict[str, object]:
        answers = [[review.id, review.digest, review.step, review.note] for review in self._reviews.values()]
        return {"review": hashlib.sha256(json.dumps(answers).encode()).hexdigest()[:16]}

    def locate(self, solutions: Sequence[Solution], seed: int) -> list[Location]:
        """Raises StepDPOError where a solution is not the one that was reviewed under its id."""
        return [self._locate(solution) for solution in solutions]

    def _locate(self, solution: Solution) -> Location:
        review = self._reviews.get(solution.id)
        if review is None:
            return Location(None, problem="not in the review file" if solution.steps.steps else "no steps")
        if review.digest != _digest(solution):
            raise StepDPOError(
                f"{self._path}, line {review.line}: another solution than the one that now has the id "
                f"{solution.id!r}; write the review file of these solutions anew"
            )
        if not review.filled:
            return Location(None, problem="not filled in")
        return Location(review.step, review.note, "" if review.step is not None else "reviewer undecided")
