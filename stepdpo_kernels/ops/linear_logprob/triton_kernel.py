"""Log-probs of the targets in one Triton kernel: the logits of a tile live in registers and nowhere else.

    forward    grid (blocks of rows, parts of the vocabulary); for each vocabulary tile of its part a program computes
               z = X_b W_t^T over D, then  m' = max(m, max z)  s = s exp(m - m') + sum exp(z - m')  and takes z[target]
               the parts' (m, s, z[target]) are joined in order:  logp = (z[target] - m) - log s
    backward   for each chunk of C columns: one kernel computes z again and writes  Q = (onehot - p) dz/du  (R, C)
               dX += Q W_c          dW_c = Q^T (g * X)          db_c = sum_r g Q           g (R,) the upstream gradient

Moved in forward: X once for each vocabulary tile and W once for each block of rows, both mostly from the L2 cache;
written: 12 bytes for each row and part. In backward Q is written and read twice, and a chunk of it fits the L2 cache.
Four products for a full backward, three for a frozen head, one for log-probs. Each sum has one order: no atomics.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stepdpo_kernels.ops.checks import refuse_second_derivative

INTERPRETED = bool(triton.knobs.runtime.interpret)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Q of one chunk, in bytes: stays in the L2 cache of the GPUs this is for (40 MB and more) between kernel and products.
Q_BYTES = 32 * 1024 * 1024
SUM_ROWS = 1024  # of a product that is added to a float32 sum: what is added stays in the L2 cache, too
MIN_COLUMNS = 512  # of a chunk: below that a product is too narrow to be fast
# Programs for each processor: what is lost while the last of them run is a quarter of one round at most.
WAVES = 4


class Config(NamedTuple):
    """Tile sizes and launch options of a product kernel."""

    block_rows: int
    block_columns: int
    block_hidden: int
    num_warps: int
    num_stages: int


# Not tuned at run time: two runs of a step take the same tiles and give the same bits. Keys: what `target_of` returns,
# and bits of the dtype. Softcap and unaligned rows take registers that the wide tiles of "plain" do not leave. None of
# these spills registers, be it compiled by Triton 3.6 or by 3.9: tests/compiled_kernels.py looks.
CONFIGS = {
    ("cuda", 80, 16, "plain"): Config(128, 128, 32, 8, 4),
    ("cuda", 80, 16, "softcap"): Config(128, 64, 32, 8, 3),
    ("cuda", 80, 16, "unaligned"): Config(128, 64, 32, 8, 3),
    ("cuda", 90, 16, "plain"): Config(128, 128, 64, 8, 4),
    ("cuda", 90, 16, "softcap"): Config(128, 64, 64, 8, 4),
    ("cuda", 90, 16, "unaligned"): Config(128, 64, 64, 8, 4),
    ("cuda", 100, 16, "plain"): Config(128, 128, 64, 8, 4),
    ("cuda", 100, 16, "softcap"): Config(128, 64, 64, 4, 4),
    ("cuda", 100, 16, "unaligned"): Config(128, 64, 64, 8, 4),
    ("hip", 0, 16, "plain"): Config(128, 128, 32, 8, 2),
    ("hip", 0, 16, "softcap"): Config(128, 64, 32, 8, 2),
    ("hip", 0, 16, "unaligned"): Config(128, 64, 32, 8, 2),
    ("cuda", 80, 32, "plain"): Config(64, 64, 16, 8, 2),
    ("cuda", 80, 32, "softcap"): Config(64, 32, 16, 8, 2),
    ("cuda", 80, 32, "unaligned"): Config(64, 32, 16, 8, 2),
    ("cuda", 90, 32, "plain"): Config(64, 64, 32, 8, 2),
    ("cuda", 90, 32, "softcap"): Config(64, 32, 32, 8, 2),
    ("cuda", 90, 32, "unaligned"): Config(64, 32, 16, 8, 2),
    ("cuda", 100, 32, "plain"): Config(64, 64, 32, 8, 2),
    ("cuda", 100, 32, "softcap"): Config(64, 32, 32, 8, 2),
    ("cuda", 100, 32, "unaligned"): Config(64, 32, 16, 8, 2),
    ("hip", 0, 32, "plain"): Config(64, 64, 16, 4, 2),
    ("hip", 0, 32, "softcap"): Config(64, 32, 16, 4, 2),
    ("hip", 0, 32, "unaligned"): Config(64, 32, 16, 4, 2),
    ("cpu", 0, 16, "plain"): Config(32, 128, 64, 4, 1),
    ("cpu", 0, 16, "softcap"): Config(32, 64, 64, 4, 1),
    ("cpu", 0, 16, "unaligned"): Config(32, 64, 64, 4, 1),
    ("cpu", 0, 32, "plain"): Config(32, 128, 64, 4, 1),
    ("cpu", 0, 32, "softcap"): Config(32, 64, 64, 4, 1),
    ("cpu", 0, 32, "unaligned"): Config(32, 64, 64, 4, 1),
}


def target_of(device: torch.device) -> tuple[str, int]:
    """("cuda", 80 | 90 | 100), ("hip", 0), or ("cpu", 0) for the interpreter."""
    if device.type == "cpu":
        return "cpu", 0
    if torch.version.hip:
        return "hip", 0
    major, _ = torch.cuda.get_device_capability(device)
    # consumer Blackwell (12.x) has no tcgen05 and the shared memory of Ampere's consumer parts
    return "cuda", {9: 90, 10: 100}.get(major, 80)


def config_for(device: torch.device, dtype: torch.dtype, softcap: bool, aligned: bool) -> Config:
    kind = "unaligned" if not aligned else "softcap" if softcap else "plain"
    return CONFIGS[*target_of(device), 8 * dtype.itemsize, kind]


def processors(device: torch.device) -> int:
    return 2 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


# ---- helpers --------------------------------------------------------------------------------------------------------


@triton.jit
def _tile(
    source, row, column, rows, columns, stride, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TMA: tl.constexpr
):
    """[BLOCK_ROWS, BLOCK_COLUMNS] at (row, column) of a matrix, 0 outside it; source is a descriptor or a pointer."""
    if TMA:
        tile = source.load([row, column])
    else:
        r = row + tl.arange(0, BLOCK_ROWS)
        c = column + tl.arange(0, BLOCK_COLUMNS)
        inside = (r < rows)[:, None] & (c < columns)[None, :]
        tile = tl.load(source + r.to(tl.int64)[:, None] * stride + c[None, :], mask=inside, other=0.0)
    return tile


@triton.jit
def _transformed(z, inside, scale, softcap, SOFTCAP: tl.constexpr):
    """Logits from u = hidden @ weight.T + bias, -inf outside the vocabulary; and dz/du, of their shape or scalar."""
    z *= scale
    slope = scale
    if SOFTCAP:
        e = tl.exp(-2 * tl.abs(z / softcap))
        tanh = (1 - e) / (1 + e)
        z = softcap * tl.where(z < 0, -tanh, tanh)
        slope = scale * (4 * e / ((1 + e) * (1 + e)))  # 1 - tanh^2 has few digits left near 1
    return tl.where(inside, z, -float("inf")), slope


@triton.jit
def _gradient(z, slope, hit, top, log_sum):
    """(onehot - p) * dz/du: of the log-prob with respect to u."""
    return (tl.where(hit, 1.0, 0.0) - tl.exp((z - top) - log_sum)) * slope


@triton.jit
def _logits(
    x,
    w,
    bias,
    row,
    column,
    R,
    V,
    D,
    stride_x,
    stride_w,
    scale,
    softcap,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """[BLOCK_R, BLOCK_V] float32 logits, and dz/du."""
    z = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    for d in tl.range(0, D, BLOCK_D):
        a = _tile(x, row, d, R, D, stride_x, BLOCK_R, BLOCK_D, TMA)
        b = _tile(w, column, d, V, D, stride_w, BLOCK_V, BLOCK_D, TMA)
        if UPCAST:  # the interpreter multiplies the bits of bfloat16 as integers
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        z = tl.dot(a, b.T, z, input_precision="ieee")
    c = column + tl.arange(0, BLOCK_V)
    if BIAS:
        z += tl.load(bias + c, mask=c < V, other=0.0).to(tl.float32)[None, :]
    return _transformed(z, (c < V)[None, :], scale, softcap, SOFTCAP)


# ---- forward --------------------------------------------------------------------------------------------------------


@triton.jit
def _forward_kernel(
    x,  # (R, D), or its descriptor
    w,  # (V, D), or its descriptor
    bias,  # (V,)
    target,  # (R,) int64
    parts,  # (3, parts, R) float32: maximum, sum of exp relative to it, target's logit or 0
    R,
    V,
    D,
    stride_x,
    stride_w,
    tiles,  # vocabulary tiles of a part
    scale,
    softcap,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R
    r = row + tl.arange(0, BLOCK_R)
    wanted = tl.load(target + r, mask=r < R, other=-1)[:, None]
    top = tl.full([BLOCK_R], -3.4028235e38, tl.float32)  # finite, so that a tile of -inf gives exp(-inf)
    total = tl.zeros([BLOCK_R], tl.float32)
    hit = tl.zeros([BLOCK_R], tl.float32)
    first = tl.program_id(1) * tiles
    for tile in range(first, tl.minimum(first + tiles, tl.cdiv(V, BLOCK_V))):
        column = tile * BLOCK_V
        z, _ = _logits(
            x, w, bias, row, column, R, V, D, stride_x, stride_w, scale, softcap,
            BLOCK_R, BLOCK_V, BLOCK_D, BIAS, SOFTCAP, TMA, UPCAST,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(z, axis=1))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top[:, None]), axis=1)
        top = new_top
        c = column + tl.arange(0, BLOCK_V)
        hit += tl.sum(tl.where(c[None, :] == wanted, z, 0.0), axis=1)
    part = tl.program_id(1).to(tl.int64) * R + r
    all_parts = tl.num_programs(1).to(tl.int64) * R
    tl.store(parts + part, top, mask=r < R)
    tl.store(parts + all_parts + part, total, mask=r < R)
    tl.store(parts + 2 * all_parts + part, hit, mask=r < R)


# ---- backward -------------------------------------------------------------------------------------------------------


@triton.jit
def _q_kernel(
    x,  # (R, D), or its descriptor
    w,  # (V, D), or its descriptor
    bias,  # (V,)
    target,  # (R,) int64
    stats,  # (2, R) float32: maximum, log of the sum relative to it
    grad,  # (R,) float32
    q_out,  # (R, C) in the dtype of x
    db_out,  # (blocks of rows, C) float32
    R,
    V,
    D,
    C,
    start,  # first column of the chunk
    stride_x,
    stride_w,
    stride_q,
    scale,
    softcap,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DB: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R
    column = start + tl.program_id(1) * BLOCK_V
    z, slope = _logits(
        x, w, bias, row, column, R, V, D, stride_x, stride_w, scale, softcap,
        BLOCK_R, BLOCK_V, BLOCK_D, BIAS, SOFTCAP, TMA, UPCAST,
    )  # fmt: skip
    r = row + tl.arange(0, BLOCK_R)
    c = column + tl.arange(0, BLOCK_V)
    wanted = tl.load(target + r, mask=r < R, other=-1)[:, None]
    top = tl.load(stats + r, mask=r < R, other=0.0)[:, None]
    log_sum = tl.load(stats + R + r, mask=r < R, other=0.0)[:, None]
    q = _gradient(z, slope, c[None, :] == wanted, top, log_sum)
    inside = (c < V) & (c < start + C)
    out = q_out + r.to(tl.int64)[:, None] * stride_q + (c - start)[None, :]
    tl.store(out, q.to(q_out.dtype.element_ty), mask=(r < R)[:, None] & inside[None, :])
    if DB:
        g = tl.load(grad + r, mask=r < R, other=0.0)[:, None]
        db = tl.sum(tl.where((r < R)[:, None], g * q, 0.0), axis=0)
        tl.store(db_out + tl.program_id(0).to(tl.int64) * C + (c - start), db, mask=inside)


# ---- why not --------------------------------------------------------------------------------------------------------


def why_not(inputs: dict[str, Any]) -> list[str]:
    hidden, bias = inputs["hidden"], inputs["bias"]
    reasons = []
    if hidden.device.type != "cuda" and not (INTERPRETED and hidden.device.type == "cpu"):
        reasons.append(f"it runs on GPUs, and hidden is on {hidden.device}")
    elif (
        hidden.device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(hidden.device)[0] < 8
    ):
        reasons.append("it needs a GPU of compute capability 8.0 or newer")
    if hidden.dtype not in DTYPES:
        reasons.append(f"it takes float32, bfloat16 and float16, and hidden is {hidden.dtype}")
    if bias is not None and bias.dtype not in DTYPES:
        reasons.append(f"it takes a float32, bfloat16 or float16 bias, and bias is {bias.dtype}")
    return reasons


# ---- launchers ------------------------------------------------------------------------------------------------------


@contextmanager
def around_launches(x: Tensor) -> Iterator[None]:
    """Triton launches on the current device, which need not be that of x; library products follow autocast."""
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        yield


class Problem:
    """What every launch needs: matrices with neighbouring columns, options as numbers, tiles for this device."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        logit_scale: float | None,
    ) -> None:
        self.x, self.w = (t if t.stride(1) == 1 else t.contiguous() for t in (hidden, weight))
        self.target = target.contiguous()
        self.bias = None if bias is None else bias.contiguous()
        self.softcap, self.scale = softcap, 1.0 if logit_scale is None else logit_scale
        self.rows, self.hidden_size = hidden.shape
        self.vocabulary = weight.shape[0]
        # rows that begin at multiples of 16 bytes
        aligned = all(
            t.data_ptr() % 16 == 0 and t.stride(0) >= t.shape[1] and t.stride(0) * t.element_size() % 16 == 0
            for t in (self.x, self.w)
        )
        has_tma = INTERPRETED or target_of(hidden.device) in (("cuda", 90), ("cuda", 100))
        narrow = hidden.element_size() == 2  # in float32 a descriptor's tiles spill registers
        self.tma = aligned and has_tma and narrow
        self.config = config_for(hidden.device, hidden.dtype, softcap is not None, aligned)

    @property
    def row_blocks(self) -> int:
        return triton.cdiv(self.rows, self.config.block_rows)

    def matrices(self) -> tuple[Any, Any]:
        """X and W, as descriptors where the hardware can follow them."""
        if not self.tma:
            return self.x, self.w
        rows, columns, depth, *_ = self.config
        return (
            TensorDescriptor.from_tensor(self.x, [rows, depth]),
            TensorDescriptor.from_tensor(self.w, [columns, depth]),
        )

    def constants(self) -> dict[str, Any]:
        return {
            "BLOCK_R": self.config.block_rows,
            "BLOCK_V": self.config.block_columns,
            "BLOCK_D": self.config.block_hidden,
            "BIAS": self.bias is not None,
            "SOFTCAP": self.softcap is not None,
            "TMA": self.tma,
            "UPCAST": INTERPRETED,
            "num_warps": self.config.num_warps,
            "num_stages": self.config.num_stages,
            "enable_fp_fusion": True,  # Triton's default is to change
        }


