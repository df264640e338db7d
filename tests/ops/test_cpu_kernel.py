"""The C++ CPU operator of the head: numerics, memory, determinism, refusals, and what torch asks of an operator."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from stepdpo_kernels import _dispatch, linear_logprob
from stepdpo_kernels.ops.linear_logprob import cpu_kernel
from tests.numerics import assert_as_good_as_eager, eager_logprob, value_and_gradients

built = pytest.mark.skipif(cpu_kernel._missing is not None, reason=str(cpu_kernel._missing))
DTYPES = [torch.float32, torch.bfloat16]

# rows, hidden size, vocabulary: within one tile and over several, ragged, odd, E kept in dW, beside it, or nowhere.
SHAPES = {
    "one": (1, 1, 1),
    "tiny": (3, 5, 7),
    "one tile": (128, 128, 128),
    "tails": (129, 145, 257),
    "odd": (200, 67, 1009),
    "E in dW": (130, 150, 300),
    "E in both": (400, 140, 300),
    "recomputed": (1300, 16, 200),
    "wide": (40, 700, 300),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 5.0},
    "all": {"bias": True, "softcap": 30.0, "logit_scale": -0.7},
}


def _inputs(rows: int, size: int, vocabulary: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, ...]:
    """hidden, weight, bias, target, and an upstream gradient of either sign with zeros in it."""
    generator = torch.Generator().manual_seed(rows + vocabulary)
    hidden, weight, bias, upstream = (
        torch.randn(*shape, generator=generator) for shape in ((rows, size), (vocabulary, size), (vocabulary,), (rows,))
    )
    target = torch.randint(vocabulary, (rows,), generator=generator)
    target[: rows // 3] = vocabulary - 1
    upstream[1::5] = 0
    return (scale * hidden).to(dtype), (weight * size**-0.5).to(dtype), bias.to(dtype), target, upstream


def _check(inputs: tuple[Tensor, ...], dtype: torch.dtype, **options: Any) -> None:
    hidden, weight, bias, target, upstream = inputs
    leaves = [hidden, weight] + ([bias] if options.pop("bias", False) else [])
    extra_bytes = options.pop("extra_bytes", None)

    def ours(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return cpu_kernel.linear_logprob(h, w, target, bias=b, extra_bytes=extra_bytes, **options)

    def eager(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return eager_logprob(h, w, target, bias=b, **options)

    results = (
        value_and_gradients(ours, leaves, upstream),
        value_and_gradients(eager, leaves, upstream),
        value_and_gradients(eager, leaves, upstream, torch.float64),
    )
    assert results[0][0].dtype == torch.float32
    for name, *of in zip(["log-probs", "dX", "dW", "db"], *results, strict=False):
        assert_as_good_as_eager(name, *of, dtype)


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_good_as_eager(shape: str, options: str, dtype: torch.dtype) -> None:
    _check(_inputs(*SHAPES[shape], dtype), dtype, **OPTIONS[options])


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_little_memory(dtype: torch.dtype) -> None:
    rows, size, vocabulary = SHAPES["E in both"]
    assert cpu_kernel.extra_rows(rows, size, vocabulary, dtype.itemsize) > 0
    _check(_inputs(rows, size, vocabulary, dtype), dtype, extra_bytes=0, **OPTIONS["all"])


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["odd", "one tile"])
def test_without_a_library_for_products(shape: str, dtype: torch.dtype) -> None:
    with torch.backends.mkldnn.flags(enabled=False):
        _check(_inputs(*SHAPES[shape], dtype), dtype, **OPTIONS["all"])


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_logits_negative_and_a_ragged_vocabulary(dtype: torch.dtype) -> None:
    # a phantom logit of zero in the tail would outweigh all of them
    hidden, weight, bias, target, upstream = _inputs(33, 40, 130, dtype)
    inputs = (hidden.abs(), -weight.abs() - 1, bias, target, upstream)
    assert (inputs[0].double() @ inputs[1].double().T).max() < -20
    _check(inputs, dtype)


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_targets_far_below_the_maximum(dtype: torch.dtype) -> None:
    # further than the reference of a row may be: log-probs of some hundreds
    hidden, weight, bias, target, upstream = _inputs(140, 64, 400, dtype, scale=60.0)
    logits = hidden.double() @ weight.double().T
    target[::2] = logits.argmin(1)[::2]
    assert (logits.amax(1) - logits.gather(1, target[:, None])[:, 0]).max() > 200
    _check((hidden, weight, bias, target, upstream), dtype)


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_certain_target_has_an_exact_small_gradient(dtype: torch.dtype) -> None:
    # 1 - p is 1e-6: as a difference of rounded numbers it would be zero
    hidden, weight = torch.zeros(1, 16, dtype=dtype), torch.zeros(200, 16, dtype=dtype)
    hidden[0, 0] = weight[7, 0] = 4.375
    leaves, target = [hidden, weight], torch.tensor([7])
    ours = value_and_gradients(lambda h, w: cpu_kernel.linear_logprob(h, w, target), leaves, torch.ones(1))
    oracle = value_and_gradients(lambda h, w: eager_logprob(h, w, target), leaves, torch.ones(1), torch.float64)
    assert -2e-6 < oracle[0].item() < -5e-7
    for a, b in zip(ours, oracle, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=16 * torch.finfo(dtype).eps, atol=1e-12)


@built
def test_masked_tokens_and_nan() -> None:
    hidden, weight, bias, target, _ = _inputs(20, 24, 150, torch.float32)
    target.clamp_(max=99)
    bias[100:] = -torch.inf
    ours = cpu_kernel.linear_logprob(hidden, weight, target, bias=bias)
    torch.testing.assert_close(ours, eager_logprob(hidden, weight[:100], target, bias=bias[:100]))
    hidden[3, 5] = torch.nan
    ours = cpu_kernel.linear_logprob(hidden, weight, target)
    assert ours.isnan().nonzero().flatten().tolist() == [3]


@built
def test_impossible_target() -> None:
    hidden, weight, bias, target, _ = _inputs(4, 24, 150, torch.float32)
    bias[target[1]] = -torch.inf
    logp = cpu_kernel.linear_logprob(hidden, weight, target, bias=bias)
    assert (logp == -torch.inf).tolist() == (target == target[1]).tolist()


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_contiguous(dtype: torch.dtype) -> None:
    hidden, weight, bias, target, upstream = _inputs(70, 40, 150, dtype)
    spread = (hidden.T.contiguous().T, weight.repeat(1, 2)[:, ::2], bias, target.repeat_interleave(2)[::2], upstream)
    assert not any(x.is_contiguous() for x in (spread[0], spread[1], spread[3]))
    _check(spread, dtype, bias=True)


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("learning", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_what_is_frozen_gets_no_gradient(learning: tuple[int, ...], dtype: torch.dtype) -> None:
    *inputs, target, upstream = _inputs(140, 60, 260, dtype)
    every = value_and_gradients(lambda h, w, b: cpu_kernel.linear_logprob(h, w, target, bias=b), inputs, upstream)
    leaves = [x.clone().requires_grad_(i in learning) for i, x in enumerate(inputs)]
    logp = cpu_kernel.linear_logprob(leaves[0], leaves[1], target, bias=leaves[2])
    logp.backward(upstream)
    assert torch.equal(logp, every[0])
    for i, leaf in enumerate(leaves):
        if i not in learning:
            assert leaf.grad is None
        elif i < 2:
            assert torch.equal(leaf.grad, every[i + 1])
        else:  # a sum of E, which may be kept or recomputed, in one order
            torch.testing.assert_close(leaf.grad, every[i + 1])


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_the_same_on_any_number_of_threads(dtype: torch.dtype) -> None:
    *inputs, target, upstream = _inputs(700, 60, 3000, dtype)
    results = []
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads)
        results.append(
            value_and_gradients(lambda h, w, b: cpu_kernel.linear_logprob(h, w, target, bias=b), inputs, upstream)
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    hidden, weight, _, target, _ = _inputs(300, 60, 700, dtype)
    together = cpu_kernel.linear_logprob(hidden, weight, target)
    for rows in (slice(0, 1), slice(100, 250), slice(299, 300)):
        assert torch.equal(cpu_kernel.linear_logprob(hidden[rows], weight, target[rows]), together[rows])


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_backwards_through_one_graph(dtype: torch.dtype) -> None:
    hidden, weight, bias, target, upstream = _inputs(150, 170, 300, dtype)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    logp = cpu_kernel.linear_logprob(hidden, weight, target, bias=bias)
    first = torch.autograd.grad(logp, leaves, upstream, retain_graph=True)
    before = first[1].clone()
    second = torch.autograd.grad(logp, leaves, upstream)
    assert torch.equal(first[1], before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@built
def test_no_second_derivative() -> None:
    hidden, weight, _, target, _ = _inputs(3, 8, 20, torch.float32)
    hidden.requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(cpu_kernel.linear_logprob(hidden, weight, target).sum(), hidden, create_graph=True)


@built
@pytest.mark.parametrize("bad", [-1, 20, 2**40])
def test_targets_out_of_range(bad: int) -> None:
    hidden, weight, _, target, _ = _inputs(3, 8, 20, torch.float32)
    target[1] = bad
    with pytest.raises(RuntimeError, match=rf"target holds .*{bad}.* outside the vocabulary 0\.\.19"):
        cpu_kernel.linear_logprob(hidden, weight, target)


@built
def test_no_rows() -> None:
    hidden, weight = torch.randn(0, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    logp = cpu_kernel.linear_logprob(hidden, weight, torch.empty(0, dtype=torch.int64))
    logp.sum().backward()
    assert logp.shape == (0,)
    assert weight.grad is not None
    assert not weight.grad.any()


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    # D = 160 holds the 150 rows, padded, so that every byte of the kept E is written and can be compared
    hidden, weight, bias, target, upstream = _inputs(150, 160, 300, dtype)
    ops, problem = torch.ops.stepdpo_kernels, (weight, target, bias, 30.0, 0.5)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    arguments = (leaves[0], leaves[1], target, leaves[2], 30.0, 0.5, True, True, 0, False)
    torch.library.opcheck(ops.linear_logprob_forward.default, arguments)
    _, row, _, kept, extra = ops.linear_logprob_forward(hidden, *problem, True, True, 0, False)
    saved = (upstream, row, kept, extra, hidden, *problem)
    torch.library.opcheck(ops.linear_logprob_backward.default, (*saved, True, True))
    torch.library.opcheck(ops.linear_logprob_backward_.default, (*saved, None, True))
    sums = torch.ones(300, 160)
    torch.library.opcheck(ops.linear_logprob_backward_.default, (*saved, sums, True))
    torch.library.opcheck(ops.linear_logprob_backward_to_sums_.default, (*saved, sums, True, True))
    torch.library.opcheck(ops.linear_logprob_forward_.default, (hidden, *problem, True, kept, extra))


@built
def test_compiles_without_a_graph_break() -> None:
    hidden, weight, _, target, upstream = _inputs(150, 40, 300, torch.float32)

    def function(h: Tensor, w: Tensor) -> Tensor:
        return cpu_kernel.linear_logprob(2 * h, w, target, softcap=9.0)

    plain = value_and_gradients(function, [hidden, weight], upstream)
    compiled = value_and_gradients(
        torch.compile(function, backend="aot_eager", fullgraph=True), [hidden, weight], upstream
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, compiled, strict=True))


_MEASURE = """
import sys, torch
from stepdpo_kernels.ops.linear_logprob import cpu_kernel
torch.set_num_threads(2)
rows, size, vocabulary, extra_bytes = map(int, sys.argv[1:5])
dtype, learns = getattr(torch, sys.argv[5]), sys.argv[6] == "learns"
def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024
def inputs(rows, vocabulary):
    hidden, weight = (torch.randn(n, size).to(dtype) for n in (rows, vocabulary))
    return hidden.requires_grad_(), weight.requires_grad_(learns), torch.randint(vocabulary, (rows,))
