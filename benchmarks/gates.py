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
    running: set[subprocess.Popen[str]] = set()
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        try:
            told = list(threads.map(lambda test: fault_of(test, end, running), tests))
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                process.kill()
            raise
    return {test: fault for test, fault in zip(tests, told, strict=True) if fault}


def fault_of(test: str, end: float, running: set[subprocess.Popen[str]]) -> str:
    """What pytest said, where a test is red or does not end by `end` of time.monotonic(); else empty.

    running: has pytest's process while it runs
    """
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow and not gpu", "--no-header", test]
    timeout = min(MOST_SECONDS, max(1.0, end - time.monotonic()))
    pipe, environment = subprocess.PIPE, worker_environment()
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, env=environment) as process:
        running.add(process)
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            return f"no end within {timeout:.3g} s"
        finally:
            running.discard(process)
    last = (stdout.strip() or stderr.strip()).splitlines()[-1:]
    return " ".join(last) or f"ended with status {process.returncode}" if process.returncode else ""


def of(workload: Workload, red: dict[str, str]) -> str:
    """Those of a workload's tests that are red, with what pytest said; empty where all are green."""
    return "; ".join(f"{test}: {red[test]}" for test in workload.tests if test in red)
