"""Tests that must be green before a figure of ours is shown."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from benchmarks.environment import ROOT
from benchmarks.measure import worker_environment
from benchmarks.registry import Workload

MOST_SECONDS = 600.0  # for the tests of one file


def red_tests(workloads: Iterable[Workload], seconds: float = float("inf")) -> dict[str, str]:
    """{test: what pytest said of it} of those that fail, or do not end within so many seconds of all."""
    end = time.monotonic() + seconds
    tests = list(dict.fromkeys(test for workload in workloads for test in workload.tests))
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        told = threads.map(lambda test: fault_of(test, end), tests)
        return {test: fault for test, fault in zip(tests, told, strict=True) if fault}


def fault_of(test: str, end: float) -> str:
    """What pytest said, where a test is red or does not end by `end` of time.monotonic(); else empty."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow and not gpu", "--no-header", test]
    timeout = min(MOST_SECONDS, max(1.0, end - time.monotonic()))
    environment = worker_environment()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=environment)
    except subprocess.TimeoutExpired:
        return f"no end within {timeout:.3g} s"
    last = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1:]
    return " ".join(last) or f"ended with status {done.returncode}" if done.returncode else ""


def of(workload: Workload, red: dict[str, str]) -> str:
    """Those of a workload's tests that are red, with what pytest said; empty where all are green."""
    return "; ".join(f"{test}: {red[test]}" for test in workload.tests if test in red)
