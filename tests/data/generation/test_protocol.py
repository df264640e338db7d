"""What can be asked of a generator."""

from __future__ import annotations

from typing import Any

import pytest

from stepdpo_kernels.data.generation import Completion, Sampling
from stepdpo_kernels.types import StepDPOError


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature must be at least 0, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be at least 0, got nan"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"stop": ("a", "")}, "stop must be a tuple of texts, none of them empty"),
        ({"stop": "Step"}, "stop must be a tuple of texts, none of them empty, got 'Step'"),
        ({"n": 2, "temperature": 0}, "n is 2 at temperature 0"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], says: str) -> None:
    with pytest.raises(StepDPOError, match=says):
        Sampling(**options)


def test_the_log_prob_of_a_part() -> None:
    completion = Completion("ab cd", "stop", logps=(-1.0, -2.0, -4.0, -8.0), ends=(2, 2, 4, 5))
    assert completion.logp(0, 2) == -3.0
    assert completion.logp(2, 5) == -12.0
    assert completion.logp(0, 5) == -15.0
    assert completion.logp(5, 5) == 0
    assert Completion("ab", "stop").logp(0, 2) is None
