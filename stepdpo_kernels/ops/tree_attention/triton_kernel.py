"""Tree attention in Triton: keys where they lie, nothing gathered, forward and backward without atomics.

The rows of a block of queries are (token, head) for the heads that share a head of keys, so a tile of keys is loaded
once for all of them and a block spans few tokens, which keeps what it sees small. With z = cap(scale q k^T):

    forward    grid (blocks of rows, G); over the tiles of keys that the block sees, in order:
               m' = max(m, max z)   l = l exp(m - m') + sum exp(z - m')   o = o exp(m - m') + exp(z - m') v
               O = o / l, kept for backward: m and log l; a sink is a first key of weight exp(sink - m) without value
    backward   p = exp((z - m) - log l)      dS = p (dO V^T - delta) cap'
               grid (rows of all heads): delta = rowsum(O dO)
               grid (blocks of rows, G): dQ = scale dS K over the block's tiles of keys
               grid (tiles of keys, G):  dV = p^T dO, dK = scale dS^T Q over the blocks of rows that see the tile
               d sink = - sum over tokens of exp(sink - m - log l) delta

Which tiles a block sees is in lists (triton_tiles.py) and not found out by tests in the loop: those would put a branch
between the loads of neighbouring tiles, which then cannot overlap with products. Within a tile two numbers of a key
and of a query, end of subtree and depth, decide.

Moved in forward: Q and O once, K and V once for each block that sees them, mostly from the L2 cache. In backward: O and
dO once for delta; Q, dO and dQ once, K and V once for each block that sees them; K, V, dK and dV once, Q and dO once
for each tile of keys that they see. Every sum has one order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from stepdpo_kernels.ops.checks import refuse_second_derivative
from stepdpo_kernels.ops.linear_logprob.triton_kernel import around_launches, target_of
from stepdpo_kernels.ops.tree_attention.triton_tiles import Shape, tiles_of
from stepdpo_kernels.types import TreePlan

INTERPRETED = bool(triton.knobs.runtime.interpret)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_SIZE = 256


class Launch(NamedTuple):
    """Tile shape and launch options of a kernel."""

    block_rows: int
    block_keys: int
    num_warps: int
    num_stages: int

    @property
    def shape(self) -> Shape:
        return Shape(self.block_rows, self.block_keys)


class Config(NamedTuple):
    """`split`: whether dK and dV are two launches, where their sums do not fit the registers together."""

    forward: Launch
    d_query: Launch
    d_key: Launch
    split: bool = False

    @property
    def shapes(self) -> tuple[Shape, Shape, Shape]:
        return self.forward.shape, self.d_query.shape, self.d_key.shape


# Not tuned at run time: two runs of a step take the same tiles and give the same bits. Keys: what `target_of` returns,
# the bits of an element, and the larger head size as a power of two. Shared memory on 8.0: what consumer parts have.
CONFIGS = {
    ("cuda", 80, 16, 64): Config(Launch(128, 64, 8, 3), Launch(128, 64, 8, 2), Launch(64, 32, 4, 2)),
    ("cuda", 80, 16, 128): Config(Launch(128, 32, 8, 3), Launch(64, 64, 8, 2), Launch(64, 64, 8, 2)),
    ("cuda", 80, 16, 256): Config(Launch(64, 32, 8, 2), Launch(64, 32, 8, 1), Launch(64, 32, 8, 1), split=True),
    ("cuda", 80, 32, 64): Config(Launch(64, 32, 8, 2), Launch(32, 32, 8, 2), Launch(32, 32, 8, 2)),
    ("cuda", 80, 32, 128): Config(Launch(32, 16, 8, 2), Launch(16, 32, 8, 2), Launch(16, 32, 8, 2)),
    ("cuda", 80, 32, 256): Config(Launch(16, 16, 4, 1), Launch(16, 16, 4, 2), Launch(16, 16, 8, 1)),
    ("cuda", 90, 16, 64): Config(Launch(128, 64, 8, 3), Launch(128, 64, 8, 2), Launch(64, 64, 4, 2)),
    ("cuda", 90, 16, 128): Config(Launch(128, 64, 8, 3), Launch(64, 64, 8, 2), Launch(64, 64, 8, 2)),
    ("cuda", 90, 16, 256): Config(Launch(64, 64, 8, 2), Launch(64, 32, 8, 2), Launch(32, 64, 8, 2), split=True),
    ("cuda", 90, 32, 64): Config(Launch(32, 32, 8, 2), Launch(32, 32, 8, 2), Launch(32, 32, 8, 2)),
    ("cuda", 90, 32, 128): Config(Launch(32, 16, 8, 2), Launch(16, 32, 8, 2), Launch(16, 32, 8, 2)),
    ("cuda", 90, 32, 256): Config(Launch(16, 16, 4, 1), Launch(16, 16, 8, 2), Launch(16, 16, 8, 1)),
    ("cuda", 100, 16, 64): Config(Launch(128, 64, 8, 3), Launch(128, 64, 8, 2), Launch(64, 64, 4, 2)),
    ("cuda", 100, 16, 128): Config(Launch(128, 64, 8, 3), Launch(128, 64, 8, 2), Launch(64, 64, 4, 2)),
    ("cuda", 100, 16, 256): Config(Launch(64, 64, 8, 2), Launch(128, 32, 8, 2), Launch(32, 64, 8, 2), split=True),
    ("cuda", 100, 32, 64): Config(Launch(32, 32, 8, 2), Launch(32, 32, 8, 2), Launch(32, 32, 8, 2)),
    ("cuda", 100, 32, 128): Config(Launch(32, 16, 8, 1), Launch(32, 16, 8, 2), Launch(16, 32, 8, 2)),
    ("cuda", 100, 32, 256): Config(Launch(16, 16, 4, 2), Launch(16, 16, 8, 2), Launch(16, 16, 8, 1)),
    ("hip", 0, 16, 64): Config(Launch(64, 16, 4, 1), Launch(64, 32, 4, 1), Launch(32, 32, 4, 1)),
    ("hip", 0, 16, 128): Config(Launch(64, 16, 4, 1), Launch(64, 32, 4, 1), Launch(32, 32, 4, 1)),
    ("hip", 0, 16, 256): Config(Launch(32, 16, 4, 1), Launch(32, 16, 4, 1), Launch(32, 32, 4, 1)),
    ("hip", 0, 32, 64): Config(Launch(32, 32, 4, 1), Launch(32, 32, 4, 1), Launch(32, 32, 4, 1)),
    ("hip", 0, 32, 128): Config(Launch(32, 32, 4, 1), Launch(32, 16, 4, 1), Launch(16, 32, 4, 1)),
    ("hip", 0, 32, 256): Config(Launch(16, 16, 4, 1), Launch(16, 16, 4, 1), Launch(16, 16, 4, 1)),
}
INTERPRETER_CONFIG = Config(Launch(64, 16, 4, 1), Launch(32, 32, 4, 1), Launch(32, 16, 4, 1))
DELTA_ROWS = 32


def config_for(device: torch.device, dtype: torch.dtype, size: int) -> Config:
    target = target_of(device)
    if target[0] == "cpu":
        return INTERPRETER_CONFIG
    return CONFIGS[*target, 8 * dtype.itemsize, max(64, triton.next_power_of_2(size))]


# ---- helpers --------------------------------------------------------------------------------------------------------


@triton.jit
def _rows(block, BLOCK_M: tl.constexpr, GROUP: tl.constexpr):
    """Token and head of queries of each row of a block, for the program's head of keys."""
    r = block * BLOCK_M + tl.arange(0, BLOCK_M)
    return r // GROUP, tl.program_id(1) * GROUP + r % GROUP


