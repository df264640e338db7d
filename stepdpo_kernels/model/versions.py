"""The oldest transformers that each part runs with."""

from __future__ import annotations

import transformers
from packaging.version import Version

from stepdpo_kernels.types import StepDPOError


def require_transformers(at_least: str, part: str) -> None:
    """Raises StepDPOError where the installed transformers is older."""
    if Version(transformers.__version__) < Version(at_least):
        raise StepDPOError(
            f"{part} needs transformers {at_least} or newer, found {transformers.__version__}: "
            f"pip install 'transformers>={at_least}'"
        )


require_transformers("5.0", "a packed model")
