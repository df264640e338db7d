"""Where the final answer of a solution is found."""

from __future__ import annotations

import time

import pytest

from stepdpo_kernels.answers import extract_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"So it is \boxed{5}.", "5"),
        (r"So it is \boxed{\frac{1}{2}}, as \boxed{x} said: \boxed{\frac{\sqrt{3}}{2}} in all.", r"\frac{\sqrt{3}}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\text{(A)}}", r"\text{(A)}"),
        (r"\boxed{\begin{pmatrix}1\\{2}\end{pmatrix}}", r"\begin{pmatrix}1\\{2}\end{pmatrix}"),
        (r"\boxed {7}", "7"),
        (r"\boxed 7.", "7"),
        (r"\fbox{8}", "8"),
        (r"$\boxed{$18$}$", "18"),
        (r"\boxed{\$18}", r"\$18"),
        (r"It is \boxed{5 but the answer is 6.", "6"),  # a brace that is never closed is no box
        (r"\boxed{} The answer is 9.", "9"),
        ("She makes 18 dollars.\n#### 18", "18"),
        ("#### 1,234\nSo 5 remain", "1,234"),
        ("#### **18**.", "18"),
        ("#### east", "east"),
        ("#### Final Answer: 42", "42"),
        ("#### Step 2: 3 + 4 is 7", "7"),
        ("#### Conclusion\nThe answer is 5.", "5"),
        ("The answer is 18.", "18"),
        ("The answer is:\n\n$$\n42\n$$", "42"),
        ("the answer is\n\\[\n\\frac{1}{2}.\n\\]\nThat is it", r"\frac{1}{2}"),
        ("The answer is: $18.50.", "$18.50"),
        ("the final answer is $\\frac{1}{2}$. I hope it is correct.", r"\frac{1}{2}"),
        ("**Answer:** 42", "42"),
        ("Answer: 02", "02"),
        ("Answer:\n42", "42"),
        ("The answers are 3 and 4.", "3 and 4"),
        ("First the answer is 3. Then the answer is 4. So 5", "4"),
        ("The answer to the problem is 12.", "12"),
        ("Step 2: 3 + 4 = 7 eggs", "7"),
        ("Let's think step by step.\nStep 1: I do not know.", None),
        ("Step 1: 3 + 4 = 7 eggs.\n**Step 12:** That is all.", "7"),
        ("It costs $1,250.75 in all.", "$1,250.75"),
        ("That is -3/4 of it", "-3/4"),
        ("half of 50%", "50%"),
        ("It comes to \u22125", "\u22125"),
        ("That makes 1.5e3 of them", "1.5e3"),
        ("It takes 10-12 hours", "12"),
        ("There is no number.", None),
        ("", None),
        ("   ", None),
    ],
)
def test_found(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "unit",
    ["\\boxed{", "{", "}", "\\", "answer is ", "the answer to ", "1,", "1/", "$", "####", " ", "\n", "-", "**", "."],
)
def test_time_is_linear(unit):
    """Twice the text may take four times as long on a busy machine, but not the sixteen that a square would need."""

    def seconds(size: int) -> float:
        text = unit * (size // len(unit))
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            extract_answer(text)
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(1_600_000) < 10 * seconds(400_000) + 0.05
