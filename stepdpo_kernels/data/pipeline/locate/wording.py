"""The steps of a solution as a judge or a person reads them."""

from __future__ import annotations

import re

from stepdpo_kernels.data.steps import MARKER, Steps


def bodies(steps: Steps) -> list[str]:
    """The text of each step without its `Step k:`, whose number may be wrong; other markers stay."""
    return [f"{re.sub(MARKER, '', step.marker).strip()} {step.text.strip()}".strip() for step in steps.steps]
