"""Fresh processes, interleaved rounds, medians: what every suite measures with."""

from __future__ import annotations

import csv
import ctypes
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGES = (
    *("torch", "transformers", "trl", "accelerate", "peft", "triton", "liger-kernel", "cut-cross-entropy"),
    *("quack-kernels", "stepdpo-kernels"),
)
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # what decides the speed of matrix products


def worker_environment() -> dict[str, str]:
    # Threads that wait give their core away: on a shared machine spinning ones slow a run by several times.
    calm = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    calm.pop("TRITON_INTERPRET", None)  # set by tests, and not what anybody would measure
    return calm


def run_worker(module: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Runs `python -m MODULE` with settings as JSON on its standard input; its last line of output is its result."""
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(settings),
        capture_output=True,
        text=True,
        check=False,
        env=worker_environment(),
    )
    if done.returncode:
        raise SystemExit(f"{module} failed for {settings}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


class Worker:
    """A process `python -m MODULE` that answers each line of JSON with one."""

    def __init__(self, module: str, timeout: float, environment: dict[str, str]) -> None:
        """timeout: seconds that an answer may take; environment: variables on top of this process's."""
        self._timeout = timeout
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**worker_environment(), **environment},
        )

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """The answer, or {"status": ..., "note": ...} where the process ended or took too long, and was killed."""
        assert self._process.stdin
        assert self._process.stdout
        late = threading.Event()

        def kill() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(self._timeout, kill)
        timer.start()
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if line:
            return json.loads(line)
        code = self._process.wait()
        if late.is_set():
            return {"status": "timed out", "note": f"no answer within {self._timeout:g} s"}
        if code == -signal.SIGKILL:
            return {"status": "out of memory", "note": "killed by the system"}
        self._errors.seek(0)
        told = self._errors.read().decode(errors="replace").strip().splitlines()[-1:]
        return {"status": "failed", "note": f"ended with status {code}: {' '.join(told)[:300]}"}

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


class PeakMemory:
    """The most memory in use since its making, over what was in use then.

    On CUDA what PyTorch's allocator gave out; else the process's resident set, where Linux tells its peak. Memory
    that was freed and that the C library kept is given back first, or using it again would not count; so the call that
    is measured pays for getting it anew, and should not be timed.
    """

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        if self._cuda:
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before: int | None = torch.cuda.memory_allocated()
        else:
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
            if trim:  # of glibc
                trim(0)
            try:
                Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident set starts here
                self._before = _status("VmRSS")
            except OSError:
                self._before = None

    def extra_bytes(self) -> int | None:
        """None where the system does not tell."""
        if self._before is None:
            return None
        if self._cuda:
            import torch

            return torch.cuda.max_memory_allocated() - self._before
        return _status("VmHWM") - self._before


def _status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def available_bytes() -> int | None:
    """Memory that can be had without swapping, within the limit of a control group; None where it is not told."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        group = Path("/sys/fs/cgroup")
        left = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return free
    return min(free, left)


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
        "processor": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in _cpuinfo("flags").split()],
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {package: version(package) for package in PACKAGES},
        "commit": commit.stdout.strip() or "unknown",
    }


def _cpuinfo(field: str) -> str:
    """Of the first processor; empty where the system does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith(field):
            return line.split(":", 1)[1].strip()
    return ""


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    """rows.csv and environment.json in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
