"""One record of the Math-Step-DPO-10K schema, checked field by field.

Required strings: `prompt`, `initial_reason_steps` (may be empty), `chosen`, `rejected`. Optional: `id` (string or
integer), `group` (string), `weight` (number). Every other field is ignored.

Unit "solution" reads `full_chosen` and `full_rejected` in place of `chosen` and `rejected`. In the released dataset
these begin with the step in question, so that `initial_reason_steps` + `full_chosen` is the whole solution; a text
that begins with the initial steps is whole already. They may be missing: many released records have no
`full_rejected`.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from stepdpo_kernels.types import StepDPOError

UNITS = ("step", "solution")
BRANCH_FIELDS = {"step": ("chosen", "rejected"), "solution": ("full_chosen", "full_rejected")}
TEXT_FIELDS = ("prompt", "initial_reason_steps", "chosen", "rejected")
FIELDS = (*TEXT_FIELDS, *BRANCH_FIELDS["solution"], "id", "group", "weight")


class RawRecord(NamedTuple):
    """A parsed but unchecked record.

    where:  file and line or row, for messages
    id:     the id that the record has if it names none
    value:  what was parsed
    """

    where: str
    id: str
    value: Any


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A checked record. `where` names its file and line or row.

    chosen, rejected:  the texts of the unit's `BRANCH_FIELDS`; of unit "solution" without the initial steps, and ""
                       where the record has none
    """

    where: str
    id: str
    group: str
    weight: float
    prompt: str
    initial_reason_steps: str
    chosen: str
    rejected: str

    @property
    def name(self) -> str:
        return f"{self.where} (id {self.id!r})"


def shorten(value: object, width: int = 80) -> str:
    """repr of `value`, its middle left out where it is longer than `width` characters."""
    if isinstance(value, str) and len(value) > width:
        value = value[: width - 10] + " ... " + value[-5:]
    text = repr(value)
    return text if len(text) <= 2 * width else text[: 2 * width] + "..."


def _article(value: object) -> str:
    return "null" if value is None else f"{type(value).__name__} {shorten(value)}"


def check_record(raw: RawRecord, unit: str = "step") -> StepRecord:
    """The record with its defaults filled in: `id` from its place, `group` from its prompt, `weight` 1.

    Raises StepDPOError that names the place, the field, its type and its value.
    """
    value, branches = raw.value, BRANCH_FIELDS[unit]
    fields = (*TEXT_FIELDS[:2], *branches)
    if not isinstance(value, dict):
        raise StepDPOError(
            f"{raw.where}: a record must be an object with the fields {', '.join(fields)}, got {_article(value)}"
        )
    name = raw.where if value.get("id") is None else f"{raw.where} (id {shorten(value['id'])})"
    texts: list[Any] = []
    for field in fields:
        text = value.get(field)
        if text is None and unit == "solution" and field in branches:
            text = ""
        elif field not in value:
            raise StepDPOError(
                f"{name}: field {field!r} is missing; a record needs {', '.join(fields)}, "
                f"this one has {', '.join(map(str, value)) or 'no fields'}"
            )
        _check_text(name, field, text)
        texts.append(text)
    prompt, steps, *both = texts
    if unit == "solution":
        both = [text.removeprefix(steps) for text in both]
    return StepRecord(
        where=raw.where,
        id=_id(raw, value.get("id")),
        group=_group(name, value),
        weight=_weight(name, value.get("weight")),
        prompt=prompt,
        initial_reason_steps=steps,
        chosen=both[0],
        rejected=both[1],
    )


def _check_text(name: str, field: str, text: object) -> None:
    if not isinstance(text, str):
        raise StepDPOError(f"{name}: field {field!r} must be a string, got {_article(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise StepDPOError(
            f"{name}: field {field!r} holds half of a surrogate pair at character {error.start}, which no tokenizer "
            f"takes: {shorten(text[max(error.start - 20, 0) : error.start + 20])}; write the whole character"
        ) from error


def _id(raw: RawRecord, value: object) -> str:
    if value is None:
        return raw.id
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise StepDPOError(f"{raw.where}: field 'id' must be a string or an integer, got {_article(value)}")
    _check_text(raw.where, "id", str(value))
    return str(value)


def _group(name: str, value: dict[str, Any]) -> str:
    group = value.get("group")
    if group is None:
        return hashlib.sha256(value["prompt"].encode()).hexdigest()[:16]
    _check_text(name, "group", group)
    return str(group)


def _weight(name: str, value: object) -> float:
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise StepDPOError(f"{name}: field 'weight' must be a number, got {_article(value)}")
    try:
        weight = float(value)
    except OverflowError:
        weight = math.inf
    if not (math.isfinite(weight) and weight >= 0):
        raise StepDPOError(f"{name}: field 'weight' must be finite and at least 0, got {shorten(value)}")
    return weight