def parts_of(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row: the largest logit, the sum of exp relative to it, the target's logit; (R,) float32."""
    p = problem
    tiles = triton.cdiv(p.vocabulary, p.config.block_columns)
    wanted = max(1, min(tiles, triton.cdiv(WAVES * processors(p.x.device), p.row_blocks)))
    tiles_of_part = triton.cdiv(tiles, wanted)
    parts = torch.empty(3, triton.cdiv(tiles, tiles_of_part), p.rows, dtype=torch.float32, device=p.x.device)
    x, w = p.matrices()
    _forward_kernel[p.row_blocks, parts.shape[1]](
        x, w, p.bias, p.target, parts,
        p.rows, p.vocabulary, p.hidden_size, p.x.stride(0), p.w.stride(0), tiles_of_part,
        p.scale, p.softcap or 0.0, **p.constants(),
    )  # fmt: skip
    tops, totals, hits = parts  # (parts, R) each
    top = tops.amax(dim=0)
    return top, (totals * (tops - top).exp_()).sum(dim=0), hits.sum(dim=0)


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Log-probs (R,), and (2, R) for backward: maximum logit, log of the sum of exp relative to it; float32."""
    top, total, hit = parts_of(problem)
    log_sum = total.log_()
    return (hit - top).sub_(log_sum), torch.stack([top, log_sum])


def backward(
    problem: Problem,
    grad: Tensor,  # (R,)
    stats: Tensor,  # (2, R)
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dX (R, D) and db (V,) in float32, dW (V, D) in the dtype of the inputs; None for what nobody needs."""
    p = problem
    x, w = p.matrices()
    dtype, device, block = p.x.dtype, p.x.device, p.config.block_columns
    columns = max(MIN_COLUMNS, Q_BYTES // (dtype.itemsize * p.rows)) // block * block
    columns = min(p.vocabulary, max(block, columns))
    q_chunk = torch.empty(p.rows, triton.cdiv(columns, 8) * 8, dtype=dtype, device=device)  # rows of aligned length
    d_hidden = torch.zeros(p.rows, p.hidden_size, dtype=torch.float32, device=device) if need_hidden else None
    d_weight = torch.empty(p.vocabulary, p.hidden_size, dtype=dtype, device=device) if need_weight else None
    d_bias = torch.empty(p.vocabulary, dtype=torch.float32, device=device) if need_bias else None
    grad = grad.to(torch.float32).contiguous()
    gx = scaled(p.x, grad) if need_weight else None
    for start in range(0, p.vocabulary, columns):
        stop = min(start + columns, p.vocabulary)
        q = q_chunk[:, : stop - start]
        db = torch.empty(p.row_blocks, stop - start, dtype=torch.float32, device=device) if need_bias else None
        _q_kernel[p.row_blocks, triton.cdiv(stop - start, block)](
            x, w, p.bias, p.target, stats, grad, q, db,
            p.rows, p.vocabulary, p.hidden_size, stop - start, start, p.x.stride(0), p.w.stride(0), q.stride(0),
            p.scale, p.softcap or 0.0, DB=need_bias, **p.constants(),
        )  # fmt: skip
        if d_hidden is not None:
            add_product(d_hidden, q, p.w[start:stop])
        if d_weight is not None:
            torch.mm(q.T, gx, out=d_weight[start:stop])
        if d_bias is not None:
            torch.sum(db, dim=0, out=d_bias[start:stop])
    if d_hidden is not None:
        d_hidden *= grad[:, None]
    return d_hidden, d_weight, d_bias


def partials(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `chunked.partials`."""
    target = torch.where((target >= 0) & (target < weight.shape[0]), target, -1)  # no column's number
    if not weight.shape[0]:  # a process without a part
        nothing = torch.zeros(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        return nothing + torch.finfo(torch.float32).min, nothing, nothing
    with around_launches(hidden):
        return parts_of(Problem(hidden, weight, target, bias, softcap, logit_scale))


def gradients(
    grad: Tensor,
    stats: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As `chunked.gradients`."""
    problem = Problem(hidden, weight, target, bias, softcap, logit_scale)
    if not weight.shape[0]:
        empty = torch.zeros(0, dtype=torch.float32, device=hidden.device)
        return (
            torch.zeros_like(hidden, dtype=torch.float32) if need_hidden else None,
            torch.zeros_like(weight) if need_weight else None,
            empty if need_bias else None,
        )
    with around_launches(hidden):
        return backward(problem, grad, stats, need_hidden, need_weight, need_bias)


def scaled(x: Tensor, grad: Tensor) -> Tensor:
    """g * X (R, D) in the dtype of x."""
    return (grad[:, None] * x).to(x.dtype)


def _has_float_output(a: Tensor) -> bool:
    """Whether products of 16-bit matrices can be had in float32 without copies."""
    return a.is_cuda and torch.version.hip is None


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b in float32."""
    if a.dtype != torch.float32 and _has_float_output(a):
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed and kept in float32."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:  # addmm with out_dtype takes a float32 total in some versions of torch only
        for rows in range(0, a.shape[0], SUM_ROWS):
            total[rows : rows + SUM_ROWS] += product(a[rows : rows + SUM_ROWS], b)


@torch.library.custom_op("stepdpo_kernels::linear_logprob_triton_fused", mutates_args=())
def _fused(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float | None,
) -> tuple[Tensor, Tensor]:
    with around_launches(hidden):
        return forward(Problem(hidden, weight, target, bias, softcap, logit_scale))


@_fused.register_fake
def _(hidden, weight, target, bias, softcap, logit_scale):  # type: ignore[no-untyped-def]
    rows = hidden.shape[0]
    return hidden.new_empty(rows, dtype=torch.float32), hidden.new_empty(2, rows, dtype=torch.float32)


@torch.library.custom_op("stepdpo_kernels::linear_logprob_triton_fused_backward", mutates_args=())
def _fused_backward(
    grad: Tensor,
    stats: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem(hidden, weight, target, bias, softcap, logit_scale)
    with around_launches(hidden):
        dx, dw, db = backward(problem, grad, stats, need_hidden, need_weight, need_bias)
    nothing = hidden.new_empty(0, hidden.shape[1])
    return (
        nothing if dx is None else dx.to(hidden.dtype),
        nothing.clone() if dw is None else dw,
        hidden.new_empty(0) if db is None else db,
    )


@_fused_backward.register_fake
def _(grad, stats, hidden, weight, target, bias, softcap, scale, need_hidden, need_weight, need_bias):  # type: ignore[no-untyped-def]
    (rows, size), vocabulary = hidden.shape, weight.shape[0]
    d_bias = hidden.new_empty(vocabulary, dtype=torch.float32) if need_bias else hidden.new_empty(0)
    return (
        hidden.new_empty(rows if need_hidden else 0, size),
        weight.new_empty(vocabulary if need_weight else 0, size),
        d_bias,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, target, bias, ctx.softcap, ctx.logit_scale = inputs
    _, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, target, bias, stats)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("linear_logprob in Triton")
    if grad is None:
        return (None,) * 6
    hidden, weight, target, bias, stats = ctx.saved_tensors
    need_hidden, need_weight, _target, need_bias, *_options = ctx.needs_input_grad
    problem = (hidden, weight, target, bias, ctx.softcap, ctx.logit_scale)
    dx, dw, db = _fused_backward(grad, stats, *problem, need_hidden, need_weight, need_bias)
    return (
        dx if need_hidden else None,
        dw if need_weight else None,
        None,
        db.to(bias.dtype) if need_bias else None,
        None,
        None,
    )


_fused.register_autograd(_backward, setup_context=_setup_context)


def linear_logprob(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (R,)
    *,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float | None = None,
) -> Tensor:  # (R,)
    """As `api.linear_logprob`."""
    return _fused(hidden, weight, target, bias, softcap, logit_scale)[0]
