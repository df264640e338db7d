"""How the stages say how far they are, without knowing who shows it."""

from __future__ import annotations

from collections.abc import Callable

# (steps done, steps in all, a few words)
Progress = Callable[[int, int, str], None]


def silent(done: int, total: int, words: str) -> None:
    """Shows nothing."""
