"""Accuracy, its error and its interval; pass@k; votes; two runs compared."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction
from statistics import fmean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepdpo_kernels.evaluation.compare import compare, exact_two_sided
from stepdpo_kernels.evaluation.metrics import (
    ItemScore,
    estimate,
    majority_score,
    pass_at_k,
    standard_error,
    summarise,
    wilson,
)
from stepdpo_kernels.types import StepDPOError


def item(name: str, right: int, samples: int = 1, **fields) -> ItemScore:
    values = dict(digest=b"", subject="", level="", majority=0.0, unfinished=0, no_answer=0, failed=0) | fields
    return ItemScore(id=name, samples=samples, right=right, **values)


def items(rights: list[int], samples: int = 1) -> list[ItemScore]:
    return [item(f"q{i}", right, samples) for i, right in enumerate(rights)]


# ---- one run --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "of", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval(right, of, low, high):
    assert wilson(right, of) == pytest.approx((low, high), abs=5e-5)
    assert wilson(of - right, of) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_needs_a_share():
    for right, of in ((-1, 3), (4, 3), (0, 0)):
        with pytest.raises(StepDPOError, match="right must be in"):
            wilson(right, of)


def test_standard_error_of_single_answers():
    """55% of MATH's 5,000: 0.7 points."""
    scores = [1.0] * 2750 + [0.0] * 2250
    found = estimate(scores)
    assert found.value == 0.55
    assert found.standard_error == pytest.approx(math.sqrt(0.55 * 0.45 / 4999), rel=1e-12)
    assert (found.low, found.high) == wilson(2750, 5000)


@given(st.lists(st.integers(0, 6), min_size=2, max_size=30))
def test_standard_error_is_clustered(rights):
    """The definition by sums over all pairs of samples of an item, with N / (N - 1)."""
    n, N = 6, len(rights)
    samples = [[1.0] * c + [0.0] * (n - c) for c in rights]
    mean = fmean(x for cluster in samples for x in cluster)
    pairs = sum((x - mean) * (y - mean) for cluster in samples for x in cluster for y in cluster)
    clustered = math.sqrt(max(pairs, 0.0)) / (N * n)
    found = summarise(items(rights, n)).accuracy
    assert found.value == pytest.approx(mean)
    assert found.standard_error == pytest.approx(clustered * math.sqrt(N / (N - 1)), abs=1e-7)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_one_item_has_no_standard_error():
    assert math.isnan(standard_error([1.0]))
    assert estimate([0.5])[2:] == (0.0, 1.0)
    with pytest.raises(StepDPOError, match="no items"):
        summarise([])


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n, c in itertools.product(range(1, 8), range(8)):
        for k in range(1, n + 1):
            if c > n:
                continue
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), rel=1e-15)


def test_pass_at_k_of_many_samples():
    """Rounded once, also where the binomial coefficients are far beyond floating point."""
    assert pass_at_k(10_000, 3, 5_000) == pytest.approx(
        float(1 - math.prod(Fraction(5_000 - i, 10_000 - i) for i in range(3))), rel=1e-15
    )
    for n, c, k in ((4, 2, 0), (4, 2, 5), (4, 5, 1), (4, -1, 1)):
        with pytest.raises(StepDPOError, match="pass@k"):
            pass_at_k(n, c, k)


def test_pass_at_1_is_the_accuracy():
    summary = summarise(items([0, 1, 4, 2], 4))
    assert summary.pass_at[1] == summary.accuracy
    assert list(summary.pass_at) == [1, 2, 4]
    assert summary.pass_at[4].value == 0.75
    assert list(summarise(items([0, 5], 6)).pass_at) == [1, 2, 4, 6]
    assert summarise(items([0, 1])).pass_at == {}
    assert summarise(items([0, 1])).majority is None


@pytest.mark.parametrize(
    ("votes", "score"),
    [
        ([(0, True), (0, True), (1, False)], 1.0),
        ([(0, True), (1, False), (1, False)], 0.0),
        ([(0, True), (1, False)], 0.5),
        ([(0, True), (1, False), (2, False)], 1 / 3),
        ([(1, False), (2, False)], 0.0),
        ([(0, True), (1, False), (1, False), (0, True), (2, False)], 0.5),
        ([], 0.0),
    ],
)
def test_majority(votes, score):
    for order in itertools.permutations(votes):
        assert majority_score(order) == pytest.approx(score)


