"""Solutions are cut into steps and put together again without losing a character."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("hypothesis")

from hypothesis import given
from hypothesis import strategies as st

from stepdpo_kernels.data.steps import StepFormat
from stepdpo_kernels.types import StepDPOError

FORMATS = [
    StepFormat(),
    StepFormat("lines"),
    StepFormat("pattern", r"\n\n"),
    StepFormat("pattern", r"(?m)^\d+\. "),
    StepFormat(closing=r"\s*Answer:"),
    StepFormat("lines", closing="####"),
]
pieces = st.sampled_from(
    ["Step 1:", "Step 2:", "\n", "\n\n", " ", "\t", "\r\n", "**Step 3:**", "### Step 4:", "a", "7. ", ".", "Answer:",
     "####", "\u2028", "\u00a0", "\x0b", "é", "Step", "step 12 :", "1. "]
)  # fmt: skip


@pytest.mark.parametrize("steps", FORMATS)
@given(text=st.lists(pieces, max_size=25).map("".join) | st.text(max_size=80))
def test_nothing_is_lost(steps, text):
    cut = steps.split(text)
    assert cut.text == text
    for k in range(1, len(cut.steps) + 1):
        assert cut.before(k) + cut.after(k) == text
        assert cut.before(k).endswith(cut.steps[k - 1].marker)
        assert cut.after(k).startswith(cut.steps[k - 1].text)


@pytest.mark.parametrize(
    ("text", "markers", "texts"),
    [
        ("Let's think step by step.\nStep 1: a\nStep 2: b", ["\nStep 1:", "\nStep 2:"], [" a", " b"]),
        ("Step 1: a. Step 2: b", ["Step 1:", " Step 2:"], [" a.", " b"]),
        ("Step 1: a\n\n**Step 2:** b", ["Step 1:", "\n\n**Step 2:**"], [" a", " b"]),
        ("### Step 1: a\n## Step 2: b", ["### Step 1:", "\n## Step 2:"], [" a", " b"]),
        ("Step 1: a\r\nStep 2: b", ["Step 1:", "\r\nStep 2:"], [" a", " b"]),
        ("step 1: a\nSTEP 2: b", ["step 1:"], [" a\nSTEP 2: b"]),
        ("Step 1: a\nStep 3: b\nStep 3: c", ["Step 1:", "\nStep 3:", "\nStep 3:"], [" a", " b", " c"]),  # misnumbered
        ("Step 1: a\n b without a marker\nStep 3: c", ["Step 1:", "\nStep 3:"], [" a\n b without a marker", " c"]),
        ("Step 1: as in Step 2: we add", ["Step 1:"], [" as in Step 2: we add"]),
        ("Step 1: a\nStep 2 is next\nStep 2: b", ["Step 1:", "\nStep 2:"], [" a\nStep 2 is next", " b"]),
        ("Step 1:\nStep 2:", ["Step 1:", "\nStep 2:"], ["", ""]),
        ("no marker at all", [], []),
        ("", [], []),
    ],
)
def test_markers(text, markers, texts):
    steps = StepFormat().split(text).steps
    assert [step.marker for step in steps] == markers
    assert [step.text for step in steps] == texts


def test_lines_and_patterns():
    lines = StepFormat("lines").split(" a\n\n b \nc\n")
    assert [(step.marker, step.text) for step in lines.steps] == [("", "a"), ("\n\n ", "b"), (" \n", "c\n")]
    assert lines.opening == " "
    numbered = StepFormat("pattern", r"(?m)^\d+\. ").split("So:\n1. a\n2. b")
    assert [(step.marker, step.text) for step in numbered.steps] == [("1. ", "a\n"), ("2. ", "b")]


def test_closing():
    cut = StepFormat(closing=r"\s*Answer:").split("Answer: no. Step 1: a. Step 2: b. Answer: 5. Step 3: c")
    assert cut.opening == "Answer: no."
    assert [step.text for step in cut.steps] == [" a.", " b."]
    assert cut.closing == " Answer: 5. Step 3: c"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"by": "words"}, "by marker, lines or pattern; got 'words'"),
        ({"by": "pattern"}, "a step pattern belongs to steps by pattern"),
        ({"pattern": "x"}, "a step pattern belongs to steps by pattern"),
        ({"by": "pattern", "pattern": "("}, "is no regular expression"),
        ({"by": "pattern", "pattern": "x*"}, "matches the empty text"),
        ({"closing": "("}, "closing pattern '\\(' is no regular expression"),
    ],
)
def test_options_are_checked(options, said):
    with pytest.raises(StepDPOError, match=said):
        StepFormat(**options)


@pytest.mark.parametrize("unit", ["\n", " ", "Step 1:", "\nStep 1: ", ". ", "#", "**", "Step ", "\n \n"])
@pytest.mark.parametrize("by", ["marker", "lines"])
def test_time_is_linear(unit, by):
    def seconds(size: int) -> float:
        text, taken = unit * (size // len(unit)), []
        for _ in range(2):
            start = time.perf_counter()
            StepFormat(by).split(text)
            taken.append(time.perf_counter() - start)
        return min(taken)

    assert seconds(800_000) < 10 * seconds(200_000) + 0.2
