"""The table in the head's README is what the formulas give, and those count what the implementations do."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks import roofline
from stepdpo_kernels.ops.linear_logprob import triton_chunked, triton_kernel

README = Path(__file__).resolve().parents[2] / "stepdpo_kernels/ops/linear_logprob/README.md"


def test_the_readme_has_the_table() -> None:
    assert roofline.table() in README.read_text()


def test_sizes_are_those_of_the_implementations() -> None:
    assert roofline.CHUNK_ROWS == triton_chunked.CHUNK_ROWS
    assert roofline.Q_BYTES == triton_kernel.Q_BYTES
    assert roofline.SUM_ROWS == triton_kernel.SUM_ROWS
    assert roofline.MIN_COLUMNS == triton_kernel.MIN_COLUMNS == triton_chunked.MIN_COLUMNS
    for rows, size in ((1024, 3584), (16_384, 3584), (16_384, 896)):
        weight = torch.empty(9, size, dtype=torch.bfloat16)
        assert roofline.kept_rows(rows, size) == triton_chunked.kept_rows(rows, weight)


def test_a_full_backward_of_kept_rows_is_three_products() -> None:
    product = 1e3 * 2 * 1024 * 4096 * 128_256 / roofline.LIBRARY
    rows = 1e3 * 6 * 1024 * 128_256 / roofline.BYTES
    assert abs(roofline.milliseconds("chunked, full", 1024, 4096, 128_256) - 3 * product - rows) < 1e-9
