"""Processes that measure, and the memory that they take."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, TextIO

# Threads that wait spin as libgomp has them do by itself: for processes that are timed, one at a time.
TIMED = {"GOMP_SPINCOUNT": "300000"}


def first_line(error: Exception) -> str:
    """Its type and the first line of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def worker_environment() -> dict[str, str]:
    # Threads that wait give their core away: beside other processes spinning ones slow a run by several times.
    calm = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    calm.pop("TRITON_INTERPRET", None)  # set by tests, and not what anybody would measure
    return calm


class Worker:
    """A process `python -m MODULE` that answers each line of JSON with one."""

    def __init__(self, module: str, environment: dict[str, str]) -> None:
        """environment: variables on top of this process's."""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**worker_environment(), **environment},
        )

    def ask(self, message: dict[str, Any], timeout: float) -> dict[str, Any]:
        """The answer, or {"status": ..., "note": ...} where the process ended, or took more seconds and was killed."""
        assert self._process.stdin
        assert self._process.stdout
        late = threading.Event()

        def kill() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(timeout, kill)
        timer.daemon = True  # an interrupt may come before it can be cancelled
        try:
            timer.start()
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
            return {"status": "timed out", "note": f"no answer within {timeout:.3g} s"}
        if code == -signal.SIGKILL:
            return {"status": "out of memory", "note": "killed by the system"}
        self._errors.seek(0)
        told = self._errors.read().decode(errors="replace").strip().splitlines()[-1:]
        return {"status": "failed", "note": f"ended with status {code}: {' '.join(told)[:300]}"}

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        """What it was asked is answered at once: it ended."""
        self._process.kill()

    def close(self) -> None:
        self.kill()
        self._process.communicate()
        self._errors.close()


def volunteer() -> None:
    """If memory runs out nevertheless, the kernel should take this process and no other."""
    score = Path("/proc/self/oom_score_adj")
    if score.exists():
        score.write_text("1000")


def results_alone() -> TextIO:
    """The standard output of this process; what libraries and C code print goes to its errors from now on."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return results


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
    """Memory that can be had without swapping, within the limit of a control group; None where it is not told.

    What a group holds of files that it may drop counts as available, as it does for the whole machine.
    """
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        group = Path("/sys/fs/cgroup")
        left = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        parts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        left += int(parts["inactive_file"])
    except (OSError, ValueError, KeyError):  # no such group, or "max"
        return free
    return min(free, left)
