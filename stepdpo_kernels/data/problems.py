r"""Problems with answers, from the files that people have.

A record is read by the format that its fields show, or by the one that is named:

    gsm8k     `question`, `answer`: the solution, a step a line, calculator notes <<48/2=24>>, then "#### 24"
              (Cobbe et al. 2021, arXiv 2110.14168)
    math      `problem`, `solution` with the answer in the last \boxed{}, `level`, `type` or `subject`
              (Hendrycks et al. 2021, arXiv 2103.03874); MATH-500 also has `answer` and `unique_id`
    aqua      `question`, `options` ("A)21", ...), `correct` (a letter), `rationale` (Ling et al. 2017,
              arXiv 1705.04146)
    aime      `Problem`, `Answer`, `ID`, `Solution`, also in small letters
    odyssey   one key, the name, to `question`, `answer`, `reasoning`, `label`, `level` (Fang et al. 2024,
              arXiv 2406.18321), with the remains of LaTeX that texts and answers end in taken off
    plain     `prompt`, `problem` or `question`; `answer`; optionally `id`, `reference` or `solution`, `subject`,
              `level`
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Any

from stepdpo_kernels.data.records import RawRecord, shorten
from stepdpo_kernels.data.sources import open_source
from stepdpo_kernels.types import StepDPOError

NOTE = re.compile(r"<<[^<>]*>>")  # GSM8K's calculator


@dataclass(frozen=True)
class Problem:
    """prompt: what is asked; answer: the right one; reference: a right solution, where there is one."""

    id: str
    prompt: str
    answer: str
    reference: str | None = None
    subject: str = ""
    level: str = ""


class _Record:
    """Fields of a record, by the first of several names that it has."""

    def __init__(self, raw: RawRecord, value: dict[str, Any], id_: str = "") -> None:
        self.where, self.value = raw.where, value
        self.id = id_ or self.text("id", "ID", "unique_id", default=raw.id)

    def text(self, *names: str, default: str | None = None) -> str:
        name = next((name for name in names if self.value.get(name) is not None), None)
        if name is None:
            if default is not None:
                return default
            have = ", ".join(map(str, self.value)) or "no fields"
            raise StepDPOError(f"{self.where}: field {names[0]!r} is missing; this record has {have}")
        value = self.value[name]
        odd = isinstance(value, float) and not math.isfinite(value)
        if odd or isinstance(value, bool) or not isinstance(value, str | int | float):
            raise StepDPOError(f"{self.where}: field {name!r} must be a string, got {shorten(value)}")
        text = str(value)
        if default is None and not text.strip():
            raise StepDPOError(f"{self.where}: field {name!r} is empty")
        return text


def _gsm8k(record: _Record) -> Problem:
    solution, mark, answer = record.text("answer").rpartition("####")
    if not mark or not answer.strip():
        raise StepDPOError(f"{record.where}: field 'answer' has no answer after ####: {shorten(answer[-60:])}")
    return Problem(record.id, record.text("question"), answer.strip(), NOTE.sub("", solution).strip() or None)


def _math(record: _Record) -> Problem:
    from stepdpo_kernels.answers import extract_answer

    solution = record.text("solution")
    answer = record.text("answer", default="").strip()
    if not answer:
        answer = (extract_answer(solution) if "\\boxed" in solution or "\\fbox" in solution else None) or ""
    if not answer:
        raise StepDPOError(f"{record.where}: field 'solution' has no answer in \\boxed{{}}: {shorten(solution[-60:])}")
    subject = record.text("subject", "type", default="")
    level = record.text("level", default="")
    return Problem(record.id, record.text("problem"), answer, solution, subject, level)


def _aqua(record: _Record) -> Problem:
    options = record.value["options"]
    letter = record.text("correct").strip()
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise StepDPOError(f"{record.where}: field 'options' must be a list of strings, got {shorten(options)}")
    letters = [option.partition(")")[0].strip(" (") for option in options]
    if letter not in letters:
        raise StepDPOError(f"{record.where}: field 'correct' is {shorten(letter)}, but the options are {letters}")
    lines = "\n".join(
        f"({name}) {option.partition(')')[2].strip()}" for name, option in zip(letters, options, strict=True)
    )
    prompt = f"{record.text('question')}\nAnswer with the letter of one of these choices:\n{lines}"
    return Problem(record.id, prompt, letter, record.text("rationale", default="") or None)


def _aime(record: _Record) -> Problem:
    prompt, answer = record.text("Problem", "problem"), record.text("Answer", "answer")
    solution = record.text("Solution", "solution", default="")
    return Problem(record.id, prompt, answer.strip(), solution or None)


REMAINS = ("\\noindent", "\\end{problem}", "\\\\")


def _odyssey(record: _Record) -> Problem:
    answer = _without_remains(record.text("answer"))
    if not answer:
        raise StepDPOError(f"{record.where}: field 'answer' is empty: {shorten(record.value['answer'])}")
    return Problem(
        record.id,
        _without_remains(record.text("question")),
        answer,
        _without_remains(record.text("reasoning", default="")) or None,
        record.text("label", default=""),
        record.text("level", default=""),
    )


def _without_remains(text: str) -> str:
    text = text.strip()
    while remains := next((remains for remains in REMAINS if text.endswith(remains)), ""):
        text = text.removesuffix(remains).rstrip()
    return text


def _plain(record: _Record) -> Problem:
    return Problem(
        record.id,
        record.text("prompt", "problem", "question"),
        record.text("answer").strip(),
        record.text("reference", "solution", default="") or None,
        record.text("subject", "type", default=""),
        record.text("level", default=""),
    )


FORMATS: dict[str, Callable[[_Record], Problem]] = {
    "gsm8k": _gsm8k,
    "math": _math,
    "aqua": _aqua,
    "aime": _aime,
    "odyssey": _odyssey,
    "plain": _plain,
}


def parse_problem(raw: RawRecord, format: str | None = None) -> Problem:
    """The problem of a record.

    format: one of `FORMATS`, None for the one that the fields show
    Raises StepDPOError that names the place, the field and the value.
    """
    if format is not None and format not in FORMATS:
        raise StepDPOError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")
    value = raw.value
    if isinstance(value, StepDPOError):
        raise value
    if not isinstance(value, dict):
        raise StepDPOError(f"{raw.where}: a record must be an object, got {shorten(value)}")
    name = ""
    if format in (None, "odyssey") and len(value) == 1 and isinstance(inner := next(iter(value.values())), dict):
        name, value, format = str(next(iter(value))), inner, "odyssey"
    record = _Record(raw, value, name)
    problem = FORMATS[format or _format_of(value)](record)
    for field in ("id", "prompt", "answer"):
        try:
            getattr(problem, field).encode()
        except UnicodeEncodeError as error:
            raise StepDPOError(f"{raw.where}: field {field!r} holds half of a surrogate pair") from error
    return problem


def _format_of(value: dict[str, Any]) -> str:
    answer = value.get("answer")
    if "options" in value and "correct" in value:
        return "aqua"
    if "question" in value and isinstance(answer, str) and "####" in answer:
        return "gsm8k"
    if "problem" in value and "solution" in value and ("answer" not in value or "level" in value):
        return "math"
    if "Problem" in value and "Answer" in value:
        return "aime"
    return "plain"


def read_problems(
    path_or_hub_id: str | PathLike[str], split: str = "test", *, format: str | None = None
) -> Iterator[Problem]:
    """The problems of a file, a folder or a hub dataset, one at a time.

    Raises StepDPOError for one that cannot be read, as `open_source` and `parse_problem` do.
    """
    for raw in open_source(path_or_hub_id, split, columns=None).records:
        yield parse_problem(raw, format)
