"""The record that the stages hand on: one solution that a model wrote, graded, cut into steps.

`stepdpo prepare collect` writes it, one a line; `locate` adds `first_wrong_step` and what goes with it; `rectify`
reads that. Fields:

    id             "<problem id>/<number of the sample, from 0>"
    problem_id     id of the problem
    prompt         the problem
    answer         its answer, as the source gives it
    reference      a right solution, where the source has one, else null
    sample, seed   number of the sample of this problem, from 0; seed it was drawn with
    generator      what wrote it
    opening        text before the first step: "Let's think step by step."
    steps          list of objects: `marker` ("\\nStep 2:"), `text`, `logp` (sum over the step's tokens as the generator
                   saw them, temperature 1; null where it reports none)
    closing        text after the last step, mostly ""
    finish         "stop" or "length": whether the model ended it
    prediction     the final answer that was found in it, or null
    verdict        "right", "wrong", "no_answer", "unfinished"

and after `locate`:

    locator            "judge", "rollout", "exact" or "human"
    first_wrong_step   1, 2, ...: the first step that is wrong; 0: every step is right; null: undecided
    explanation        what the locator has to say about it, "" for nothing
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Any

from stepdpo_kernels.data.records import shorten
from stepdpo_kernels.data.sources import open_source
from stepdpo_kernels.data.steps import Step, Steps
from stepdpo_kernels.types import StepDPOError

VERDICTS = ("right", "wrong", "no_answer", "unfinished")
LOCATORS = ("judge", "rollout", "exact", "human")


@dataclass(frozen=True)
class Solution:
    """One record, its fields as in the module's text. `logps` stand beside the steps, one each."""

    id: str
    problem_id: str
    prompt: str
    answer: str
    reference: str | None
    sample: int
    seed: int
    generator: str
    steps: Steps
    logps: tuple[float | None, ...]
    finish: str
    prediction: str | None
    verdict: str
    locator: str | None = None
    first_wrong_step: int | None = None
    explanation: str = ""

    @property
    def text(self) -> str:
        return self.steps.text

    def to_record(self) -> dict[str, Any]:
        steps = [
            {"marker": step.marker, "text": step.text, "logp": logp}
            for step, logp in zip(self.steps.steps, self.logps, strict=True)
        ]
        record = {
            "id": self.id,
            "problem_id": self.problem_id,
            "prompt": self.prompt,
            "answer": self.answer,
            "reference": self.reference,
            "sample": self.sample,
            "seed": self.seed,
            "generator": self.generator,
            "opening": self.steps.opening,
            "steps": steps,
            "closing": self.steps.closing,
            "finish": self.finish,
            "prediction": self.prediction,
            "verdict": self.verdict,
        }
        if self.locator is not None:
            record |= {
                "locator": self.locator,
                "first_wrong_step": self.first_wrong_step,
                "explanation": self.explanation,
            }
        return record

    @classmethod
    def from_record(cls, value: Any, where: str) -> Solution:
        """The solution of a parsed record. Raises StepDPOError that names the place, the field and the value."""
        if not isinstance(value, dict):
            raise StepDPOError(f"{where}: a record must be an object, got {shorten(value)}")
        field = _Fields(value, where)
        steps, logps = [], []
        for k, step in enumerate(field("steps", list), start=1):
            part = _Fields(step if isinstance(step, dict) else {}, f"{where}: step {k}")
            steps.append(Step(part("marker", str), part("text", str)))
            logps.append(part("logp", float, int, type(None), default=None))
        found = field("first_wrong_step", int, type(None), default=None)
        if found is not None and not 0 <= found <= len(steps):
            raise StepDPOError(f"{where}: field 'first_wrong_step' is {found}, but there are {len(steps)} steps")
        verdict = field("verdict", str)
        if verdict not in VERDICTS:
            raise StepDPOError(f"{where}: field 'verdict' must be one of {', '.join(VERDICTS)}; got {shorten(verdict)}")
        return cls(
            id=field("id", str),
            problem_id=field("problem_id", str),
            prompt=field("prompt", str),
            answer=field("answer", str),
            reference=field("reference", str, type(None), default=None),
            sample=field("sample", int),
            seed=field("seed", int),
            generator=field("generator", str),
            steps=Steps(field("opening", str), tuple(steps), field("closing", str, default="")),
            logps=tuple(logps),
            finish=field("finish", str),
            prediction=field("prediction", str, type(None), default=None),
            verdict=verdict,
            locator=field("locator", str, type(None), default=None),
            first_wrong_step=found,
            explanation=field("explanation", str, default=""),
        )


class _Fields:
    def __init__(self, value: dict[str, Any], where: str) -> None:
        self.value, self.where = value, where

    def __call__(self, name: str, *kinds: type, **options: Any) -> Any:
        if name not in self.value:
            if "default" in options:
                return options["default"]
            raise StepDPOError(f"{self.where}: field {name!r} is missing")
        value = self.value[name]
        if not isinstance(value, kinds) or isinstance(value, bool):
            words = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise StepDPOError(f"{self.where}: field {name!r} must be {words}, got {shorten(value)}")
        return value


def read_solutions(path: str | PathLike[str]) -> Iterator[Solution]:
    """The solutions of a file, one at a time. Raises StepDPOError for one that cannot be read."""
    for raw in open_source(path, "train", columns=None).records:
        yield Solution.from_record(raw.value, raw.where)
