"""Triton kernels compile for every target, fit, spill nothing and use tensor cores: see tests/compiled_kernels.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


def compile_kernels(*arguments: str) -> tuple[int, list[dict[str, Any]]]:
    """Status and lines of a process of its own: this one interprets its kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.compiled_kernels", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def check(status: int, lines: list[dict[str, Any]]) -> None:
    assert [line for line in lines if line["faults"]] == []
    assert status == 0
    assert {tuple(line["target"]) for line in lines} == {("cuda", 80), ("cuda", 90), ("cuda", 100), ("hip", 0)}


def test_the_usual_kernels() -> None:
    head, tree = ("head-bfloat16-1024", "head-float32-1023-bias-softcap"), "tree-bfloat16-64-64-window-softcap"
    status, lines = compile_kernels("--only", *head, tree, "pair-17", "segments-bfloat16-512")
    check(status, lines)
    assert {line["kernel"] for line in lines} >= {
        "_forward_kernel",
        "_q_kernel",
        "_row_kernel",
        "_gradient_kernel",
        "_branch_gradient_kernel",
        "_token_gradient_kernel",
        "_delta_kernel",
        "_d_query_kernel",
        "_d_key_kernel",
        "_segment_sum_kernel",
    }
    for kernel in ("_q_kernel", "_d_query_kernel", "_d_key_kernel"):
        products = [line for line in lines if line["kernel"] == kernel and "bfloat16" in line["case"]]
        assert products
        assert all(line["matrix"] for line in products)


@pytest.mark.slow
def test_all_kernels() -> None:
    status, lines = compile_kernels()
    check(status, lines)
    for operation in ("head", "tree"):
        dtypes = {line["case"].split("-")[1] for line in lines if line["case"].startswith(operation)}
        assert dtypes == {"bfloat16", "float16", "float32"}


FAULTS = {"registers": "spills", "shared memory": "bytes of shared memory", "tensor cores": "multiplies without"}
TREE = "tree-bfloat16-128-128-window-softcap"


@pytest.mark.parametrize(("case", "what"), [
    *(("head-bfloat16-1024-bias-softcap", what) for what in FAULTS),
    ("tree-bfloat16-16-16-window-softcap", "tensor cores"),
    *(pytest.param(TREE, what, marks=pytest.mark.slow) for what in ("registers", "shared memory")),
])  # fmt: skip
def test_a_broken_kernel_is_found(case: str, what: str) -> None:
    status, lines = compile_kernels("--only", case, "--break", what)
    assert status == 1
    assert any(FAULTS[what] in text for line in lines for text in line["faults"])
