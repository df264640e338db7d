"""A solution in text <-> its steps, without losing a character.

The released dataset of Step-DPO cuts solutions at the marker `Step k:`; others write a step a line, or a marker of
their own. A step is named by its position: what number the marker itself bears is the model's business, and may be
wrong, come twice or be missing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from stepdpo_kernels.types import StepDPOError

# At the beginning of a line, or after the end of a sentence; Markdown's emphasis and headings around it are part of it.
MARKER = r"(?m)(?:^[ \t]*|(?<=[.!?:;])[ \t]+)(?:#+ *|\*\*)?[Ss]tep +\d+ *:(?:\*\*)?"


class Step(NamedTuple):
    """marker: with the white space before it, such as "\\nStep 2:"; text: up to the next marker."""

    marker: str
    text: str


@dataclass(frozen=True)
class Steps:
    """A solution: what stands before the first step, the steps, and what comes after the last one.

    opening + (marker + text of each step) + closing is the solution, character for character.
    """

    opening: str
    steps: tuple[Step, ...]
    closing: str = ""

    @property
    def text(self) -> str:
        return self.opening + "".join(step.marker + step.text for step in self.steps) + self.closing

    def before(self, k: int) -> str:
        """The text up to and with the marker of step k = 1, 2, ...: `initial_reason_steps` of a record."""
        earlier = "".join(step.marker + step.text for step in self.steps[: k - 1])
        return self.opening + earlier + self.steps[k - 1].marker

    def after(self, k: int) -> str:
        """The text from step k = 1, 2, ... on, without its marker: `full_rejected` of a record."""
        return self.text[len(self.before(k)) :]


@dataclass(frozen=True)
class StepFormat:
    """How solutions are cut into steps.

    by:       "marker": at markers such as `Step 3:`, at the beginning of a line or after a sentence;
              "lines": every line that is not blank is a step;
              "pattern": at matches of the regular expression `pattern`, which become the markers
    pattern:  for "pattern"; "(?m)" and other flags are written inside it
    closing:  a regular expression, or "" for none; its first match after the first step ends the last step, and what
              it matches and all that follows is no step ("Answer: 42" after the last step)

    Raises StepDPOError for an unknown `by`, and for a pattern that is absent, malformed or matches the empty text.
    """

    by: str = "marker"
    pattern: str = ""
    closing: str = ""

    def __post_init__(self) -> None:
        if self.by not in ("marker", "lines", "pattern"):
            raise StepDPOError(f"steps must be cut by marker, lines or pattern; got {self.by!r}")
        if (self.by == "pattern") != bool(self.pattern):
            raise StepDPOError(f"a step pattern belongs to steps by pattern; got by {self.by!r}, {self.pattern!r}")
        for name, pattern in (("step pattern", self.pattern), ("closing pattern", self.closing)):
            try:
                empty = bool(pattern) and re.fullmatch(pattern, "") is not None
            except re.error as error:
                raise StepDPOError(f"{name} {pattern!r} is no regular expression: {error}") from error
            if empty:
                raise StepDPOError(f"{name} {pattern!r} matches the empty text: it would cut everywhere")

    def split(self, text: str) -> Steps:
        """The steps of a solution. One without any marker has no steps: all of it is `opening`."""
        if self.by == "lines":
            return self._lines(text)
        spans = [m.span() for m in re.finditer(MARKER if self.by == "marker" else self.pattern, text) if m[0]]
        if self.by == "marker":
            spans = [(_before_spaces(text, start), end) for start, end in spans]
        return self._cut(text, spans)

    def _lines(self, text: str) -> Steps:
        spans: list[tuple[int, int]] = []
        at = end = 0
        for line in text.split("\n"):
            body = line.strip()
            if body:
                start = at + line.index(body)
                spans.append((end if spans else start, start))
                end = start + len(body)
            at += len(line) + 1
        return self._cut(text, spans)

    def _cut(self, text: str, spans: list[tuple[int, int]]) -> Steps:
        """spans: start and end of each marker."""
        if not spans:
            return Steps(text, ())
        found = re.compile(self.closing).search(text, spans[0][1]) if self.closing else None
        last = found.start() if found else len(text)
        spans = [span for span in spans if span[1] <= last]
        ends = [start for start, _ in spans[1:]] + [last]
        steps = tuple(Step(text[start:end], text[end:stop]) for (start, end), stop in zip(spans, ends, strict=True))
        return Steps(text[: spans[0][0]], steps, text[last:])


def _before_spaces(text: str, at: int) -> int:
    while at and text[at - 1].isspace():
        at -= 1
    return at
