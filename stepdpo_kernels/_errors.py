"""The package's own error, where nothing heavy is imported."""

from __future__ import annotations


class StepDPOError(ValueError):
    """Input that this library cannot use: the message names the record, the field and the value."""