@triton.jit
def _tile(x, token, head, stride_t, stride_h, T, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """[tokens, BLOCK] of (T, heads, SIZE), 0 outside it; head is a number or one for each token."""
    c = tl.arange(0, BLOCK)
    offset = token.to(tl.int64) * stride_t + head * stride_h
    inside = (token < T)[:, None]
    if SIZE != BLOCK:
        inside = inside & (c < SIZE)[None, :]
    return tl.load(x + offset[:, None] + c[None, :], mask=inside, other=0.0)


@triton.jit
def _store(x, tile, token, head, stride_t, T, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of _tile for a tensor with neighbouring heads."""
    c = tl.arange(0, BLOCK)
    offset = token.to(tl.int64) * stride_t + head * SIZE
    inside = (token < T)[:, None]
    if SIZE != BLOCK:
        inside = inside & (c < SIZE)[None, :]
    tl.store(x + offset[:, None] + c[None, :], tile.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _dot(a, b, total, UPCAST: tl.constexpr):
    # The interpreter multiplies the bits of bfloat16 as integers, and adds float32 in an order that depends on the
    # tile's shape: z would differ between kernels. A GPU adds over the head in one order.
    if UPCAST:
        wide = tl.dot(a.to(tl.float64), b.to(tl.float64), total.to(tl.float64), out_dtype=tl.float64)
        return wide.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _tanh(x):
    """tanh and its derivative with nearly all digits; for |x| < 0.625 x + x^3 P(x^2), to 8e-8 of the value."""
    e = tl.exp(2 * tl.abs(x))
    rest = 2 / (e + 1)  # 1 - tanh |x|
    large = tl.where(x < 0, rest - 1, 1 - rest)
    s = x * x
    p = -5.704987328499556e-3
    p = p * s + 2.06390880048275e-2
    p = p * s - 5.373971536755562e-2
    p = p * s + 1.3331441581249237e-1
    p = p * s - 3.333328068256378e-1
    small = x + x * s * p
    near = tl.abs(x) < 0.625
    return tl.where(near, small, large), tl.where(near, 1 - small * small, rest * (2 - rest))


@triton.jit
def _scores(products, sees, scale, softcap, SOFTCAP: tl.constexpr):
    """z, -inf where a query does not see a key, and cap': its derivative by scale q k."""
    z = products * scale
    slope = 1.0
    if SOFTCAP:
        z, slope = _tanh(z / softcap)
        z *= softcap
    return tl.where(sees, z, -float("inf")), slope


@triton.jit
def _keys(tile, ends, depths, window, T, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr):
    """Numbers of a tile's keys, sizes of their subtrees, and the depths from which on they are not seen."""
    key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    size = tl.load(ends + key, mask=key < T, other=0) - key
    reach = size
    if WINDOW:
        reach = tl.load(depths + key, mask=key < T, other=0) + window
    return key, tl.maximum(size, 0), reach


@triton.jit
def _sees(token, depth, key, size, reach, WINDOW: tl.constexpr):
    sees = (token - key).to(tl.uint32) < size.to(tl.uint32)  # 0 <= token - key < size: few predicates, registers on AMD
    if WINDOW:
        sees = sees & (depth < reach)
    return sees


# ---- forward --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T", "seen_stride", "window"])
def _forward_kernel(
    q,  # (T, H, D)
    k,  # (T, G, D)
    v,  # (T, G, E)
    sinks,  # (H,), or None
    ends,  # (T,) int32
    depths,  # (T,) int32
    seen,  # (blocks of rows, 1 + tiles of keys) int32
    out,  # (T, H, E)
    stats,  # (2, T, H) float32: maximum, log of the sum of exp relative to it
    T,
    H,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    seen_stride,
    scale,
    softcap,
    window,
    D: tl.constexpr,
    E: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SINKS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    UPCAST: tl.constexpr,
):
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last blocks of a long tree see most: they begin first
    token, head = _rows(block, BLOCK_M, GROUP)
    depth = tl.load(depths + token, mask=token < T, other=0) if WINDOW else token
    q_tile = _tile(q, token, head, stride_qt, stride_qh, T, D, BLOCK_D)
    top = tl.full([BLOCK_M], -3.4028235e38, tl.float32)  # finite, so that a row of -inf gives exp(-inf)
    total = tl.zeros([BLOCK_M], tl.float32)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        top = tl.maximum(top, sink)
        total = tl.exp(sink - top)
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    seen += block.to(tl.int64) * seen_stride
    for n in tl.range(1, tl.load(seen) + 1):
        key, size, reach = _keys(tl.load(seen + n), ends, depths, window, T, BLOCK_N, WINDOW)
        k_tile = _tile(k, key, tl.program_id(1), stride_kt, stride_kh, T, D, BLOCK_D)
        z = _dot(q_tile, k_tile.T, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), UPCAST)
        sees = _sees(token[:, None], depth[:, None], key[None, :], size[None, :], reach[None, :], WINDOW)
        z, _ = _scores(z, sees, scale, softcap, SOFTCAP)
        new_top = tl.maximum(top, tl.max(z, axis=1))
        p = tl.exp(z - new_top[:, None])
        shrunk = tl.exp(top - new_top)
        total = total * shrunk + tl.sum(p, axis=1)
        top = new_top
        v_tile = _tile(v, key, tl.program_id(1), stride_vt, stride_vh, T, E, BLOCK_E)
        acc = _dot(p.to(v_tile.dtype), v_tile, acc * shrunk[:, None], UPCAST)
    total = tl.where(token < T, total, 1.0)  # rows after the last
    _store(out, acc / total[:, None], token, head, H * E, T, E, BLOCK_E)
    at = stats + token * H + head
    tl.store(at, top, mask=token < T)
    tl.store(at + T * H, tl.log(total), mask=token < T)


# ---- backward -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T"])
def _delta_kernel(
    out,  # (T, H, E)
    d_out,  # (T, H, E)
    deltas,  # (T, H) float32
    T,
    H,
    stride_dt,
    stride_dh,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token, head = r // H, r % H
    o_tile = _tile(out, token, head, H * E, E, T, E, BLOCK_E)
    d_tile = _tile(d_out, token, head, stride_dt, stride_dh, T, E, BLOCK_E)
    tl.store(deltas + r, tl.sum(o_tile.to(tl.float32) * d_tile.to(tl.float32), axis=1), mask=token < T)


@triton.jit(do_not_specialize=["T", "seen_stride", "window"])
def _d_query_kernel(
    q,  # (T, H, D)
    k,  # (T, G, D)
    v,  # (T, G, E)
    d_out,  # (T, H, E)
    stats,  # (2, T, H) float32
    deltas,  # (T, H) float32
    ends,  # (T,) int32
    depths,  # (T,) int32
    seen,  # (blocks of rows, 1 + tiles of keys) int32
    d_q,  # (T, H, D)
    T,
    H,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_dt,
    stride_dh,
    seen_stride,
    scale,
    softcap,
    window,
    D: tl.constexpr,
    E: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    UPCAST: tl.constexpr,
):
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    token, head = _rows(block, BLOCK_M, GROUP)
    depth = tl.load(depths + token, mask=token < T, other=0) if WINDOW else token
    q_tile = _tile(q, token, head, stride_qt, stride_qh, T, D, BLOCK_D)
    d_tile = _tile(d_out, token, head, stride_dt, stride_dh, T, E, BLOCK_E)
    at = token * H + head
    delta = tl.load(deltas + at, mask=token < T, other=0.0)
    top = tl.load(stats + at, mask=token < T, other=0.0)
    log_sum = tl.load(stats + T * H + at, mask=token < T, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    seen += block.to(tl.int64) * seen_stride
    for n in tl.range(1, tl.load(seen) + 1):
        key, size, reach = _keys(tl.load(seen + n), ends, depths, window, T, BLOCK_N, WINDOW)
        k_tile = _tile(k, key, tl.program_id(1), stride_kt, stride_kh, T, D, BLOCK_D)
        v_tile = _tile(v, key, tl.program_id(1), stride_vt, stride_vh, T, E, BLOCK_E)
        products = _dot(q_tile, k_tile.T, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), UPCAST)
        d_p = _dot(d_tile, v_tile.T, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), UPCAST)
        sees = _sees(token[:, None], depth[:, None], key[None, :], size[None, :], reach[None, :], WINDOW)
        z, slope = _scores(products, sees, scale, softcap, SOFTCAP)
        d_s = tl.exp((z - top[:, None]) - log_sum[:, None]) * (d_p - delta[:, None]) * slope
        acc = _dot(d_s.to(k_tile.dtype), k_tile, acc, UPCAST)
    _store(d_q, acc * scale, token, head, H * D, T, D, BLOCK_D)


@triton.jit(do_not_specialize=["T", "seen_stride", "window"])
def _d_key_kernel(
    q,  # (T, H, D)
    k,  # (T, G, D)
    v,  # (T, G, E)
    d_out,  # (T, H, E)
    stats,  # (2, T, H) float32
    deltas,  # (T, H) float32
    ends,  # (T,) int32
    depths,  # (T,) int32
    seen_by,  # (tiles of keys, 1 + blocks of rows) int32
    d_k,  # (T, G, D)
    d_v,  # (T, G, E)
    T,
    H,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_dt,
    stride_dh,
    seen_stride,
    scale,
    softcap,
    window,
    D: tl.constexpr,
    E: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    UPCAST: tl.constexpr,
    KEYS: tl.constexpr,  # whether to compute dK
    VALUES: tl.constexpr,  # whether to compute dV
):
    tile = tl.program_id(0)  # the first tiles are seen by most
    key, size, reach = _keys(tile, ends, depths, window, T, BLOCK_N, WINDOW)
    k_tile = _tile(k, key, tl.program_id(1), stride_kt, stride_kh, T, D, BLOCK_D)
    v_tile = _tile(v, key, tl.program_id(1), stride_vt, stride_vh, T, E, BLOCK_E)
    k_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    v_acc = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    seen_by += tile.to(tl.int64) * seen_stride
    for n in tl.range(1, tl.load(seen_by) + 1):
        token, head = _rows(tl.load(seen_by + n), BLOCK_M, GROUP)
        q_tile = _tile(q, token, head, stride_qt, stride_qh, T, D, BLOCK_D)
        d_tile = _tile(d_out, token, head, stride_dt, stride_dh, T, E, BLOCK_E)
        at = token * H + head
        top = tl.load(stats + at, mask=token < T, other=0.0)
        log_sum = tl.load(stats + T * H + at, mask=token < T, other=0.0)
        depth = tl.load(depths + token, mask=token < T, other=0) if WINDOW else token
        products = _dot(k_tile, q_tile.T, tl.zeros([BLOCK_N, BLOCK_M], tl.float32), UPCAST)
        sees = _sees(token[None, :], depth[None, :], key[:, None], size[:, None], reach[:, None], WINDOW)
        z, slope = _scores(products, sees, scale, softcap, SOFTCAP)
        p = tl.exp((z - top[None, :]) - log_sum[None, :])
        if VALUES:
            v_acc = _dot(p.to(d_tile.dtype), d_tile, v_acc, UPCAST)
        if KEYS:
            d_p = _dot(v_tile, d_tile.T, tl.zeros([BLOCK_N, BLOCK_M], tl.float32), UPCAST)
            d_s = p * (d_p - tl.load(deltas + at, mask=token < T, other=0.0)[None, :]) * slope
            k_acc = _dot(d_s.to(q_tile.dtype), q_tile, k_acc, UPCAST)
    groups = tl.num_programs(1)
    if KEYS:
        _store(d_k, k_acc * scale, key, tl.program_id(1), groups * D, T, D, BLOCK_D)
    if VALUES:
        _store(d_v, v_acc, key, tl.program_id(1), groups * E, T, E, BLOCK_E)


# ---- why not --------------------------------------------------------------------------------------------------------


def why_not(inputs: dict[str, Any]) -> list[str]:
    query, value = inputs["query"], inputs["value"]
    device = query.device
    reasons = []
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        reasons.append(f"it runs on GPUs, and query is on {device}")
    elif device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] < 8:
        reasons.append("it needs a GPU of compute capability 8.0 or newer")
    if query.dtype not in DTYPES:
        reasons.append(f"it takes float32, bfloat16 and float16, and query is {query.dtype}")
    size = max(query.shape[2], value.shape[2])
    if size > MAX_SIZE:
        reasons.append(f"heads of at most {MAX_SIZE}, not {size}")
    return reasons


