"""What a judge's reply says: JSON of a schema, or text that ends with a final decision.

A reply is taken only where nothing in it speaks against it; every other one is undecided, with a reason.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

KEY = "first_wrong_step"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "steps": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "step": {"type": "integer"},
                    "explanation": {"type": "string"},
                    "correct": {"type": "boolean"},
                },
                "required": ["step", "explanation", "correct"],
                "additionalProperties": False,
            },
        },
        KEY: {"type": "integer"},
    },
    "required": ["steps", KEY],
    "additionalProperties": False,
}


class Reading(NamedTuple):
    """step, explanation, problem: as in Location"""

    step: int | None
    explanation: str
    problem: str = ""


_THOUGHT_ENDS, _THOUGHT_BEGINS = re.compile(r"(?i)</think(?:ing)?>"), re.compile(r"(?i)<think(?:ing)?>")
_MARKUP = re.compile(r"[*_`#|>~]|\\text(?:bf|it)?\b|[{}$]")
_DECISION = re.compile(r"final\s+decision", re.IGNORECASE)
_NUMBERS = r"\d+(?:\s*(?:,|and|&|-|–|to|through)\s*(?:steps?\s*)?\d+){0,99}"
_VERDICT = re.compile(
    rf"\bsteps?\s*({_NUMBERS})[\s:=–—-]*(?:\b(?:is|are)\b[\s:=–—-]*)?"
    r"(?:(incorrect|not\s+correct|wrong|false|✗|✘|❌)|(correct|right|true|✓|✔|✅))(?![\w-])",
    re.IGNORECASE,
)
_ALL = re.compile(r"\W*all\s+(?:the\s+|\d+\s+)?steps\s*(?:are|:)?\s*correct\W*", re.IGNORECASE)
_OBJECT = re.compile(r'\{\s*"')


def read_reply(text: str, count: int) -> Reading:
    """The first wrong step among `count` steps, 0 for none, by a judge's reply. Never raises."""
    text = _THOUGHT_BEGINS.split(_THOUGHT_ENDS.split(text)[-1])[0].strip()
    if not text:
        return Reading(None, "", "empty reply")
    value = _json(text)
    if value is not None:
        return _of_json(value, count)
    return _of_text(text, count)


def _json(text: str) -> dict[str, Any] | None:
    """The last object with a first wrong step in a text, which may be JSON as a whole or hold it in a fence."""
    found, at, decoder = None, 0, json.JSONDecoder()
    if KEY not in text:
        return None
    while match := _OBJECT.search(text, at):
        try:
            value, end = decoder.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            value, end = {}, 0
        if KEY in value:
            found, at = value, end
        else:
            at = match.end()  # it may be within
    return found


def _of_json(value: dict[str, Any], count: int) -> Reading:
    steps = value.get("steps")
    entries = [entry for entry in steps if isinstance(entry, dict)] if isinstance(steps, list) else []
    verdicts: list[tuple[int, bool]] = []
    words: dict[int, str] = {}
    for entry in entries:
        number, correct = _whole(entry.get("step")), entry.get("correct")
        if number is not None and isinstance(correct, bool):
            verdicts.append((number, correct))
            words[number] = str(entry.get("explanation") or "")
    told = _whole(value.get(KEY))
    everything = "\n".join(f"Step {number}: {text}" for number, text in words.items())
    if told is None or not 0 <= told <= count:
        return Reading(None, everything, "no such step" if told is not None else "no decision")
    if not entries:
        return Reading(told, "")
    step, problem = _first_wrong(verdicts, count)
    if not problem and step != told:
        problem = "contradiction"
    if problem:
        return Reading(None, everything, problem)
    return Reading(told, words.get(told, ""))


def _whole(value: object) -> int | None:
    if isinstance(value, str) and re.fullmatch(r"\s*\d{1,9}\s*", value):
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _of_text(text: str, count: int) -> Reading:
    marks = [*_DECISION.finditer(text)]
    decided = [
        (match, _first_wrong(verdicts, count))
        for match, end in zip(marks, [*(later.start() for later in marks[1:]), len(text)], strict=False)
        if (verdicts := _verdicts(_MARKUP.sub(" ", text[match.end() : end]), count))
    ]
    if not decided:
        return Reading(None, text, "no decision")
    words = text[: decided[-1][0].start()].rstrip("*#_ \n\t")
    outcomes = {outcome for _, outcome in decided}
    if len(outcomes) > 1:
        return Reading(None, text, "contradiction")
    step, problem = outcomes.pop()
    return Reading(None, text, problem) if problem else Reading(step, words)


def _verdicts(text: str, count: int) -> list[tuple[int, bool]]:
    """Number of a step, and whether it is correct, for each verdict; numbers may come in lists and ranges."""
    verdicts = []
    for match in _VERDICT.finditer(text):
        numbers = [int(number[:9]) for number in re.findall(r"\d+", match[1])]
        if re.search(r"-|–|to|through", match[1]) and len(numbers) == 2:
            numbers = [*range(numbers[0], min(numbers[1], count + 1) + 1)]
        verdicts += [(number, match[3] is not None) for number in numbers]
    if not verdicts and _ALL.fullmatch(text):
        verdicts = [(number, True) for number in range(1, count + 1)]
    return verdicts


def _first_wrong(verdicts: list[tuple[int, bool]], count: int) -> tuple[int | None, str]:
    """The first wrong step, 0 for none; or None, and what is the matter with the verdicts."""
    said = dict(verdicts)
    if any(said[number] != correct for number, correct in verdicts):
        return None, "contradiction"
    if any(not 1 <= number <= count for number in said):
        return None, "no such step"
    for number in range(1, count + 1):
        if number not in said:
            return None, "a step is left out"
        if not said[number]:
            return number, ""
    return 0, ""
