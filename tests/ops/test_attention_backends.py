"""The CUDA backends of tree attention as far as a CPU goes: what they hand to their kernels, and their self-test.

FlashAttention's kernels are replaced by their definition (tests/flash_by_definition.py).
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from stepdpo_kernels import _dispatch
from stepdpo_kernels.ops.tree_attention import api, cpu, flash, leaf_paths, reference, selftest, varlen
from stepdpo_kernels.ops.tree_attention.reference import dense_mask
from stepdpo_kernels.types import TreePlan
from tests.attention import PLANS, described, no_tokens, random_inputs, star
from tests.flash_by_definition import Flash
from tests.numerics import assert_as_good_as_eager, value_and_gradients

NAMES = ["output", "dQ", "dK", "dV", "d sinks"]


def _run(backend: Any, inputs: list[Tensor], upstream: Tensor, plan: TreePlan, **options: Any) -> list[Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, s: Tensor | None = None) -> Tensor:
        output: Tensor = backend.tree_attention(q, k, v, plan, scale=0.7, sinks=s, **options)
        return output

    return value_and_gradients(attend, inputs, upstream)


@pytest.fixture
def torch_flash(monkeypatch: pytest.MonkeyPatch) -> Flash:
    """torch's two operations of FlashAttention, by definition."""
    kernels = Flash()

    def forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale, **window):
        sides = (window.pop("window_size_left"), window.pop("window_size_right"))
        assert (dropout_p, is_causal, return_debug_mask, window) == (0.0, sides == (-1, 0), False, {})
        out, lse = kernels.forward(q, k, v, cu_q, cu_k, max_q, max_k, scale, sides)
        return out, lse, torch.tensor([1, 2]), torch.tensor([3]), torch.empty(0)

    def backward(
        grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, rng, unused, *, scale, **window
    ):
        sides = (window.pop("window_size_left"), window.pop("window_size_right"))
        assert (dropout_p, is_causal, window) == (0.0, sides == (-1, 0), {})
        assert (rng.tolist(), unused.tolist()) == ([1, 2], [3])
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        return kernels.backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, scale, sides)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
    return kernels


def _flash_2(kernels: Flash) -> ModuleType:
    """As much of flash_attn.flash_attn_interface 2.8 as is called."""
    module = ModuleType("flash_attn.flash_attn_interface")

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        assert (dropout_p, causal, alibi_slopes, return_softmax) == (0.0, True, None, False)
        sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        sides = (window_size_left, window_size_right)
        out, lse = kernels.forward(q, k, v, *sequences, softmax_scale, sides, softcap)
        return out, lse, torch.empty(0), torch.tensor([5, 6])

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert (dropout_p, causal, alibi_slopes, deterministic) == (0.0, True, None, True)
        assert rng_state.tolist() == [5, 6]
        sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        sides = (window_size_left, window_size_right)
        gradients = kernels.backward(dout, q, k, v, out, softmax_lse, *sequences, softmax_scale, sides, softcap)
        for into, gradient in zip((dq, dk, dv), gradients, strict=True):
            into.copy_(gradient)
        return torch.empty(0)

    module._flash_attn_varlen_forward = _flash_attn_varlen_forward  # type: ignore[attr-defined]
    module._flash_attn_varlen_backward = _flash_attn_varlen_backward  # type: ignore[attr-defined]
    return module


def _flash_3(kernels: Flash) -> ModuleType:
    """As much of flash_attn_interface as is called."""
    module = ModuleType("flash_attn_interface")

    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None,
        softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1, attention_chunk=0, softcap=0.0,
        num_splits=1, pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        assert causal
        sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        sides = (window_size_left, window_size_right)
        return *kernels.forward(q, k, v, *sequences, softmax_scale, sides, softcap), torch.empty(0), torch.empty(0)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        assert is_causal
        assert deterministic
        sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        sides = (window_size_left, window_size_right)
        gradients = kernels.backward(dout, q, k, v, out, softmax_lse, *sequences, softmax_scale, sides, softcap)
        for into, gradient in zip((dq, dk, dv), gradients, strict=True):
            into.copy_(gradient)
        return torch.empty(0)

    module._flash_attn_forward = _flash_attn_forward  # type: ignore[attr-defined]
    module._flash_attn_backward = _flash_attn_backward  # type: ignore[attr-defined]
    return module


@pytest.fixture(autouse=True)
def _no_packages_remembered() -> Iterator[None]:
    flash._load.cache_clear()
    yield
    flash._load.cache_clear()