# ---- launchers ------------------------------------------------------------------------------------------------------


def _aligned(x: Tensor) -> Tensor:
    """With heads that begin at multiples of 16 elements, which Triton loads 16 bytes at a time.

    The last head begins less than 2^31 elements after the first: `_tile` has that product in int32, as registers are
    few.
    """
    aligned = x.stride(2) == 1 and x.stride(0) % 16 == x.stride(1) % 16 == x.data_ptr() % 16 == 0
    return x if aligned and (x.shape[1] - 1) * x.stride(1) < 2**31 else x.clone(memory_format=torch.contiguous_format)


def _constants(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    softcap: float | None,
    window: int | None,
    launch: Launch,
) -> dict[str, Any]:
    return {
        "D": query.shape[2],
        "E": value.shape[2],
        "GROUP": query.shape[1] // key.shape[1],
        "BLOCK_M": launch.block_rows,
        "BLOCK_N": launch.block_keys,
        "BLOCK_D": max(16, triton.next_power_of_2(query.shape[2])),
        "BLOCK_E": max(16, triton.next_power_of_2(value.shape[2])),
        "SOFTCAP": softcap is not None,
        "WINDOW": window is not None,
        "UPCAST": INTERPRETED,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "enable_fp_fusion": True,  # Triton's default is to change
    }