def step(hidden, weight, target):
    cpu_kernel.linear_logprob(hidden, weight, target, extra_bytes=extra_bytes).sum().backward()
step(*inputs(64, 2000))  # what libraries set up once
arguments = inputs(rows, vocabulary)
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts here
before = status("VmRSS")
step(*arguments)
print(status("VmHWM") - before)
"""


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("learns", "extra"), [(True, True), (True, False), (False, True)])
def test_resident_memory(learns: bool, extra: bool, dtype: torch.dtype) -> None:
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs /proc/self/clear_refs of Linux")
    rows, size, vocabulary = 1024, 192, 60_000
    limit = 2 * min(rows, 2 * size) * vocabulary if extra else 0
    arguments = [*map(str, (rows, size, vocabulary, limit)), str(dtype)[6:], "learns" if learns else "frozen"]
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, *arguments],
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    allowed = 32 * 2**20 + learns * (vocabulary * size * dtype.itemsize + limit)
    assert allowed < 4 * rows * vocabulary / 1.5
    assert int(run.stdout) < allowed, f"{int(run.stdout) / 2**20:.0f} MiB, allowed {allowed / 2**20:.0f} MiB"


@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("size", [64, 576, 896, 4096])
@pytest.mark.parametrize("rows", [1, 100, 896, 1024, 8192])
def test_what_is_kept_beside_dw(rows: int, size: int, element_bytes: int) -> None:
    vocabulary = 49_152
    extra = cpu_kernel.extra_rows(rows, size, vocabulary, element_bytes)
    padded = -(-rows // cpu_kernel.LANES) * cpu_kernel.LANES
    in_weight = padded if padded <= size else size // cpu_kernel.ROW_BLOCK * cpu_kernel.ROW_BLOCK
    assert extra * vocabulary * element_bytes <= 2 * min(rows, 2 * size) * vocabulary
    assert extra == padded - in_weight or extra % cpu_kernel.ROW_BLOCK == 0
    assert in_weight + extra <= padded
    assert cpu_kernel.extra_rows(rows, size, vocabulary, element_bytes, 0) == 0


def test_the_usual_step_recomputes_nothing() -> None:
    for element_bytes in (2, 4):
        extra = cpu_kernel.extra_rows(1024, 896, 151_936, element_bytes)
        assert extra + 896 == 1024


def _reasons(hidden: Tensor, bias: Tensor | None = None) -> str:
    return "; ".join(cpu_kernel.why_not({"hidden": hidden, "bias": bias}))


def test_why_not() -> None:
    x = torch.randn(4, 4)
    if cpu_kernel._missing is None:
        assert not _reasons(x)
        assert not _reasons(x.bfloat16(), bias=x[0])
    assert "takes float32 and bfloat16, and hidden is torch.float64" in _reasons(x.double())
    assert "bias is torch.float16" in _reasons(x, bias=x[0].half())
    assert "hidden is on meta" in _reasons(x.to("meta"))


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(cpu_kernel, "_missing", "the C++ extension is not built")
    cpu_kernel._log_missing.cache_clear()
    hidden, weight, _, target, _ = _inputs(3, 8, 20, torch.float32)
    with caplog.at_level(logging.INFO, logger="stepdpo_kernels"):
        for _ in range(2):
            torch.testing.assert_close(linear_logprob(hidden, weight, target), eager_logprob(hidden, weight, target))
    assert [r.getMessage() for r in caplog.records if "runs in plain torch" in r.getMessage()] == [
        "linear_logprob on CPUs runs in plain torch: the C++ extension is not built"
    ]
    with pytest.raises(ValueError, match="the C\\+\\+ extension is not built"):
        linear_logprob(hidden, weight, target, impl="cpu")


def test_an_extension_of_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "stepdpo_kernels._C", SimpleNamespace(torch_version="2.0.1"))
    assert "was built with torch 2.0.1" in str(cpu_kernel._load())
    monkeypatch.setitem(sys.modules, "stepdpo_kernels._C", None)
    assert cpu_kernel._load() == "the C++ extension is not built"


@pytest.mark.skipif(os.environ.get("STEPDPO_REQUIRE_EXTENSION") != "1", reason="STEPDPO_REQUIRE_EXTENSION=1 is not set")
def test_the_extension_is_there() -> None:
    assert cpu_kernel._missing is None


@built
def test_auto_takes_it() -> None:
    inputs = {"hidden": torch.randn(3, 8), "weight": torch.randn(20, 8), "bias": None}
    assert _dispatch.choose("linear_logprob", "auto", inputs).name == "cpu"
    wide = {name: x if x is None else x.double() for name, x in inputs.items()}
    assert _dispatch.choose("linear_logprob", "auto", wide).name == "chunked"


@built
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1], ids=hex)
def test_any_nan_stays_nan_when_rounded(bits: int) -> None:
    """Adding half a unit to the bits of some NaN overflows to -0."""
    hidden, weight, _, target, upstream = _inputs(20, 40, 300, torch.bfloat16)
    upstream.view(torch.int32)[3] = bits
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    d_hidden, d_weight = torch.autograd.grad(
        cpu_kernel.linear_logprob(hidden, weight, target), [hidden, weight], upstream
    )
    assert d_weight.isnan().all()
    assert d_hidden[3].isnan().all()
    assert not d_hidden[:3].isnan().any()
