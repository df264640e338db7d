"""The problem sets that Step-DPO is measured on (Lai et al. 2024, arXiv 2406.18629, section 4): greedy, 2,048 tokens.

A task is a name for where problems are, how a record is read (`data/problems.py`), and how long a solution may be. The
same task can be read from a file of one's own. The final answer is found in the same way for all of them
(`answers.extract_answer`) and compared by `answers.AnswerChecker`.

The prompt is the problem in the template that the model was trained with, and the solution begins as in training. The
fixed templates "deepseek-math" and "qwen2-boxed" ask for an answer in a box themselves; nothing is added to the others
unless an instruction is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from os import PathLike, fspath

from stepdpo_kernels.data.pipeline.collect import BEGINNING
from stepdpo_kernels.data.records import RawRecord
from stepdpo_kernels.data.sources import open_source
from stepdpo_kernels.types import StepDPOError

MAX_NEW_TOKENS = 2048


@dataclass(frozen=True)
class Task:
    """Problems to evaluate on.

    name:            as on the command line
    title:           as in reports
    sources:         files, folders or hub ids, read one after the other
    split:           of a folder or a hub dataset
    format:          of the records, as in `data/problems.py`; None: as their fields show
    items:           how many there are, None where that is not known
    download:        where the file is to be had, for a task that has no source of its own
    max_new_tokens:  most tokens of a solution
    instruction:     follows the problem, after a line break; "" for none
    beginning:       how every solution begins; the model goes on from there
    """

    name: str
    title: str
    sources: tuple[str, ...] = ()
    split: str = "test"
    format: str | None = None
    items: int | None = None
    download: str = ""
    max_new_tokens: int = MAX_NEW_TOKENS
    instruction: str = ""
    beginning: str = BEGINNING

    def records(self) -> Iterator[RawRecord]:
        """Raises StepDPOError as `open_source` does."""
        for source in self.sources:
            yield from open_source(source, self.split, columns=None, keep_bad=True).records


_MATH_SUBJECTS = (
    *("algebra", "counting_and_probability", "geometry", "intermediate_algebra"),
    *("number_theory", "prealgebra", "precalculus"),
)
TASKS = {
    task.name: task
    for task in (
        Task("gsm8k", "GSM8K", ("openai/gsm8k:main",), "test", "gsm8k", 1319),
        Task(
            "math",
            "MATH",
            tuple(f"EleutherAI/hendrycks_math:{subject}" for subject in _MATH_SUBJECTS),
            "test",
            "math",
            5000,
        ),
        Task("math500", "MATH-500", ("HuggingFaceH4/MATH-500",), "test", "math", 500),
        Task("aime2024", "AIME 2024", ("Maxwell-Jia/AIME_2024",), "train", "aime", 30),
        Task(
            "odyssey-math",
            "Odyssey-MATH",
            format="odyssey",
            download="final-odyssey-math-with-levels.jsonl of github.com/protagolabs/odyssey-math",
        ),
    )
}


def find_task(name: str | None = None, data: str | PathLike[str] | None = None, split: str | None = None) -> Task:
    """The task of a name, of other data, or of both: a task that is read from a file.

    data:   a file, a folder or a hub dataset in place of the task's own
    split:  in place of the task's own
    Raises StepDPOError for an unknown name, for neither, and for a task without a source of its own.
    """
    if name is None and data is None:
        raise StepDPOError(f"nothing to evaluate on: name a task ({', '.join(TASKS)}) or a file of problems")
    if name is not None and name not in TASKS:
        raise StepDPOError(f"task must be one of {', '.join(TASKS)}; got {name!r}")
    task = TASKS[name] if name is not None else Task(fspath(data or ""), fspath(data or ""))
    if data is not None:
        task = replace(task, sources=(fspath(data),), split="test", items=None)
        if name is not None:
            task = replace(task, format=None)  # another's records of the same problems may have other fields
    elif not task.sources:
        raise StepDPOError(f"task {name!r} has no hub dataset: get {task.download}, and name that file as the data")
    return replace(task, split=split) if split is not None else task
