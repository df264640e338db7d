"""`python -m benchmarks gpu`: all that needs a GPU, within a time limit, and what there is so far when stopped.

First the tests marked gpu, then the suites head, attention and step at their quick size, then the report. Each suite
has a share of the time that is left, so that a slow one leaves some to the next. `--dry` walks through the same on a
CPU: tiny cases, Triton's kernels in its interpreter.
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
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks import session
from benchmarks.environment import ROOT

TESTS = "gpu-tests"  # .json and .log
SHARES = {"head": 0.4, "attention": 0.45, "step": 1.0}  # of the time that is left when its turn comes
TESTS_SHARE = 0.35
PROVIDER_SECONDS = 90.0  # that a turn of a provider may take


def run(options: argparse.Namespace) -> list[str]:
    """Writes into options.output. Returns what failed: workloads, tests."""
    end = time.monotonic() + options.time_limit
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    tests = run_tests(output, options.time_limit * TESTS_SHARE, "tests/gpu" if options.dry else "tests")
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


def run_tests(output: Path, seconds: float, tests: str) -> dict[str, Any]:
    """Runs pytest, its output into a file; what was done when the time was up counts."""
    found = output / f"{TESTS}.json"
    found.unlink(missing_ok=True)  # of an earlier run
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--no-header", "-rf", "-p", "no:cacheprovider"]
    log, began = output / f"{TESTS}.log", time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, tests], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
        )
        try:
            status: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what the tests began
            process.wait()
    lines = log.read_text().strip().splitlines() or ["pytest said nothing"]
    # pytest's closing line, or how far it came
    summary = lines[-1].strip("= ") if status is not None else f"stopped after {seconds:.0f} s: {' '.join(lines[-1:])}"
    told = {
        "summary": summary,
        "status": 1 if status is None else int(status not in (0, 5)),  # 5: no test is marked gpu
        "seconds": round(time.monotonic() - began, 1),
        "failed": re.findall(r"^FAILED (\S+)", "\n".join(lines), re.MULTILINE),
    }
    found.write_text(json.dumps(told, indent=2) + "\n")
    return told
