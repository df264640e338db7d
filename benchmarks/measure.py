"""Fresh processes, interleaved rounds, medians: what every suite measures with."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "triton", "stepdpo-kernels")


def run_worker(module: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Runs `python -m MODULE` with settings as JSON on its standard input; its last line of output is its result."""
    # Threads that wait give their core away: on a shared machine spinning ones slow a run by several times.
    calm = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(settings),
        capture_output=True,
        text=True,
        check=False,
        env=calm,
    )
    if done.returncode:
        raise SystemExit(f"{module} failed for {settings}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between the sorted values, q in [0, 1]."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def environment() -> dict[str, Any]:
    """What a figure was measured on: machine, versions, commit."""

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "absent"

    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {package: version(package) for package in PACKAGES},
        "commit": commit.stdout.strip() or "unknown",
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    """rows.csv and environment.json in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