def _install(
    monkeypatch: pytest.MonkeyPatch, two: ModuleType | None, three: ModuleType | None, capability: int = 9
) -> None:
    """None in sys.modules is a package that is not there."""
    monkeypatch.setitem(sys.modules, "flash_attn", None if two is None else ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", two)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", three)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    flash._load.cache_clear()


@pytest.fixture(params=["varlen", "flash 2", "flash 3"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Flash]:
    """A backend and what stands for its kernels."""
    if request.param == "varlen":
        return varlen, request.getfixturevalue("torch_flash")
    kernels = Flash()
    _install(monkeypatch, _flash_2(kernels), _flash_3(kernels) if request.param == "flash 3" else None)
    return flash, kernels


@pytest.mark.parametrize("window", [None, 1, 5, 1000])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(
    ("heads", "sizes"), [((4, 2), (8, 8)), ((4, 4), (24, 16)), ((3, 1), (7, 7)), ((4, 2), (5, 16))], ids=str
)
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_flash_attention_along_leaf_paths(
    backend: tuple[Any, Flash],
    plan: TreePlan,
    heads: tuple[int, int],
    sizes: tuple[int, int],
    sinks: bool,
    window: int | None,
) -> None:
    module, kernels = backend
    softcap = 1.5 if module is flash and window in (None, 5) else None
    inputs = random_inputs(plan, heads, sizes, sinks=sinks)
    upstream = torch.randn(plan.num_tokens, heads[0], sizes[1], dtype=torch.float64)
    options = {"sliding_window": window, "softcap": softcap}
    ours = _run(module, inputs, upstream, plan, **options)
    exact = _run(reference, inputs, upstream, plan, **options)
    for name, a, b in zip(NAMES, ours, exact, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
    size = -(-max(sizes) // 8) * 8
    of_call = {
        "window": (-1 if window is None else window - 1, 0),
        "softcap": softcap or 0.0,
        "keys": (plan.keys.index.numel(), heads[1], size),
    }
    assert kernels.calls == [{"forward": True, **of_call}, {"forward": False, **of_call}]


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("sizes", [(64, 64), (24, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_as_good_as_eager(backend: tuple[Any, Flash], dtype: torch.dtype, sizes: tuple[int, int], sinks: bool) -> None:
    plan = PLANS["forest"]
    inputs = random_inputs(plan, sizes=sizes, dtype=dtype, sinks=sinks)
    upstream = torch.randn(plan.num_tokens, 4, sizes[1]).to(dtype)

    def eager(q: Tensor, k: Tensor, v: Tensor, s: Tensor | None = None) -> Tensor:
        q, k, v = q.transpose(0, 1), *(x.repeat_interleave(2, 1).transpose(0, 1) for x in (k, v))
        scores = (q @ k.mT * 0.7).masked_fill(~dense_mask(plan), -torch.inf)
        if s is not None:
            scores = torch.cat([scores, s[:, None, None].expand(-1, scores.shape[1], 1)], dim=2)
        weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        return (weights[:, :, : k.shape[1]] @ v).transpose(0, 1)

    ours = _run(backend[0], inputs, upstream, plan)
    theirs, oracle = (value_and_gradients(eager, inputs, upstream, of) for of in (None, torch.float64))
    for name, a, b, c in zip(NAMES, ours, theirs, oracle, strict=False):
        assert a.dtype == dtype
        assert_as_good_as_eager(name, a, b, c, dtype)


def test_shared_keys_are_summed_in_float32(backend: tuple[Any, Flash]) -> None:
    # 400 leaves pull the root's value the same way: a bfloat16 sum would stand still
    plan = star(400, root=1, tail=1)
    inputs = [torch.zeros(plan.num_tokens, 1, 8, dtype=torch.bfloat16) for _ in range(3)]
    ours = _run(backend[0], inputs, torch.full_like(inputs[0], 0.3), plan)
    expected = (1 + 400 / 2) * torch.tensor(0.3).bfloat16().double()
    torch.testing.assert_close(ours[3][0].double(), expected.expand(1, 8), rtol=2**-8, atol=0)


def test_no_gathered_keys_are_kept(backend: tuple[Any, Flash]) -> None:
    plan = star(200)
    assert plan.keys.index.numel() > 2 * plan.num_tokens
    inputs = [x.requires_grad_() for x in random_inputs(plan, sinks=True)]
    saved: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        backend[0].tree_attention(*inputs[:3], plan, scale=0.3, sinks=inputs[3])
    assert max(x.numel() for x in saved) == plan.num_tokens * 4 * 8
    assert sum(x.numel() for x in saved) <= plan.num_tokens * (4 + 2 + 2 + 4 + 1) * 8


def test_gradients_that_nobody_wants(backend: tuple[Any, Flash]) -> None:
    plan = PLANS["forest"]
    for wanted in ([0], [1], [2], [3], [0, 2]):
        inputs = random_inputs(plan, sinks=True)
        for i in wanted:
            inputs[i].requires_grad_()
        results = []
        for module in (backend[0], reference):
            output = module.tree_attention(*inputs[:3], plan, scale=0.3, sinks=inputs[3])
            results.append(torch.autograd.grad(output.sum(), [inputs[i] for i in wanted]))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_no_tokens(backend: tuple[Any, Flash]) -> None:
    shapes = ((0, 4, 8), (0, 2, 8), (0, 2, 5), (4,))
    inputs = [torch.empty(shape, requires_grad=True) for shape in shapes]
    output = backend[0].tree_attention(*inputs[:3], no_tokens(), scale=1.0, sinks=inputs[3])
    assert output.shape == (0, 4, 5)
    gradients = torch.autograd.grad(output.sum(), inputs)
    assert [g.shape for g in gradients] == [x.shape for x in inputs]
    assert not gradients[3].any()
    assert not backend[1].calls


def test_determinism_of_torch_is_as_it_was(torch_flash: Flash) -> None:
    plan = PLANS["forest"]
    inputs = random_inputs(plan)
    settings: Any = torch.utils.deterministic
    before = settings.fill_uninitialized_memory
    for mode in (0, 1, 2):
        torch.set_deterministic_debug_mode(mode)
        try:
            _run(varlen, inputs, torch.ones_like(inputs[0]), plan)
            assert torch.get_deterministic_debug_mode() == mode
            assert settings.fill_uninitialized_memory is before
        finally:
            torch.set_deterministic_debug_mode(0)


def test_one_thread_at_a_time_sets_determinism() -> None:
    # the second to enter would take the first one's setting for that of before, and put it back after the first
    entered, left = threading.Event(), threading.Event()

    def second() -> None:
        with varlen._deterministic():
            entered.set()
            left.wait(10)

    thread = threading.Thread(target=second)
    before = torch.get_deterministic_debug_mode()
    try:
        with varlen._deterministic():
            thread.start()
            assert not entered.wait(0.2)
        left.set()
        thread.join(10)
        assert entered.is_set()
        assert torch.get_deterministic_debug_mode() == before
    finally:
        left.set()
        thread.join(10)
        torch.set_deterministic_debug_mode(before)


def test_a_logsumexp_of_another_shape_is_not_taken(monkeypatch: pytest.MonkeyPatch, torch_flash: Flash) -> None:
    forward = torch.ops.aten._flash_attention_forward

    def transposed(*args: Any, **options: Any) -> Any:
        out, lse, *rest = forward(*args, **options)
        return out, lse.T, *rest

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", transposed)
    plan = PLANS["forest"]
    with pytest.raises(RuntimeError, match=rf"expected a logsumexp of \(4, {plan.num_tokens}\) \(heads, tokens\)"):
        varlen.tree_attention(*random_inputs(plan), plan, scale=1.0)


# Which package, and why not.


def test_flash_attention_3_on_hopper_and_2_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    two, three = Flash(), Flash()
    plan = PLANS["forest"]
    for capability, sizes, taken in ((9, (64, 64), three), (8, (64, 64), two), (10, (64, 64), two), (9, (256, 8), two)):
        _install(monkeypatch, _flash_2(two), _flash_3(three), capability)
        assert flash.why_not(described(sizes)) == []
        inputs = random_inputs(plan, sizes=sizes)
        _run(flash, inputs, torch.ones(plan.num_tokens, 4, sizes[1], dtype=torch.float64), plan)
        assert [len(kernels.calls) for kernels in (two, three)] == [2 * (kernels is taken) for kernels in (two, three)]
        two.calls.clear()
        three.calls.clear()


def test_flash_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Flash()
    _install(monkeypatch, None, None)
    missing = ["flash_attn_interface is not installed", "flash_attn.flash_attn_interface is not installed"]
    found = flash.why_not(described())
    assert found[0] == missing[0]
    assert re.fullmatch(r"flash_attn(\.flash_attn_interface)? is not installed", found[1])
    _install(monkeypatch, None, _flash_3(kernels), capability=8)
    assert flash.why_not(described())[0] == "flash_attn_interface is for Hopper"
    _install(monkeypatch, None, _flash_3(kernels))
    assert flash.why_not(described()) == []
    assert (
        flash.why_not(described((64, 200)))[0] == "flash_attn_interface has no deterministic backward for heads of 200"
    )
    _install(monkeypatch, _flash_2(kernels), None)
    assert flash.why_not(described((64, 200), softcap=1.0, sinks=object())) == []
    assert flash.why_not(described((64, 257), torch.float32, "cpu")) == [
        "it runs on CUDA, not on cpu",
        "it takes float16 and bfloat16, not torch.float32",
        "heads of at most 256, not 257",
    ]


def test_other_versions_of_flash_attention_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    without = _flash_2(Flash())
    del without._flash_attn_varlen_backward
    _install(monkeypatch, without, None)
    expected = "flash_attn.flash_attn_interface of this version has no _flash_attn_varlen_backward"
    assert flash.why_not(described())[1] == expected

    older = _flash_2(Flash())
    older._flash_attn_varlen_forward = lambda q, k, v, cu_seqlens_q, window_size: None  # type: ignore[attr-defined]
    _install(monkeypatch, older, None)
    assert re.match(
        r"_flash_attn_varlen_forward of this version of flash_attn.flash_attn_interface takes other arguments: .*",
        flash.why_not(described())[1],
    )

    with monkeypatch.context() as patch:
        patch.setattr(flash, "import_module", lambda name: (_ for _ in ()).throw(ImportError("undefined symbol: abc")))
        flash._load.cache_clear()
        assert flash.why_not(described())[1] == (
            "flash_attn.flash_attn_interface cannot be imported: ImportError: undefined symbol: abc"
        )


def test_arguments_of_operations_that_torch_wraps_are_seen() -> None:
    def operation(x: Tensor, left: int) -> Tensor:
        return x.clone()

    wrapped = torch.library.custom_op("stepdpo_tests::operation", operation, mutates_args=())
    assert flash._mismatch(wrapped, ["x", "left"]) is None
    assert "left" in str(flash._mismatch(wrapped, ["x"]))


def test_varlen_says_every_reason() -> None:
    assert varlen.why_not(described((300, 8), torch.float32, "cpu", softcap=1.0)) == [
        "it runs on CUDA, not on cpu",
        "it takes float16 and bfloat16, not torch.float32",
        "heads of at most 256, not 300",
        "it has no softcap",
    ]
    assert varlen.why_not(described((192, 128), sinks=object(), sliding_window=3)) == []
    plan = PLANS["one token"]
    with pytest.raises(
        ValueError, match="'varlen' of tree_attention cannot take these inputs: it runs on CUDA, not on"
    ):
        api.tree_attention(*random_inputs(plan), plan, scale=1.0, impl="varlen")


# The self-test.


@pytest.fixture
def tested_everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(selftest, "UNTESTED", ())
    selftest._fault.cache_clear()
    yield
    selftest._fault.cache_clear()


def _flash_with(monkeypatch: pytest.MonkeyPatch, *faults: str) -> Flash:
    kernels = Flash(faults)
    _install(monkeypatch, _flash_2(kernels), None)
    return kernels


ALL = {"sliding_window": 3, "softcap": 1.0, "sinks": torch.zeros(4, dtype=torch.bfloat16)}


def _faults(dtype: torch.dtype = torch.bfloat16, sizes: tuple[int, int] = (64, 64), **options: Any) -> list[str]:
    query, value = (torch.zeros(3, 4, size, dtype=dtype) for size in sizes)
    return _dispatch._implementations["tree_attention"]["flash"].self_test(
        {"query": query, "key": query, "value": value, **options}
    )


@pytest.mark.parametrize("sizes", [(64, 64), (192, 128), (16, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_is_right_passes(
    monkeypatch: pytest.MonkeyPatch, tested_everywhere: None, dtype: torch.dtype, sizes: tuple[int, int]
) -> None:
    kernels = _flash_with(monkeypatch)
    assert _faults(dtype, sizes, **ALL) == []
    assert len(kernels.calls) == 2 * 4
    assert _faults(dtype, sizes, **ALL) == []
    assert len(kernels.calls) == 2 * 4  # once and for all
    assert _faults(dtype, (32, 32)) == []
    assert len(kernels.calls) == 2 * 5


BROKEN = {
    "top-left": (
        {},
        r"it fails its self-test on cpu in torch\.bfloat16: its \w+ is off by [\d.]+% of the largest value, "
        r"3\.1% are allowed; its causal mask is aligned with the first key \(top-left\), not with the last \(bottom-",
    ),
    "no window": (
        {"sliding_window": 3},
        r"on cpu in torch\.bfloat16 with sliding_window: .* are allowed; it ignores it",
    ),
    "no softcap": ({"softcap": 1.0}, r"with softcap: .* are allowed; it ignores it"),
    "no groups": ({}, r"on cpu in torch\.bfloat16: its \w+ is off by [\d.]+% .* are allowed$"),
    "wrong dK": ({}, r"on cpu in torch\.bfloat16: its dK is off by [\d.]+% .* are allowed$"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_is_broken_is_refused(monkeypatch: pytest.MonkeyPatch, tested_everywhere: None, fault: str) -> None:
    options, message = BROKEN[fault]
    _flash_with(monkeypatch, fault)
    found = _faults(**options)
    assert len(found) >= 1
    assert re.search(message, found[-1])
    if options:
        assert len(found) == 1
        assert _faults() == []  # who does not ask for it can have the rest


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_faults_are_far_above_the_tolerance(
    monkeypatch: pytest.MonkeyPatch, tested_everywhere: None, dtype: torch.dtype, fault: str
) -> None:
    _flash_with(monkeypatch, fault)
    found = _faults(dtype, **BROKEN[fault][0])
    assert float(re.search(r"off by ([\d.]+)%", found[-1])[1]) / 100 > 4 * selftest.TOLERANCE[dtype]  # type: ignore[index]


def test_sinks_that_are_ignored_or_have_another_gradient(
    monkeypatch: pytest.MonkeyPatch, tested_everywhere: None
) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, plan: TreePlan, *, sinks: Tensor | None = None, **options: Any) -> Tensor:
        return cpu.tree_attention(q, k, v, plan, **options) + (0 if sinks is None else 0 * sinks.sum())

    inputs = {"query": torch.zeros(3, 4, 8), "value": torch.zeros(3, 4, 8), "sinks": torch.zeros(4)}
    assert re.search(
        r"in torch\.float32 with sinks: .* are allowed; it ignores it$", selftest.of("flash", run)(inputs)[0]
    )

    def slower(
        q: Tensor, k: Tensor, v: Tensor, plan: TreePlan, *, sinks: Tensor | None = None, **options: Any
    ) -> Tensor:
        sinks = None if sinks is None else sinks.detach() + 0.5 * (sinks - sinks.detach())
        return cpu.tree_attention(q, k, v, plan, sinks=sinks, **options)

    found = selftest.of("flash", slower)(inputs)
    assert re.search(r"with sinks: its gradient of the sinks is off by 50\.0% .* are allowed$", found[0])
    assert len(found) == 1
    selftest.of("flash", flash.tree_attention)


def test_a_backend_that_raises_or_gives_no_numbers(monkeypatch: pytest.MonkeyPatch, tested_everywhere: None) -> None:
    def raises(*args: Any, **options: Any) -> Tensor:
        raise RuntimeError("no kernel image is available for execution on the device")

    def not_a_number(q: Tensor, k: Tensor, v: Tensor, plan: TreePlan, **options: Any) -> Tensor:
        return cpu.tree_attention(q, k, v, plan, **options) * torch.nan

    inputs = {"query": torch.zeros(3, 4, 8), "value": torch.zeros(3, 4, 8)}
    assert selftest.of("flash", raises)(inputs) == [
        "it fails its self-test on cpu in torch.float32: RuntimeError: "
        "no kernel image is available for execution on the device"
    ]
    assert "is off by inf%" in selftest.of("flash", not_a_number)(inputs)[0]
    selftest.of("flash", flash.tree_attention)


def test_too_little_memory_is_not_a_fault(monkeypatch: pytest.MonkeyPatch, tested_everywhere: None) -> None:
    room = False

    def run(*args: Any, **options: Any) -> Tensor:
        if not room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return cpu.tree_attention(*args, **options)

    monkeypatch.setitem(selftest._backends, "flash", run)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            _faults()
    room = True
    assert _faults() == []


def test_a_broken_backend_is_refused_by_name_and_passed_over_by_auto(
    monkeypatch: pytest.MonkeyPatch, tested_everywhere: None
) -> None:
    monkeypatch.setattr(leaf_paths, "why_not", lambda inputs: [])  # as if this were a GPU
    monkeypatch.setattr(varlen, "why_not", lambda inputs: ["not now"])
    implementations = _dispatch._implementations["tree_attention"]
    monkeypatch.delitem(implementations, "varlen")
    plan = PLANS["forest"]
    query, key, value = random_inputs(plan, dtype=torch.bfloat16)
    inputs = {"query": query, "key": key, "value": value, "plan": plan}
    _flash_with(monkeypatch, "top-left")
    with pytest.raises(
        ValueError, match=r"'flash' of tree_attention cannot take .* aligned with the first key \(top-l"
    ):
        api.tree_attention(*list(inputs.values())[:3], plan, scale=1.0, impl="flash")
    assert _dispatch.choose("tree_attention", "auto", inputs).name == "cpu"
    selftest._fault.cache_clear()
    _flash_with(monkeypatch)
    assert _dispatch.choose("tree_attention", "auto", inputs).name == "flash"


def test_the_self_test_runs_wherever_a_model_does(monkeypatch: pytest.MonkeyPatch, tested_everywhere: None) -> None:
    from torch.utils.checkpoint import checkpoint

    kernels = _flash_with(monkeypatch)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert _faults() == []
    selftest._fault.cache_clear()
    with torch.inference_mode():
        assert _faults() == []
    selftest._fault.cache_clear()
    assert len(kernels.calls) == 4

    plan = PLANS["forest"]
    inputs = [x.requires_grad_() for x in random_inputs(plan, dtype=torch.bfloat16)]

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert _faults() == []
        return flash.tree_attention(q, k, v, plan, scale=0.5) * 2

    state = torch.get_rng_state()
    output = checkpoint(block, *inputs, use_reentrant=False)
    gradients = torch.autograd.grad(output.float().sum(), inputs)
    assert torch.equal(torch.get_rng_state(), state)
    plain = torch.autograd.grad((flash.tree_attention(*inputs, plan, scale=0.5) * 2).float().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(gradients, plain, strict=True))


def test_cpus_and_interpreters_are_not_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = _flash_with(monkeypatch, "top-left")
    assert _faults() == []
    assert not kernels.calls


# The README's table.


def _table() -> dict[str, dict[str, str]]:
    text = (Path(api.__file__).parent / "README.md").read_text(encoding="utf-8")
    rows = [re.split(r"\s*\|\s*", line.strip("| \n")) for line in text.splitlines() if line.startswith("|")]
    head = next(row for row in rows if row[:2] == ["backend", "device"])
    start = rows.index(head)
    table = {}
    for row in rows[start + 2 :]:
        if len(row) != len(head):
            break
        table[row[0].strip("`")] = dict(zip(head, row, strict=True))
    return table


def _takes(name: str, device: str, dtype: torch.dtype, sizes: tuple[int, int], **options: Any) -> bool:
    found = _dispatch._implementations["tree_attention"][name].why_not(described(sizes, dtype, device, **options))
    return not found


DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def test_the_table_of_the_readme_is_what_the_backends_take(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, _flash_2(Flash()), _flash_3(Flash()))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    table = _table()
    assert list(table) == _dispatch.implementations("tree_attention")
    for name, row in table.items():
        device = "cpu" if row["device"] == "CPU" else "cuda"
        dtypes = [label for label, dtype in DTYPES.items() if _takes(name, device, dtype, (64, 64))]
        assert row["dtypes"] == ("all" if len(dtypes) == 4 else ", ".join(dtypes)), name
        dtype = DTYPES[dtypes[-1]]
        sizes = [size for size in (8, 16, 256, 257, 4096) if _takes(name, device, dtype, (size, size))]
        label = {(8, 16, 256, 257, 4096): "any", (8, 16, 256): "<= 256", (16, 256, 257, 4096): ">= 16"}[tuple(sizes)]
        assert row["head sizes"] == label, name
        for column, options in (
            ("window", {"sliding_window": 3}),
            ("softcap", {"softcap": 1.0}),
            ("sinks", {"sinks": torch.zeros(2)}),
        ):
            assert row[column] == ("yes" if _takes(name, device, dtype, (64, 64), **options) else "no"), (name, column)
        assert row["unequal heads"] == ("yes" if _takes(name, device, dtype, (192, 128)) else "no"), name
        other = {"cpu": "cuda", "cuda": "cpu"}[device]
        assert (row["device"] == "any") == (_takes(name, other, dtype, (64, 64)) and name != "flex"), name
