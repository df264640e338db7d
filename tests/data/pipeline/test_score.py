"""The score of a locator against annotations, and the agreement of two locators."""

from __future__ import annotations

import random

import pytest

from stepdpo_kernels.data.pipeline.locate.score import agreement, score
from stepdpo_kernels.types import StepDPOError


def test_score_counts_each_kind_of_answer() -> None:
    annotated = [2, 2, 2, 2, 2, 0, 0, 0, 1, 5, None]
    located = [2, 1, 4, None, 0, 0, 3, None, 2, 5, 1]
    lengths = [5] * 11
    result = score(annotated, located, lengths)
    assert (result.count, result.unannotated, result.undecided) == (10, 1, 2)
    assert (result.exact, result.off_by_one) == (3, 2)  # 2, 0, 5; 1 for 2 and 2 for 1
    assert (result.earlier, result.later) == (2, 3)  # 1 for 2, 3 for none; 4 and none for 2, 2 for 1
    assert (result.wrong, result.exact_wrong, result.right, result.exact_right) == (7, 2, 3, 1)
    assert result.baselines == {
        "always step 1": 1,
        "always the last step": 1,
        "always no wrong step": 3,
        "always the most frequent, 2": 5,
    }
    assert result.accuracy == 0.3
    assert result.standard_error == pytest.approx((0.3 * 0.7 / 10) ** 0.5)
    assert result.f1 == pytest.approx(2 / (7 / 2 + 3 / 1))


def test_every_kind_adds_up_and_a_baseline_scores_itself() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(1, 9) for _ in range(500)]
    annotated = [draw.choice([None, *range(n + 1)]) for n in lengths]
    located = [draw.choice([None, *range(n + 1)]) for n in lengths]
    result = score(annotated, located, lengths)
    assert result.exact + result.earlier + result.later + result.undecided == result.count
    assert result.exact == result.exact_wrong + result.exact_right
    for name, places in {
        "always step 1": [1] * 500,
        "always the last step": lengths,
        "always no wrong step": [0] * 500,
    }.items():
        assert score(annotated, places, lengths).exact == result.baselines[name]


def test_score_in_words() -> None:
    text = str(score([2, 0, 1, None], [2, 0, None, 1], [3, 3, 3, 3]))
    lines = {line[:42].strip(): line[42:].split() for line in text.splitlines()}
    assert lines["first wrong step as annotated"] == ["2", "66.7%", "±", "27.2"]
    assert lines["F1 of the two"] == ["66.7"]
    assert lines["baseline: always no wrong step"] == ["1", "33.3%"]
    assert lines["left out: annotation undecided"] == ["1"]
    assert score([2, 1], [2, 1], [3, 3]).f1 is None
    assert "F1" in str(score([2], [None], [3]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], [1], [3, 3]), "2 annotations and 1 locations"),
        (([1, 2], [1, 2], [3]), "2 annotations and 1 lengths"),
        (([1, 2], [1, 4], [3, 3]), "location 1 is step 4 of a solution of 3 steps"),
        (([-1], [1], [3]), "annotation 0 is step -1"),
        (([None], [1], [3]), "none of 1 solutions is annotated"),
        (([], [], []), "none of 0 solutions"),
    ],
)
def test_what_cannot_be_scored(arguments, message: str) -> None:
    with pytest.raises(StepDPOError, match=message):
        score(*arguments)


def test_agreement_by_hand() -> None:
    a = [1, 1, 2, 2, 0, 0, 3, 3, None, None, None, 0]
    b = [1, 2, 2, 1, 0, 4, None, 0, 2, None, 0, None]
    result = agreement(a, b)
    assert (result.count, result.both, result.equal) == (12, 7, 3)
    # a: 1 1 2 2 0 0 3, b: 1 2 2 1 0 4 0
    chance = (2 * 2 + 2 * 2 + 2 * 2) / 49
    assert result.kappa == pytest.approx((3 / 7 - chance) / (1 - chance))
    assert result.table == {
        ("a step", "earlier"): 1,
        ("a step", "same"): 2,
        ("a step", "later"): 1,
        ("a step", "none"): 1,
        ("a step", "undecided"): 1,
        ("none", "a step"): 1,
        ("none", "none"): 1,
        ("none", "undecided"): 1,
        ("undecided", "a step"): 1,
        ("undecided", "none"): 1,
        ("undecided", "undecided"): 1,
    }
    lines = str(result).splitlines()
    assert lines[2].split() == ["equal,", "of", "these", "3", "42.9%"]
    assert lines[-3].split() == ["a", "step", "1", "2", "1", "1", "1"]
    assert lines[-1].split() == ["undecided", "1", "1", "1"]


def test_kappa_agrees_with_a_count_over_all_pairs() -> None:
    draw = random.Random(1)
    a = [draw.choice([0, 1, 1, 2, 3]) for _ in range(200)]
    b = [x if draw.random() < 0.5 else draw.choice([0, 1, 2, 3, 4]) for x in a]
    chance = sum(x == y for x in a for y in b) / 200**2
    observed = sum(x == y for x, y in zip(a, b, strict=True)) / 200
    assert agreement(a, b).kappa == pytest.approx((observed - chance) / (1 - chance))
    assert agreement(a, a).kappa == 1
    assert agreement(a, b).kappa == agreement(b, a).kappa


def test_kappa_is_undefined_where_nothing_varies_or_nothing_is_decided() -> None:
    for a, b in (([2, 2], [2, 2]), ([], []), ([None, 1], [1, None])):
        assert agreement(a, b).kappa is None
        assert "undefined" in str(agreement(a, b))
    with pytest.raises(StepDPOError, match="2 locations of a and 1 locations of b"):
        agreement([1, 2], [1])
