"""What a judge is asked: a text file with named places, which a user can replace.

    {problem}   the problem; must be there
    {steps}     the solution to check, one "Step k: ..." after the other; must be there
    {solution}  a right solution, or a sentence that says that none is at hand
    {answer}    the right final answer
    {count}     how many steps there are
    {form}      how the judge is to answer. A file without it says so itself, such that the reply ends with
                "Final Decision: Step 1: correct; Step 2: incorrect", and structured output is not asked for

`{{problem}}` stands for a literal `{problem}`. All other braces are as they are: `\\frac{1}{2}`, `{"a": 1}`.
"""

from __future__ import annotations

import re
from importlib import resources
from os import PathLike
from pathlib import Path

from stepdpo_kernels.data.pipeline.locate.wording import bodies
from stepdpo_kernels.data.pipeline.solution import Solution
from stepdpo_kernels.types import StepDPOError

PLACES = ("problem", "steps", "solution", "answer", "count", "form")
REQUIRED = ("problem", "steps")

NO_SOLUTION = "(A correct solution is not at hand. Work it out yourself before you check the steps.)"
TEXT_FORM = (
    "End with one line that names every step, in order:\nFinal Decision: Step 1: <correct or incorrect>; "
    "Step 2: <correct or incorrect>; and so on up to Step {}"
)
JSON_FORM = (
    'Answer with a JSON object. "steps" holds an object for every step, in order, with its number "step", a short '
    '"explanation", and whether it is "correct". "first_wrong_step" is the number of the first step that is '
    "incorrect, or 0 if all {} steps are correct."
)

_PLACE = re.compile(r"\{(\{[A-Za-z_]\w*\})\}|\{([A-Za-z_]\w*)\}")


class JudgePrompt:
    """The prompt of a file, or the one that comes with the package.

    text:  as read

    Raises StepDPOError, naming the file, for one that cannot be read, an unknown place, or a required one that is
    missing.
    """

    def __init__(self, file: str | PathLike[str] | None = None) -> None:
        path = resources.files(__package__) / "prompt.txt" if file is None else Path(file)
        try:
            self.text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise StepDPOError(f"prompt file {path}: not UTF-8 at byte {error.start}") from error
        except OSError as error:
            raise StepDPOError(f"prompt file {path} cannot be read: {error.strerror}") from error
        names = [match[2] for match in _PLACE.finditer(self.text) if match[2]]
        for name in names:
            if name not in PLACES:
                raise StepDPOError(
                    f"prompt file {path}: {{{name}}} is unknown; there are {', '.join(f'{{{p}}}' for p in PLACES)}; "
                    f"write {{{{{name}}}}} for a literal {{{name}}}"
                )
        for name in REQUIRED:
            if name not in names:
                raise StepDPOError(f"prompt file {path}: {{{name}}} is missing")
        self.has_form = "form" in names

    def fill(self, solution: Solution, *, structured: bool) -> str:
        """The prompt about a solution. structured: asks for JSON where the file leaves the form open."""
        steps = bodies(solution.steps)
        count = str(len(steps))
        values = {
            "problem": solution.prompt.strip(),
            "steps": "\n".join(f"Step {k}: {body}" for k, body in enumerate(steps, start=1)),
            "solution": NO_SOLUTION if solution.reference is None else solution.reference.strip(),
            "answer": solution.answer.strip(),
            "count": count,
            "form": (JSON_FORM if structured else TEXT_FORM).replace("{}", count),
        }
        return _PLACE.sub(lambda match: match[1] or values[match[2]], self.text)
