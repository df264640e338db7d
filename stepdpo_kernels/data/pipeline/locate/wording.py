"""The steps of a solution as a judge or a person reads them."""

from __future__ import annotations

import re

from stepdpo_kernels.data.steps import MARKER, Steps

_MARKER = re.compile(MARKER)


def bodies(steps: Steps) -> list[str]:
    """The text of each step without the `Step k:` that it begins with, whose number may be wrong."""
    texts = [(step.marker + step.text).strip() for step in steps.steps]
    return [text[match.end() :].strip() if (match := _MARKER.match(text)) else text for text in texts]