def _config(query: Tensor, value: Tensor) -> Config:
    return config_for(query.device, query.dtype, max(query.shape[2], value.shape[2]))


@torch.library.custom_op("stepdpo_kernels::tree_attention_triton", mutates_args=())
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    ends: Tensor,
    depths: Tensor,
    forward: Tensor,
    d_query_tiles: Tensor,
    d_key_tiles: Tensor,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Output (T, H, e), and (2, T, H) float32 for backward; for head sizes that are multiples of 16."""
    (tokens, heads, _), groups = query.shape, key.shape[1]
    q, k, v = (_aligned(x) for x in (query, key, value))
    out = query.new_empty(tokens, heads, value.shape[2])
    stats = query.new_empty(2, tokens, heads, dtype=torch.float32)
    config = _config(query, value)
    if tokens:
        with around_launches(query):
            _forward_kernel[forward.shape[0], groups](
                q, k, v, None if sinks is None else sinks.contiguous(), ends, depths, forward, out, stats,
                tokens, heads, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], forward.stride(0),
                scale, softcap or 0.0, sliding_window or 0, SINKS=sinks is not None,
                **_constants(query, key, value, softcap, sliding_window, config.forward),
            )  # fmt: skip
    return out, stats


@_attention.register_fake
def _(query, key, value, *_):  # type: ignore[no-untyped-def]
    tokens, heads, _ = query.shape
    out = query.new_empty(tokens, heads, value.shape[2])
    return out, query.new_empty(2, tokens, heads, dtype=torch.float32)


@torch.library.custom_op("stepdpo_kernels::tree_attention_triton_backward", mutates_args=())
def _gradients(
    grad: Tensor,
    out: Tensor,
    stats: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    ends: Tensor,
    depths: Tensor,
    d_query_tiles: Tensor,
    d_key_tiles: Tensor,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dQ, dK, dV, and the gradient of the sinks, (0,) without them; contiguous, in the dtypes of what they are of."""
    (tokens, heads, _), groups = query.shape, key.shape[1]
    q, k, v, grad = (_aligned(x) for x in (query, key, value, grad))
    d_query, d_key, d_value = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    deltas = torch.empty_like(stats[0])
    config = _config(query, value)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *grad.stride()[:2])
    options = (scale, softcap or 0.0, sliding_window or 0)
    masks = (softcap, sliding_window)
    if tokens:
        with around_launches(query):
            _delta_kernel[(triton.cdiv(tokens * heads, DELTA_ROWS),)](
                out, grad, deltas, tokens, heads, *grad.stride()[:2], value.shape[2], BLOCK=DELTA_ROWS,
                BLOCK_E=max(16, triton.next_power_of_2(value.shape[2])), num_warps=4,
            )  # fmt: skip
            _d_query_kernel[d_query_tiles.shape[0], groups](
                q, k, v, grad, stats, deltas, ends, depths, d_query_tiles, d_query,
                tokens, heads, *strides, d_query_tiles.stride(0), *options,
                **_constants(query, key, value, *masks, config.d_query),
            )  # fmt: skip
            for parts in ((True, False), (False, True)) if config.split else ((True, True),):
                _d_key_kernel[d_key_tiles.shape[0], groups](
                    q, k, v, grad, stats, deltas, ends, depths, d_key_tiles, d_key, d_value,
                    tokens, heads, *strides, d_key_tiles.stride(0), *options, KEYS=parts[0], VALUES=parts[1],
                    **_constants(query, key, value, *masks, config.d_key),
                )  # fmt: skip
    if sinks is None:
        return d_query, d_key, d_value, query.new_empty(0)
    weights = ((sinks.to(torch.float32) - stats[0]) - stats[1]).exp_()  # (T, H)
    return d_query, d_key, d_value, (weights * deltas).sum(dim=0).neg_().to(sinks.dtype)


