"""Two answers compared part by part; what text alone does not decide is handed on."""

from __future__ import annotations

import re
from collections.abc import Callable

from stepdpo_kernels.answers.quick import (
    LONGEST,
    Listed,
    choice,
    clean,
    listed,
    quantity,
    same_quantity,
    without_name,
    words_of,
)

# None: cannot be decided here.
Decide = Callable[[str, str], bool | None]

PARTS = 50  # of an unordered list; longer ones are compared in order
_AND = re.compile(r"\s*,?\s*(?:\\text\s*\{\s*,?\s*(?:and|or)\s*\}|\s(?:and|or)\s)\s*")
_LETTER_AND_MORE = re.compile(r"\(([A-J])\)\s*\S.*|([A-J])[.):]\s+\S.*", re.DOTALL)


def undecided(gold: str, prediction: str) -> bool | None:
    return None


def compare(gold: str, prediction: str, decide: Decide = undecided) -> bool | None:
    """Whether the answers are the same; None where neither text nor `decide`, which is asked for the rest, can say."""
    gold, prediction = clean(gold), clean(prediction)
    if gold == prediction:
        return True
    if max(len(gold), len(prediction)) > LONGEST:
        return False
    return _compare(gold, prediction, decide, 0)


def _compare(gold: str, prediction: str, decide: Decide, depth: int) -> bool | None:
    gold, prediction = clean(gold), clean(prediction)
    if gold == prediction:
        return True
    if depth > 5 or not gold or not prediction:
        return False
    letter = choice(gold)
    if letter is not None and (other := _letter(prediction)) is not None:
        return letter == other
    (name, value), (other_name, other_value) = without_name(gold), without_name(prediction)
    if name or other_name:
        if name and other_name and name != other_name:
            return False
        return _compare(value, other_value, decide, depth + 1)
    a, b = quantity(gold), quantity(prediction)
    if a is not None and b is not None:
        return same_quantity(a, b)
    left, right = _AND.sub(", ", gold), _AND.sub(", ", prediction)
    if words_of(left) is not None or words_of(right) is not None:
        return _words(gold, prediction)
    parts, other_parts = listed(left), listed(right)
    if parts is not None and other_parts is not None:
        return _lists(parts, other_parts, decide, depth)
    for one, text in ((parts, right), (other_parts, left)):
        if one is not None and one.brackets == "{}" and len(one.parts) == 1:
            return _compare(one.parts[0], text, decide, depth + 1)
    if (parts is not None and b is not None) or (other_parts is not None and a is not None):
        return False
    return decide(left, right)


def _letter(prediction: str) -> str | None:
    if (letter := choice(prediction)) is not None:
        return letter
    match = _LETTER_AND_MORE.fullmatch(prediction)
    return (match[1] or match[2]) if match else None


def _words(gold: str, prediction: str) -> bool:
    texts = [words_of(text) or clean(text).casefold() for text in (gold, prediction)]
    a, b = (re.sub(r"^(?:the|a|an) ", "", text).replace(" ", "").replace("-", "") for text in texts)
    return a == b


def _lists(gold: Listed, prediction: Listed, decide: Decide, depth: int) -> bool | None:
    if len(gold.parts) != len(prediction.parts):
        return False
    both = {gold.brackets, prediction.brackets}
    if both <= {"", "{}"}:
        return _unordered(gold.parts, prediction.parts, decide, depth)
    if len(both) > 1 and both != {"", "()"}:
        return False
    return _all([_compare(a, b, decide, depth + 1) for a, b in zip(gold.parts, prediction.parts, strict=True)])


def _unordered(gold: tuple[str, ...], prediction: tuple[str, ...], decide: Decide, depth: int) -> bool | None:
    if len(gold) > PARTS:
        return _all([_compare(a, b, decide, depth + 1) for a, b in zip(gold, prediction, strict=True)])
    rest, results = list(prediction), list[bool | None]()
    for a in gold:
        found = [_compare(a, b, decide, depth + 1) for b in rest]
        result = True if True in found else None if None in found else False
        results.append(result)
        if result:
            rest.pop(found.index(True))
    return _all(results)


def _all(results: list[bool | None]) -> bool | None:
    return False if False in results else None if None in results else True
