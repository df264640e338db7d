"""Tests that must be green before a figure of ours is shown."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable

from benchmarks.environment import ROOT
from benchmarks.measure import worker_environment
from benchmarks.registry import Workload


def red_tests(workloads: Iterable[Workload], timeout: float = 600) -> dict[str, str]:
    """{test: what pytest said of it} of those that fail, or that cannot be run at all."""
    red = {}
    for test in dict.fromkeys(test for workload in workloads for test in workload.tests):
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow and not gpu", "--no-header", test]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=worker_environment()
            )
        except subprocess.TimeoutExpired:
            red[test] = f"no end within {timeout:g} s"
            continue
        if done.returncode:
            red[test] = " ".join((done.stdout.strip() or done.stderr.strip()).splitlines()[-1:])
    return red


def of(workload: Workload, red: dict[str, str]) -> str:
    """Those of a workload's tests that are red, with what pytest said; empty where all are green."""
    return "; ".join(f"{test}: {red[test]}" for test in workload.tests if test in red)