@_gradients.register_fake
def _(grad, out, stats, query, key, value, sinks, *_):  # type: ignore[no-untyped-def]
    return (
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
        query.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _, d_query_tiles, d_key_tiles, ctx.scale, ctx.sliding_window, ctx.softcap = inputs
    out, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(out, stats, *tensors, d_query_tiles, d_key_tiles)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("tree_attention in Triton")
    if grad is None:
        return (None,) * 12
    gradients = _gradients(grad, *ctx.saved_tensors, ctx.scale, ctx.sliding_window, ctx.softcap)
    needed = (g if need else None for g, need in zip(gradients, ctx.needs_input_grad[:4], strict=True))
    return (*needed, *(None,) * 8)


_attention.register_autograd(_backward, setup_context=_setup_context)


def tree_attention(
    query: Tensor,  # (T, H, d)
    key: Tensor,  # (T, G, d)
    value: Tensor,  # (T, G, e)
    plan: TreePlan,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # (H,)
) -> Tensor:  # (T, H, e)
    """As `api.tree_attention`."""
    config = _config(query, value)
    group = query.shape[1] // key.shape[1]
    tiles = tiles_of(plan, sliding_window, group, *config.shapes)
    # pad copies even where it has nothing to add
    q, k, v = (pad(x, (0, -x.shape[2] % 16)) if x.shape[2] % 16 else x for x in (query, key, value))
    output = _attention(q, k, v, sinks, *tiles, scale, sliding_window, softcap)[0]
    return output[:, :, : value.shape[2]]
