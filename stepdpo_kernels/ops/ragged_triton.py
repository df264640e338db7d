# mypy: ignore-errors
# (Triton kernels are compiled by Triton from source that is Python in form only.)
"""Sums of rows by segments in Triton.

    out[s] = sum of x[index[i]] over the entries i of segment s, in float32 (float64 of float64)

Grid (segments, blocks of columns). A program adds tiles of BLOCK_N entries one after another and then the BLOCK_N sums
of a tile, so the order depends on nothing but the shape: no atomics. Reads each entry of x and index once and writes
each row of out once, in the dtype of x; nothing is gathered in memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TILE = 16384  # bytes of sums: 32 registers a thread
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}  # the last: Triton's default is to change


@triton.jit
def _segment_sum_kernel(
    x,  # (rows, C)
    index,  # (N,) int64: the rows of segment 0, then of segment 1, ...
    ends,  # (segments,) int64: where the rows of a segment end in index
    lengths,  # (segments,) int64
    out,  # (segments, C)
    C,
    stride_x,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.arange(0, BLOCK_N)
    length = tl.load(lengths + segment)
    first = tl.load(ends + segment) - length
    total = tl.zeros([BLOCK_N, BLOCK_C], WIDE)
    for start in range(0, length, BLOCK_N):
        inside = start + n < length
        row = tl.load(index + first + start + n, mask=inside, other=0)
        at = x + row[:, None] * stride_x + c[None, :]  # [BLOCK_N, BLOCK_C]
        total += tl.load(at, mask=inside[:, None] & (c < C)[None, :], other=0.0).to(WIDE)
    tl.store(out + segment * C + c, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=c < C)


def why_not(inputs: dict[str, Any]) -> list[str]:
    x = inputs["x"]
    reasons = []
    if x.device.type != "cuda" and not (INTERPRETED and x.device.type == "cpu"):
        reasons.append(f"it runs on GPUs, and x is on {x.device}")
    if x.dtype not in DTYPES:
        reasons.append(f"it takes float64, float32, bfloat16 and float16, and x is {x.dtype}")
    return reasons


@torch.library.custom_op("stepdpo_kernels::segment_sum_triton", mutates_args=())
def segment_sum(x: Tensor, index: Tensor, lengths: Tensor) -> Tensor:
    """As `ragged.segment_sum`."""
    segments = lengths.shape[0]
    out = x.new_empty(segments, *x.shape[1:])
    columns = out[0].numel() if segments else 0
    if columns:
        flat = x.reshape(x.shape[0], columns)
        flat = flat if columns == 1 or flat.stride(1) == 1 else flat.contiguous()
        block_c = min(512, triton.next_power_of_2(columns))
        with torch.cuda.device_of(x):  # Triton launches on the current device
            _segment_sum_kernel[(segments, triton.cdiv(columns, block_c))](
                flat, index, lengths.cumsum(0), lengths, out, columns, flat.stride(0),
                WIDE=tl.float64 if x.dtype == torch.float64 else tl.float32,
                BLOCK_N=min(128, TILE // (max(4, x.element_size()) * block_c)), BLOCK_C=block_c, **OPTIONS,
            )  # fmt: skip
    return out


@segment_sum.register_fake
def _(x: Tensor, index: Tensor, lengths: Tensor) -> Tensor:
    return x.new_empty(lengths.shape[0], *x.shape[1:])
