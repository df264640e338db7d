"""What a figure was measured on: machine, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

PACKAGES = (
    *("torch", "transformers", "triton", "trl", "accelerate", "peft", "datasets", "tokenizers", "numpy"),
    *("liger-kernel", "cut-cross-entropy", "quack-kernels", "flash-attn"),
)
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # what decides the speed of matrix products
ROOT = Path(__file__).resolve().parent.parent


@cache
def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def versions(package: str = "") -> str:
    """Of torch and triton, and of a package beside them, for a row."""
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "triton", *filter(None, (package,))))


@cache
def commit() -> str:
    """Of this checkout, "-dirty" where files were changed."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT).stdout
    except OSError:  # no git
        told = ""
    return told.strip() or "unknown"


def processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def environment(device_name: str = "") -> dict[str, Any]:
    told: dict[str, Any] = {
        "device": device_name or processor(),
        "processor": processor(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in _cpuinfo("flags").split()],
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {package: version(package) for package in PACKAGES},
        "commit": commit(),
    }
    if device_name and device_name != processor():
        query = ["nvidia-smi", "--query-gpu=driver_version,memory.total,power.limit", "--format=csv,noheader"]
        try:
            told["gpu"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        except OSError:
            told["gpu"] = "nvidia-smi is not there"
    return told


def _cpuinfo(field: str) -> str:
    """Of the first processor; empty where the system does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith(field):
            return line.split(":", 1)[1].strip()
    return ""
