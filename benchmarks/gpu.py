"""`python -m benchmarks gpu`: all that needs a GPU, within a time limit, and what there is so far when stopped.

First the tests marked gpu, then the suites head, attention and step at their quick size, then the report. Each suite
has a share of the time that is left, so that a slow one leaves some to the next. Red tests hold no figures back: time
on a GPU is dear, every provider is held against float64 on it all the same, and the report begins with what failed.
`--dry` walks through the same on a CPU: tiny cases, Triton's kernels in its interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import session
from benchmarks.environment import ROOT

TESTS = "gpu-tests"  # .json and .log
# Where tests marked gpu are, and nothing else is collected; in the order in which they begin.
MARKED = ("tests/gpu/test_training.py", "tests/gpu/test_cuda.py", "tests/trainer/test_sharded.py")
SHARES = {"head": 0.4, "attention": 0.45, "step": 1.0}  # of the time that is left when its turn comes
TESTS_SHARE = 0.35
PROCESSES = 8  # of tests, on two cores each: they compile for most of their time
GRACE = 15.0  # seconds in which pytest may still tell what failed; its processes have 10 to end
PROVIDER_SECONDS = 90.0  # that a turn of a provider may take
OUTCOMES = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
DONE = (  # a line of pytest -v, by several processes and by one
    re.compile(rf"^\[gw\d+\] \[ *(?P<percent>\d+)%\] (?P<outcome>{OUTCOMES}) (?P<name>\S.*?) *$", re.MULTILINE),
    re.compile(rf"^(?P<name>\S+::.*?) (?P<outcome>{OUTCOMES})(?: \(.*\))? +\[ *(?P<percent>\d+)%\]$", re.MULTILINE),
)
NOT_COLLECTED = re.compile(r"^ERROR (\S+\.py)(?: - .*)?$", re.MULTILINE)


def run(options: argparse.Namespace) -> list[str]:
    """Writes into options.output. Returns what failed: workloads, tests."""
    end = time.monotonic() + options.time_limit
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    tests = run_tests(output, options.time_limit * TESTS_SHARE, MARKED)
    print(f"tests marked gpu: {tests['summary']}", flush=True)
    size, device = ("tiny", "cpu") if options.dry else ("quick", "cuda")
    rounds = 1 if options.dry else session.ROUNDS[size]
    failed: list[str] = []
    for suite, share in SHARES.items():
        now = time.monotonic()
        context = session.context(
            argparse.Namespace(
                suite=suite, device=device, providers=None, threads=0, timeout=PROVIDER_SECONDS, dry=options.dry
            ),
            rounds=rounds,
            deadline=now + share * (end - now),
        )
        failed += session.run(session.chosen(suite, None), size, context, output, tests=False)
    if tests["status"]:
        failed.append(f"tests marked gpu: {tests['summary']}; {output / TESTS}.log has all of it")
    return failed


def run_tests(output: Path, seconds: float, tests: Sequence[str]) -> dict[str, Any]:
    """Runs pytest, its output into a file; what was done when the time was up counts, or when we are interrupted."""
    found = output / f"{TESTS}.json"
    found.unlink(missing_ok=True)  # of an earlier run
    log, began, status = output / f"{TESTS}.log", time.monotonic(), None
    with log.open("w") as file:
        process = subprocess.Popen(
            pytest_command(tests),
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"},  # else a pool of them in each process
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what shells start with & ignores it
        )
        try:
            with suppress(subprocess.TimeoutExpired):
                status = process.wait(timeout=seconds)
        finally:
            after = time.monotonic() - began
            try:
                stop(process)
            finally:
                told = outcome(log.read_text(errors="replace"), status, after)
                told["seconds"] = round(time.monotonic() - began, 1)
                found.write_text(json.dumps(told, indent=2) + "\n")
    return told


def pytest_command(tests: Sequence[str]) -> list[str]:
    """One line for each outcome as it comes; several processes, in the order of the tests, where xdist is installed."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--no-header", "-rfE", "-p", "no:cacheprovider"]
    command.append("--continue-on-collection-errors")
    processes = min(PROCESSES, (os.cpu_count() or 1) // 2)
    if processes > 1 and find_spec("xdist"):
        command += ["-n", str(processes), "--dist", "load"]
    return [*command, *tests]


def stop(process: subprocess.Popen[bytes]) -> None:
    """SIGINT, upon which pytest tells what failed, then SIGKILL to it and to what the tests began."""
    try:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=GRACE)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def outcome(log: str, status: int | None, after: float) -> dict[str, Any]:
    """What pytest's output says. status: None where it was stopped, after so many seconds."""
    done = [line for pattern in DONE for line in pattern.finditer(log)]
    failed = [line["name"] for line in done if line["outcome"] in ("FAILED", "ERROR")]
    lines = log.strip().splitlines() or ["pytest said nothing"]
    summary = lines[-1].strip("= ")  # pytest's closing line
    if status is None:
        counts = Counter(line["outcome"].lower() for line in done)
        far = max((int(line["percent"]) for line in done), default=0)
        told = ", ".join(f"{count} {what}" for what, count in counts.items())
        summary = f"stopped after {after:.0f} s at {far}%: {told or 'no test had ended'}"
    return {
        "summary": summary,
        "status": 1 if status is None else int(status not in (0, 5)),  # 5: no test is marked gpu
        "failed": list(dict.fromkeys([*failed, *NOT_COLLECTED.findall(log)])),
    }
