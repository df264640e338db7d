"""One record of the Math-Step-DPO-10K schema, checked field by field.

Required strings: `prompt`, `initial_reason_steps` (may be empty), `chosen`, `rejected`. Optional: `id` (string or
integer), `group` (string), `weight` (number). Every other field is ignored.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from stepdpo_kernels.types import StepDPOError

TEXT_FIELDS = ("prompt", "initial_reason_steps", "chosen", "rejected")
FIELDS = (*TEXT_FIELDS, "id", "group", "weight")


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
    """A checked record. `where` names its file and line or row."""

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


def check_record(raw: RawRecord) -> StepRecord:
    """The record with its defaults filled in: `id` from its place, `group` from its prompt, `weight` 1.

    Raises StepDPOError that names the place, the field, its type and its value.
    """
    value = raw.value
    if not isinstance(value, dict):
        raise StepDPOError(
            f"{raw.where}: a record must be an object with the fields {', '.join(TEXT_FIELDS)}, got {_article(value)}"
        )
    name = raw.where if value.get("id") is None else f"{raw.where} (id {shorten(value['id'])})"
    for field in TEXT_FIELDS:
        if field not in value:
            raise StepDPOError(
                f"{name}: field {field!r} is missing; a record needs {', '.join(TEXT_FIELDS)}, "
                f"this one has {', '.join(map(str, value)) or 'no fields'}"
            )
        _check_text(name, field, value[field])
    return StepRecord(
        where=raw.where,
        id=_id(raw, value.get("id")),
        group=_group(name, value),
        weight=_weight(name, value.get("weight")),
        **{field: value[field] for field in TEXT_FIELDS},
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