def test_tables():
    rows = [
        item("a", 1, subject="algebra", level="Level 10"),
        item("b", 0, subject="algebra", level="Level 2", unfinished=1),
        item("c", 0, subject="geometry", level="Level 2", no_answer=1),
        item("d", 1, level="Level 2"),
    ]
    summary = summarise(rows)
    assert [(r.name, r.items, r.accuracy.value) for r in summary.subjects] == [
        ("algebra", 2, 0.5),
        ("geometry", 1, 0.0),
        ("not named", 1, 1.0),
    ]
    assert [(r.name, r.items) for r in summary.levels] == [("Level 2", 3), ("Level 10", 1)]
    assert [(r.unfinished, r.no_answer) for r in summary.subjects] == [(0.5, 0), (0, 1), (0, 0)]
    assert (summary.unfinished, summary.no_answer, summary.failed) == (0.25, 0.25, 0)
    assert summarise(items([1])).subjects == []


def test_all_items_have_as_many_samples():
    with pytest.raises(StepDPOError, match="same number of samples, got 1 to 2"):
        summarise([item("a", 1, 1), item("b", 1, 2)])


# ---- two runs -------------------------------------------------------------------------------------------------------


def by_definition(better: int, worse: int) -> Fraction:
    """Sum of the probabilities of all outcomes that are at least as far from the middle."""
    n = better + worse
    far = abs(better - worse)
    return sum((Fraction(math.comb(n, i), 2**n) for i in range(n + 1) if abs(n - 2 * i) >= far), Fraction(0))


@given(st.integers(0, 80), st.integers(0, 80))
def test_exact_test_is_the_definition(better, worse):
    assert exact_two_sided(better, worse) == float(by_definition(better, worse))
    assert exact_two_sided(better, worse) == exact_two_sided(worse, better)


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    [(5, 15, 0.04138946533203125), (0, 10, 2 * 2**-10), (0, 1, 1.0), (7, 7, 1.0), (0, 0, 1.0), (0, 1024, 2**-1023)],
)
def test_exact_test_of_known_counts(better, worse, p):
    assert exact_two_sided(better, worse) == p


def test_exact_test_of_many_items():
    """Against the normal approximation with its correction for continuity, at n = 100,000."""
    p = exact_two_sided(49_700, 50_300)
    z = (600 - 1) / math.sqrt(100_000)
    assert p == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-3)
    assert exact_two_sided(0, 100_000) == 0.0


def test_exact_test_keeps_its_level():
    """Two equal models: p <= 0.05 in no more than 5% of the comparisons."""
    rng = random.Random(0)
    few = 0
    for _ in range(2000):
        better = sum(rng.random() < 0.5 for _ in range(40))
        few += exact_two_sided(better, 40 - better) <= 0.05
    assert few / 2000 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 2000)


def test_comparison_of_single_answers():
    a = items([1, 1, 1, 0, 0, 1, 1, 0, 1, 1])
    b = items([0, 1, 0, 0, 1, 1, 0, 0, 0, 1])
    found = compare(a, list(reversed(b)))
    differences = [1, 0, 1, 0, -1, 0, 1, 0, 1, 0]
    assert (found.items, found.better, found.worse, found.test) == (10, 4, 1, "McNemar")
    assert found.p_value == 2 * 6 / 32
    assert found.difference.value == pytest.approx(0.3)
    assert found.difference.standard_error == pytest.approx(stdev(differences) / math.sqrt(10))
    assert (found.a.value, found.b.value) == (0.7, 0.4)
    back = compare(b, a)
    assert (back.better, back.worse, back.p_value) == (1, 4, found.p_value)
    assert back.difference.value == -found.difference.value


def test_comparison_of_several_samples():
    found = compare(items([4, 2, 1], 4), items([1, 1, 0]))
    assert (found.better, found.worse, found.test) == (1, 1, "sign")
    assert found.difference.value == pytest.approx((0 - 0.5 + 0.25) / 3)


def test_the_same_run_differs_in_nothing():
    found = compare(items([1, 0, 1]), items([1, 0, 1]))
    assert (found.difference.value, found.difference.standard_error, found.p_value) == (0, 0, 1.0)


def test_runs_on_other_items_are_refused():
    a, b = items([1] * 6), items([1] * 2)
    with pytest.raises(StepDPOError, match=r"4 only in the first run \('q2', 'q3', 'q4' and 1 more\); none only in"):
        compare(a, b)
    with pytest.raises(StepDPOError, match=r"1 with another problem or right answer \('q0'\)"):
        compare([item("q0", 1, digest=b"x")], [item("q0", 1, digest=b"y")])
    with pytest.raises(StepDPOError, match="second run has item 'q0' twice"):
        compare(items([1]), items([1]) * 2)
    with pytest.raises(StepDPOError, match="the first run has no items"):
        compare([], a)
