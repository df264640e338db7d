"""What counts as the same answer."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

pytest.importorskip("math_verify")
pytest.importorskip("hypothesis")

from hypothesis import given
from hypothesis import strategies as st

from stepdpo_kernels.answers import AnswerChecker, answers_match, extract_answer
from stepdpo_kernels.data.problems import read_problems
from tests.answers.cases import DIFFERENT, DISTINCT, SAME


@pytest.fixture(scope="module")
def checker():
    with AnswerChecker(seconds=30) as checker:
        yield checker


def test_the_table_is_long_enough():
    assert len({*SAME, *DIFFERENT}) == len(SAME) + len(DIFFERENT) >= 230


@pytest.mark.parametrize("same", [True, False])
def test_table(checker, same):
    cases = SAME if same else DIFFERENT
    wrong = [pair for pair, verdict in zip(cases, checker.check(cases), strict=True) if verdict.equal != same]
    assert wrong == []


def test_the_table_both_ways(checker):
    """Which of the two is the right answer does not matter, except to a choice that is followed by its text."""
    cases = [(b, a) for a, b in SAME if not (len(a) == 1 and a in "ABCDE")]
    wrong = [pair for pair, verdict in zip(cases, checker.check(cases), strict=True) if not verdict.equal]
    assert wrong == []


def test_one_by_one():
    assert answers_match(r"\frac{\sqrt{3}}{3}", r"1/\sqrt{3}")
    assert not answers_match("5", "500")


@given(st.fractions(max_denominator=1000), st.fractions(max_denominator=1000))
def test_plain_fractions(a, b):
    with AnswerChecker() as checker:  # starts no process: text decides
        latex = rf"{'-' if b < 0 else ''}\frac{{{abs(b.numerator)}}}{{{b.denominator}}}"
        assert checker.match(str(a), latex).equal == (a == b)
        assert checker.match(str(a), str(a)).equal
        assert checker._workers == [None]


@given(st.integers(-(10**12), 10**12), st.integers(0, 4))
def test_integers_in_other_writings(number, places):
    with AnswerChecker() as checker:
        for text in (f"{number:,}", f"{number}.{'0' * places}", f"x = {number}", f"${number}$", f"{number} eggs"):
            assert checker.match(str(number), text).equal, text
        assert not checker.match(str(number), str(number + 1)).equal
        assert not checker.match(str(number), str(number * 100 or 1)).equal


@given(st.text(max_size=60))
def test_any_text_is_itself_or_unreadable(text):
    with AnswerChecker() as checker:
        verdict = checker.match(text, text)
        assert verdict.equal or verdict.reason == "unreadable_gold"
        assert verdict.equal == bool(text.strip(" .$\n\t\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0")) or not verdict.equal


def gsm8k(shared_data):
    return [problem.answer for problem in read_problems(shared_data / "gsm8k_test.jsonl")]


def test_gsm8k_answers_are_themselves(shared_data, checker):
    answers = gsm8k(shared_data)
    assert len(answers) == 1319
    assert all(verdict.equal for verdict in checker.check((answer, answer) for answer in answers))
    solutions = [f"So we have it.\nStep 3: The answer is: {answer}." for answer in answers]
    found = [extract_answer(text) for text in solutions]
    assert all(verdict.equal for verdict in checker.check(zip(answers, found, strict=True)))


def test_no_false_match_among_random_gsm8k_answers(shared_data, checker):
    """Of 10,000 pairs of answers with different values none is a match; equal values always are."""
    answers, draw = gsm8k(shared_data), random.Random(0)
    values = {answer: Fraction(answer.replace(",", "")) for answer in answers}
    pairs: list[tuple[str, str]] = []
    while len(pairs) < 10_000:
        a, b = draw.choice(answers), draw.choice(answers)
        if values[a] != values[b]:
            pairs.append((a, b))
    verdicts = checker.check(pairs)
    assert [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.equal] == []
    written = [(a, f"${float(values[a]):,.2f}") for a in answers]
    assert all(verdict.equal for verdict in checker.check(written))


@pytest.mark.parametrize("every", [41, pytest.param(1, marks=pytest.mark.slow)])
def test_no_false_match_among_answers_of_every_kind(every):
    """All pairs of answers of which no two are the same: more than 10,000. A comparison that hangs is no match."""
    pairs = [(a, b) for a in DISTINCT for b in DISTINCT if a != b]
    assert len(pairs) > 10_000
    pairs = pairs[::every]
    with AnswerChecker(seconds=3) as checker:
        verdicts = checker.check(pairs)
    assert [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.equal] == []
