"""A progress bar on a terminal; elsewhere, lines now and then."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from tqdm import tqdm

LINE_SECONDS = 60.0  # between two lines where stderr is no terminal


class _Lines:
    """A stream to which a bar writes lines instead of writing over itself."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.last = stream, ""

    def write(self, text: str) -> None:
        if text.strip() not in ("", self.last):
            self.last = text.strip()
            self.stream.write(self.last + "\n")

    def flush(self) -> None:
        self.stream.flush()


def open_bar(total: int | None, words: str = "", *, unit: str = "steps", **options: Any) -> tqdm[Any]:
    """A bar on a terminal; elsewhere a line a minute and one at the end.

    total:    None where nobody knows
    options:  of tqdm
    """
    options |= {"total": total, "desc": words, "unit": unit}
    if sys.stderr.isatty():
        layout = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}{postfix}]"
        if total is None:
            layout = "{desc}{n_fmt} {unit} [{elapsed}{postfix}]"
        return tqdm(**options, bar_format=layout, dynamic_ncols=True)
    layout = "{desc}{n_fmt}/{total_fmt} {unit} ({percentage:.0f}%), {elapsed} passed, {remaining} left{postfix}"
    if total is None:
        layout = "{desc}{n_fmt} {unit}, {elapsed} passed{postfix}"
    seldom = {"mininterval": LINE_SECONDS, "maxinterval": LINE_SECONDS}
    return tqdm(**options, bar_format=layout, file=_Lines(sys.stderr), **seldom)
