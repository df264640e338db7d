"""A comparison that hangs or dies costs one pair, never the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("math_verify")

from stepdpo_kernels.answers import AnswerChecker
from stepdpo_kernels.answers.checker import Verdict
from stepdpo_kernels.types import StepDPOError

HARD = (r"\sqrt{8}", r"2\sqrt{2}")  # needs a process


@pytest.mark.parametrize(
    ("gold", "prediction", "reason"),
    [
        ("5", "5", "equal"),
        ("5", "6", "different"),
        ("", "5", "unreadable_gold"),
        ("$$", "5", "unreadable_gold"),
        (r"\frac{", "x+1", "unreadable_gold"),
        ("5", "", "no_answer"),
        ("5", None, "no_answer"),
        ("x+1", "???", "unreadable"),
        (*HARD, "equal"),
    ],
)
def test_reasons(gold, prediction, reason):
    with AnswerChecker(seconds=30) as checker:
        assert checker.match(gold, prediction) == Verdict(reason == "equal", reason)


def test_a_hang_is_a_timeout_and_the_others_go_on():
    hang = (r"10^{10^{10}}", "5+x")
    with AnswerChecker(seconds=2) as checker:
        assert checker.match(*HARD).equal
        first = checker._workers[0]
        start = time.monotonic()
        verdicts = checker.check([HARD, hang, (r"\sqrt{18}", r"3\sqrt{2}"), hang, ("5", "5")])
        assert [verdict.reason for verdict in verdicts] == ["equal", "timeout", "equal", "timeout", "equal"]
        assert time.monotonic() - start < 60
        assert checker._workers[0] is not first


def test_a_killed_process_is_a_crash_and_is_replaced():
    with AnswerChecker(workers=2, seconds=30) as checker:
        assert checker.match(*HARD).equal
        worker = checker._workers[0]
        assert worker is not None
        os.kill(worker.process.pid, signal.SIGSTOP)
        worker.send((r"\sqrt{8}", "x"), 30)
        os.kill(worker.process.pid, signal.SIGKILL)
        worker.process.wait()
        assert checker.match(*HARD).equal


def test_an_interrupted_comparison_is_not_the_answer_to_the_next_one():
    class TooLateError(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise TooLateError

    with AnswerChecker(seconds=30) as checker:
        assert checker.match(*HARD).equal
        worker = checker._workers[0]
        assert worker is not None
        os.kill(worker.process.pid, signal.SIGSTOP)
        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        try:
            with pytest.raises(TooLateError):
                checker.match(*HARD)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            os.kill(worker.process.pid, signal.SIGCONT) if worker.process.poll() is None else None
        assert not checker.match(r"\sqrt{8}", r"3\sqrt{2}").equal


def test_memory_is_limited():
    with AnswerChecker(seconds=3) as checker:
        assert not checker.match("x+1", "9" * 1900 + r"^{9^{9^{9}}}+x").equal
        assert checker.match(*HARD).equal


@pytest.mark.parametrize(
    "text", ["9" * 10_000_000, "{" * 1_000_000, r"\frac{1}{" * 100_000, "(" * 1_000_000, "1," * 1_000_000]
)
def test_absurd_predictions_cost_no_time(text):
    with AnswerChecker() as checker:
        start = time.monotonic()
        assert not checker.match("5", text).equal
        assert time.monotonic() - start < 20
        assert checker._workers == [None]


def test_many_are_compared_side_by_side_and_in_order():
    roots = [(rf"\sqrt{{{k * k * 2}}}", rf"{k}\sqrt2" if k % 3 else r"\sqrt2+x") for k in range(2, 20)]
    with AnswerChecker(workers=2, seconds=30) as checker:
        verdicts = checker.check(roots)
        assert all(worker is not None for worker in checker._workers)
    assert [verdict.equal for verdict in verdicts] == [bool(k % 3) for k in range(2, 20)]


def test_workers_end_with_their_parent():
    code = (
        "from stepdpo_kernels.answers import AnswerChecker; import os, signal;"
        rf"c = AnswerChecker(); c.match({HARD[0]!r}, {HARD[1]!r}); print(c._workers[0].process.pid, flush=True);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    worker = int(said.stdout)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the process outlives the one that started it")


def test_importing_is_cheap():
    code = "import sys, stepdpo_kernels.answers; print({'math_verify', 'sympy', 'torch'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert said.stdout.strip() in ("set()", "{'torch'}"), said.stderr


def test_options_are_checked():
    with pytest.raises(StepDPOError, match="workers must be at least 1, got 0"):
        AnswerChecker(workers=0)
    with pytest.raises(StepDPOError, match="seconds must be above 0, got -1"):
        AnswerChecker(seconds=-1)
