"""Tests that must be green before a figure of ours is shown."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterable

from benchmarks.environment import ROOT
from benchmarks.measure import worker_environment
from benchmarks.registry import Workload

MOST_SECONDS = 600.0  # for the tests of one file


def red_tests(workloads: Iterable[Workload], seconds: float = float("inf")) -> dict[str, str]:
    """{test: what pytest said of it} of those that fail, or do not end within so many seconds of all."""
    red = {}
    end = time.monotonic() + seconds
    for test in dict.fromkeys(test for workload in workloads for test in workload.tests):
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow and not gpu", "--no-header", test]
        timeout = min(MOST_SECONDS, max(1.0, end - time.monotonic()))
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=worker_environment()
            )
        except subprocess.TimeoutExpired:
            red[test] = f"no end within {timeout:.3g} s"
            continue
        if done.returncode:
            red[test] = " ".join((done.stdout.strip() or done.stderr.strip()).splitlines()[-1:])
    return red


def of(workload: Workload, red: dict[str, str]) -> str:
    """Those of a workload's tests that are red, with what pytest said; empty where all are green."""
    return "; ".join(f"{test}: {red[test]}" for test in workload.tests if test in red)
